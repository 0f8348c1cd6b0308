"""Calibrators computed from the values themselves, in float64, one candidate range at a time.

`width` is that of the histogram under test: ranges are compared at its edges, and the divergence is
defined on its bins. `bug` plants a known mistake, to show that tests see it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BUGS = (
    "signed",  # a symmetric range that forgets the negative values
    "one_tail",  # the whole rest cut off at one end
    "wide",  # 128 steps instead of 127
    "no_outliers",  # what lies outside is not counted at all
    "empty_bins",  # the rounded distribution spread over empty bins too
    "levels",  # twice the levels
    "no_clipping",  # the error of clipped values is forgotten
    "floor_zero",  # zero point rounded down
)


def percentile_range(x: Array, share: float, symmetric: bool, bug: str = "") -> tuple[float, float]:
    if symmetric:
        reach = _covering(x if bug == "signed" else np.abs(x), share)
        return -reach, reach
    tail = (1 - share) if bug == "one_tail" else (1 - share) / 2
    low = -_covering(-x, 1.0 if bug == "one_tail" else 1 - tail)
    return min(low, 0.0), max(_covering(x, 1 - tail), 0.0)


def _covering(x: Array, share: float) -> float:
    """The least value that at least this share of all values does not exceed."""
    return float(np.quantile(x, share, method="inverted_cdf"))


def divergence(bins: Array, start: int, stop: int, levels: int, bug: str = "") -> float:
    """KL(P || Q) for the range of bins [start, stop), by the book."""
    size = stop - start
    p = bins[start:stop].copy()
    if bug != "no_outliers":
        p[0] += bins[:start].sum()
        p[-1] += bins[stop:].sum()
    if not bins[start:stop].any():
        return math.inf
    members: list[list[int]] = [[] for _ in range(levels)]
    for j in range(size):
        members[j * levels // size].append(j)
    q = np.zeros(size)
    for level in members:
        kept = [j for j in level if p[j] > 0] if bug != "empty_bins" else level
        if kept:
            q[kept] = sum(bins[start + j] for j in level) / len(kept)
    p, q = p / p.sum(), q / q.sum()
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            total += a * math.log(a / b) if b > 0 else math.inf
    return total


def entropy_range(x: Array, width: float, symmetric: bool, bug: str = "") -> tuple[float, float]:
    levels = (128 if symmetric else 256) * (2 if bug == "levels" else 1)
    if symmetric:
        x = x[x > 0] if bug == "signed" else np.abs(x)
    first = min(math.floor(x.min() / width), 0)
    last = max(math.floor(x.max() / width) + 1, 0)
    bins = np.zeros(last - first)
    for index in np.floor(x / width).astype(int):
        bins[index - first] += 1
    start, stop, zero = 0, len(bins), -first
    if symmetric:
        # Doubling a histogram of |x| around 0 changes nothing: |x| of -1.0 lies in bin 1.0.
        stop = _best_stop(bins, 0, max(levels, zero), levels, bug)
        return -min(stop * width, x.max()), min(stop * width, x.max())
    stop = _best_stop(bins, 0, max(levels, zero), levels, bug)
    starts = range(max(min(stop - levels, zero), 0) + 1)
    start = min(starts, key=lambda s: divergence(bins, s, stop, levels, bug))
    ends = (start - zero) * width, (stop - zero) * width
    return max(ends[0], min(x.min(), 0.0)), min(ends[1], max(x.max(), 0.0))


def _best_stop(bins: Array, start: int, least: int, levels: int, bug: str) -> int:
    if least >= len(bins):
        return len(bins)
    stops = range(least, len(bins) + 1)
    return min(stops, key=lambda s: divergence(bins, start, s, levels, bug))


def error(x: Array, low: float, high: float, symmetric: bool, bug: str = "") -> float:
    """Mean squared error of quantizing x on the grid of a range, measured."""
    scale = max(-low, high) / 127 if symmetric else (high - low) / 255
    if bug == "no_clipping":
        x = x[(x >= low) & (x <= high)]
    if symmetric:
        q = np.clip(np.round(x / scale), -127, 127)
    else:  # an unrounded zero point: it shifts the grid, not the error that is expected
        q = np.clip(np.round((x - low) / scale), 0, 255) + low / scale
    return float(np.square(q * scale - x).mean())


def mse_reach(x: Array, width: float, bug: str = "") -> float:
    """The best symmetric range among whole numbers of bins."""
    most = math.ceil(np.abs(x).max() / width)
    reaches = [n * width for n in range(1, most + 1)]
    return min(reaches, key=lambda reach: error(x, -reach, reach, True, bug))


def grid(low: float, high: float, symmetric: bool, bug: str = "") -> tuple[float, int]:
    if symmetric:
        return max(-low, high) / (128 if bug == "wide" else 127), 0
    scale = (high - low) / 255
    place = -128 - low / scale
    return scale, math.floor(place) if bug == "floor_zero" else round(place)
