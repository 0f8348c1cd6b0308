"""Reads labelled rows from JSONL (also .gz) and CSV; an error names the file and the line.

A data folder holds `{train,validation,test}.jsonl[.gz]` or `.csv`. A single file serves for any
split; for training it is divided by a hash of the text, nine parts train and one validation, so
that equal texts stay on one side. Where no such path exists, the names `commands`, `commands-en`
and `commands-zh` mean the embedded set.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pocketglm.contracts import DataOptions
from pocketglm.data import commands
from pocketglm.errors import DataError, nearest

Split = Literal["train", "validation", "test"]

EMBEDDED = {"commands": "both", "commands-en": "en", "commands-zh": "zh"}
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv")

_VALIDATION_SHARE = 0.1
_LIMIT_SEED = 0

# line number from 1, row
Row = tuple[int, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled row."""

    text: str
    label: str


def read_split(options: DataOptions, split: Split, *, training: bool = False) -> list[Example]:
    """The rows of one split.

    Columns: where the text column is missing, a list column `tokens` is joined (with blanks, or
    without where every token is a single Chinese character); where the label column is missing,
    `intent` is the label. `limit` keeps the first rows after a shuffle with a fixed seed, so that
    a file sorted by label still gives many labels.

    Args:
        training: the rows are for training, which divides a single file 90/10 into train and
            validation (which may be empty for a few rows); without it a single file is returned
            whole, whatever the split.

    Raises:
        DataError: nothing at the path, no such split in the folder, or rows that cannot be used.
    """
    path = options.path
    if path.name == str(path) and path.name in EMBEDDED and not path.exists():
        made = commands.generate(split, EMBEDDED[path.name])
        return _limited([Example(row.text, row.intent) for row in made], options.limit)
    if path.is_dir():
        return _limited(_read_examples(_split_file(path, split), options), options.limit)
    examples = _read_examples(path, options)
    if training:
        train = [e for e in examples if not _is_held_out(e.text)]
        known = {e.label for e in train}
        held_out = [e for e in examples if _is_held_out(e.text)]
        # A label that only held-out rows have would never be trained.
        train += [e for e in held_out if e.label not in known]
        examples = train if split == "train" else [e for e in held_out if e.label in known]
    return _limited(examples, options.limit)


def read_texts(path: Path, text_column: str = "text") -> list[str]:
    """The texts of a file, labelled or not: JSONL[.gz], CSV, or plain text, one a line (.txt).

    Raises:
        DataError: the file is missing, empty or malformed, or has no such column.
    """
    if path.suffix == ".txt":
        texts = [line.strip() for _, line in _lines(path) if line.strip()]
        if not texts:
            raise _empty(path)
        return texts
    return [_text(row, text_column, path, line) for line, row in _rows(path)]


# --- finding the file --------------------------------------------------------------------------


def _split_file(folder: Path, split: Split) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise DataError(
        f"no {split} split in this folder; it holds: {found}",
        f"add {split}.jsonl, {split}.jsonl.gz or {split}.csv, or pass one file",
        path=folder,
    )


def _is_held_out(text: str) -> bool:
    return sha256(text.encode()).digest()[0] < 256 * _VALIDATION_SHARE


def _limited(examples: list[Example], limit: int | None) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    return random.Random(_LIMIT_SEED).sample(examples, len(examples))[:limit]


# --- rows --------------------------------------------------------------------------------------


def _read_examples(path: Path, options: DataOptions) -> list[Example]:
    return [
        Example(
            _text(row, options.text_column, path, line),
            _label(row, options.label_column, path, line),
        )
        for line, row in _rows(path)
    ]


def _rows(path: Path) -> Iterator[Row]:
    """The rows of a file, at least one, each a mapping."""
    if not path.is_file():
        raise DataError(
            f"{path} is not there",
            f"give a folder, a .jsonl[.gz] or .csv file, or one of {', '.join(EMBEDDED)}",
        )
    if not path.name.endswith(SUFFIXES):
        raise DataError(
            f"unknown kind of file '{path.name}'", "use .jsonl, .jsonl.gz or .csv", path=path
        )
    read = _csv_rows if path.suffix == ".csv" else _json_rows
    empty = True
    for row in read(path):
        empty = False
        yield row
    if empty:
        raise _empty(path)


def _empty(path: Path) -> DataError:
    return DataError(
        "the file has no rows", 'one row a line, e.g. {"text": ..., "label": ...}', path=path
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their number; decoded one by one, so that a bad byte has its line."""
    if not path.is_file():
        raise DataError(f"{path} is not there", "check the path")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: {error.reason}, byte 0x{error.object[error.start]:02x}",
            "save the file as UTF-8",
            path=path,
            line=number,
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot be read: {error}", "write or download it again", path=path
        ) from error


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"malformed JSON: {error}", "one JSON object a line", path=path, line=number
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"a {type(row).__name__} instead of an object: {line.strip()[:60]}",
                'a row looks like {"text": ..., "label": ...}',
                path=path,
                line=number,
            )
        yield number, row


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    try:
        header = reader.fieldnames or []
        if any(not name.strip() for name in header):
            raise DataError(
                f"the header has an unnamed column: {', '.join(header)}",
                "the first line of a CSV file names its columns",
                path=path,
                line=1,
            )
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"the row has {'more' if None in row else 'fewer'} fields than the header's "
                    f"{len(header)}",
                    "put quotes round a text that holds commas",
                    path=path,
                    line=reader.line_num,
                )
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise DataError(
            f"malformed CSV: {error}", "check the quotes", path=path, line=reader.reader.line_num
        ) from error


def _text(row: dict[str, Any], column: str, path: Path, line: int) -> str:
    value = row.get(column)
    tokens = row.get("tokens")
    if column not in row and isinstance(tokens, list) and all(isinstance(t, str) for t in tokens):
        value = _join(tokens)
    elif column not in row:
        raise _missing("text", column, row, path, line)
    if not isinstance(value, str):
        raise DataError(
            f"the text in column '{column}' is {json.dumps(value)[:60]}, not a string",
            "put the text in quotes",
            path=path,
            line=line,
        )
    if not value.strip():
        raise DataError(
            f"the text in column '{column}' is empty", "remove the row", path=path, line=line
        )
    return value


def _join(tokens: Iterable[str]) -> str:
    tokens = list(tokens)
    chinese = any("\u4e00" <= token[:1] <= "\u9fff" and len(token) == 1 for token in tokens)
    return "".join(tokens) if chinese else " ".join(tokens)


def _label(row: dict[str, Any], column: str, path: Path, line: int) -> str:
    name = column if column in row else "intent"
    if name not in row:
        raise _missing("label", column, row, path, line)
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):  # class ids are common
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"the label in column '{name}' is {json.dumps(value)[:60]}",
            "a label is a non-empty string or an integer",
            path=path,
            line=line,
        )
    return value


def _missing(kind: str, column: str, row: dict[str, Any], path: Path, line: int) -> DataError:
    hint = f"{nearest(column, row)}; choose one with --{kind}-column"
    if path.suffix == ".csv":
        hint += " (the first line of a CSV file must name its columns)"
    return DataError(
        f"no column '{column}'; found: {', '.join(row) or 'none'}", hint, path=path, line=line
    )
