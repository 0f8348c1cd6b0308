"""Prove with numbers what an export cost against a baseline; gates set the exit code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

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
    Threads,
    emit,
    table,
)
from pocketglm.contracts import DataOptions
from pocketglm.errors import UsageError
from pocketglm.stages.prove import Gates, exit_code, prove


def main(
    export: Annotated[Path, typer.Argument(help="Export folder, e.g. out/onnx.")],
    baseline: Annotated[
        Path, typer.Option(help="What to compare with: a checkpoint (exported fp32) or an export.")
    ],
    task: Annotated[str, typer.Option(help="intent or embed; of a decoder command or lm.")],
    data: Annotated[Path, typer.Option(help=DATA_HELP)],
    out: Out,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Gate: accuracy points that may be lost, e.g. 0.5.")
    ] = None,
    max_oos_recall_drop: Annotated[
        float | None, typer.Option(help="Gate: out-of-scope recall points that may be lost.")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Gate, with --task lm: percent, e.g. 2.")
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option(help="Gate: baseline / candidate latency, of a decoder per new token."),
    ] = None,
    min_size_ratio: Annotated[
        float | None, typer.Option(help="Gate: baseline bytes / candidate bytes, e.g. 3.8.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Gate: p50 latency, of a decoder per new token.")
    ] = None,
    max_memory_mb: Annotated[float | None, typer.Option(help="Gate: peak memory.")] = None,
    max_size_mb: Annotated[float | None, typer.Option(help="Gate: size of the folder.")] = None,
    allow_inconclusive: Annotated[
        bool, typer.Option("--allow-inconclusive", help="Exit 0 where the data cannot decide.")
    ] = False,
    pairs: Annotated[int, typer.Option(min=7, help="Interleaved timing pairs.")] = 9,
    text_column: TextColumnName = "text",
    label_column: LabelColumnName = "label",
    oos_label: OosLabel = "oos",
    max_length: MaxLength = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score at most this many rows.")] = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compare EXPORT with BASELINE; write proof.json, report.html and a model card to OUT."""
    given = locals()
    gates = _gates({name: given[name] for name in Gates.model_fields})
    with Progressive() as reporter:
        result = prove(
            export,
            baseline,
            task,
            DataOptions(data, text_column, label_column, oos_label, limit),
            out,
            gates=gates,
            threads=threads,
            pairs=pairs,
            max_length=max_length,
            force=force,
            reporter=reporter,
        )

    def words() -> None:
        rows = [
            [
                c.title,
                f"{c.value:.3g} {c.unit}".rstrip(),
                f"{c.low:.3g} .. {c.high:.3g}",
                str(c.n),
                "" if c.limit is None else f"{'<=' if c.better == 'lower' else '>='} {c.limit:g}",
                c.verdict,
            ]
            for c in result.claims
        ]
        table("", ["claim", "value", "95 % interval", "n", "limit", "verdict"], rows)
        print(f"verdict: {result.verdict}\nreport: {result.report}")

    emit(result, json, words)
    code = exit_code(result, allow_inconclusive)
    if code:
        raise typer.Exit(code)


def _gates(limits: dict[str, float | None]) -> Gates:
    for name, limit in limits.items():
        if limit is not None and not math.isfinite(limit):
            option = name.replace("_", "-")
            raise UsageError(f"--{option} {limit} is not a finite number", f"e.g. --{option} 1.5")
    return Gates(**limits)


SPEC = main
