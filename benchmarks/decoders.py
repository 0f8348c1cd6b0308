"""Making a decoder small, measured on a mix of texts: writes benchmarks/decoders.md.

    POCKETGLM_DATA=... python benchmarks/decoders.py [--work runs/decoders] [PART ...]

Parts, in order: train, rows, qat, q4_0, tiny, large. All but `large` need `train`, and nothing of
each other. Resumable: each step is a `pocketglm` command whose finished output is reused, and what
was measured is kept in WORK/results. Speeds (tiny, large) want an otherwise idle machine; `large`
takes 6 GB of disk. `--smoke`: models of no use, to see within minutes that all parts run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _decoders_large
import numpy as np
import numpy.typing as npt
import yaml
from _decoders_large import Large
from compression import Kept, Step, effects, read_json_lines, resampled
from encoder import PAIRS, cpu, pocketglm, spread

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import DataOptions, RunOptions, Silent
from pocketglm.eval._evaluate import evaluate
from pocketglm.model.decoder import init_decoder
from pocketglm.model.hf import decoder_spec_of, is_linear, save_decoder
from pocketglm.ops.stored import parameter_counts
from pocketglm.stages._timing import interleave

HERE = Path(__file__).parent
Values = npt.NDArray[np.float64]

# --- what is done --------------------------------------------------------------------------------

# Set, column, and the most rows of validation and test (None: all). Sentences that an assistant
# hears, everyday ones in two languages, and verse lines: a small decoder learns these in an hour.
MIX: Sequence[tuple[str, str, int | None, int | None]] = (
    ("clinc150", "text", 300, 1000),
    ("snips", "tokens", 200, None),
    ("ha_intents_en", "tokens", 100, 400),
    ("ha_intents_zh", "tokens", None, None),
    ("tatoeba_en_zh", "source", 300, 1000),
    ("tatoeba_en_zh", "target", 300, 1000),
    ("tiny_shakespeare", "text", 150, None),
)


@dataclass(frozen=True)
class Scale:
    """How much of everything. `shape`: of the decoder, where it is not the size's. `rows`: of a
    set's split, at most. `further`: of steps that train at the labels; `teaching`: of QAD, at what
    the float model says; `heal`: of the two that make Tiny and its twin; `commands`: of both for
    commands.
    """

    size: str = "autoglm-15m"
    vocabulary: int = 4096
    shape: Mapping[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 384, "num_layers": 6, "num_heads": 6, "num_kv_heads": 2,
            "intermediate_size": 1024,
        }
    )  # fmt: skip
    rows: int | None = None
    training: Sequence[str] = (
        "--epochs", "3", "--batch-size", "4", "--lr", "1.5e-3", "--warmup", "0.05",
        "--weight-decay", "0.1", "--dropout", "0.1", "--patience", "3",
    )  # fmt: skip
    further: Step = field(
        default_factory=lambda: {"epochs": 0.5, "batch_size": 4, "learning_rate": 2e-4}
    )
    teaching: Step = field(
        default_factory=lambda: {
            "preset": None, "alpha": 1.0, "temperature": 1.0, "epochs": 1, "batch_size": 4,
            "learning_rate": 3e-5,
        }
    )  # fmt: skip
    heal: Step = field(
        default_factory=lambda: {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3}
    )
    commands: Sequence[str] = (
        "--epochs", "2", "--batch-size", "32", "--lr", "5e-4", "--dropout", "0.1",
        "--slot-swap", "0.5", "--early-intent", "0.2", "--text-loss", "0.2",
    )  # fmt: skip
    top_k: Sequence[int] = (1, 2, 4, 8, 16, 32)
    large: Large = field(default_factory=Large)


SMOKE = Scale(
    size="autoglm-nano",
    vocabulary=1024,
    shape={},
    rows=60,
    training=("--epochs", "2", "--batch-size", "4", "--lr", "2e-3"),
    further={"epochs": 0.2, "batch_size": 4, "learning_rate": 2e-4},
    teaching={"preset": "qad", "alpha": 1.0, "epochs": 0.2, "batch_size": 4},
    heal={"epochs": 0.2, "batch_size": 4, "learning_rate": 5e-4},
    commands=("--epochs", "0.1", "--batch-size", "16", "--limit", "200"),
    top_k=(2, 8),
    large=_decoders_large.SMOKE,
)
# The table, which is the head too, is INT8 in every row but fp32: the methods differ in the body.
TABLE: Step = {"embeddings": 8}
GROUPS = (32, 128)
PLAIN = "INT4 g32 RTN"
AGAIN = "fp32, trained on"
MUST = {"GPTQ": (35, 50), "QAD": (50, 80)}  # % of what RTN lost: must, goal
MIXED = {"mixed": 1.0, "mixed, 1.1 times the bytes": 1.1}  # of what `PLAIN` has
COMMANDS = "snips"
TOP_K = "attention_top_k"  # in a config.json


def int4(method: str, group: int, **own: Any) -> Step:
    return {method: {"bits": 4, "group_size": group, **TABLE, **own}}


@dataclass(frozen=True)
class Row:
    """reference: the float row that it is compared with. lost: the row of RTN whose loss it should
    win back."""

    steps: Sequence[Step]
    reference: str = "fp32"
    lost: str | None = None


def rtn(group: int) -> str:
    return f"INT4 g{group} RTN"


def post_training() -> dict[str, Row]:
    rows = {"INT8 RTN": Row([{"quantize_rtn": {"bits": 8, **TABLE}}])}
    for group in GROUPS:
        name = f"INT4 g{group}"
        rows[rtn(group)] = Row([int4("quantize_rtn", group)])
        for short in ("GPTQ", "AWQ"):
            method = f"quantize_{short.lower()}"
            rows[f"{name} {short}"] = Row([int4(method, group)], lost=rtn(group))
    return rows


def further(scale: Scale) -> dict[str, Row]:
    """Rows that train on, and RTN of fp32 that did."""
    own = scale.further
    on: Step = {"distill": {"preset": None, "alpha": 0.0, **own}}
    lost = f"{PLAIN}, trained on"
    qat = {"preset": None, "alpha": 0.0, **own}
    return {
        AGAIN: Row([on]),
        lost: Row([on, int4("quantize_rtn", 32)], AGAIN),
        "INT4 g32 QAT": Row([int4("qat", 32, **qat)], AGAIN, lost),
        "INT4 g32 QAD": Row([int4("qat", 32, **scale.teaching)], lost=PLAIN),
    }


def twins(scale: Scale) -> dict[str, Sequence[Step]]:
    """Both learn from what `fp32` says, the same steps."""
    teaching = {"preset": "soft", "temperature": 1.0, **scale.heal}
    return {"dense twin": [{"distill": teaching}], "Tiny": [{"tiny": teaching}]}


def only_top_k(k: int) -> Sequence[Step]:
    """The dense model with top-k attention, and nothing else of Tiny."""
    return [{"tiny": {"share": 1, "unify": False, "top_k": k, "epochs": 0}}]


# --- measuring -----------------------------------------------------------------------------------


class Bench(Kept):
    """The mix, the trained decoder and what is made of it."""

    def __init__(self, work: Path, data: Path, scale: Scale) -> None:
        super().__init__(work)
        self.data, self.scale = data, scale

    @property
    def trained(self) -> Path:
        return self.work / "trained"

    @property
    def mix(self) -> Path:
        """Folder with the splits of the mix, set after set, as lines of JSON."""
        out = self.work / "mix"
        if not out.is_dir():
            half = self.work / "mix.partial"
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            for split in ("train", "validation", "test"):
                texts = [text for part in MIX for text in self.texts(*part, split)]
                lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
                file = half / f"{split}.jsonl"
                file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            half.rename(out)
        return out

    def texts(
        self, name: str, column: str, validation: int | None, test: int | None, split: str
    ) -> list[str]:
        most = {"train": None, "validation": validation, "test": test}[split]
        rows = read_json_lines(self.data / name / f"{split}.jsonl.gz")[:most][: self.scale.rows]
        space = "" if name.endswith("_zh") else " "
        found = [row[column] for row in rows]
        return [text if isinstance(text, str) else space.join(text) for text in found]

    @property
    def task(self) -> list[str]:
        return ["--task", "lm", "--data", str(self.mix)]

    def compress(self, name: str, steps: Sequence[Step], source: Path | None = None) -> Path:
        """Run a plan on the trained decoder, or another one; the checkpoint."""
        folder = name.replace(",", "").replace(" ", "-")
        out, plan = self.work / folder, self.work / f"{folder}.yaml"
        plan.write_text(yaml.safe_dump({"steps": list(steps)}, sort_keys=False))
        arguments = ["--plan", str(plan), *self.task, "--out", str(out)]
        pocketglm("compress", str(source or self.trained), *arguments)
        return out

    def scores(self, ckpt: Path, baseline: Path | None = None) -> dict[str, Any]:
        """By test text: nats, divergence and flips per token, and tokens; and the file's bytes."""
        data, options = DataOptions(self.mix), RunOptions(threads=1)
        scores, _ = evaluate(ckpt, "lm", data, None, options, Silent(), baseline)
        return {
            "bytes": sum(file.stat().st_size for file in ckpt.glob("*.safetensors")),
            "rows": {name: np.nan_to_num(values).tolist() for name, values in scores.rows.items()},
            "notes": list(scores.notes),
            "effects": effects(ckpt),
        }

    def row(self, name: str, row: Row) -> None:
        """Make, score and keep one row."""

        def measure() -> Any:
            other = self.trained
            if row.reference != "fp32":
                other = self.compress(row.reference, further(self.scale)[row.reference].steps)
            return self.scores(self.compress(name, row.steps), other)

        self.once(name, measure)


def initial(bench: Bench) -> tuple[Path, Any]:
    """A decoder with random weights and a tokenizer of the mix, and what `init` says of it."""
    scale, out = bench.scale, bench.work / "init"

    def make() -> Any:
        size = bench.work / "size"
        pocketglm(
            "init", scale.size, "--vocab-size", str(scale.vocabulary), "--dtype", "float32",
            "--tokenizer-data", str(bench.mix), "--out", str(size),
        )  # fmt: skip
        ckpt = Checkpoint.open(size)
        model = init_decoder(replace(decoder_spec_of(ckpt), **scale.shape))
        shutil.rmtree(out, ignore_errors=True)
        save_decoder(model, out, source=ckpt, manifest=ckpt.manifest)
        return {"parameters": sum(p.numel() for p in model.parameters())}

    return out, bench.once("init", make)


def train(bench: Bench) -> None:
    """The decoder from random weights; and whether RTN in INT4 loses enough to be seen."""
    scale = bench.scale
    init, made = initial(bench)
    print(f"{made['parameters']:,} parameters")
    command = ["train", str(init), *bench.task, *scale.training, "--out", str(bench.trained)]
    bench.once("train", lambda: pocketglm(*command))
    bench.once("fp32", lambda: bench.scores(bench.trained))
    for name, row in post_training().items():
        if name.endswith("RTN"):
            bench.row(name, row)
            print(f"{name}: KL {divergence(bench, name).text}")


def rows(bench: Bench) -> None:
    """GPTQ, AWQ, and mixed precision in the bytes of RTN and some more."""
    for name, row in post_training().items():
        bench.row(name, row)
    most = bench.found(PLAIN)["effects"][-1]["bytes_after"]
    for name, times in MIXED.items():
        mixed: Step = {"mixed_precision": {"group_size": 32, "max_bytes": int(times * most)}}
        bench.row(name, Row([mixed], lost=PLAIN))


def qat(bench: Bench) -> None:
    """Trained in INT4, at the labels or by the float model; and in float at the labels."""
    for name, row in further(bench.scale).items():
        bench.row(name, row)


def q4_0(bench: Bench) -> None:
    """The body by llama.cpp's rule, as a float checkpoint; then the table as in the other rows."""

    def measure() -> Any:
        folder, body = bench.work / "q4_0-body", 0
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bench.trained, folder)
        ckpt = Checkpoint.open(bench.trained)
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, info in ckpt.tensors.items():
            arrays[name] = ckpt.read(name)
            if is_linear(name, info.shape):
                arrays[name] = by_q4_0(arrays[name])
                body += arrays[name].size
        safetensors.write_file(folder / "model.safetensors", arrays.items())
        rest: Step = {"quantize_rtn": {"bits": 8, **TABLE, "skip": ["*.layers.*"]}}
        made = bench.compress("q4_0", [rest], folder)
        found = bench.scores(made, bench.trained)
        # Stored as float here; a block of 32 takes 16 bytes and its scale 2.
        return found | {"bytes": found["bytes"] - 4 * body + body // 32 * 18}

    bench.once("Q4_0", measure)


def by_q4_0(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What Q4_0 (llama.cpp, ggml-quants.c) makes of float32 [N, K], K a multiple of 32."""
    blocks = weight.reshape(-1, 32)
    places = np.abs(blocks).argmax(axis=1)[:, None]
    step = np.take_along_axis(blocks, places, 1) / np.float32(-8)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)
    integers = np.minimum(np.trunc(blocks * inverse + np.float32(8.5)), np.float32(15))
    found: npt.NDArray[np.float32] = (integers - 8) * step.astype(np.float16).astype(np.float32)
    return found.reshape(weight.shape)


def tiny(bench: Bench) -> None:
    """Tiny and its dense twin: text, commands, files, speed; then other top-k."""
    exports = {name: _twin(bench, name, steps) for name, steps in twins(bench.scale).items()}
    for form in ("fp32", "INT4"):

        def speed(form: str = form) -> dict[str, list[float]]:
            first, second = (exports[name][form] for name in exports)
            found = interleave(first, second, 128, 2, PAIRS, Silent(), 64)
            return {name: one.medians.tolist() for name, one in zip(exports, found, strict=True)}

        bench.once(f"tiny speed: {form}", speed)
    for k in bench.scale.top_k:

        def dense(k: int = k) -> Any:
            return bench.scores(bench.compress(f"top-k {k}", only_top_k(k)), bench.trained)

        def sparse(k: int = k) -> Any:
            return bench.scores(_with_top_k(bench.work / "Tiny", k), bench.trained)

        bench.once(f"fp32, top-k {k}", dense)
        bench.once(f"Tiny, top-k {k}", sparse)


def _twin(bench: Bench, name: str, steps: Sequence[Step]) -> dict[str, Path]:
    """Make and score one of the two; its exports."""
    ckpt = bench.compress(name, steps)
    bench.once(name, partial(_twin_scores, bench, ckpt))
    bench.once(f"{name}: commands", partial(_commands, bench, ckpt))
    small = bench.compress(f"{name} INT4", [int4("quantize_rtn", 32)], ckpt)
    exports = {"fp32": _export(ckpt), "INT4": _export(small)}
    bench.once(f"{name}: files", lambda: {form: _model_bytes(f) for form, f in exports.items()})
    return exports


def _twin_scores(bench: Bench, ckpt: Path) -> dict[str, Any]:
    return bench.scores(ckpt, bench.trained) | _parameters(ckpt)


def _parameters(ckpt: Path) -> dict[str, Any]:
    opened = Checkpoint.open(ckpt)
    return {
        "parameters": sum(parameter_counts(opened).values()),
        "top_k": opened.config.get(TOP_K),
    }


def _commands(bench: Bench, ckpt: Path) -> dict[str, Any]:
    """Exact match on the test rows, by row, after training for commands."""
    out, data = ckpt.with_name(f"{ckpt.name}-commands"), bench.data / COMMANDS
    task = ["--task", "command", "--data", str(data)]
    pocketglm("train", str(ckpt), *task, *bench.scale.commands, "--out", str(out))
    options = DataOptions(data, limit=bench.scale.rows)
    scores, _ = evaluate(out, "command", options, None, RunOptions(threads=1), Silent(), None)
    return {"rows": {"exact_match": scores.rows["exact_match"].tolist()}}


def _export(ckpt: Path) -> Path:
    out = ckpt.with_name(f"{ckpt.name}-export")
    pocketglm("export", str(ckpt), "--target", "onnx", "--out", str(out))
    return out / "onnx"


def _model_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("model*.onnx*"))


def _with_top_k(ckpt: Path, k: int) -> Path:
    """A copy of Tiny with another k; nothing is trained."""
    out = ckpt.with_name(f"{ckpt.name}-top-{k}")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ckpt, out)
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {TOP_K: k}))
    return out


def large(bench: Bench) -> None:
    """GPTQ of a large random model, killed and whole: memory, time of a layer, the same bytes."""
    _decoders_large.killed(bench, bench.scale.large)
    _decoders_large.whole(bench, bench.scale.large)


PARTS: Mapping[str, Callable[[Bench], None]] = {
    part.__name__: part for part in (train, rows, qat, q4_0, tiny, large)
}


# --- the page ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A value with its 95 % interval, by bootstrap over the test texts."""

    value: float
    low: float
    high: float
    digits: int = 4

    @classmethod
    def of(cls, value: float, drawn: Values, digits: int = 4) -> Found:
        low, high = np.percentile(drawn, [2.5, 97.5])
        return cls(value, float(low), float(high), digits)

    @property
    def text(self) -> str:
        value, low, high = (f"{v:.{self.digits}f}" for v in (self.value, self.low, self.high))
        return f"{value} ({low}..{high})"

    @property
    def times(self) -> float:
        """How many times the interval's half the value is."""
        return 2 * self.value / max(self.high - self.low, 1e-12)


def sums(bench: Bench, name: str, what: str = "nll") -> tuple[Values, Values]:
    """Of each test text, summed over its tokens, and how many these are."""
    kept = bench.found(name)["rows"]
    tokens = np.array(kept["tokens"])
    return np.array(kept[what]) * tokens, tokens


def per_token(values: Values, tokens: Values) -> tuple[float, Values]:
    """Over all texts, and over each of the resamples."""
    drawn = resampled(len(tokens))
    return float(values.sum() / tokens.sum()), values[drawn].sum(1) / tokens[drawn].sum(1)


def difference(bench: Bench, name: str, reference: str) -> Found:
    """Nats per token more than the reference has."""
    (own, tokens), (other, _) = sums(bench, name), sums(bench, reference)
    return Found.of(*per_token(own - other, tokens))


def divergence(bench: Bench, name: str) -> Found:
    """KL(reference || name), nats per token."""
    return Found.of(*per_token(*sums(bench, name, "kl")), digits=5)


def won_back(bench: Bench, name: str, row: Row) -> Found:
    """Percent of the divergence of RTN."""
    assert row.lost is not None
    lost, drawn_lost = per_token(*sums(bench, row.lost, "kl"))
    left, drawn_left = per_token(*sums(bench, name, "kl"))
    return Found.of(100 * (1 - left / lost), 100 * (1 - drawn_left / drawn_lost), digits=0)


def all_rows(bench: Bench) -> dict[str, Row]:
    return {
        "fp32": Row([]),
        **post_training(),
        **{name: Row([], lost=PLAIN) for name in MIXED},
        "Q4_0": Row([], lost=PLAIN),
        **further(bench.scale),
    }


def rows_lines(bench: Bench) -> list[str]:
    lines = [
        "| model | MB | perplexity | nats/token more | KL | other likeliest token % | "
        "of RTN's KL, won back % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in all_rows(bench).items():
        kept = bench.found(name)
        if kept is None or bench.found(row.reference) is None:
            lines.append(f"| {name} | not measured | | | | | |")
            continue
        cells = [f"{kept['bytes'] / 1e6:.2f}", f"{np.exp(per_token(*sums(bench, name))[0]):.2f}"]
        if name == "fp32":
            cells += ["", "", ""]
        else:
            flips = per_token(*sums(bench, name, "flip_rate"))[0]
            cells += [
                difference(bench, name, row.reference).text,
                divergence(bench, name).text,
                f"{100 * flips:.1f}",
            ]
        known = row.lost is not None and bench.found(row.lost) is not None
        cells.append(won_back(bench, name, row).text if known else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def seen_lines(bench: Bench) -> list[str]:
    """Whether there is a loss to win back."""
    lines = []
    for group in GROUPS:
        nats, lost = difference(bench, rtn(group), "fp32"), divergence(bench, rtn(group))
        lines.append(
            f"RTN in INT4 by groups of {group}: KL to fp32 {lost.text}, {lost.times / 2:.0f} times "
            f"its interval; {nats.text} nats/token more, {nats.times / 2:.1f} times its interval."
        )
    return lines


def tiny_lines(bench: Bench) -> list[str]:
    lines = [
        "| model | parameters | MB fp32 / INT4 | a new token, ms fp32 / INT4 | times faster | "
        "perplexity | exact match % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    speeds = {form: bench.found(f"tiny speed: {form}") for form in ("fp32", "INT4")}
    for name in twins(bench.scale):
        kept, right, files = (bench.found(f"{name}{k}") for k in ("", ": commands", ": files"))
        if None in (kept, right, files):
            lines.append(f"| {name} | not measured | | | | | |")
            continue
        times, faster = ["not measured"] * 2, [""] * 2
        if all(speeds.values()):
            own = [np.array(found[name]) for found in speeds.values()]
            base = [np.array(found["dense twin"]) for found in speeds.values()]
            times = [spread(values) for values in own]
            faster = [spread(b / o) for b, o in zip(base, own, strict=True)]
        matches = np.array(right["rows"]["exact_match"])
        exact = Found.of(
            100 * matches.mean(), 100 * matches[resampled(len(matches))].mean(1), digits=1
        )
        lines.append(
            f"| {name} | {kept['parameters'] / 1e6:.2f} M | "
            f"{' / '.join(f'{files[form] / 1e6:.1f}' for form in speeds)} | {' / '.join(times)} | "
            f"{' / '.join(faster)} | {np.exp(per_token(*sums(bench, name))[0]):.2f} | "
            f"{exact.text} |"
        )
    return lines


def top_k_lines(bench: Bench) -> list[str]:
    names = ("fp32", "Tiny")
    lines = ["| k | " + " | ".join(f"{n}: perplexity" for n in names) + " |", "| --- | --- | --- |"]
    for k in bench.scale.top_k:
        keys = [f"{name}, top-k {k}" for name in names]
        cells = [
            f"{np.exp(per_token(*sums(bench, key))[0]):.2f}" if bench.found(key) else "not measured"
            for key in keys
        ]
        lines.append(f"| {k} | {' | '.join(cells)} |")
    return lines


PAGE = """\
# Making a decoder small

Command: `POCKETGLM_DATA=... python benchmarks/decoders.py` (resumable). {today}; {versions};
{minutes:.0f} CPU minutes.

One GLM decoder: `pocketglm init {size} --vocab-size {vocabulary}`, its shape {shape}
({parameters:.1f} M parameters), then `pocketglm train --task lm {training}`, from random weights,
on {mix}: {tokens}.
Intervals: 95 %, bootstrap over the test texts, paired. {notes}.

{seen}

## INT4 that keeps its quality

Weights alone are quantized, inputs stay float. The token table, which is the head too, is INT8 by
row in every row but fp32 and `mixed`, which has the bytes of {plain} and puts them where it likes.
`Q4_0` is llama.cpp's own rule for the body; its bytes are counted, not written. Calibration: 8,192
tokens of training rows.

What RTN lost is its KL to the float model: what was quantized says something else, and by how much
is measured well. In nats of the labels the loss is within its interval at both group sizes: there
is none to win back, and no row is judged by it.

`{again}`: {further} more, at the labels; `QAT` learns the same steps at the labels, in INT4, and
its nats and KL are against `{again}`: two trainings of the same steps end apart, by more than
rounding. `QAD` learns from fp32 alone ({teaching}; of the rates 3e-4, 1e-4 and 3e-5 the best on
the validation texts after a quarter of an epoch, not by this command); float weights that did so
would stay what they are, so that its KL is to fp32 itself.

{rows}

Must: {must}.

## Tiny against its dense twin

The default of `tiny`, from `fp32`, which also teaches it; the twin is `fp32` that learned the same
steps from the same teacher ({heal}). A new token: behind a prompt of 128, ONNX, 2 threads, {pairs}
alternating rounds. Exact match: intent and all slots, both then trained on {commands_data} alike
(`{commands}`). INT4: RTN by groups of 32, table INT8.

{tiny}

Top-k at several k, nothing trained for it: `fp32` with no other change, and Tiny as healed with its
own k; windows of 512 tokens.

{top_k}

## GPTQ of a large model

Random weights in bf16, {large_tokens:,} tokens to calibrate with. {large_lines}
"""


def settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in settings.items() if value is not None)


def page(bench: Bench) -> str:
    scale, made = bench.scale, bench.found("init")
    return PAGE.format(
        today=f"{datetime.date.today()}, {cpu()}, {os.cpu_count()} cores",
        versions=f"torch {version('torch')}",
        minutes=bench.cpu_minutes(),
        size=scale.size,
        vocabulary=scale.vocabulary,
        shape=settings_text(scale.shape) or "as it is",
        parameters=made["parameters"] / 1e6,
        training=" ".join(scale.training),
        mix=", ".join(f"{name} (`{column}`)" for name, column, *_ in MIX),
        tokens=", ".join(
            f"{sum(len(bench.texts(*part, split)) for part in MIX):,} {split} texts"
            for split in ("train", "validation", "test")
        ),
        notes="; ".join(bench.found("fp32")["notes"]),
        seen="\n".join(seen_lines(bench)),
        plain=PLAIN,
        again=AGAIN,
        further=settings_text(scale.further),
        teaching=settings_text(scale.teaching),
        rows="\n".join(rows_lines(bench)),
        heal=settings_text(scale.heal),
        pairs=PAIRS,
        commands_data=COMMANDS,
        commands=" ".join(scale.commands),
        tiny="\n".join(tiny_lines(bench)),
        top_k="\n".join(top_k_lines(bench)),
        large_tokens=scale.large.tokens,
        large_lines="\n".join(_decoders_large.lines(bench, scale.large)),
        must="; ".join(
            f"{name} {least} % or more, goal {goal}" for name, (least, goal) in MUST.items()
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "decoders")
    parser.add_argument("--smoke", action="store_true", help="very small; the page goes to WORK")
    arguments = parser.parse_args()
    data = Path(os.environ.get("POCKETGLM_DATA", ""))
    if not all((data / name).is_dir() for name, *_ in MIX):
        sys.exit(f"set POCKETGLM_DATA to the folder that holds {', '.join(n for n, *_ in MIX)}")
    bench = Bench(arguments.work, data, SMOKE if arguments.smoke else Scale())
    for part in arguments.parts or PARTS:
        PARTS[part](bench)
    out = (arguments.work if arguments.smoke else HERE) / "decoders.md"
    if all(bench.found(name) for name in ("fp32", *(f"INT4 g{g} RTN" for g in GROUPS))):
        out.write_text(page(bench), encoding="utf-8")
        print(out)


if __name__ == "__main__":
    main()
