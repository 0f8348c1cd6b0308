"""Parts of decoders.py: GPTQ of a random decoder of 1.1 B. Memory, time by layer, and `kill -9`.

A run is a `pocketglm` command with a step cache of its own. Its peak memory is the kernel's own
(VmHWM); its layers are timed by when the files appear that a killed run goes on with.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from encoder import pocketglm

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.model.hf import model_spec_of
from pocketglm.stages._block_step import block_parameters

POLL = 0.1  # seconds
_SAID = re.compile(r"holds up to ([\d.]+) ([MG])B")
_KIB = re.compile(r"^(VmHWM|VmRSS):\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True)
class Large:
    """kill_after: finished layers. room: what the issue allows, times the largest block in float32
    and one embedding."""

    size: str = "autoglm-base"
    tokens: int = 2048
    group: int = 32
    kill_after: int = 10
    room: float = 2.5

    @property
    def settings(self) -> list[str]:
        own = {"bits": 4, "group_size": self.group, "embeddings": 8, "tokens": self.tokens}
        return [part for key, value in own.items() for part in ("--set", f"{key}={value}")]


SMOKE = Large("autoglm-nano", tokens=1024, kill_after=2)


class Bench(Protocol):
    """What decoders.py brings. task: of texts to calibrate with."""

    work: Path

    @property
    def task(self) -> list[str]: ...
    def once(self, key: str, measure: Callable[[], Any]) -> Any: ...
    def found(self, key: str) -> Any: ...


@dataclass
class Run:
    """A watched process. code: -9 where it was killed. finished: layers that a later run need not
    do again. marks: when a layer's file was last written, in seconds. Memory in bytes: `before` is
    what it held when it said what it will need (`said`).
    """

    code: int = 0
    seconds: float = 0.0
    peak: int = 0
    before: int = 0
    said: int = 0
    finished: int = 0
    marks: dict[int, float] = field(default_factory=dict)


def watched(command: Sequence[str], cache: Path, log: Path, kill_after: int | None = None) -> Run:
    """Run it to its end, or until `kill_after` layers are done; then it is killed (SIGKILL)."""
    run, began = Run(), time.monotonic()
    environment = os.environ | {"POCKETGLM_CACHE": str(cache)}
    with log.open("wb") as words:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=words)
        while child.poll() is None:
            run.marks |= layer_marks(cache)
            run.finished = max(run.finished, finished_layers(cache))
            held = memory(child.pid)
            run.peak = max(run.peak, held.get("VmHWM", 0))
            if not run.said:
                run.said = said_bytes(log.read_text(errors="replace"))
                run.before = held.get("VmRSS", 0)
            if kill_after is not None and run.finished >= kill_after:
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(POLL)
    run.code, run.seconds = child.returncode, time.monotonic() - began
    return run


def layer_marks(cache: Path) -> dict[int, float]:
    """By layer, when its finished file was written; a file may vanish meanwhile."""
    found = {}
    for file in cache.glob("*/work/block-*.safetensors"):
        try:
            found[int(file.stem.removeprefix("block-"))] = file.stat().st_mtime
        except FileNotFoundError:
            continue
    return found


def finished_layers(cache: Path) -> int:
    """A layer is finished when the next one's inputs are written."""
    found = cache.glob("*/work/hidden-*.safetensors")
    return max((int(file.stem.removeprefix("hidden-")) for file in found), default=0)


def memory(pid: int) -> dict[str, int]:
    """Resident bytes of a process, and their maximum; nothing if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: 1024 * int(count) for name, count in _KIB.findall(text)}


def said_bytes(log: str) -> int:
    """What the step said that it will hold; 0: it has not said so yet."""
    found = _SAID.search(log)
    return round(float(found[1]) * {"M": 1e6, "G": 1e9}[found[2]]) if found else 0


def layer_seconds(marks: Mapping[int, float], first: int) -> list[float]:
    """From each layer's file to the next one's, from layer `first` on."""
    return [marks[n + 1] - marks[n] for n in sorted(marks) if n >= first and n + 1 in marks]


def redone(before: Mapping[int, float], after: Mapping[int, float], finished: int) -> list[int]:
    """Of the first `finished` layers those that were written again."""
    return [layer for layer in range(finished) if after.get(layer) != before.get(layer)]


def file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- the parts -----------------------------------------------------------------------------------


def _source(bench: Bench, large: Large) -> Path:
    """Random weights in bf16; every byte is a token."""
    out = bench.work / "large" / "random"
    pocketglm("init", large.size, "--out", str(out))
    return out


def _fresh(bench: Bench, name: str) -> tuple[Path, Path, Path]:
    """Paths of output, step cache and log, of which nothing is there."""
    folder = bench.work / "large"
    paths = folder / name, folder / f"{name}-cache", folder / f"{name}.log"
    for path in paths[:2]:
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(paths[0].with_name(f"{name}.partial"), ignore_errors=True)
    return paths


def _command(bench: Bench, large: Large, source: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "pocketglm", "compress", str(source), "--method", "quantize_gptq",
        *large.settings, *bench.task, "--out", str(out), "--json",
    ]  # fmt: skip


def _sizes(source: Path, large: Large) -> dict[str, float]:
    ckpt = Checkpoint.open(source)
    spec = model_spec_of(ckpt)
    block = 4 * max(block_parameters(ckpt, index) for index in range(spec.num_layers))
    table = 4 * spec.vocab_size * spec.hidden_size
    return {
        "layers": spec.num_layers,
        "block": block,
        "embedding": table,
        "room": large.room * (block + table),
    }


def killed(bench: Bench, large: Large) -> None:
    """GPTQ is killed, and goes on; time by layer and memory of the run that ends."""

    def measure() -> Any:
        source = _source(bench, large)
        out, cache, log = _fresh(bench, "killed")
        command = _command(bench, large, source, out)
        first = watched(command, cache, log, large.kill_after)
        again = watched(command, cache, log.with_name("resumed.log"))
        if (first.code, again.code) != (-signal.SIGKILL, 0):
            sys.exit(f"ended with {first.code} and {again.code}; see {log.parent}")
        return {
            **_sizes(source, large),
            "done": first.finished,
            "redone": redone(first.marks, again.marks, first.finished),
            "layer_seconds": layer_seconds(again.marks, first.finished),
            "seconds": [first.seconds, again.seconds],
            "peak": max(first.peak, again.peak),
            "before": again.before,
            "said": again.said,
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
            "digest": file_digest(out / "model.safetensors"),
        }

    bench.once("large", measure)


def whole(bench: Bench, large: Large) -> None:
    """The same without a kill: is the file the same?"""

    def measure() -> Any:
        source = _source(bench, large)
        out, cache, log = _fresh(bench, "whole")
        run = watched(_command(bench, large, source, out), cache, log)
        if run.code:
            sys.exit(f"ended with {run.code}; see {log}")
        return {
            "digest": file_digest(out / "model.safetensors"),
            "peak": run.peak,
            "seconds": run.seconds,
        }

    bench.once("large, whole", measure)


def lines(bench: Bench, large: Large) -> list[str]:
    """For the page."""
    found = bench.found("large")
    if found is None:
        return ["Not measured."]
    times, other = found["layer_seconds"], bench.found("large, whole")
    same = "not measured"
    if other is not None:
        same = "yes" if other["digest"] == found["digest"] else "**no**"
    # What the process holds before is the program; the rest is what the step was allowed.
    own, unit = found["peak"] - found["before"], found["block"] + found["embedding"]
    layers, done = found["layers"], found["done"]
    lost = f"layers {found['redone']} again" if found["redone"] else "none of them again"
    return [
        f"`init {large.size}`, then `compress --method quantize_gptq {' '.join(large.settings)}`; "
        f"OMP_NUM_THREADS={found['threads'] or 'unset'}.",
        "",
        "| seconds a layer, median (range) | layers timed | peak RSS MB | of it before the step | "
        f"said beforehand | {large.room}x (largest block in float32 + embedding) |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f}) | {len(times)} of "
        f"{layers} | {found['peak'] / 1e6:.0f} | {found['before'] / 1e6:.0f} | "
        f"{found['said'] / 1e6:.0f} | {found['room'] / 1e6:.0f} |",
        "",
        f"The step itself took {own / 1e6:.0f} MB, {own / unit:.2f} times the largest block in "
        f"float32 ({found['block'] / 1e6:.0f} MB) and the embedding "
        f"({found['embedding'] / 1e6:.0f} MB). Killed with SIGKILL after {done} layers and started "
        f"again, it computed {lost}. The file is that of a run without a kill, byte for byte: "
        f"{same}.",
    ]
