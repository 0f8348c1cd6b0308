"""Rounding to a fixed 8-bit grid and its straight-through gradient, value by value in float64.

`bug` plants a known mistake, to show that tests see it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BUGS = ("away", "early_zero", "narrow", "unsigned", "through_clipping", "no_gradient")


def fake_quant(x: Array, scale: float, zero: int, bug: str = "") -> tuple[Array, Array]:
    """Values on the grid, and d(value)/dx."""
    values, gradients = np.empty_like(x), np.empty_like(x)
    low, high = (-127 if bug == "narrow" else -128), 127
    if bug == "unsigned":
        low, high = 0, 255
    for place, each in np.ndenumerate(x):
        # The device divides in float32.
        ratio = float(np.float32(each) / np.float32(scale))
        whole = math.floor(ratio)
        rest = ratio - whole
        up = rest > 0.5 or (rest == 0.5 and (whole % 2 == 1 or (bug == "away" and ratio > 0)))
        q = whole + up + zero
        if bug == "early_zero":
            q = math.floor(ratio + zero + 0.5)
        inside = low <= q <= high
        values[place] = (min(max(q, low), high) - zero) * scale
        gradients[place] = float(inside or bug == "through_clipping") * (bug != "no_gradient")
    return values, gradients
