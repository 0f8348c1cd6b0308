"""Scores of next-token logits, one token at a time in plain Python floats.

Perplexity by sliding windows as commonly defined: a token is predicted from the tokens of the first
window that holds it; windows start at multiples of the stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Logits = Callable[[list[int]], Sequence[Sequence[float]]]


def log_probabilities(logits: Sequence[float]) -> list[float]:
    values = [float(v) for v in logits]
    top = max(values)
    total = math.fsum(math.exp(v - top) for v in values)
    return [v - top - math.log(total) for v in values]


def divergence(true: Sequence[float], other: Sequence[float]) -> float:
    """KL(true || other) in nats, of two rows of logits."""
    p, q = log_probabilities(true), log_probabilities(other)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def first_choice(logits: Sequence[float]) -> int:
    return max(range(len(logits)), key=lambda i: (logits[i], -i))


def context(ids: Sequence[int], place: int, length: int, stride: int) -> list[int]:
    """The tokens that token number `place` is predicted from."""
    start = 0
    while start + length < place:
        start += stride
    return list(ids[start:place])


def nats(model: Logits, ids: Sequence[int], length: int, stride: int) -> list[float]:
    """-log p of each token but the first."""
    return [
        -log_probabilities(model(context(ids, place, length, stride))[-1])[ids[place]]
        for place in range(1, len(ids))
    ]
