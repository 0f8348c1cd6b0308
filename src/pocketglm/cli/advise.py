"""Which model, recipe and runtime suit a device, predicted; and what to type next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pocketglm.artifacts.schemas import (
    AdviceRow,
    AdviseResult,
    LimitResult,
)
from pocketglm.cli._common import Json, emit
from pocketglm.report._advice import Sources, megabytes, span
from pocketglm.stages.advise import Wanted, advise

_SHOWN, _FEW = 8, 3  # rows of a list
_JUDGED = (
    "predicted, not run: ranges hold four of five devices; memory is judged by the upper end, "
    "times by the middle"
)


Device = Annotated[
    str,
    typer.Option(
        help="Name or alias that `pocketglm devices` lists, e.g. snapdragon-8-gen-3, or the file "
        "of a profile.",
        show_default=False,
    ),
]
Model = Annotated[
    Path | None,
    typer.Argument(
        help="A model of yours (default: the family's sizes, or MiniLM).", show_default=False
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(help="intent, embed, command or lm; default: the checkpoint's, else lm."),
]
MaxLatency = Annotated[
    float | None,
    typer.Option(
        help="Longest time: of one text (intent, embed), the whole answer (command), or to the "
        "first token (lm). Default: 100 for a text, else 1000.",
        show_default=False,
    ),
]
MaxMemoryMb = Annotated[
    float | None,
    typer.Option(help="Most memory; default: what one app gets there.", show_default=False),
]
MinAccuracy = Annotated[
    float | None,
    typer.Option(
        help="Percent (92.5), or a fraction (0.925). What nobody measured does not count as "
        "enough.",
        show_default=False,
    ),
]
MinSpeed = Annotated[
    float | None,
    typer.Option(help="Slowest answer; default: 5 for lm, a reader's pace.", show_default=False),
]
Context = Annotated[
    int | None,
    typer.Option(
        help="Tokens that the cache is made for; default: 2048 for lm, 128 for command.",
        show_default=False,
    ),
]
Prompt = Annotated[
    int | None,
    typer.Option(
        help="Tokens that go in; default: 128 for lm, 64 for command, 32 for an encoder.",
        show_default=False,
    ),
]
NewTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the answer; default: 64 for lm, 32 for command.", show_default=False
    ),
]
RuntimeName = Annotated[
    str | None, typer.Option(help="Only this one: onnx, litert, executorch, coreml, gguf.")
]
All = Annotated[bool, typer.Option("--all", help="Print every row, not the first few.")]


def main(
    device: Device,
    checkpoint: Model = None,
    task: TaskName = None,
    max_latency_ms: MaxLatency = None,
    max_memory_mb: MaxMemoryMb = None,
    min_accuracy: MinAccuracy = None,
    min_tokens_per_second: MinSpeed = None,
    context: Context = None,
    prompt: Prompt = None,
    new_tokens: NewTokens = None,
    runtime: RuntimeName = None,
    all: All = False,
    json: Json = False,
) -> None:
    """Rank what fits a device. Exit code 1: nothing does."""
    result = advise(
        device,
        task=task,
        checkpoint=checkpoint,
        wanted=Wanted(
            max_latency_ms=max_latency_ms,
            max_memory_mb=max_memory_mb,
            min_accuracy=min_accuracy,
            min_tokens_per_second=min_tokens_per_second,
            context=context,
            prompt=prompt,
            new_tokens=new_tokens,
            runtime=runtime,
        ),
    )
    emit(result, json, lambda: show(result, all))
    if not result.fits:
        raise typer.Exit(1)


def show(result: AdviseResult, everything: bool = False) -> None:
    """The advice as a person reads it."""
    print(f"{result.device_title}, task {result.task}: {_asked(result)}")
    for limit in result.limits:
        print(f"  {_limit(limit, result.judged)}")
    print(f"  {_JUDGED}")
    good = [row for row in result.rows if row.fits in ("yes", "probably")]
    made = [row for row in good if row.available]
    predicted = _one_each([row for row in good if not row.available], everything)
    sources = Sources()
    _list("Fits, and this version makes it", made, result, sources, everything, _SHOWN)
    title = "Fits by prediction, but this version has no such target"
    _list(title, predicted, result, sources, everything, _FEW)
    _reasons(result.rows if everything else _telling(result.rows), everything)
    print()
    for hint in result.hints:
        print(f"try: {hint}")
    for note in result.notes:
        print(f"note: {note}")
    for line in sources.lines():
        print(line)
    if result.best:
        row = result.best
        plan = f" ({row.plan})" if row.plan else ""
        print(f"\nNext, {row.title}{plan}; DATA is your rows:")
        for command in row.commands:
            print(f"  {command}")


def _asked(result: AdviseResult) -> str:
    if result.judged == "text":
        return f"a text of {result.prompt} tokens"
    return (
        f"a prompt of {result.prompt} and {result.new_tokens} new tokens, a cache for "
        f"{result.context:,}"
    )


def _limit(limit: LimitResult, judged: str) -> str:
    name = {"latency": f"time, {judged}", "speed": "speed"}.get(limit.name, limit.name)
    sign = "at least" if limit.name in ("speed", "accuracy") else "at most"
    return f"{name}: {sign} {limit.value:,.6g} {limit.unit}; {limit.words}"


def _one_each(rows: Sequence[AdviceRow], everything: bool) -> list[AdviceRow]:
    """The first row of each model and recipe."""
    if everything:
        return list(rows)
    first: dict[tuple[str, str], AdviceRow] = {}
    for row in rows:
        first.setdefault((row.model, row.recipe), row)
    return list(first.values())


def _list(
    title: str,
    rows: Sequence[AdviceRow],
    result: AdviseResult,
    sources: Sources,
    everything: bool,
    most: int,
) -> None:
    if not rows:
        return
    shown = rows if everything else rows[:most]
    lines = [_head(result), *(_cells(row, result, sources) for row in shown)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print(f"\n{title}")
    for line in lines:
        left, *cells, last = line
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True)]
        print("  ".join(["", left.ljust(widths[0]), *padded, last]).rstrip())
    if len(shown) < len(rows):
        print(f"  and {len(rows) - len(shown)} more (--all)")


def _head(result: AdviseResult) -> list[str]:
    times = ["time"] if result.judged == "text" else ["first token", "tokens/s", "answer"]
    return ["", "runtime", "file", "memory", *times, "loses"]


def _cells(row: AdviceRow, result: AdviseResult, sources: Sources) -> list[str]:
    times = [span(row.latency_ms, "ms")]
    if result.judged != "text":
        times = [span(row.first_token_ms, "ms"), span(row.tokens_per_second), *times]
    sure = "" if row.fits == "yes" else " (probably)"
    return [
        f"{row.title}{sure}",
        f"{row.runtime} {row.unit}",
        megabytes(row.file_mb),
        span(row.memory_mb, "MB"),
        *times,
        sources.losses(row),
    ]


def _telling(rows: Sequence[AdviceRow]) -> list[AdviceRow]:
    """Of what does not fit: of each model that never does the nearest row, then other recipes of
    the models that do.
    """
    fitting = {row.model for row in rows if row.fits in ("yes", "probably")}
    recipes = {(row.model, row.recipe) for row in rows if row.fits in ("yes", "probably")}
    first: dict[tuple[str, str], AdviceRow] = {}
    for row in sorted(rows, key=_miss):
        if (row.model, row.recipe) not in recipes:
            first.setdefault((row.model, row.recipe if row.model in fitting else ""), row)
    return sorted(first.values(), key=lambda row: (row.model in fitting, row.fits == "unknown"))


def _miss(row: AdviceRow) -> tuple[float | bool, ...]:
    memory = row.memory_mb.high if row.memory_mb else row.file_mb
    return not row.available, row.fits == "unknown", -row.parameters, len(row.exceeds), memory


def _reasons(rows: Sequence[AdviceRow], everything: bool) -> None:
    rows = [row for row in rows if row.fits not in ("yes", "probably")]
    if not rows:
        return
    shown = rows if everything else rows[:_SHOWN]
    print("\nDoes not fit, or nobody can say")
    for row in shown:
        print(f"  {row.reason} ({row.runtime} {row.unit})")
    if len(shown) < len(rows):
        print(f"  and {len(rows) - len(shown)} more (--all)")


SPEC = main
