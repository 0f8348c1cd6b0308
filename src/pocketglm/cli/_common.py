"""What the verbs share: option types, the progress display, and how a result is printed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from pocketglm.artifacts.schemas import MetricResult
from pocketglm.contracts import Config

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object to stdout.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Compute threads (default: all cores it may use)."),
]
TextColumnName = Annotated[str, typer.Option("--text-column", help="Column that holds the text.")]
LabelColumnName = Annotated[
    str, typer.Option("--label-column", help="Column that holds the label.")
]
OosLabel = Annotated[str, typer.Option(help="The label that means 'out of scope'.")]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Tokens per text; longer texts are cut.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="Memory that this process may use, e.g. 800MB: kept, or refused up front."),
]
DATA_HELP = (
    "Folder with {train,validation,test}.jsonl[.gz] or .csv, or one file; or the embedded set: "
    "commands, commands-en, commands-zh."
)

_EVERY = 15.0  # seconds between progress lines where stderr is no terminal


class Progressive:
    """A Reporter on stderr: live bars on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> Progressive:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """One line of words."""
        self._bars.console.print(text, markup=False)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        """Draw or print the state of one piece of work; a finished one may start again."""
        if not self.console.is_terminal:
            self._line(label, done, total, note)
            return
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total, note=note)
        self._bars.update(self._tasks[label], completed=done, total=total, note=note)
        if done >= total:
            del self._tasks[label]

    def _line(self, label: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done >= total:
            self._last.pop(label, None)
        elif now - self._last.setdefault(label, now) < _EVERY:
            return
        else:
            self._last[label] = now
        self.say(f"{label} {done}/{total} {note}".rstrip())


def emit(result: Config, as_json: bool, words: Callable[[], None]) -> None:
    """Print the one result of a verb: a JSON object, or what `words` prints, to stdout."""
    try:
        write(result, as_json, words)
    except BrokenPipeError:
        drop_output()


def write(result: Config, as_json: bool, words: Callable[[], None]) -> None:
    """`emit` for one result of several; BrokenPipeError says that nobody reads the next."""
    if as_json:
        sys.stdout.write(result.model_dump_json() + "\n")
    else:
        words()
    sys.stdout.flush()


def drop_output() -> None:
    """Write nothing more: the reader of stdout, such as `head`, has read enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; the first column is left-aligned, the others right-aligned."""
    grid = Table(title=title or None, title_justify="left")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console = Console(highlight=False, markup=False)
    with console.capture() as text:
        console.print(grid)
    sys.stdout.write(text.get())  # rich itself would end the process at a broken pipe


def megabytes(count: float) -> str:
    """Decimal megabytes, as app stores count: '22.9 MB'."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def percent(value: float) -> str:
    """A fraction as percent with two decimals."""
    return f"{100 * value:.2f} %"


def metric_row(name: str, metric: MetricResult) -> list[str]:
    """Name, value, interval and n, for a table."""
    value, low, high = (
        percent(v) if metric.unit == "fraction" else f"{v:.4g}"
        for v in (metric.value, metric.low, metric.high)
    )
    unit = "" if metric.unit == "fraction" else f" {metric.unit}"
    return [name, value + unit, f"{low} .. {high}", str(metric.n)]
