"""The demo's decoder: spoken requests to a phone agent's actions, in INT4, next to its fp32 model.

A new `autoglm-nano` learns the embedded commands, English and Chinese together. Its exact match on
phrasings that training never saw stands beside that of the nearest training command.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from pocketglm.artifacts.export import read_export
from pocketglm.artifacts.schemas import DemoCommands
from pocketglm.cli._common import percent, table
from pocketglm.contracts import DataOptions, Metric, Reporter, RunOptions
from pocketglm.data.frames import action, read_frames
from pocketglm.eval._evaluate import evaluate
from pocketglm.eval._nearest import nearest_frames
from pocketglm.eval.command import command_scores, parse, read_grammar
from pocketglm.runtimes import open_decoder
from pocketglm.stages._sides import model_bytes
from pocketglm.stages.bench import bench
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.init import init
from pocketglm.stages.plan import Plan
from pocketglm.text.frame import FrameTokens
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train.finetune import FinetuneConfig, finetune

SIZE = "autoglm-nano"
DATA = DataOptions(Path("commands"))
# None of them is a training row.
REQUESTS = (
    "please wake me up at half past six",
    "text Anna that I am running late",
    "how is the weather in Berlin tomorrow",
    "请打开蓝牙",
    "明天上海天气怎么样",
)
# The recipe of plans/int4-decoder.yaml.
INT4 = {"bits": 4, "group_size": 32, "embeddings": 8, "head": 8, "activation": "dynamic_block"}
# Chosen on the validation rows.
TRAINING: dict[str, Any] = {
    "epochs": 60, "patience": 60, "batch_size": 32, "learning_rate": 2e-3, "dropout": 0.1,
    "slot_swap": 0.5, "weight_decay": 0.1,
}  # fmt: skip
THREADS = 2
CPU_SECONDS = 140  # of the training loop; reading and validating come on top
METRICS = {
    "exact_match": "exact match, %",
    "intent_accuracy": "intent, %",
    "slot_f1": "slot F1, %",
}


def commands(
    out: Path,
    minutes: float,
    threads: int | None,
    seed: int,
    force: bool,
    reporter: Reporter,
) -> DemoCommands:
    """What a user would type: init, train, compress, export, eval, bench and run.

    minutes: of training at most; it also takes no more than `CPU_SECONDS`.
    """
    base, trained = out / "base", out / "checkpoint"
    init(
        SIZE, base, seed=seed, dtype="float32", tokenizer_data=DATA.path, force=force,
        reporter=reporter,
    )  # fmt: skip
    began = time.process_time()
    with _at_most(THREADS) as used:
        config = FinetuneConfig(
            task="command",
            data=DATA.path,
            minutes=min(minutes, CPU_SECONDS / used / 60),
            seed=seed,
            **TRAINING,
        )
        finetune(base, config, trained, force=force, reporter=reporter)
    cpu_seconds = time.process_time() - began
    plan = Plan.single("quantize_rtn", INT4)
    compress(trained, plan, out / "quantized", force=force, reporter=reporter)
    export(trained, ["onnx"], out / "fp32", force=force, reporter=reporter)
    export(out / "quantized", ["onnx"], out / "int4", force=force, reporter=reporter)
    folders = {name: out / name / "onnx" for name in ("fp32", "int4")}
    return DemoCommands(
        rows=_compare(folders, threads, reporter),
        actions=_actions(folders["int4"], threads),
        training_cpu_seconds=cpu_seconds,
    )


@contextmanager
def _at_most(threads: int) -> Iterator[int]:
    """PyTorch with so many threads; gives how many there are. A small model gains little by more,
    and would use up its seconds of CPU the faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _compare(
    folders: dict[str, Path], threads: int | None, reporter: Reporter
) -> list[dict[str, Any]]:
    """Rows of the table: accuracy on the test rows, file size, speed."""
    reporter.say("the nearest training command, as a baseline")
    test = read_frames(DATA, "test")
    near = nearest_frames(read_frames(DATA, "train"), [row.text for row in test])
    found = {"nearest": command_scores(test, near).metrics}
    options = RunOptions(threads=threads)
    for name, folder in folders.items():
        reporter.say(f"scoring {name}")
        scores, _ = evaluate(folder, "command", DATA, options=options, reporter=reporter)
        found[name] = scores.metrics
    rows: list[dict[str, Any]] = [
        {"measure": words, **{name: _metric(m.get(key)) for name, m in found.items()}}
        for key, words in METRICS.items()
    ]
    sizes = {name: model_bytes(read_export(folder)) / 1e6 for name, folder in folders.items()}
    rows.append({"measure": "model file, MB", "nearest": None, **sizes})
    speeds = {
        name: bench(folder, tokens=16, new_tokens=48, threads=threads).per_second
        for name, folder in folders.items()
    }
    rows.append({"measure": "new tokens per second", "nearest": None, **speeds})
    return rows


def _metric(metric: Metric | None) -> dict[str, float] | None:
    """None: there was nothing to count, such as slots that were found."""
    if metric is None:
        return None
    return {"value": metric.value, "n": metric.n, "low": metric.low, "high": metric.high}


def _actions(folder: Path, threads: int | None) -> list[dict[str, Any]]:
    tokens = FrameTokens(read_grammar(folder), Tokenizer.load(folder))
    answers = []
    with closing(open_decoder(folder, RunOptions(threads=threads))) as session:
        for text in REQUESTS:
            start = time.perf_counter()
            frame = parse(session, tokens, text)
            milliseconds = 1e3 * (time.perf_counter() - start)
            answers.append(
                {
                    "text": text,
                    "intent": frame.intent,
                    "slots": [{"name": name, "value": value} for name, value in frame.slots],
                    "action": action(frame.intent, frame.slots),
                    "milliseconds": milliseconds,
                }
            )
    return answers


def show(result: DemoCommands) -> None:
    """The table, and the actions."""
    sides = ("nearest", "fp32", "int4")
    rows = [[row["measure"], *(_cell(row[side]) for side in sides)] for row in result.rows]
    (n,) = {row["int4"]["n"] for row in result.rows if row["measure"] == METRICS["exact_match"]}
    table(
        f"{SIZE}, English and Chinese commands: {n} unseen phrasings, 95 % intervals",
        ["", "nearest command", "fp32", "INT4"],
        rows,
    )
    answers = [[a["text"], a["action"], f"{a['milliseconds']:.1f} ms"] for a in result.actions]
    table("Five requests, parsed by the INT4 file", ["request", "action", ""], answers)
    print(f"{SIZE} trained for {result.training_cpu_seconds:.0f} CPU seconds.")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        low, high = (percent(value[key]).removesuffix(" %") for key in ("low", "high"))
        return f"{100 * value['value']:.2f} ({low} .. {high})"
    return f"{value:.4g}"
