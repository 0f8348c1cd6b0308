"""Reads labelled rows from JSONL (also .gz) and CSV; an error names the file and the line.

A data folder holds `{train,validation,test}.jsonl[.gz]` or `.csv`. A single file serves for any
split; for training it is divided by a hash of the text, eight parts train, one validation and one
test, so that equal texts stay together. Where no such path exists, the names `commands`,
`commands-en` and `commands-zh` mean the embedded set.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pocketglm.contracts import DataOptions
from pocketglm.data import commands
from pocketglm.errors import DataError, nearest

Split = Literal["train", "validation", "test"]

EMBEDDED = {"commands": "both", "commands-en": "en", "commands-zh": "zh"}
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv")

# of a single file, by the last digit of the hash; else train
_HELD_OUT: dict[int, Split] = {0: "validation", 1: "test"}
_LIMIT_SEED = 0
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}

# line number from 1, row
Row = tuple[int, dict[str, Any]]


class Labelled(Protocol):
    """What a row must have to be divided into splits."""

    @property
    def text(self) -> str: ...
    @property
    def label(self) -> str: ...


T = TypeVar("T", bound=Labelled)


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled row."""

    text: str
    label: str


def read_split(options: DataOptions, split: Split, *, training: bool = False) -> list[Example]:
    """The rows of one split.

    Columns: a file without `text` may have a list column `tokens`, which is joined (with blanks,
    or without where tokens are single Chinese characters); one without `label` may have `intent`.
    A column of another name must be there. `limit` keeps the first rows after a shuffle with a
    fixed seed, so that a file sorted by label still gives many labels.

    Args:
        training: the rows are for training, which divides a single file 80/10/10 into train,
            validation and test (the latter may be empty for a few rows); without it, and without
            `options.divided_by`, a single file is returned whole, whatever the split.

    Raises:
        DataError: nothing at the path, no such split in the folder, or rows that cannot be used.
    """
    return read_rows(options, split, _read_examples, _embedded_example, training=training)


def _embedded_example(row: commands.Command) -> Example:
    return Example(row.text, row.intent)


def read_rows(
    options: DataOptions,
    split: Split,
    read_file: Callable[[Path, DataOptions], list[T]],
    embedded: Callable[[commands.Command], T],
    *,
    training: bool = False,
) -> list[T]:
    """`read_split` for rows of any kind.

    read_file: the rows of one file. embedded: a row of the embedded set.
    """
    path = options.path
    if path.name == str(path) and path.name in EMBEDDED and not path.exists():
        made = commands.generate(split, EMBEDDED[path.name])
        return _limited([embedded(row) for row in made], options.limit)
    if path.is_dir():
        return _limited(read_file(split_file(path, split), options), options.limit)
    rows = read_file(path, options)
    if training or options.divided_by:
        keys: Sequence[Labelled] = rows
        if options.divided_by not in (None, (options.text_column, options.label_column)):
            text, label = options.divided_by
            keys = read_file(path, replace(options, text_column=text, label_column=label))
        rows = [row for row, part in zip(rows, _parts(keys), strict=True) if part == split]
        if not rows and not training:
            raise DataError(
                f"the model was trained on this file, and no row was held out for {split}",
                "give rows that it was not trained on",
                path=path,
            )
    return _limited(rows, options.limit)


def read_texts(path: Path, text_column: str = "text") -> list[str]:
    """The texts of a file, labelled or not: JSONL[.gz], CSV, or plain text, one a line (.txt).

    Raises:
        DataError: the file is missing, empty or malformed, or has no such column.
    """
    texts: list[str] = []
    if path.suffix == ".txt":
        texts = [line.strip() for _, line in _lines(path) if line.strip()]
        if not texts:
            raise _empty(path)
        return texts
    for line, row in file_rows(path):
        if not texts:
            text_column = text_column_of(row, text_column)
        texts.append(text_of(row, text_column, path, line))
    return texts


# --- finding the file --------------------------------------------------------------------------


def split_file(folder: Path, split: Split) -> Path:
    """The file of a folder that holds a split; DataError where there is none."""
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise DataError(
        f"no {split} split in this folder; it holds: {found}",
        f"add {split}.jsonl, {split}.jsonl.gz or {split}.csv, or pass one file",
        path=folder,
    )


def _parts(examples: Sequence[Labelled]) -> list[Split]:
    """The split of each row of a single file."""
    hashes = (sha256(e.text.encode(errors="surrogatepass")).hexdigest() for e in examples)
    parts: list[Split] = [_HELD_OUT.get(int(digits, 16) % 10, "train") for digits in hashes]
    known = {e.label for e, part in zip(examples, parts, strict=True) if part == "train"}
    # A label that only held-out rows have would never be trained.
    given_back = {e.text for e in examples if e.label not in known}
    return ["train" if e.text in given_back else p for e, p in zip(examples, parts, strict=True)]


def _limited(examples: list[T], limit: int | None) -> list[T]:
    if limit is None or limit >= len(examples):
        return examples
    return random.Random(_LIMIT_SEED).sample(examples, len(examples))[:limit]


# --- rows --------------------------------------------------------------------------------------


def _read_examples(path: Path, options: DataOptions) -> list[Example]:
    examples: list[Example] = []
    text, label = options.text_column, options.label_column
    for line, row in file_rows(path):
        if not examples:  # the first row decides for the file
            text, label = text_column_of(row, text), label_column_of(row, label)
        examples.append(Example(text_of(row, text, path, line), label_of(row, label, path, line)))
    return examples


def text_column_of(row: dict[str, Any], asked: str) -> str:
    """`asked`, or `tokens` where the usual column is not there; the first row decides."""
    is_tokens = isinstance(row.get("tokens"), list)
    return "tokens" if asked == "text" and asked not in row and is_tokens else asked


def label_column_of(row: dict[str, Any], asked: str) -> str:
    """`asked`, or `intent` where the usual column is not there; the first row decides."""
    return "intent" if asked == "label" and asked not in row and "intent" in row else asked


def file_rows(path: Path) -> Iterator[Row]:
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
    lines = (line for _, line in _lines(path))
    first = next(lines, "")
    reader = csv.DictReader(itertools.chain([first], lines), strict=True)
    try:
        _check_separator(first, path)
        header = reader.fieldnames or []
        _check_header(header, path)
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


def _check_separator(line: str, path: Path) -> None:
    """Refuse a header that is divided by something else than commas."""
    found = [name for mark, name in _SEPARATORS.items() if mark in line]
    if found and "," not in line:
        raise DataError(
            f"the columns are separated by {found[0]}, not commas: {line.strip()[:60]}",
            "save the file as comma-separated CSV, or as JSONL",
            path=path,
            line=1,
        )


def _check_header(names: Sequence[str], path: Path) -> None:
    """Each column needs a name of its own."""
    shown = ", ".join(names)
    if any(not name.strip() for name in names):
        message = f"the header has an unnamed column: {shown}"
    elif twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        message = f"the header has the column '{twice[0]}' more than once: {shown}"
    else:
        return
    hint = "the first line of a CSV file names its columns, each once"
    raise DataError(message, hint, path=path, line=1)


def text_of(row: dict[str, Any], column: str, path: Path, line: int) -> str:
    """The text in a column, or its joined tokens; DataError if there is none."""
    if column not in row:
        raise _missing("text", column, row, path, line)
    value = row[column]
    if column == "tokens" and isinstance(value, list) and all(isinstance(t, str) for t in value):
        value = join_tokens(value)
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


def join_tokens(tokens: Sequence[str]) -> str:
    """The text that was divided into `tokens`."""
    return separator(tokens).join(tokens)


def separator(tokens: Sequence[str]) -> str:
    """What stood between tokens: nothing if they are Chinese characters rather than words."""
    chinese = ["\u4e00" <= token[:1] <= "\u9fff" for token in tokens]
    single = sum(c and len(t) == 1 for c, t in zip(chinese, tokens, strict=True))
    words = sum(t[:1].isalpha() and not c for c, t in zip(chinese, tokens, strict=True))
    return "" if single > words else " "


def label_of(row: dict[str, Any], column: str, path: Path, line: int) -> str:
    """The label in a column, without blanks around it; DataError if there is none."""
    if column not in row:
        raise _missing("label", column, row, path, line)
    value = row[column]
    if isinstance(value, int) and not isinstance(value, bool):  # class ids are common
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"the label in column '{column}' is {json.dumps(value)[:60]}",
            "a label is a non-empty string or an integer",
            path=path,
            line=line,
        )
    return value.strip()


def _missing(kind: str, column: str, row: dict[str, Any], path: Path, line: int) -> DataError:
    hint = f"{nearest(column, row)}; choose one with --{kind}-column"
    if path.suffix == ".csv":
        hint += " (the first line of a CSV file must name its columns)"
    return DataError(
        f"no column '{column}'; found: {', '.join(row) or 'none'}", hint, path=path, line=line
    )
