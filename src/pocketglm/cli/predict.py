"""Label every row of a file (text, CSV or JSONL)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketglm.cli._common import (
    Force,
    Json,
    MaxLength,
    Progressive,
    TextColumnName,
    Threads,
    emit,
)
from pocketglm.contracts import RunOptions
from pocketglm.eval._predict import predict


def main(
    path: Annotated[Path, typer.Argument(help="Checkpoint or export folder.")],
    file: Annotated[Path, typer.Argument(help="Texts: .txt (one a line), .csv or .jsonl[.gz].")],
    out: Annotated[
        Path | None, typer.Option(help="File to write (.jsonl or .csv); else stdout.")
    ] = None,
    text_column: TextColumnName = "text",
    max_length: MaxLength = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Label every row of FILE."""
    with Progressive() as reporter:
        result = predict(
            path,
            file,
            out=out,
            text_column=text_column,
            max_length=max_length,
            options=RunOptions(threads=threads),
            force=force,
            reporter=reporter,
        )

    def words() -> None:
        if result.out:
            print(f"{result.rows} rows: {result.out}")
            return
        for row in result.predictions:
            print(f"{row.get('label', '')}\t{row.get('score', 0):.3f}\t{row['text']}")

    emit(result, json, words)


SPEC = main
