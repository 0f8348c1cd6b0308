"""Made-up words, an augmentation: a model that meets them has to go by the words around.

A model that is trained from nothing knows the words of its rows by heart, and takes a name that it
never saw for the words whose pieces the name is made of. Here words of the training rows become
ones that do not exist, anew in each epoch: tokens of rare words, put together in another way, or
another word of the rows. After the stochastic replacement by an unknown word of Dyer et al. 2015,
"Transition-Based Dependency Parsing with Stack Long Short-Term Memory", arXiv:1505.08075.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pocketglm.data.frames import FrameRow
from pocketglm.text.frame import FrameTokens, words

Tokens = list[int]
_OTHERS = 0.1  # words outside of slots are made up at this times the share
_KNOWN = 0.5  # of the made-up words are other words of the rows


@dataclass
class _Kind:
    """Words that are written alike. `known`: the tokens of each; `rare`: of those with several."""

    known: list[Tokens] = field(default_factory=list)
    rare: list[Tokens] = field(default_factory=list)

    def word(self, rng: np.random.Generator) -> Tokens:
        if not self.rare or rng.random() < _KNOWN:
            return self.known[int(rng.integers(len(self.known)))]
        length = len(self._rare(rng))
        return [self._rare(rng)[0], *(self._later(rng) for _ in range(length - 1))]

    def _rare(self, rng: np.random.Generator) -> Tokens:
        return self.rare[int(rng.integers(len(self.rare)))]

    def _later(self, rng: np.random.Generator) -> int:
        tokens = self._rare(rng)
        return tokens[int(rng.integers(1, len(tokens)))]


class MadeUp:
    """Makes up words for `share` of the slots' values, and for a tenth of it of the other words."""

    def __init__(self, tokens: FrameTokens, rows: Sequence[FrameRow], share: float) -> None:
        self._tokens, self._share = tokens, share
        self._kinds: dict[tuple[bool, bool], _Kind] = {}
        seen: set[tuple[int, ...]] = set()
        for row in rows:
            for (start, end), ids in zip(words(row.text), tokens.words(row.text), strict=True):
                if tuple(ids) not in seen and row.text[start].isalnum():
                    seen.add(tuple(ids))
                    kind = self._kinds.setdefault(_kind(row.text, start, end), _Kind())
                    kind.known.append(ids)
                    if len(ids) > 1:
                        kind.rare.append(ids)

    def words(self, row: FrameRow, rng: np.random.Generator) -> list[Tokens]:
        """The tokens of each word of a row, some of them made up; signs stay as they are."""
        chosen = rng.random(len(row.spans)) < self._share
        made = []
        for (start, end), ids in zip(words(row.text), self._tokens.words(row.text), strict=True):
            inside = [
                pick for pick, (a, b) in zip(chosen, row.spans, strict=True) if a <= start < b
            ]
            swap = inside[0] if inside else rng.random() < self._share * _OTHERS
            kind = self._kinds.get(_kind(row.text, start, end))
            made.append(kind.word(rng) if swap and kind and row.text[start].isalnum() else ids)
        return made


def _kind(text: str, start: int, end: int) -> tuple[bool, bool]:
    """Whether a blank stands before a word, and whether its letters are Latin ones."""
    return start == 0 or text[start - 1].isspace(), text[start:end].isascii()
