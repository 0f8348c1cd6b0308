"""Latency p50/p99, throughput, load time and peak memory, in a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketglm.cli._common import Json, Progressive, Threads, emit, megabytes, table
from pocketglm.stages.bench import bench


def main(
    path: Annotated[Path, typer.Argument(help="Checkpoint or export folder.")],
    batch: Annotated[int, typer.Option(min=1, help="Texts per call.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per text.")] = 32,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 200,
    threads: Threads = None,
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds of sustained load instead of --runs.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure PATH on this machine."""
    with Progressive() as reporter:
        result = bench(
            path,
            batch=batch,
            tokens=tokens,
            runs=runs,
            threads=threads,
            duration=duration,
            reporter=reporter,
        )

    def words() -> None:
        rows = [
            ["latency p50", f"{result.p50_ms:.2f} ms"],
            ["latency p99", f"{result.p99_ms:.2f} ms"],
            ["texts per second", f"{result.per_second:.0f}"],
            ["load", f"{result.load_ms:.0f} ms"],
            ["peak memory", megabytes(result.peak_rss_bytes)],
            ["size on disk", megabytes(result.size_bytes)],
        ]
        if result.first_third_p50_ms and result.last_third_p50_ms:
            thirds = f"{result.first_third_p50_ms:.2f}, {result.last_third_p50_ms:.2f} ms"
            rows.insert(2, ["p50 of the first, last third", thirds])
        table(
            f"{result.path}: {result.runtime}, batch {result.batch}, {result.tokens} tokens, "
            f"{result.threads} threads, {result.runs} runs",
            ["measure", "value"],
            rows,
        )

    emit(result, json, words)


SPEC = main
