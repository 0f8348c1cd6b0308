"""The vocabularies of `tokenizer.json` by kind: which tokens need which, and how to leave some out.

Why leaving tokens out changes nothing for a text whose tokens, and all that they need, stay:

* WordPiece (greedy longest match; Schuster and Nakajima 2012): the longest match was in use, so it
  is still there, and no longer one has come. A word that was unknown may be found now, in other
  pieces; `tried` names the pieces that keep it unknown.
* BPE (Sennrich et al. 2016, arXiv:1508.07909): all merges that built the text's tokens stay, in
  their order. Each step takes the first merge of the list that fits; of a part of the list that
  holds the one taken before, that is the same one.
* Unigram (Kudo 2018, arXiv:1804.10959): the best division is still there, and no better one has
  come, as long as an unknown character costs the same: that depends on the lowest score of all, so
  its token stays.

`text/trim.py` does not rely on it: it compares every text.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from pocketglm.errors import CheckpointError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTES = 256
Pair = tuple[str, str]


class Vocabulary(Protocol):
    """The model's own tokens; added ones (special tokens, mostly) are not its business."""

    tokens: dict[str, int]

    @property
    def fixed(self) -> set[int]:
        """Ids that may not go, whatever the texts are."""

    def needs(self, token: int) -> set[int]:
        """What must be there so that this token can come out: itself, and its parts."""

    def tried(self, word: str) -> set[int]:
        """Every token that encoding a word goes through."""

    def plain(self, token: str) -> str:
        """The token's text, without the marks of beginning and continuation."""

    def characters(self) -> dict[int, str]:
        """Tokens of one character, which spell a word that nothing else is there for."""

    def rewritten(self, new: Mapping[int, int]) -> dict[str, Any]:
        """The model of tokenizer.json with the ids `new` (old id -> new id) alone."""


class WordPiece:
    """Longest match first; a word that does not come out even is unknown."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self._prefix = str(model.get("continuing_subword_prefix", "##"))
        self._longest = int(model.get("max_input_chars_per_word", 100))
        self.tokens: dict[str, int] = model["vocab"]

    @property
    def fixed(self) -> set[int]:
        return _present(self.tokens, [self._model.get("unk_token")])

    def needs(self, token: int) -> set[int]:
        return {token}

    def tried(self, word: str) -> set[int]:
        found: set[int] = set()
        start = 0
        while start < len(word) <= self._longest:
            mark = self._prefix if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if mark + word[start:e] in self.tokens), None)
            if end is None:
                break
            found.add(self.tokens[mark + word[start:end]])
            start = end
        return found

    def plain(self, token: str) -> str:
        return token.removeprefix(self._prefix) if token != self._prefix else token

    def characters(self) -> dict[int, str]:
        return _characters(self)

    def rewritten(self, new: Mapping[int, int]) -> dict[str, Any]:
        return {**self._model, "vocab": _renumbered(self.tokens, new)}


class BPE:
    """Merges in order, over bytes, or over characters with bytes or an unknown token behind."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self.tokens: dict[str, int] = model["vocab"]
        self._prefix = model.get("continuing_subword_prefix") or ""
        self._suffix = model.get("end_of_word_suffix") or ""
        self._rank = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
        self._names = {token: name for name, token in self.tokens.items()}
        self._known: dict[int, set[int]] = {}

    @functools.cached_property
    def _into(self) -> dict[str, list[Pair]]:
        """The merges that make each token."""
        found: dict[str, list[Pair]] = {}
        for pair in self._rank:
            found.setdefault(self._join(pair), []).append(pair)
        return found

    @functools.cached_property
    def _spelled(self) -> set[int]:
        """The 256 bytes, as the letters of byte-level BPE or as <0x00> to <0xFF>; or nothing."""
        byte_level = [name for name in _byte_letters() if name in self.tokens]
        fallback = [name for name in self.tokens if _BYTE.fullmatch(name)]
        for names in (fallback if self._model.get("byte_fallback") else [], byte_level):
            if len(names) == _BYTES:
                return {self.tokens[name] for name in names}
        return set()

    @property
    def fixed(self) -> set[int]:
        return self._spelled | _present(self.tokens, [self._model.get("unk_token")])

    def _join(self, pair: Pair) -> str:
        return pair[0] + pair[1].removeprefix(self._prefix)

    def needs(self, token: int) -> set[int]:
        if token not in self._known:
            name = self._names.get(token, "")
            found = self.tried(name) | {token}
            # Merging its letters leads to it: no other way does, in whatever text it comes.
            whole = name and not self._prefix and not self._suffix and self._merged(name) == [name]
            self._known[token] = found if whole else self._all_ways(token)
        return self._known[token]

    def _all_ways(self, token: int) -> set[int]:
        """The token with the parts of every merge that makes it, their parts, and so on."""
        found, open_names = {token}, [self._names.get(token, "")]
        while open_names:
            for part in (part for pair in self._into.get(open_names.pop(), []) for part in pair):
                if part in self.tokens and self.tokens[part] not in found:
                    found.add(self.tokens[part])
                    open_names.append(part)
        return found

    def tried(self, word: str) -> set[int]:
        found: set[int] = set()
        self._merged(word, lambda name: found.add(self.tokens[name]))
        return found

    def _merged(self, word: str, seen: Callable[[str], None] = lambda name: None) -> list[str]:
        """The parts of a word after all merges; `seen` hears of each part on the way."""
        if _BYTE.fullmatch(word) and word in self.tokens:
            seen(word)
            return [word]
        parts = list(self._letters(word))
        for part in filter(self.tokens.__contains__, parts):
            seen(part)
        while True:
            pairs = enumerate(itertools.pairwise(parts))
            ranked = [(self._rank[pair], at) for at, pair in pairs if pair in self._rank]
            if not ranked:
                return parts
            _, at = min(ranked)
            parts[at : at + 2] = [self._join((parts[at], parts[at + 1]))]
            if parts[at] in self.tokens:
                seen(parts[at])

    def _letters(self, word: str) -> Iterator[str]:
        for at, letter in enumerate(word):
            last = at == len(word) - 1
            yield (self._prefix if at else "") + letter + (self._suffix if last else "")

    def plain(self, token: str) -> str:
        text = token.removeprefix(self._prefix).removesuffix(self._suffix)
        return text.lstrip("Ġ▁") or text

    def characters(self) -> dict[int, str]:
        return {} if self._spelled else _characters(self)

    def rewritten(self, new: Mapping[int, int]) -> dict[str, Any]:
        vocab = _renumbered(self.tokens, new)
        merges = []
        for merge in self._model["merges"]:
            pair = _pair(merge)
            if pair[0] in vocab and pair[1] in vocab and self._join(pair) in vocab:
                merges.append(merge)
        return {**self._model, "vocab": vocab, "merges": merges}


class Unigram:
    """The division with the greatest sum of scores; a token's id is its place in the list."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._model = model
        self._scores: list[tuple[str, float]] = [(str(t), float(s)) for t, s in model["vocab"]]
        self.tokens = {name: token for token, (name, _) in enumerate(self._scores)}

    @property
    def fixed(self) -> set[int]:
        unknown = self._model.get("unk_id")
        lowest = min(range(len(self._scores)), key=lambda token: self._scores[token][1])
        found = {lowest} | ({int(unknown)} if unknown is not None else set())
        if self._model.get("byte_fallback"):
            found |= {token for name, token in self.tokens.items() if _BYTE.fullmatch(name)}
        return found

    def needs(self, token: int) -> set[int]:
        return {token}

    def tried(self, word: str) -> set[int]:
        """Every piece of the word: any of them may take part in the comparison."""
        longest = max(map(len, self.tokens))
        starts = range(len(word))
        pieces = (word[s:e] for s in starts for e in range(s + 1, min(s + longest, len(word)) + 1))
        return _present(self.tokens, pieces)

    def plain(self, token: str) -> str:
        return token.lstrip("▁") or token

    def characters(self) -> dict[int, str]:
        bytes_there = sum(_BYTE.fullmatch(name) is not None for name in self.tokens)
        spelled = self._model.get("byte_fallback") and bytes_there == _BYTES
        return {} if spelled else _characters(self)

    def rewritten(self, new: Mapping[int, int]) -> dict[str, Any]:
        kept = [token for token in range(len(self._scores)) if token in new]
        unknown = self._model.get("unk_id")
        return {
            **self._model,
            "vocab": [self._model["vocab"][token] for token in kept],
            "unk_id": None if unknown is None else new[int(unknown)],
        }


_KINDS: dict[str, type[WordPiece | BPE | Unigram]] = {
    "WordPiece": WordPiece,
    "BPE": BPE,
    "Unigram": Unigram,
}


def kind_of(model: Mapping[str, Any]) -> str:
    """The name of the kind; older files do not state it."""
    if stated := model.get("type"):
        return str(stated)
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def refusal(model: Mapping[str, Any]) -> str | None:
    """Why a vocabulary cannot be trimmed, or None."""
    kind = kind_of(model)
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        return f"its tokenizer is of kind {kind}, which cannot be trimmed; known: {known}"
    if model.get("dropout"):
        return f"its tokenizer divides words by chance (dropout {model['dropout']}): set it to null"
    return None


def vocabulary_of(model: Mapping[str, Any]) -> Vocabulary:
    """Raises CheckpointError if the model lacks what its kind needs; `refusal` comes first."""
    try:
        return _KINDS[kind_of(model)](model)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"tokenizer.json: the model is malformed ({error!r})") from error


def _pair(merge: Any) -> Pair:
    """A merge, which newer files write as a list and older ones as "left right"."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _present(tokens: Mapping[str, int], names: Iterable[str | None]) -> set[int]:
    return {tokens[name] for name in names if name is not None and name in tokens}


def _renumbered(tokens: Mapping[str, int], new: Mapping[int, int]) -> dict[str, int]:
    kept = ((new[token], name) for name, token in tokens.items() if token in new)
    return {name: token for token, name in sorted(kept)}


def _characters(vocabulary: Vocabulary) -> dict[int, str]:
    plain = ((token, vocabulary.plain(name)) for name, token in vocabulary.tokens.items())
    return {token: text for token, text in plain if len(text) == 1}


@functools.cache
def _byte_letters() -> frozenset[str]:
    """The letters that byte-level BPE writes bytes as (GPT-2): printable ones as themselves, the
    others as the letters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return frozenset(
        [*map(chr, printable), *(chr(0x100 + n) for n in range(_BYTES - len(printable)))]
    )
