"""A weight rounded to its stored values, and the slopes with which it and its scales learn.

Value by value in float64, scales as given. The slopes are those of s * (clamp(w / s + r + z) - z),
where r, by how much rounding moved the value, is held: taken as differences, not from a formula.
`bug` plants a known mistake, to show that tests see it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BUGS = ("floor", "through_clipping", "no_slope_of_clipped", "scale_as_value", "wrong_end")
_STEP = 2.0**-20  # relative


def nearest(ratio: float) -> int:
    """Ties go to the even integer."""
    whole = math.floor(ratio)
    rest = ratio - whole
    return whole + (rest > 0.5 or (rest == 0.5 and whole % 2 == 1))


def one(
    w: float, s: float, z: int, low: int, high: int, bug: str = ""
) -> tuple[float, float, float]:
    """Value, d(value)/dw and d(value)/d(log s) of one weight."""
    if bug == "wrong_end":
        low += 1
    # The packer divides in float32.
    ratio = float(np.float32(w) / np.float32(s))
    q = math.floor(ratio) if bug == "floor" else nearest(ratio)
    moved = q - ratio

    def value(w: float, s: float) -> float:
        return s * (min(max(w / s + moved + z, low), high) - z)

    clipped = not low <= q + z <= high
    of_weight = float(bug == "through_clipping") if clipped else 1.0
    if clipped and bug == "no_slope_of_clipped":
        return value(w, s), of_weight, 0.0
    if bug == "scale_as_value":
        return value(w, s), of_weight, value(w, s)
    if clipped:
        of_scale = (value(w, s * (1 + _STEP)) - value(w, s * (1 - _STEP))) / (2 * _STEP)
    else:  # at an end the clamp must not meet the difference
        free = [t * (w / t + moved) for t in (s * (1 + _STEP), s * (1 - _STEP))]
        of_scale = (free[0] - free[1]) / (2 * _STEP)
    return value(w, s), of_weight, of_scale


def rounded(
    weight: Array, scales: Array, zeros: Array, low: int, high: int, bug: str = ""
) -> tuple[Array, Array, Array]:
    """weight [N, K], scales and zeros [N, G]: values and slopes, each [N, K]."""
    size = weight.shape[1] // scales.shape[1]
    found = np.empty((3, *weight.shape))
    for place, w in np.ndenumerate(weight):
        group: Any = place[0], place[1] // size
        found[(slice(None), *place)] = one(
            float(w), float(scales[group]), int(zeros[group]), low, high, bug
        )
    return found[0], found[1], found[2]


def blocks(x: Array, size: int) -> Array:
    """x [T, K] with each block of `size` values on a grid of its own, 127 steps each way."""
    found = x.copy()
    for row in found:
        for start in range(0, len(row), size):
            part = row[start : start + size]
            scale = np.abs(part).max() / 127
            if scale:
                part[:] = [nearest(value / scale) * scale for value in part]
    return found
