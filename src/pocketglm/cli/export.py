"""Lower a checkpoint to the files that a runtime opens, and check that they agree."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from pocketglm.artifacts.schemas import ExportResult
from pocketglm.cli._common import (
    Force,
    Json,
    Out,
    Progressive,
    emit,
    megabytes,
    table,
)
from pocketglm.cli._placement import AllowFallback, Delegate, Device, placement_table, warn
from pocketglm.contracts import ComputeUnits, ExportOptions
from pocketglm.errors import as_lines
from pocketglm.stages._memory import parse_size
from pocketglm.stages.export_each import export_each

DeploymentTarget = Annotated[
    Literal["iOS15", "iOS16", "iOS17", "iOS18"] | None,
    typer.Option(
        help="Core ML: the oldest system that opens it. Default: the oldest that has what the "
        "model needs."
    ),
]
Units = Annotated[
    ComputeUnits | None,
    typer.Option(
        help="Core ML: what it is laid out for: cpuAndNeuralEngine (fixed shapes, 1x1 "
        "convolutions), or cpuAndGPU, cpuOnly (flexible shapes). Default: by kind of model."
    ),
]
Precision = Annotated[
    Literal["float16", "float32"] | None,
    typer.Option(
        help="Core ML: the type of its values. Default: float16, but float32 for top-k attention."
    ),
]


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    out: Out,
    target: Annotated[str, typer.Option(help="Targets, separated by commas, e.g. onnx.")] = "onnx",
    opset: Annotated[
        int | None,
        typer.Option(
            help="ONNX opset; 13 = standard operators only, for old devices (fp32 or static INT8)."
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens per text; of a decoder, prompt and answer together. Default: the model's.",
        ),
    ] = None,
    logits: Annotated[
        Literal["last", "all"],
        typer.Option(
            help="Decoder: logits of each row's last position (faster; one row at a time) or all."
        ),
    ] = "last",
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Thread count that the export records for its app."),
    ] = None,
    spinning: Annotated[
        bool,
        typer.Option(
            "--spinning", help="Decoder: threads of its app wait busily (own cores only)."
        ),
    ] = False,
    deployment_target: DeploymentTarget = None,
    compute_units: Units = None,
    compute_precision: Precision = None,
    device: Device = None,
    delegate: Delegate = None,
    allow_fallback: AllowFallback = False,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory that each target may use, e.g. 800MB: refused up front, or stopped there."
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write OUT/TARGET/ for every target, each in a process of its own; each that works is kept.

    What a target printed that crashed or was stopped is in OUT/TARGET.log.
    """
    targets = [name.strip() for name in target.split(",") if name.strip()]
    options = ExportOptions(
        opset=opset,
        max_length=max_length,
        threads=threads,
        logits=logits,
        spinning=spinning,
        max_memory=parse_size(max_memory),
        deployment=deployment_target,
        compute_units=compute_units,
        compute_precision=compute_precision,
        device=device,
        delegate=delegate,
        allow_fallback=allow_fallback,
    )
    with Progressive() as reporter:
        result = export_each(
            checkpoint, targets, out, options=options, force=force, reporter=reporter
        )
    for entry in result.targets:
        if entry.error:
            sys.stderr.write(as_lines(f"{entry.target}: {entry.error}", entry.hint))
        warn(entry, device)

    emit(result, json, lambda: _show(result))
    code = max((entry.exit_code for entry in result.targets), default=0)
    if code:
        raise typer.Exit(code)


def _show(result: ExportResult) -> None:
    """One row per target."""
    rows = []
    for entry in result.targets:
        parity = entry.parity
        rows.append(
            [
                entry.target,
                "already done" if entry.already_done else "ok" if entry.ok else "failed",
                entry.precision,
                megabytes(entry.bytes) if entry.ok else "",
                f"{parity.output_max_abs:.2g} (limit {parity.tolerance:.2g})" if parity else "",
                megabytes(entry.peak_memory) if entry.peak_memory else "",
                entry.out or "",
            ]
        )
    columns = ["target", "", "precision", "size", "worst difference", "peak memory", "folder"]
    table("", columns, rows)
    placement_table(result)


SPEC = main
