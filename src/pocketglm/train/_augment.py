"""Copies of training texts with some words dropped, swapped or replaced.

A teacher that has fitted its training rows is nearly certain of each; how it hesitates, which is
what a student learns from it, shows on texts that it has not seen. Changing words at random:
TinyBERT, Jiao et al. 2020, https://arxiv.org/abs/1909.10351 (which replaces them by a language
model's guesses), and EDA, Wei and Zou 2019, https://arxiv.org/abs/1901.11196.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff"
_PIECE = re.compile(rf"[{_HAN}]|[^\s{_HAN}]+")
_STREAM = 0x61756762  # apart from the streams of other random numbers


def words_of(text: str) -> list[str]:
    """A text's words; each Chinese character is one."""
    return _PIECE.findall(text)


def join_words(words: Sequence[str]) -> str:
    """Words with spaces between them, but not between Chinese characters."""
    text = " ".join(words)
    return re.sub(rf"(?<=[{_HAN}]) (?=[{_HAN}])", "", text)


def changed_copies(texts: Sequence[str], copy: int, share: float) -> list[str]:
    """Copy number `copy` of every text, a function of the arguments alone.

    share: of the words, each chosen by chance; a chosen word is dropped, swapped with the next one,
    or replaced by a word of any of the texts, one as likely as the other. One word at least is
    chosen, and one stays.
    """
    rng = np.random.default_rng([_STREAM, copy])
    split = [words_of(text) for text in texts]
    pool = [word for words in split for word in words]
    return [
        join_words(_changed(words, pool, share, rng)) if words else text
        for words, text in zip(split, texts, strict=True)
    ]


def _changed(
    words: Sequence[str], pool: Sequence[str], share: float, rng: np.random.Generator
) -> list[str]:
    chosen = rng.random(len(words)) < share
    chosen[rng.integers(len(words))] = True
    kinds = rng.integers(3, size=len(words))
    others = rng.integers(len(pool), size=len(words))
    result: list[str] = list(words)
    for place in np.flatnonzero(chosen):
        following = place + 1
        if kinds[place] == 1 and following < len(words):
            result[place], result[following] = result[following], result[place]
        elif kinds[place] != 0:
            result[place] = pool[others[place]]
    dropped = chosen & (kinds == 0)
    kept = [word for word, gone in zip(result, dropped, strict=True) if not gone]
    return kept or [result[0]]
