"""`bench`: latency, throughput, load time and peak memory of one model, in a fresh process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pocketglm.artifacts.checkpoint import Checkpoint, model_folder
from pocketglm.artifacts.export import is_export, read_export
from pocketglm.artifacts.schemas import BenchResult
from pocketglm.contracts import Reporter, Silent
from pocketglm.errors import UsageError
from pocketglm.model.hf import is_decoder
from pocketglm.runtimes import runtime_of
from pocketglm.stages import _device
from pocketglm.stages._measure import Worker

_SLICE = 1.0  # seconds of sustained load between two progress reports
Kind = Literal["encoder", "decoder"]
Times = tuple[list[float], list[float]]  # of calls, or a decoder's prompts; of its steps


@dataclass(frozen=True, slots=True)
class _Defaults:
    """slice: calls between two progress reports."""

    tokens: int
    new_tokens: int
    runs: int
    warmup: int
    slice: int


_DEFAULTS: dict[Kind, _Defaults] = {
    "encoder": _Defaults(tokens=32, new_tokens=0, runs=200, warmup=10, slice=25),
    "decoder": _Defaults(tokens=128, new_tokens=64, runs=5, warmup=1, slice=1),
}


def bench(
    path: Path,
    *,
    batch: int = 1,
    tokens: int | None = None,
    new_tokens: int | None = None,
    threads: int | None = None,
    runs: int | None = None,
    warmup: int | None = None,
    duration: float | None = None,
    runtime: str | None = None,
    reporter: Reporter | None = None,
) -> BenchResult:
    """Measure a checkpoint or an export on random ids.

    An encoder: `runs` (200) calls of [batch, tokens (32)]. A decoder: `runs` (5) texts, each a
    prompt of `tokens` (128) and `new_tokens` (64) steps behind it. With `duration` (seconds) the
    load is sustained instead of `runs` calls, and the result also tells the p50 of the first and
    the last third: a device that heats up gets slower. runtime: another one that reads the files.

    Raises:
        UsageError: a number that is not positive, no such folder, or an option of the other kind
            of model.
        InputError: the folder cannot be opened, or takes fewer tokens.
        WorkError: the measuring process died.
    """
    reporter = reporter or Silent()
    _check_positive(batch=batch, tokens=tokens, new_tokens=new_tokens, runs=runs, duration=duration)
    folder = model_folder(path)
    kind, size = _kind_and_bytes(folder)
    if kind == "decoder" and batch > 1:
        raise UsageError(f"--batch {batch}: a decoder writes one text at a time", "use --batch 1")
    if kind == "encoder" and new_tokens:
        raise UsageError(f"--new-tokens: {path} is an encoder, it writes none", "leave it out")
    defaults = _DEFAULTS[kind]
    tokens = tokens or defaults.tokens
    new_tokens = new_tokens or defaults.new_tokens
    with Worker(folder, batch, tokens, threads, new_tokens, runtime) as worker:
        worker.run(defaults.warmup if warmup is None else warmup)
        if duration is None:
            calls, steps = _by_count(worker, runs or defaults.runs, defaults.slice, reporter)
        else:
            calls, steps = _by_time(worker, duration, reporter)
        peak = worker.close()
    values = np.asarray(steps if kind == "decoder" else calls)
    third = max(len(values) // 3, 1)
    prefill = float(np.median(calls)) if kind == "decoder" else None
    return BenchResult(
        path=str(path),
        runtime=worker.runtime,
        threads=worker.used_threads,
        batch=batch,
        tokens=tokens,
        runs=len(calls),
        p50_ms=float(np.percentile(values, 50)),
        p99_ms=float(np.percentile(values, 99)),
        mean_ms=float(values.mean()),
        per_second=batch * 1e3 / float(values.mean()),
        load_ms=worker.load_ms,
        peak_rss_bytes=peak,
        size_bytes=size,
        device=_device.describe(),
        kind=kind,
        new_tokens=new_tokens or None,
        prefill_ms=prefill,
        prefill_per_second=tokens * 1e3 / prefill if prefill else None,
        first_third_p50_ms=float(np.median(values[:third])) if duration else None,
        last_third_p50_ms=float(np.median(values[-third:])) if duration else None,
        extra_memory=runtime_of(path, runtime).extra_memory,
    )


def _check_positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and value <= 0:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} must be positive, got {value}", "give a larger number")


def _kind_and_bytes(folder: Path) -> tuple[Kind, int]:
    if is_export(folder):
        return read_export(folder).kind, export_bytes(folder)
    ckpt = Checkpoint.open(folder)
    return "decoder" if is_decoder(ckpt) else "encoder", ckpt.nbytes


def export_bytes(folder: Path) -> int:
    """Bytes of all files of an export, `export.json` not counted."""
    return sum(entry.bytes for entry in read_export(folder).files.values())


def _by_count(worker: Worker, runs: int, at_once: int, reporter: Reporter) -> Times:
    calls: list[float] = []
    steps: list[float] = []
    while len(calls) < runs:
        _add(worker.texts(min(at_once, runs - len(calls))), calls, steps)
        reporter.progress("bench", len(calls), runs, _note(calls, steps))
    return calls, steps


def _by_time(worker: Worker, duration: float, reporter: Reporter) -> Times:
    calls: list[float] = []
    steps: list[float] = []
    left, total = duration, max(round(duration), 1)
    while left > 0:
        _add(worker.texts(1, min(_SLICE, left)), calls, steps)
        left -= _SLICE
        done = min(round(duration - max(left, 0)), total)
        reporter.progress("sustained load", done, total, _note(calls, steps))
    return calls, steps


def _add(more: Times, calls: list[float], steps: list[float]) -> None:
    calls += more[0]
    steps += more[1]


def _note(calls: list[float], steps: list[float]) -> str:
    return f"p50 {np.median(steps or calls):.2f} ms"
