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


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, e.g. a MiniLM or BERT.")],
    task: Annotated[str, typer.Option(help="What to learn: intent.")],
    data: Annotated[Path, typer.Option(help=DATA_HELP)],
    out: Out,
    text_column: TextColumnName = "text",
    label_column: LabelColumnName = "label",
    oos_label: OosLabel = "oos",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Train on at most this many rows (and validate on as many)."),
    ] = None,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the data.")] = _DEFAULT.epochs,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts per step, over all processes.")
    ] = _DEFAULT.batch_size,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", min=0, help="Peak rate of the body.")
    ] = _DEFAULT.learning_rate,
    head_multiplier: Annotated[
        float, typer.Option(min=0, help="New layers learn this many times faster.")
    ] = _DEFAULT.head_multiplier,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps that warm up.")
    ] = _DEFAULT.warmup,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW.")] = _DEFAULT.weight_decay,
    clip: Annotated[float, typer.Option(min=0, help="Largest gradient norm.")] = _DEFAULT.clip,
    patience: Annotated[
        int, typer.Option(min=1, help="Epochs without improvement before it stops.")
    ] = _DEFAULT.patience,
    label_smoothing: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the target spread over all labels.")
    ] = _DEFAULT.label_smoothing,
    class_weights: Annotated[
        bool, typer.Option("--class-weights", help="Weigh rare labels more.")
    ] = False,
    pooling: Annotated[
        Pooling | None, typer.Option(help="How tokens become one vector (default: mean).")
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="auto = bf16 where the hardware has it.")
    ] = "auto",
    max_length: MaxLength = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Scale the steps to about this much time.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
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
        rows = [[name, percent(m.value), str(m.n)] for name, m in result.validation.items()]
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
