"""Nucleus sampling's distribution in plain float64 Python (Holtzman et al. 2020, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def nucleus(logits: Sequence[float], temperature: float, top_p: float) -> list[float]:
    """The probability of each token; the likeliest tokens until their sum reaches `top_p`."""
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    whole = math.fsum(weights)
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    kept: list[int] = []
    for token in order:
        kept.append(token)
        if top_p < 1 and math.fsum(weights[t] for t in kept) / whole >= top_p:
            break
    inside = math.fsum(weights[t] for t in kept)
    return [weights[t] / inside if t in kept else 0.0 for t in range(len(logits))]


def draw(chances: Sequence[float], uniform: float) -> int:
    """The token of a uniform number in [0, 1): the first whose running sum is above it."""
    total = 0.0
    for token, chance in enumerate(chances):
        total += chance
        if uniform < total:
            return token
    return max(token for token, chance in enumerate(chances) if chance)
