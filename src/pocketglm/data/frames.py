"""Reads commands with their meaning: intent and slots. An error names the file and the line.

A row is one of
    {"tokens": ["wake", "me", "at", "7"], "slots": ["O", "O", "O", "B-time"], "intent": "alarm"}
    {"text": "wake me at 7", "slots": {"time": "7"}, "intent": "alarm"}
    {"text": "wake me at 7", "slots": [["time", "7"]], "label": "alarm", "action": "..."}
BIO tags: Ramshaw and Marcus 1995, arXiv:cmp-lg/9505040. A value is a piece of the text that begins
and ends between two words; values do not overlap. The names `commands`, `commands-en` and
`commands-zh` mean the embedded set; folders, files and splits are those of `readers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketglm.artifacts.manifest import CommandGrammar
from pocketglm.contracts import DataOptions
from pocketglm.data import commands
from pocketglm.data._actions import ACTIONS, OOS
from pocketglm.data.readers import (
    Split,
    file_rows,
    label_column_of,
    label_of,
    read_rows,
    separator,
    text_column_of,
    text_of,
)
from pocketglm.errors import DataError
from pocketglm.text.frame import Frame, clean, is_boundary

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FrameRow:
    """One command. `text` is one line; `spans` are the first and the last character but one of
    each slot's value in it, ascending. `action`: what the phone does. `language`: "" if unknown.
    """

    text: str
    frame: Frame
    spans: tuple[Span, ...]
    action: str
    language: str = ""

    @property
    def label(self) -> str:
        return self.frame.intent


def read_frames(options: DataOptions, split: Split, *, training: bool = False) -> list[FrameRow]:
    """The commands of one split; see `readers.read_split` for the splits and `training`.

    Raises:
        DataError: no such data, or a row that cannot be used: no slots, a value that is not in the
            text, BIO tags that begin with I-, as many tags as tokens not.
    """
    return read_rows(options, split, _read_file, _embedded, training=training)


def grammar_of(rows: Iterable[FrameRow]) -> CommandGrammar:
    """Each intent with the slots that it has in the rows, sorted."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.frame.intent, set()).update(name for name, _ in row.frame.slots)
    return CommandGrammar(intents={intent: sorted(found[intent]) for intent in sorted(found)})


def action(intent: str, slots: Iterable[tuple[str, str]]) -> str:
    """What a phone agent does: that of the embedded set where it has the intent, else
    `do(action="Intent", slot="value")`. A slot that comes more than once has a list of values.
    """
    values: dict[str, list[str]] = {}
    for name, value in slots:
        values.setdefault(name, []).append(value)
    arguments = {name: found[0] if len(found) == 1 else found for name, found in values.items()}
    if intent == OOS or intent in ACTIONS:
        return commands.action_of(intent, arguments)
    return commands.call_of({"action": intent, **arguments})


# --- rows ----------------------------------------------------------------------------------------


def _embedded(row: commands.Command) -> FrameRow:
    text = clean(row.text)
    slots = list(row.slots.items())
    placed = place(text, slots)
    return FrameRow(
        text,
        Frame(row.intent, tuple(slot for _, slot in placed)),
        tuple(span for span, _ in placed),
        row.action,
        row.language,
    )


def _read_file(path: Path, options: DataOptions) -> list[FrameRow]:
    rows: list[FrameRow] = []
    text, label = options.text_column, options.label_column
    for line, row in file_rows(path):
        if not rows:  # the first row decides for the file
            text, label = text_column_of(row, text), label_column_of(row, label)
        try:
            rows.append(_row(row, text, label, path, line))
        except _BadRowError as error:
            raise DataError(str(error), error.hint, path=path, line=line) from error
    return rows


class _BadRowError(Exception):
    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def _row(row: dict[str, Any], column: str, label: str, path: Path, line: int) -> FrameRow:
    text, intent = clean(text_of(row, column, path, line)), label_of(row, label, path, line)
    slots = row.get("slots")
    if isinstance(slots, str):  # CSV
        slots = _json(slots)
    tags = [tag for tag in slots if isinstance(tag, str)] if isinstance(slots, list) else []
    if isinstance(slots, list) and tags and len(tags) == len(slots):
        text, placed = _tagged(row.get("tokens"), tags)
    else:
        placed = place(text, _pairs(slots))
    for kind, name in (("intent", intent), *(("slot", name) for _, (name, _) in placed)):
        if not name.isprintable() or "|" in name or name != name.strip() or not name:
            raise _BadRowError(f"the {kind} {name!r} cannot be written", "use letters, digits, _")
    frame = Frame(intent, tuple(slot for _, slot in placed))
    said, language = row.get("action"), row.get("language")
    return FrameRow(
        text,
        frame,
        tuple(span for span, _ in placed),
        said if isinstance(said, str) else action(intent, frame.slots),
        language if isinstance(language, str) else "",
    )


def _json(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError as error:
        raise _BadRowError(
            f"the slots are {text[:60]}, which is no JSON", 'write {"time": "7"}'
        ) from error


def _pairs(slots: Any) -> list[tuple[str, str]]:
    """(name, value) of every form of `slots` that is not BIO tags."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(slots, dict):
        for name, values in slots.items():
            pairs.extend((name, v) for v in (values if isinstance(values, list) else [values]))
    elif isinstance(slots, list) and all(isinstance(s, list) and len(s) == 2 for s in slots):
        pairs = [(name, value) for name, value in slots]
    else:
        raise _BadRowError(
            "no column 'slots'" if slots is None else f"the slots are {json.dumps(slots)[:60]}",
            'write {"time": "7"}, [["time", "7"]] or, beside tokens, BIO tags; {} means no slot',
        )
    for name, value in pairs:
        if not isinstance(name, str) or not isinstance(value, str) or not clean(value):
            raise _BadRowError(
                f"slot {json.dumps(name)[:60]} has the value {json.dumps(value)[:60]}",
                "name and value are texts; leave out a slot that has no value",
            )
    return [(name, clean(value)) for name, value in pairs]


def place(text: str, slots: Iterable[tuple[str, str]]) -> list[tuple[Span, tuple[str, str]]]:
    """Where each slot's value stands in the one-line text, in the order of the text.

    Where a value stands more than once it is the first place that no longer value has taken.
    """
    placed: list[tuple[Span, tuple[str, str]]] = []
    for name, value in sorted(slots, key=lambda slot: -len(slot[1])):
        spans = occurrences(text, value)
        if not spans:
            raise _within(name, value, text)
        free = [(a, b) for a, b in spans if all(b <= c or d <= a for (c, d), _ in placed)]
        if not free:
            raise _BadRowError(
                f"the value of slot '{name}', {value!r}, overlaps with another in {text[:60]!r}",
                "keep one of the two slots",
            )
        placed.append((free[0], (name, value)))
    return sorted(placed)


def occurrences(text: str, value: str) -> list[Span]:
    """Where `value` stands in `text` as whole words."""
    spans = []
    start = text.find(value)
    while start >= 0:
        if is_boundary(text, start) and is_boundary(text, start + len(value)):
            spans.append((start, start + len(value)))
        start = text.find(value, start + 1)
    return spans


def _tagged(tokens: Any, tags: list[str]) -> tuple[str, list[tuple[Span, tuple[str, str]]]]:
    """The text of tokens with BIO tags, and its slots."""
    if not isinstance(tokens, list) or not all(isinstance(t, str) and t.strip() for t in tokens):
        raise _BadRowError(
            f"BIO tags, and the tokens are {json.dumps(tokens, ensure_ascii=False)[:60]}",
            'write "tokens": ["wake", "me"], none of them blank',
        )
    if len(tokens) != len(tags):
        raise _BadRowError(
            f"{len(tokens)} tokens and {len(tags)} tags",
            "each token has one tag: O, B-name, I-name",
        )
    tokens = [clean(token) for token in tokens]
    between = separator(tokens)
    spans: list[tuple[str, int, int]] = []  # name, start, end
    start, open_slot = 0, ""
    for index, (token, tag) in enumerate(zip(tokens, tags, strict=True), 1):
        kind, _, name = tag.partition("-")
        if (kind, name) != ("O", "") and (kind not in ("B", "I") or not name):
            raise _BadRowError(f"token {index} has the tag {tag!r}", "tags are O, B-name, I-name")
        if kind == "B":
            spans.append((name, start, start + len(token)))
        elif kind == "I":
            if name != open_slot:
                raise _BadRowError(
                    f"token {index} has the tag {tag!r}, and no {name} goes on there",
                    f"the first token of a value has the tag B-{name}",
                )
            spans[-1] = (name, spans[-1][1], start + len(token))
        open_slot = name
        start += len(token) + len(between)
    text = between.join(tokens)
    for name, a, b in spans:
        if not (is_boundary(text, a) and is_boundary(text, b)):
            raise _within(name, text[a:b], text)
    return text, [((a, b), (name, text[a:b])) for name, a, b in spans]


def _within(name: str, value: str, text: str) -> _BadRowError:
    what = "within a word of" if value in text else "not in"
    return _BadRowError(
        f"the value of slot '{name}', {value!r}, is {what} the text {text[:60]!r}",
        "a value is a piece of the text, letter by letter, and of whole words",
    )
