"""The `predict` verb: label every text of a file."""

from __future__ import annotations

import csv
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pocketglm.artifacts.output import check_place, disk_errors, keep_inputs
from pocketglm.artifacts.schemas import PredictResult
from pocketglm.contracts import EncoderSession, Reporter, RunOptions, Silent
from pocketglm.data.readers import read_texts
from pocketglm.errors import OutputExistsError, UsageError
from pocketglm.eval._run import outputs_of, say_truncated, softmax
from pocketglm.runtimes import open_encoder
from pocketglm.text.tokenizer import Tokenizer

_WINDOW = 1024  # texts that are labelled and written at a time
_FIELDS = ("text", "label", "score")

Row = dict[str, Any]


def predict(
    path: Path,
    file: Path,
    *,
    out: Path | None = None,
    text_column: str = "text",
    max_length: int | None = None,
    options: RunOptions | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> PredictResult:
    """Label the texts of `file` (.txt, .csv, .jsonl) with the classifier in folder `path`.

    Each row of the result is text, label and score (the label's probability). With `out` (.jsonl
    or .csv) the rows go there, whole or not at all, and `predictions` is empty.

    Raises:
        UsageError: the model has no labels; `out` has another suffix, is `file`, lies in `path`, or
            cannot be created.
        OutputExistsError: `out` exists, and `force` is not set.
        DataError: the file cannot be used.
    """
    if out is not None:
        _check_out(out, force, [path, file])
    session = open_encoder(path, options or RunOptions())
    try:
        if not session.info.labels:
            raise UsageError(
                f"{path} has no labels, so it cannot label texts",
                "fine-tune it first: pocketglm train CKPT --task intent --data DATA --out DIR",
            )
        tokenizer = Tokenizer.load(path)
        texts = read_texts(file, text_column)
        rows = _labelled(session, tokenizer, texts, max_length, reporter or Silent())
        kept: list[Row] = []
        if out is None:
            kept = list(rows)
        else:
            with disk_errors(out), _whole_file(out) as stream:
                write = _writer(out, stream)
                for row in rows:
                    write(row)
    finally:
        session.close()
    return PredictResult(
        path=str(path),
        file=str(file),
        out=None if out is None else str(out),
        rows=len(texts),
        predictions=kept,
    )


def _check_out(out: Path, force: bool, inputs: Sequence[Path]) -> None:
    keep_inputs(out, inputs)
    if out.suffix not in (".jsonl", ".csv"):
        raise UsageError(f"--out {out} has no known suffix", "name it .jsonl or .csv")
    if out.is_dir() or (out.exists() and not force):
        raise OutputExistsError(f"{out} exists", "choose another --out, or add --force")
    check_place(out)


def _labelled(
    session: EncoderSession,
    tokenizer: Tokenizer,
    texts: list[str],
    max_length: int | None,
    reporter: Reporter,
) -> Iterator[Row]:
    truncated = 0
    for start in range(0, len(texts), _WINDOW):
        window = texts[start : start + _WINDOW]
        found = outputs_of(session, tokenizer, window, max_length)
        truncated += found.truncated
        for text, row in zip(window, softmax(found.values), strict=True):
            best = int(row.argmax())
            label, share = session.info.labels[best], round(float(row[best]), 6)
            yield dict(zip(_FIELDS, (text, label, share), strict=True))
        reporter.progress("predict", start + len(window), len(texts))
    say_truncated(truncated / len(texts), reporter)


def _writer(out: Path, stream: IO[str]) -> Callable[[Row], object]:
    if out.suffix == ".csv":
        table = csv.DictWriter(stream, _FIELDS, lineterminator="\n")
        table.writeheader()
        return table.writerow
    return lambda row: stream.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def _whole_file(out: Path) -> Iterator[IO[str]]:
    """A text file that appears under its name only when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, so that two writers do not meet; "x" (not tempfile) for the usual mode.
    partial = out.with_name(f".{out.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("x", encoding="utf-8", newline="") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
