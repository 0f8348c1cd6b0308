"""Reads texts for a language model: plain ones, or a text (`target`) that answers one (`source`).

A row of JSONL or CSV has a text column, or `source` and `target`; a .txt file has one text a line.
Folders, files, splits and the embedded set are those of `readers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pocketglm.contracts import DataOptions
from pocketglm.data import commands
from pocketglm.data.frames import read_frames
from pocketglm.data.readers import (
    EMBEDDED,
    Split,
    file_rows,
    read_rows,
    read_texts,
    split_file,
    text_column_of,
    text_of,
)
from pocketglm.text.frame import prompt


@dataclass(frozen=True, slots=True)
class TextRow:
    """One text. `prompt`: what it answers; None: it stands alone."""

    text: str
    prompt: str | None = None

    @property
    def label(self) -> str:
        return ""


def read_text_rows(options: DataOptions, split: Split, *, training: bool = False) -> list[TextRow]:
    """The texts of one split; see `readers.read_split` for the splits and `training`.

    A plain text that is blank, as between paragraphs, is no row.

    Raises:
        DataError: no such data, or a row without a text.
    """
    return read_rows(options, split, _read_file, _embedded, training=training)


def vocabulary_texts(path: Path, text_column: str = "text") -> list[str]:
    """What to train a tokenizer on: the texts of a file, labelled or not, or of the train split of
    a folder or of the embedded set; commands as a decoder will read them, and of a file of commands
    those that training takes.

    Raises:
        DataError: no such data, or a row without a text.
    """
    options = DataOptions(path, text_column)
    embedded = path.name == str(path) and path.name in EMBEDDED and not path.exists()
    if path.suffix == ".txt":
        return read_texts(path)
    file = split_file(path, "train") if path.is_dir() else path
    if embedded or "slots" in next(file_rows(file))[1]:
        rows = read_frames(options, "train", training=True)
        return [prompt(row.text) for row in rows]
    texts = read_text_rows(options, "train")
    return [text for row in texts for text in (row.prompt, row.text) if text is not None]


def _embedded(row: commands.Command) -> TextRow:
    return TextRow(row.text)


def _read_file(path: Path, options: DataOptions) -> list[TextRow]:
    if path.suffix == ".txt":
        return [TextRow(text) for text in read_texts(path)]
    rows: list[TextRow] = []
    column, paired = options.text_column, False
    for line, row in file_rows(path):
        if not rows:  # the first row decides for the file
            column = text_column_of(row, column)
            paired = column not in row and {"source", "target"} <= set(row)
        if paired:
            source, target = (text_of(row, key, path, line) for key in ("source", "target"))
            rows.append(TextRow(target, source))
        elif column not in row or str(row[column]).strip():
            rows.append(TextRow(text_of(row, column, path, line)))
    return rows
