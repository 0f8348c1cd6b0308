"""The demo's decoder: spoken requests to a phone agent's actions, in INT4, next to its fp32 model.

A new `autoglm-nano` learns the embedded commands, English and Chinese together. Its exact match on
phrasings that training never saw stands beside that of the nearest training command.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pocketglm.artifacts.proof import Proof, read_proof
from pocketglm.artifacts.schemas import DemoCommands
from pocketglm.cli._common import table
from pocketglm.contracts import DataOptions, Metric, Reporter, RunOptions
from pocketglm.data.frames import action, read_frames
from pocketglm.eval._nearest import nearest_frames
from pocketglm.eval.command import command_scores, parse, read_grammar
from pocketglm.runtimes import open_decoder
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.init import init
from pocketglm.stages.plan import Plan
from pocketglm.stages.prove import Gates, prove
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
    "麻烦你帮我把蓝牙打开",
    "明天上海天气怎么样",
)
# The recipe of plans/int4-decoder.yaml.
INT4 = {"bits": 4, "group_size": 32, "embeddings": 8, "head": 8, "activation": "dynamic_block"}
# Chosen on the validation rows.
TRAINING: dict[str, Any] = {
    "epochs": 60, "patience": 60, "batch_size": 16, "learning_rate": 4e-4, "dropout": 0.1,
    "slot_swap": 0.5, "made_up": 0.25, "weight_decay": 0.1,
}  # fmt: skip
CPU_SECONDS = 140  # of the training loop; reading and validating come on top
GATES = Gates(max_accuracy_drop=3.0, min_size_ratio=4.5)
SIDES = ("nearest", "fp32", "int4")
METRICS = {
    "exact_match": "exact match, %",
    "intent_accuracy": "intent, %",
    "slot_f1": "slot F1, %",
}
MEASURES = {
    "size_ratio": "model file, MB",
    "prefill_speedup": "prompt tokens per second",
    "decode_speedup": "new tokens per second",
    "memory_ratio": "peak memory, MB",
}


def commands(
    out: Path,
    minutes: float,
    threads: int | None,
    seed: int,
    force: bool,
    reporter: Reporter,
) -> DemoCommands:
    """What a user would type: init, train, compress, export, prove and run.

    minutes: of training at most; it also takes no more than about `CPU_SECONDS`.
    """
    base, trained, quantized = out / "base", out / "checkpoint", out / "quantized"
    init(
        SIZE, base, seed=seed, dtype="float32", tokenizer_data=DATA.path, force=force,
        reporter=reporter,
    )  # fmt: skip
    began = time.process_time()
    config = FinetuneConfig(
        task="command",
        data=DATA.path,
        minutes=min(minutes, CPU_SECONDS / 60),
        seed=seed,
        **TRAINING,
    )
    with _one_thread():
        training = finetune(base, config, trained, force=force, reporter=reporter)
    cpu_seconds = None if training.already_done else time.process_time() - began
    compress(trained, Plan.single("quantize_rtn", INT4), quantized, force=force, reporter=reporter)
    export(quantized, ["onnx"], out / "int4", force=force, reporter=reporter)
    folder = out / "int4" / "onnx"
    proof = prove(
        folder, trained, "command", DATA, out / "proof", gates=GATES, threads=threads,
        force=force, reporter=reporter,
    )  # fmt: skip
    reporter.say("the nearest training command, as a baseline")
    return DemoCommands(
        report=proof.report,
        verdict=proof.verdict,
        rows=_rows(read_proof(out / "proof"), _nearest()),
        actions=_actions(folder, threads),
        training_cpu_seconds=cpu_seconds,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch with one thread: on batches this small more of them take more CPU time in all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nearest() -> dict[str, Metric]:
    """Scores of the baseline: each test command gets the meaning of the training command that is
    most like it."""
    train, test = read_frames(DATA, "train"), read_frames(DATA, "test")
    frames = nearest_frames(train, [row.text for row in test])
    return dict(command_scores(test, frames).metrics)


def _rows(proof: Proof, nearest: Mapping[str, Metric]) -> list[dict[str, Any]]:
    """Rows of the table: accuracy with its interval, then what a phone notices."""
    rows: list[dict[str, Any]] = []
    for name, words in METRICS.items():
        near = nearest.get(name)
        sides = (
            asdict(near) if near else None,
            proof.baseline["metrics"].get(name),
            proof.candidate["metrics"].get(name),
        )
        rows.append({"measure": words, **dict(zip(SIDES, sides, strict=True))})
    for name, words in MEASURES.items():
        for claim in proof.claims:
            if claim.metric == name:
                values = (None, claim.baseline, claim.candidate)
                rows.append({"measure": words, **dict(zip(SIDES, values, strict=True))})
    return rows


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
    """The table, the actions, and what the training cost."""
    rows = [[row["measure"], *(_cell(row[side]) for side in SIDES)] for row in result.rows]
    n = next(row["fp32"]["n"] for row in result.rows)
    table(
        f"{SIZE} on {n} unseen phrasings, English and Chinese (± 95 %)",
        ["", "nearest command", "fp32", "INT4"],
        rows,
    )
    answers = [[a["text"], a["action"], f"{a['milliseconds']:.1f} ms"] for a in result.actions]
    table("Five requests, parsed by the INT4 file", ["request", "action", ""], answers)
    if result.training_cpu_seconds is not None:
        print(f"{SIZE} trained for {result.training_cpu_seconds:.0f} CPU seconds.")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        half = max(value["high"] - value["value"], value["value"] - value["low"])
        return f"{100 * value['value']:.1f} ± {100 * half:.1f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
