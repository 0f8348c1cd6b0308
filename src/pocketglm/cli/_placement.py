"""What `export` says of where its files will run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pocketglm.artifacts.schemas import ExportResult, TargetResult
from pocketglm.cli._common import table
from pocketglm.stages._placement import warnings

Device = Annotated[
    str | None,
    typer.Option(
        help="Phone that it is for (see `pocketglm devices`): predicts where its operators run; "
        "refused (exit 1) if the delegate would take less than half of the multiplications."
    ),
]
Delegate = Annotated[
    str | None,
    typer.Option(help="Delegate that the app will ask for: gpu, npu, nnapi. Default: xnnpack."),
]
AllowFallback = Annotated[
    bool, typer.Option("--allow-fallback", help="Export even if the delegate takes little.")
]


def warn(entry: TargetResult, device: str | None) -> None:
    """On stderr: delegates that take little or get many pieces, or that none is known."""
    for message, hint in warnings(entry.placement):
        sys.stderr.write(f"warning: {message}\n" + (f"  try: {hint}\n" if hint else ""))
    if device is not None and entry.ok and not entry.placement:
        sys.stderr.write(
            f"warning: {entry.target} on {device}: no delegate is known there, so nothing was "
            "predicted\n"
        )


def placement_table(result: ExportResult) -> None:
    """On stdout: what each delegate takes of each graph; nothing without a device."""
    placed = [placement for entry in result.targets for placement in entry.placement]
    if not placed:
        return
    rows = [
        [
            entry.delegate,
            entry.graph,
            f"{entry.taken}/{entry.nodes}",
            f"{100 * entry.share:.0f} %",
            str(entry.partitions),
            entry.evidence,
        ]
        for entry in placed
    ]
    columns = ["delegate", "graph", "operators", "work", "pieces", "known by"]
    table(f"Predicted for {placed[0].device}: what each delegate takes", columns, rows)
