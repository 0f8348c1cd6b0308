"""Fine-tune a checkpoint on a task (CPU, GPU, or many under accelerate launch)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from pocketglm.cli._common import (
    DATA_HELP,
    Force,
    Json,
    LabelColumnName,
    MaxLength,
    OosLabel,
    Out,
    Progressive,
    TextColumnName,
    emit,
    percent,
    table,
)
from pocketglm.errors import UsageError
from pocketglm.train.finetune import FinetuneConfig, finetune

Precision = Literal["auto", "fp32", "bf16"]
Pooling = Literal["mean", "cls"]
_DEFAULT = FinetuneConfig(data=Path("x"))

# --- options, in the order of the command line ---------------------------------------------------

CheckpointPath = Annotated[Path, typer.Argument(help="Folder of an encoder or a decoder.")]
TaskName = Annotated[str, typer.Option(help="intent (for encoders), lm or command (decoders).")]
Data = Annotated[Path, typer.Option(help=DATA_HELP)]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Train on at most this many rows (and validate on as many)."),
]
Epochs = Annotated[float, typer.Option(min=0, help="Passes over the data.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts per step, over all processes.")]
Rate = Annotated[
    float, typer.Option("--learning-rate", "--lr", min=0, help="Peak rate of the body.")
]
HeadMultiplier = Annotated[
    float, typer.Option(min=0, help="New layers learn this many times faster.")
]
Warmup = Annotated[float, typer.Option(min=0, max=1, help="Share of the steps that warm up.")]
WeightDecay = Annotated[float, typer.Option(min=0, help="AdamW.")]
Clip = Annotated[float, typer.Option(min=0, help="Largest gradient norm.")]
Patience = Annotated[int, typer.Option(min=1, help="Epochs without improvement before it stops.")]
Smoothing = Annotated[
    float,
    typer.Option(min=0, max=0.9, help="Share of the target spread over all labels or tokens."),
]
Dropout = Annotated[
    float | None,
    typer.Option(min=0, max=0.9, help="While it trains (default: the model's own)."),
]
Lora = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Train adapters of this rank, and merge them at the end: for models that are too big "
        "to train whole.",
        show_default=False,
    ),
]
LoraAlpha = Annotated[
    float | None,
    typer.Option(min=0.001, help="Scale of the adapters times the rank (default: twice the rank)."),
]
SlotSwap = Annotated[
    float,
    typer.Option(
        "--slot-swap",
        "--augment",
        min=0,
        max=1,
        help="Commands: share of the rows that get other values of the same slots in an epoch, of "
        "those seen with the same intent.",
    ),
]
MadeUp = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Commands: share of the slots' values that become made-up words in an epoch; helps a "
        "small model with names it never saw.",
    ),
]
EarlyIntent = Annotated[
    float,
    typer.Option(
        min=0,
        help="Commands: weight of telling the intent after every token of the text, too; helps a "
        "model that is trained from nothing.",
    ),
]
TextLoss = Annotated[
    float,
    typer.Option(
        min=0, help="Commands: weight of telling the text's next token, too; helps such a model."
    ),
]
ClassWeights = Annotated[bool, typer.Option("--class-weights", help="Weigh rare labels more.")]
PoolingName = Annotated[
    Pooling | None, typer.Option(help="How tokens become one vector (default: mean).")
]
PrecisionName = Annotated[Precision, typer.Option(help="auto = bf16 where the hardware has it.")]
Minutes = Annotated[
    float | None, typer.Option(min=0.01, help="Scale the steps to about this much time.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def main(
    checkpoint: CheckpointPath,
    task: TaskName,
    data: Data,
    out: Out,
    text_column: TextColumnName = "text",
    label_column: LabelColumnName = "label",
    oos_label: OosLabel = "oos",
    limit: Limit = None,
    epochs: Epochs = _DEFAULT.epochs,
    batch_size: BatchSize = _DEFAULT.batch_size,
    learning_rate: Rate = _DEFAULT.learning_rate,
    head_multiplier: HeadMultiplier = _DEFAULT.head_multiplier,
    warmup: Warmup = _DEFAULT.warmup,
    weight_decay: WeightDecay = _DEFAULT.weight_decay,
    clip: Clip = _DEFAULT.clip,
    patience: Patience = _DEFAULT.patience,
    label_smoothing: Smoothing = _DEFAULT.label_smoothing,
    dropout: Dropout = None,
    lora: Lora = None,
    lora_alpha: LoraAlpha = None,
    slot_swap: SlotSwap = _DEFAULT.slot_swap,
    made_up: MadeUp = _DEFAULT.made_up,
    early_intent: EarlyIntent = _DEFAULT.early_intent,
    text_loss: TextLoss = _DEFAULT.text_loss,
    class_weights: ClassWeights = False,
    pooling: PoolingName = None,
    precision: PrecisionName = "auto",
    max_length: MaxLength = None,
    minutes: Minutes = None,
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fine-tune CHECKPOINT on the train rows of DATA; early stopping on its validation rows.

    Interrupted by anything, the same command resumes. Several processes (on CPUs too):
    accelerate launch --multi_gpu --num_processes 2 -m pocketglm train ...
    """
    given = locals()
    config = _config({n: given[n] for n in FinetuneConfig.model_fields if n in given})
    with Progressive() as reporter:
        result = finetune(checkpoint, config, out, force=force, reporter=reporter)

    def words() -> None:
        rows = [
            [name, percent(m.value) if m.unit == "fraction" else f"{m.value:.4g}", str(m.n)]
            for name, m in result.validation.items()
        ]
        table(f"validation, best epoch {result.best_epoch}", ["metric", "value", "n"], rows)
        print(f"{'already done' if result.already_done else 'checkpoint'}: {result.out}")

    if os.environ.get("RANK", "0") == "0":  # of several processes one tells
        emit(result, json, words)


def _config(settings: dict[str, Any]) -> FinetuneConfig:
    try:
        return FinetuneConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UsageError(f"--{option} {first['input']}: {first['msg']}") from error


SPEC = main
