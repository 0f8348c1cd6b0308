"""Leaves tokens out of a tokenizer and numbers the others anew, in their order; torch-free.

`trim` keeps what a corpus uses, what that needs (`_vocabularies.py` says why no more is needed),
all special tokens, and what spells any other text: the 256 bytes where the vocabulary has them,
single characters where it has not. Then it encodes and decodes every text of the corpus with both
tokenizers and compares. A text that divides otherwise brings its pieces back; if that does not
help, `trim` fails. Texts outside the corpus may become more tokens, or unknown ones: `measure` says
how many.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from pydantic import Field

from pocketglm.artifacts.checkpoint import read_json
from pocketglm.contracts import Config, Ids
from pocketglm.errors import UnsupportedError, WorkError
from pocketglm.text._renumber import model_of, renumbered, renumbered_config, rewritten, side_files
from pocketglm.text._vocabularies import refusal, vocabulary_of
from pocketglm.text.tokenizer import Tokenizer

__all__ = [
    "Choice",
    "Comparison",
    "Trimmed",
    "Unseen",
    "compare",
    "measure",
    "reasons",
    "renumbered_config",
    "rewritten",
    "trim",
]

_CHUNK = 1024  # texts in memory as tokens at a time
_ROUNDS = 3
_RESERVED = re.compile(r"[\[<].+[\]>]")  # [unused7], <extra_id_7>


class Choice(Config):
    """Which tokens stay; `docs/extensions.md` is generated from the descriptions."""

    min_count: int = Field(
        1, ge=1, description="least uses in the corpus; above 1, some of its texts may change"
    )
    max_size: int | None = Field(
        None, ge=1, description="most tokens to keep, the most used first; default: as needed"
    )
    fallback: Literal["characters", "seen", "none"] = Field(
        "characters",
        description="single characters that stay to spell unseen words, where the tokenizer has no "
        "bytes for that: all, those of the corpus and ASCII, or the corpus' tokens alone",
    )
    keep_numbers: bool = Field(False, description="keep all tokens that are digits")
    extra: int = Field(
        0, ge=0, description="further tokens to keep, the first of the vocabulary, for unseen texts"
    )
    pad_to_multiple: int = Field(
        32, ge=1, description="further tokens stay until the number is a multiple of this"
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """The corpus under both tokenizers.

    changed: texts with a token that `min_count` or `max_size` left out; lost: those of them that
    no longer decode to the same. broken: texts without such a token that differ all the same.
    """

    texts: int
    changed: int
    lost: int
    broken: list[str]


@dataclass(frozen=True, slots=True)
class Unseen:
    """Other texts under both tokenizers; special tokens around a text do not count."""

    texts: int
    same: int
    tokens_before: int
    tokens: int
    unknown_before: int
    unknown: int


@dataclass(frozen=True, slots=True)
class Trimmed:
    """`kept`: old ids, ascending [V]; a token's new id is its place there. files: name -> text.

    dropped: files of the old tokenizer that are not to be copied. tokens: of the corpus.
    """

    kept: Ids
    files: dict[str, str]
    dropped: tuple[str, ...]
    old: Tokenizer
    new: Tokenizer
    corpus: Comparison
    tokens: int


def reasons(folder: Path) -> list[str]:
    """Why the tokenizer of a model folder cannot be trimmed; CheckpointError if there is none."""
    Tokenizer.load(folder)
    reason = refusal(model_of(read_json(folder / "tokenizer.json")))
    return [reason] if reason else []


def trim(
    folder: Path, texts: Iterable[str], choice: Choice, rows: int, pinned: Iterable[int] = ()
) -> Trimmed:
    """The tokenizer of a model folder, with the tokens that `texts` use.

    Args:
        rows: of the model's embedding; those without a token go, or fill `pad_to_multiple` up.
        pinned: ids that stay, whatever the texts are.

    Raises:
        CheckpointError: the tokenizer cannot be read, or has ids beyond `rows`.
        UnsupportedError: it is of an unknown kind, or `max_size` is too small.
        DataError: a text is not Unicode.
        WorkError: a text of the corpus encodes or decodes otherwise.
    """
    old = Tokenizer.load(folder)
    old.check_vocabulary(rows, folder)
    data = read_json(folder / "tokenizer.json")
    if reason := refusal(model_of(data)):
        raise UnsupportedError(f"{folder} cannot be trimmed:", [reason])
    corpus = list(dict.fromkeys(texts))
    counts = count_tokens(old, corpus, rows)
    chooser = _Chooser(folder, data, old, counts, choice)
    kept = chooser.choose(pinned)
    for _ in range(_ROUNDS):
        ids = np.array(sorted(chooser.filled(kept)), np.int64)
        content = rewritten(data, ids)
        new = _opened(content, old, ids)
        found = compare(old, new, ids, corpus)
        more = chooser.tried(found.broken) - kept
        if not found.broken:
            files, dropped = side_files(folder, content, ids)
            tokens = int(counts.sum())
            return Trimmed(ids, files, dropped, old, new, found, tokens)
        kept = chooser.within_limit(kept | more)
    raise WorkError(
        f"{len(found.broken)} texts of the corpus differ after trimming, such as "
        f"{found.broken[0][:60]!r}",
        "this tokenizer.json divides texts in a way that trimming does not know: do not trim it",
    )


# --- which tokens --------------------------------------------------------------------------------


def count_tokens(tokenizer: Tokenizer, texts: Sequence[str], rows: int) -> Ids:
    """How often each token stands in the texts, with the special tokens around them, [rows]."""
    counts = np.zeros(rows, np.int64)
    for chunk in _chunks(texts):
        ids = [token for row in tokenizer.encode_all(chunk) for token in row]
        counts += np.bincount(np.array(ids, np.int64), minlength=rows)
    return counts


class _Chooser:
    """Decides what stays of one tokenizer."""

    def __init__(
        self, folder: Path, data: dict[str, Any], old: Tokenizer, counts: Ids, choice: Choice
    ) -> None:
        self._vocabulary = vocabulary_of(model_of(data))
        self._special = _special_ids(folder, data, old)
        self._named = set(old.inner.get_vocab(with_added_tokens=True).values())
        self._old, self._counts, self._choice = old, counts, choice
        self._limit = len(counts)
        if (size := choice.max_size) is not None:
            multiple = choice.pad_to_multiple
            self._limit = size // multiple * multiple or size

    def choose(self, pinned: Iterable[int]) -> set[int]:
        """The ids that must stay, and those that the corpus uses often enough."""
        vocabulary, counts = self._vocabulary, self._counts
        used = {int(token) for token in np.flatnonzero(counts)}
        must = self._special | vocabulary.fixed | set(pinned) | self._spelling(used)
        if self._choice.keep_numbers:
            digits = (
                t for name, t in vocabulary.tokens.items() if vocabulary.plain(name).isdigit()
            )
            must.update(digits)
        kept = self.within_limit(self._closed(must))
        for token in self._by_use(used - kept):
            needed = vocabulary.needs(token) - kept
            if counts[token] >= self._choice.min_count and len(kept) + len(needed) <= self._limit:
                kept |= needed
        return kept

    def _spelling(self, used: set[int]) -> set[int]:
        characters = self._vocabulary.characters()
        if self._choice.fallback == "characters":
            return set(characters)
        if self._choice.fallback == "none":
            return set()
        names = (n for n, token in self._vocabulary.tokens.items() if token in used)
        seen = {*string.printable, *(c for name in names for c in self._vocabulary.plain(name))}
        return {token for token, character in characters.items() if character in seen}

    def _closed(self, ids: set[int]) -> set[int]:
        return ids.union(*(self._vocabulary.needs(token) for token in ids))

    def _by_use(self, ids: Iterable[int]) -> list[int]:
        return sorted(ids, key=lambda token: (-int(self._counts[token]), token))

    def within_limit(self, ids: set[int]) -> set[int]:
        """`ids`, or UnsupportedError if they are more than `max_size` allows."""
        if len(ids) > self._limit:
            raise UnsupportedError(
                f"max_size {self._choice.max_size}: special tokens, bytes or characters, and what "
                f"else must stay, are {len(ids)} tokens already",
                hint="raise max_size, or set fallback to seen or none",
            )
        return ids

    def filled(self, ids: set[int]) -> set[int]:
        """`ids` and `extra` more, up to a multiple: what the corpus uses, the first tokens of the
        vocabulary, and in the end rows of the embedding that have no token."""
        multiple = self._choice.pad_to_multiple
        target = -(-(len(ids) + self._choice.extra) // multiple) * multiple
        target = min(target, self._limit)
        vocabulary, found = self._vocabulary, set(ids)
        # Letters of strange scripts and reserved names come first in many vocabularies.
        last = {t for name, t in vocabulary.tokens.items() if _RESERVED.fullmatch(name)}
        last.update(vocabulary.characters())
        nameless = (token for token in range(len(self._counts)) if token not in self._named)
        for token in (*self._by_use(self._named - last), *self._by_use(last), *nameless):
            if len(found) == target:
                break
            needed = vocabulary.needs(token) - found
            if len(found) + len(needed) <= target:
                found |= needed
        return found

    def tried(self, texts: Iterable[str]) -> set[int]:
        """Every token that encoding the texts goes through."""
        normalizer, splitter = self._old.inner.normalizer, self._old.inner.pre_tokenizer
        found: set[int] = set()
        for text in texts:
            normal = normalizer.normalize_str(text) if normalizer else text
            words = splitter.pre_tokenize_str(normal) if splitter else [(normal, (0, 0))]
            found = found.union(*(self._vocabulary.tried(word) for word, _ in words))
        return self._closed(found)


def _special_ids(folder: Path, data: dict[str, Any], tokenizer: Tokenizer) -> set[int]:
    """The ids that tokenizer.json names, and those of tokens that the files beside it name."""
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    renumbered(data, note)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            for token in _strings(_token_values(read_json(folder / name))):
                if (known := tokenizer.inner.token_to_id(token)) is not None:
                    found.add(known)
    return found


def _token_values(config: Mapping[str, Any]) -> list[Any]:
    lists = ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder")
    return [value for key, value in config.items() if key.endswith("_token") or key in lists]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


# --- proof ---------------------------------------------------------------------------------------


def compare(old: Tokenizer, new: Tokenizer, kept: Ids, texts: Sequence[str]) -> Comparison:
    """Encode and decode every text with both; ids of `old` become those of `new` by `kept`."""
    places = _places(old, kept)
    changed, lost, broken = 0, 0, []
    for chunk in _chunks(texts):
        before, after = old.encode_all(chunk), new.encode_all(chunk)
        mapped = [[int(places[token]) for token in row] for row in before]
        decoded = zip(_decoded(old, before), _decoded(new, after), strict=True)
        for text, a, b, (was, is_now) in zip(chunk, mapped, after, decoded, strict=True):
            if -1 in a:
                changed += 1
                lost += was != is_now
            elif a != b or was != is_now:
                broken.append(text)
    return Comparison(len(texts), changed, lost, broken)


def measure(trimmed: Trimmed, texts: Sequence[str]) -> Unseen:
    """What becomes of texts that were not used for the choice."""
    old, new = trimmed.old, trimmed.new
    places = _places(old, trimmed.kept)
    same, tokens, unknown = 0, [0, 0], [0, 0]
    for chunk in _chunks(texts):
        rows = [tokenizer.encode_all(chunk, special=False) for tokenizer in (old, new)]
        for side, tokenizer in enumerate((old, new)):
            tokens[side] += sum(map(len, rows[side]))
            unknown[side] += sum(token == tokenizer.unk_id for row in rows[side] for token in row)
        same += sum(
            [int(places[token]) for token in a] == b for a, b in zip(rows[0], rows[1], strict=True)
        )
    return Unseen(len(texts), same, tokens[0], tokens[1], unknown[0], unknown[1])


def _places(old: Tokenizer, kept: Ids) -> Ids:
    """New ids by old ones; -1: left out."""
    places = np.full(max(old.size, int(kept[-1]) + 1), -1, np.int64)
    places[kept] = np.arange(len(kept))
    return places


def _decoded(tokenizer: Tokenizer, rows: list[list[int]]) -> list[str]:
    return list(tokenizer.inner.decode_batch(rows, skip_special_tokens=False))


def _opened(content: Mapping[str, Any], old: Tokenizer, kept: Ids) -> Tokenizer:
    """The new tokenizer as its reader sees it, which must number the tokens as intended."""
    new = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), old.config)
    places = _places(old, kept)
    before = old.inner.get_vocab(with_added_tokens=True)
    expected = {name: int(places[token]) for name, token in before.items() if places[token] >= 0}
    if new.inner.get_vocab(with_added_tokens=True) != expected:
        raise UnsupportedError(
            "the tokenizer's library numbers its added tokens otherwise than tokenizer.json does",
            hint="does tokenizer.json belong to this model? download it again",
        )
    return new


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK))
