"""Make a checkpoint smaller by a plan of steps; finished steps are reused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketglm.cli._common import (
    DATA_HELP,
    Force,
    Json,
    LabelColumnName,
    MaxMemory,
    OosLabel,
    Out,
    Progressive,
    TextColumnName,
    emit,
    megabytes,
    table,
)
from pocketglm.contracts import DataOptions
from pocketglm.errors import UsageError
from pocketglm.stages._memory import parse_size
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    out: Out,
    plan: Annotated[
        Path | None, typer.Option(help="YAML plan: a mapping with `steps:`.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="One method instead of a plan, e.g. quantize_rtn.")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of --method, e.g. bits=8.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sizes that would result; write nothing.")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(help="intent, command or lm; default: the one that it was trained for."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Rows for methods that learn or calibrate; each step is then scored on the "
            "validation rows. " + DATA_HELP,
            show_default=False,
        ),
    ] = None,
    text_column: TextColumnName = "text",
    label_column: LabelColumnName = "label",
    oos_label: OosLabel = "oos",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many rows of each split.")
    ] = None,
    max_memory: MaxMemory = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Run a plan, or one --method, on CHECKPOINT and write the result to OUT."""
    steps = _plan(plan, method, set or [])
    rows = DataOptions(data, text_column, label_column, oos_label, limit) if data else None
    with Progressive() as reporter:
        result = compress(
            checkpoint,
            steps,
            out,
            force=force,
            dry_run=dry_run,
            task=task,
            data=rows,
            max_memory=parse_size(max_memory),
            reporter=reporter,
        )

    def words() -> None:
        rows = [
            [
                step.method + (" (reused)" if step.reused else ""),
                megabytes(step.bytes_before),
                megabytes(step.bytes_after),
                f"{step.bytes_before / max(step.bytes_after, 1):.2f}x",
                ", ".join(step.figures()),
            ]
            for step in result.steps
        ]
        table("", ["step", "before", "after", "smaller", "effect"], rows)
        state = "dry run, nothing written" if dry_run else str(out)
        print(f"already done: {out}" if result.already_done else state)

    emit(result, json, words)


def _plan(plan: Path | None, method: str | None, pairs: list[str]) -> Plan:
    if (plan is None) == (method is None):
        raise UsageError(
            "give either --plan FILE or --method NAME", "for example --method quantize_rtn"
        )
    if plan is not None:
        if pairs:
            raise UsageError("--set goes with --method", "put settings of a plan into its file")
        return Plan.from_file(plan)
    settings: dict[str, str] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found or not key:
            raise UsageError(f"--set '{pair}' is not key=value", "for example --set bits=8")
        settings[key] = value
    return Plan.single(str(method), settings)


SPEC = main
