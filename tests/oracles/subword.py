"""Encoders of words by the definition, in plain Python, from a parsed tokenizer.json.

They take a word as the tokenizer's own splitting gives it, and return the names of its tokens.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any


def wordpiece(model: dict[str, Any], word: str) -> list[str]:
    """Longest match first: BERT's WordPiece."""
    vocab, mark = model["vocab"], model["continuing_subword_prefix"]
    if len(word) > model["max_input_chars_per_word"]:
        return [model["unk_token"]]
    found: list[str] = []
    rest = word
    while rest:
        size = len(rest)
        while size and (mark if found else "") + rest[:size] not in vocab:
            size -= 1
        if not size:
            return [model["unk_token"]]
        found.append((mark if found else "") + rest[:size])
        rest = rest[size:]
    return found


def bpe(model: dict[str, Any], word: str) -> list[str]:
    """Of all neighbours, join the pair that stands first in the list, wherever it is; repeat."""
    vocab = model["vocab"]
    if model.get("ignore_merges") and word in vocab:
        return [word]
    parts: list[str] = []
    for letter in word:
        if letter in vocab:
            parts.append(letter)
        elif model.get("byte_fallback"):
            parts += [f"<0x{byte:02X}>" for byte in letter.encode()]
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    while True:
        there = [list(pair) for pair in pairwise(parts)]
        best = next((merge for merge in merges if merge in there), None)
        if best is None:
            return parts
        at = there.index(best)
        parts = [*parts[:at], best[0] + best[1], *parts[at + 2 :]]


def unigram(model: dict[str, Any], word: str) -> tuple[float, list[str]]:
    """The best sum of scores over all divisions, and a division that has it; no unknown letters."""
    scores = dict(model["vocab"])

    @lru_cache(None)
    def best(start: int) -> tuple[float, tuple[str, ...]]:
        if start == len(word):
            return 0.0, ()
        found: tuple[float, tuple[str, ...]] = (float("-inf"), ())
        for end in range(start + 1, len(word) + 1):
            piece = word[start:end]
            if piece in scores:
                rest, tail = best(end)
                found = max(found, (scores[piece] + rest, (piece, *tail)))
        return found

    score, pieces = best(0)
    return score, list(pieces)
