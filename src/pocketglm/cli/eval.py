"""Score a checkpoint or export on a task's test rows, with n and a 95 % interval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketglm.cli._common import (
    DATA_HELP,
    Json,
    LabelColumnName,
    MaxLength,
    OosLabel,
    Progressive,
    TextColumnName,
    Threads,
    emit,
    metric_row,
    table,
)
from pocketglm.contracts import DataOptions, RunOptions
from pocketglm.eval._evaluate import evaluate


def main(
    path: Annotated[Path, typer.Argument(help="Checkpoint or export folder.")],
    task: Annotated[str, typer.Option(help="intent, embed, command or lm.")],
    data: Annotated[Path, typer.Option(help=DATA_HELP)],
    text_column: TextColumnName = "text",
    label_column: LabelColumnName = "label",
    oos_label: OosLabel = "oos",
    max_length: MaxLength = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score at most this many rows.")] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="With --task lm: a model to tell the divergence and flip rate from."),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Score a checkpoint or export on the test rows of DATA."""
    options = DataOptions(data, text_column, label_column, oos_label, limit)
    with Progressive() as reporter:
        _, result = evaluate(
            path,
            task,
            options,
            max_length=max_length,
            options=RunOptions(threads=threads),
            reporter=reporter,
            baseline=baseline,
        )

    def words() -> None:
        rows = [metric_row(name, metric) for name, metric in result.metrics.items()]
        table(
            f"{result.path} on {result.data} ({result.split})",
            ["metric", "value", "95 % interval", "n"],
            rows,
        )

    emit(result, json, words)


SPEC = main
