"""The embedded data set: a seeded generator of phone-assistant commands, English and Chinese.

A command is a phrasing with slot values put in, inside a wrapper such as "could you ...". Each of
the three belongs to one split only (the bare wrapper apart), so a test row shows nothing that
training has shown. Out-of-scope rows carry the label `oos`.

The grammar tables (`_commands_en.py` ...) are text: `@name` opens an entry, a line `train`,
`validation` or `test` lists its alternatives between ` | `, an indented line continues it. A
phrasing that begins with `!` is an imperative, which has wrappers of its own.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pocketglm.data import (
    _commands_en,
    _commands_zh,
    _heldout_en,
    _heldout_zh,
    _slots_en,
    _slots_zh,
)
from pocketglm.data._actions import ACTIONS, OOS
from pocketglm.errors import UsageError, nearest

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
SIZES = {"train": 4000, "validation": 500, "test": 1000}

_OOS_SHARE = 0.08
_SLOT = re.compile(r"\{(\w+)\}")

# entry -> split -> alternatives
Table = dict[str, dict[str, list[str]]]


@dataclass(frozen=True, slots=True)
class Command:
    """One row: what is said, what is meant, and what the phone does."""

    text: str
    intent: str
    slots: dict[str, str]
    action: str
    language: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """One language's tables."""

    intents: Table
    slots: Table
    wrappers: Table


@functools.cache
def grammar(language: Language) -> Grammar:
    """The phrasings, slot values and wrappers of one language, by split."""
    train, held_out, values = {
        "en": (_commands_en, _heldout_en, _slots_en),
        "zh": (_commands_zh, _heldout_zh, _slots_zh),
    }[language]
    intents = _parse(train.INTENTS + held_out.INTENTS)
    return Grammar(intents, _parse(values.SLOTS), _parse(values.WRAPPERS))


def _parse(text: str) -> Table:
    table: Table = {}
    entry: dict[str, list[str]] = {}
    split = ""
    for line in text.splitlines():
        if line.startswith("@"):
            entry = table.setdefault(line[1:], {})
            continue
        if line and not line.startswith(" "):
            split, _, line = line.partition(" ")
        entry.setdefault(split, []).extend(p for part in line.split("|") if (p := part.strip()))
    return table


def labels(language: str = "en") -> list[str]:
    """The sorted intents; both languages have the same ones, with `oos` among them."""
    return sorted(grammar(_languages(language)[0]).intents)


def action_of(intent: str, slots: Mapping[str, str | Sequence[str]]) -> str:
    """The phone agent's call for an intent, e.g. `do(action="Launch", app="Maps")`.

    Raises:
        UsageError: an intent that does not exist.
    """
    if intent == OOS:
        return 'finish(message="out of scope")'
    if intent not in ACTIONS:
        raise UsageError(f"unknown intent '{intent}'", nearest(intent, ACTIONS))
    return call_of({**ACTIONS[intent], **slots})


def call_of(arguments: Mapping[str, str | Sequence[str]]) -> str:
    """The call with these arguments, each as a JSON value: `do(action="Launch", app="Maps")`."""
    written = (f"{name}={json.dumps(v, ensure_ascii=False)}" for name, v in arguments.items())
    return f"do({', '.join(written)})"


def generate(
    split: str, language: str = "en", seed: int = 0, n: int | None = None
) -> list[Command]:
    """Distinct shuffled rows of one split, as many of each intent as the phrasings allow.

    Args:
        language: "en", "zh", or "both" (`n` rows of each).
        n: rows per language; None is the usual size of the split (`SIZES`).

    Raises:
        UsageError: an unknown split or language, or more rows than the grammar can make.
    """
    if split not in SIZES:
        raise UsageError(f"unknown split '{split}'", nearest(split, SIZES))
    count = SIZES[split] if n is None else n
    rows = [row for one in _languages(language) for row in _generate(split, one, seed, count)]
    random.Random(f"{seed} {split} {language}").shuffle(rows)
    return rows


def write_folder(folder: Path, language: str = "en", seed: int = 0) -> None:
    """Writes {train,validation,test}.jsonl with text, label, slots, action and language."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for row in generate(split, language, seed):
                value = asdict(row)
                value["label"] = value.pop("intent")
                file.write(json.dumps(value, ensure_ascii=False) + "\n")


def _languages(language: str) -> Sequence[Language]:
    if language == "both":
        return LANGUAGES
    for one in LANGUAGES:
        if one == language:
            return (one,)
    raise UsageError(f"unknown language '{language}'", nearest(language, [*LANGUAGES, "both"]))


def _generate(split: str, language: Language, seed: int, n: int) -> list[Command]:
    rng = random.Random(f"{seed} {split} {language} rows")
    tables = grammar(language)
    intents = sorted(set(tables.intents) - {OOS})
    rows: dict[str, Command] = {}

    def add(intent: str) -> bool:
        """One more distinct row of this intent, unless it is as good as used up."""
        for _ in range(30):
            row = _command(rng, tables, split, language, intent)
            if row.text not in rows:
                rows[row.text] = row
                return True
        return False

    wanted = round(n * _OOS_SHARE)
    while len(rows) < wanted and add(OOS):
        pass
    while len(rows) < n:  # round robin, so that intents stay balanced while they last
        intents = [intent for intent in intents if len(rows) < n and add(intent)]
        if not intents:
            break
    if len(rows) < n:
        raise UsageError(
            f"the {language} {split} phrasings make {len(rows)} distinct rows, {n} were asked for",
            f"ask for at most {len(rows)}",
        )
    return list(rows.values())


def _command(
    rng: random.Random, tables: Grammar, split: str, language: Language, intent: str
) -> Command:
    phrasing = rng.choice(tables.intents[intent][split])
    mood = "imperative" if phrasing.startswith("!") else "other"
    names = _SLOT.findall(phrasing)
    slots = {name: rng.choice(tables.slots[name][split]) for name in names}
    text = phrasing.removeprefix("!").format(**slots)
    text = rng.choice(tables.wrappers[mood][split]).format(text)
    slots = {} if intent == OOS else slots
    return Command(text, intent, slots, action_of(intent, slots), language)
