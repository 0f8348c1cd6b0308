"""A new decoder of a family size, with random weights and a tokenizer, ready to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketglm.cli._common import Force, Json, Out, Progressive, TextColumnName, emit, megabytes
from pocketglm.stages.init import Dtype, init


def main(
    size: Annotated[str, typer.Argument(help="A name that `pocketglm sizes` lists.")],
    out: Out,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="How the weights are stored.")] = "bfloat16",
    vocab_size: Annotated[
        int | None, typer.Option(min=264, help="Rows of the embedding (default: the size's).")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder whose tokenizer is copied.", show_default=False)
    ] = None,
    tokenizer_data: Annotated[
        Path | None,
        typer.Option(
            help="Texts (.txt, .jsonl, .csv, a folder's train split, or the embedded commands) to "
            "train a byte-level BPE tokenizer on. Without it and without --tokenizer every byte is "
            "a token.",
            show_default=False,
        ),
    ] = None,
    text_column: TextColumnName = "text",
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a new checkpoint of SIZE."""
    with Progressive() as reporter:
        result = init(
            size,
            out,
            seed=seed,
            dtype=dtype,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            tokenizer_data=tokenizer_data,
            text_column=text_column,
            force=force,
            reporter=reporter,
        )

    def words() -> None:
        state = "already done" if result.already_done else "written"
        print(
            f"{result.size}: {result.parameters:,} random parameters in {result.dtype}, "
            f"{megabytes(result.bytes)}\n"
            f"tokenizer: {result.tokenizer}, {result.tokens} of {result.vocab_size} tokens\n"
            f"{state}: {result.out}"
        )

    emit(result, json, words)


SPEC = main
