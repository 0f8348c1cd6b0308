"""Latency p50/p99, throughput, load time and peak memory, in a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from pocketglm.artifacts.schemas import BenchResult
from pocketglm.cli._common import Json, Progressive, Threads, emit, megabytes, table
from pocketglm.stages.bench import bench


def main(
    path: Annotated[Path, typer.Argument(help="Checkpoint or export folder.")],
    batch: Annotated[int, Option(min=1, help="Encoder: texts per call.")] = 1,
    tokens: Annotated[
        int | None, Option(min=1, help="Tokens per text or prompt (32; decoder: 128).")
    ] = None,
    new_tokens: Annotated[
        int | None, Option(min=1, help="Decoder: tokens written behind each prompt (64).")
    ] = None,
    runs: Annotated[
        int | None, Option(min=1, help="Timed calls (200), or a decoder's texts (5).")
    ] = None,
    threads: Threads = None,
    duration: Annotated[
        float | None, Option(min=0.1, help="Seconds of sustained load instead of --runs.")
    ] = None,
    runtime: Annotated[
        str | None, Option(help="Another runtime that reads the export, such as genai.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure PATH on this machine."""
    with Progressive() as reporter:
        result = bench(
            path,
            batch=batch,
            tokens=tokens,
            new_tokens=new_tokens,
            runs=runs,
            threads=threads,
            duration=duration,
            runtime=runtime,
            reporter=reporter,
        )

    def words() -> None:
        rows = [
            *(_of_decoder(result) if result.kind == "decoder" else _of_encoder(result)),
            ["load", f"{result.load_ms:.0f} ms"],
            ["peak memory", megabytes(result.peak_rss_bytes)],
            ["size on disk", megabytes(result.size_bytes)],
        ]
        if result.first_third_p50_ms and result.last_third_p50_ms:
            thirds = f"{result.first_third_p50_ms:.2f}, {result.last_third_p50_ms:.2f} ms"
            rows.insert(-3, ["p50 of the first, last third", thirds])
        table(
            f"{result.path}: {result.runtime}, {_what(result)}, {result.threads} threads, "
            f"{result.runs} runs",
            ["measure", "value"],
            rows,
        )
        if result.extra_memory:
            print(f"memory includes {result.extra_memory}")

    emit(result, json, words)


def _what(result: BenchResult) -> str:
    if result.kind == "encoder":
        return f"batch {result.batch}, {result.tokens} tokens"
    return f"prompt {result.tokens} tokens, then {result.new_tokens} new ones"


def _of_encoder(result: BenchResult) -> list[list[str]]:
    return [
        ["latency p50", f"{result.p50_ms:.2f} ms"],
        ["latency p99", f"{result.p99_ms:.2f} ms"],
        ["texts per second", f"{result.per_second:.0f}"],
    ]


def _of_decoder(result: BenchResult) -> list[list[str]]:
    tokens, new = result.tokens, result.new_tokens or 0
    return [
        ["prompt tokens per second", f"{result.prefill_per_second or 0:.0f}"],
        ["prompt p50", f"{result.prefill_ms or 0:.1f} ms"],
        ["new tokens per second", f"{result.per_second:.1f}"],
        ["new token p50", f"{result.p50_ms:.2f} ms"],
        ["new token p99", f"{result.p99_ms:.2f} ms"],
        ["at a context of", f"{tokens} to {tokens + new} tokens"],
    ]


SPEC = main
