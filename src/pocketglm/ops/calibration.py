"""From the histogram of a layer's inputs to the grid on which they are quantized.

Every calibrator chooses a range that holds 0; its ends are the exact least and greatest value, or
edges of bins, so it lies within one bin of what the values themselves would give.

* minmax: everything that was seen.
* percentile: the given share of the values; a symmetric range holds that share of |x|, an
  asymmetric one leaves out half of the rest at each end.
* entropy: the range in which the rounded distribution is nearest to the true one by
  Kullback-Leibler divergence. Migacz, "8-bit inference with TensorRT" (GTC 2017): what lies outside
  is counted in the last bin of the true distribution, and not in the rounded one; this one has 128
  levels of |x|. Asymmetric ranges have 256 levels; the upper end is chosen first, then the lower.
* mse: the least squared error, values taken to lie evenly in their bin. Symmetric: every range is
  tried. Asymmetric: the best of all pairs of ends by the expected error (step^2 / 12 inside,
  clipping outside) is improved one end at a time.

Scales are float32. Symmetric: max(|low|, |high|) / 127, zero point 0. Asymmetric: the range over
255 steps, zero point int8. Both use the integers from -128 to 127.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pocketglm.ops.fake_quant import HIGH, LOW, InputGrid
from pocketglm.ops.histogram import Counts, Histogram

Calibrator = Literal["minmax", "percentile", "entropy", "mse"]

_SCALE_MIN = 2.0**-60  # of inputs that were always 0
_LEVELS = {True: 128, False: 256}  # by symmetry
_ROUNDS, _REACH = 2, 64  # of improving an asymmetric mse range; how many bins an end may move
_BATCH = 128  # ranges that are compared at a time: bounds the temporary memory

Floats = npt.NDArray[np.float64]


def calibrate(
    histogram: Histogram, calibrator: Calibrator, *, symmetric: bool, percentile: float = 99.99
) -> InputGrid:
    """The grid for values as in `histogram`; it may be empty, its range is 0 then.

    percentile: of calibrator "percentile", above 0 and at most 100.
    """
    low, high = choose_range(histogram, calibrator, symmetric=symmetric, percentile=percentile)
    return grid_of(low, high, symmetric=symmetric)


def choose_range(
    histogram: Histogram, calibrator: Calibrator, *, symmetric: bool, percentile: float = 99.99
) -> tuple[float, float]:
    """The values (low <= 0, high >= 0) between which nothing is clipped; -high, high: symmetric."""
    reach = max(-histogram.low, histogram.high)
    if calibrator == "minmax" or not reach:
        return (-reach, reach) if symmetric else (histogram.low, histogram.high)
    if symmetric:
        counts = np.trim_zeros(histogram.folded(), "b")
        if calibrator == "percentile":
            bins = _covering(counts, percentile / 100)
        elif calibrator == "entropy":
            bins = _entropy_stop(counts, 0, 0, _LEVELS[True])
        else:
            bins = _mse_bins(counts, histogram.width)
        high = min(bins * histogram.width, reach)
        return -high, high
    first, last = np.flatnonzero(histogram.counts)[[0, -1]]
    zero = -histogram.start  # the edge that is 0, counted from the window's first bin
    start, stop = min(int(first), zero), max(int(last) + 1, zero)
    counts, zero = histogram.counts[start:stop], zero - start
    if calibrator == "percentile":
        share = 0.5 + percentile / 200
        high_bin = max(_covering(counts, share), zero)
        low_bin = min(len(counts) - _covering(counts[::-1], share), zero)
    elif calibrator == "entropy":
        low_bin, high_bin = _entropy_range(counts, zero, _LEVELS[False])
    else:
        low_bin, high_bin = _mse_range(counts, zero, histogram.width)
    return (
        max((low_bin - zero) * histogram.width, histogram.low),
        min((high_bin - zero) * histogram.width, histogram.high),
    )


def grid_of(low: float, high: float, *, symmetric: bool) -> InputGrid:
    """The grid of a range that holds 0."""
    if symmetric:
        return InputGrid(_scale(max(-low, high) / HIGH))
    scale = _scale((high - low) / (HIGH - LOW))
    return InputGrid(scale, int(np.clip(np.rint(LOW - low / scale), LOW, HIGH)))


def _scale(value: float) -> float:
    return float(np.float32(max(value, _SCALE_MIN)))


def _covering(counts: Counts, share: float) -> int:
    """How many of the first bins hold at least this share of all values."""
    running = np.cumsum(counts)
    return int(np.searchsorted(running, share * running[-1] * (1 - 1e-12))) + 1


# --- entropy -------------------------------------------------------------------------------------


def _entropy_stop(counts: Counts, start: int, zero: int, levels: int) -> int:
    """The best end of a range that begins at bin `start` and holds edge `zero`."""
    least = max(start + levels, zero)
    if least >= len(counts):
        return len(counts)
    stops = np.arange(least, len(counts) + 1)
    found = _divergence(counts, np.full_like(stops, start), stops, levels)
    return int(stops[found.argmin()])


def _entropy_range(counts: Counts, zero: int, levels: int) -> tuple[int, int]:
    """The upper end for the whole lower side; then the lower end for that upper one."""
    stop = _entropy_stop(counts, 0, zero, levels)
    most = min(stop - levels, zero)
    if most <= 0:
        return 0, stop
    starts = np.arange(most + 1)
    found = _divergence(counts, starts, np.full_like(starts, stop), levels)
    return int(found.argmin()), stop


def _divergence(
    counts: Counts, starts: npt.NDArray[Any], stops: npt.NDArray[Any], levels: int
) -> Floats:
    """Kullback-Leibler divergence of each range of bins from its rounded self, in nats.

    P: the counts inside, plus what lies outside in the first and the last bin. Q: the counts inside
    spread evenly over the bins of their level that P has anything in. Infinite where Q has nothing
    in a bin of P. A level's bins share one value of Q, so sums over levels are enough.
    """
    parts = [
        _divergence_part(counts, starts[at : at + _BATCH], stops[at : at + _BATCH], levels)
        for at in range(0, len(starts), _BATCH)
    ]
    return np.concatenate(parts)


def _divergence_part(
    counts: Counts, starts: npt.NDArray[Any], stops: npt.NDArray[Any], levels: int
) -> Floats:
    mass = np.concatenate([[0], np.cumsum(counts)])  # of the bins before an edge
    used = np.concatenate([[0], np.cumsum(counts > 0)])
    surprise = np.concatenate([[0.0], np.cumsum(_x_log_x(counts))])
    total = float(mass[-1])
    below, above = mass[starts], mass[-1] - mass[stops]
    sizes = (stops - starts)[:, None]
    # Level of bin j: floor(j * levels / size). So a level begins at ceil(level * size / levels).
    edges = starts[:, None] + -(-np.arange(levels + 1) * sizes // levels)
    inside = np.diff(mass[edges]).astype(np.float64)
    p = inside.copy()
    p[:, 0] += below
    p[:, -1] += above
    filled = np.diff(used[edges]).astype(np.float64)
    first, last = counts[starts], counts[stops - 1]
    filled[:, 0] += (first == 0) & (below > 0)
    filled[:, -1] += (last == 0) & (above > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.log(inside / filled)
        cross = np.where(p > 0, p * log_q, 0.0).sum(1)
    log_p = (
        surprise[stops]
        - surprise[starts]
        - (_x_log_x(first) + _x_log_x(last))
        + (_x_log_x(first + below) + _x_log_x(last + above))
    )
    kept = (mass[stops] - mass[starts]).astype(np.float64)
    result: Floats = (log_p - cross) / total - np.log(total) + np.log(np.maximum(kept, 1.0))
    return np.where(np.isfinite(cross), result, np.inf)


def _x_log_x(x: npt.NDArray[Any]) -> Floats:
    values = x.astype(np.float64)
    result: Floats = values * np.log(np.maximum(values, 1.0))
    return result


# --- mean squared error --------------------------------------------------------------------------


def _mse_bins(counts: Counts, width: float) -> int:
    """How many bins of |x| a symmetric range should hold."""
    reach = np.arange(1, len(counts) + 1) * width
    return int(_errors(counts, 0, width, np.zeros(len(reach)), reach / HIGH, HIGH).argmin()) + 1


def _mse_range(counts: Counts, zero: int, width: float) -> tuple[int, int]:
    """The first and the last edge of the best range around edge `zero`."""
    start, stop = _rough_range(counts, zero, width)
    steps = HIGH - LOW
    for _ in range(_ROUNDS):
        stops = _around(stop, max(zero, start + 1), len(counts))
        scales = (stops - start) * (width / steps)
        lows = np.full(len(stops), (start - zero) * width)
        stop = int(stops[_errors(counts, zero, width, lows, scales, steps).argmin()])
        starts = _around(start, 0, min(zero, stop - 1))
        scales = (stop - starts) * (width / steps)
        lows = (starts - zero) * width
        start = int(starts[_errors(counts, zero, width, lows, scales, steps).argmin()])
    return start, stop


def _around(place: int, least: int, most: int) -> npt.NDArray[Any]:
    return np.arange(max(place - _REACH, least), min(place + _REACH, most) + 1)


def _errors(
    counts: Counts, zero: int, width: float, lows: Floats, scales: Floats, steps: int
) -> Floats:
    """Squared error on each grid of `steps` steps of `scales` [n] from about `lows` [n] up.

    Values are taken to lie evenly in their bin.
    """
    edges = (np.arange(len(counts) + 1) - zero) * width
    errors = np.empty(len(lows))
    for at in range(0, len(lows), _BATCH):
        scale = scales[at : at + _BATCH, None]
        least = np.rint(lows[at : at + _BATCH, None] / scale)
        x = edges / scale
        q = np.rint(x).clip(least, least + steps)
        # The integral of (x - q)^2 from 0 to each edge; a whole step inside adds 1 / 12.
        integral = q / 12 + (x - q) ** 3 / 3
        errors[at : at + _BATCH] = np.diff(integral) @ counts * scale[:, 0] ** 3 / width
    return errors


def _rough_range(counts: Counts, zero: int, width: float) -> tuple[int, int]:
    """As `_mse_range`, by the error that is expected: step^2 / 12 inside, clipping outside."""
    mass = np.concatenate([[0], np.cumsum(counts)])
    below = _clipping(counts[:zero][::-1], width)[::-1]  # by edge, up to `zero`
    above = _clipping(counts[zero:], width)
    stops = np.arange(zero, len(counts) + 1)
    best = (np.inf, 0, len(counts))
    for start in range(zero + 1):
        step = (stops - start) * (width / (HIGH - LOW))
        error = below[start] + above + step**2 / 12 * (mass[stops] - mass[start])
        error[stops == start] = np.inf  # no range at all
        index = int(error.argmin())
        best = min(best, (float(error[index]), start, int(stops[index])))
    return best[1], best[2]


def _clipping(counts: Counts, width: float) -> Floats:
    """Squared error of clipping at each edge [n + 1], for values above 0 in `counts` [n].

    Values count as if in the middle of their bin.
    """
    centres = (np.arange(len(counts)) + 0.5) * width
    edges = np.arange(len(counts) + 1) * width

    def beyond(values: Floats) -> Floats:
        return np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])

    weights = counts.astype(np.float64)
    result: Floats = (
        beyond(weights * centres**2)
        - 2 * edges * beyond(weights * centres)
        + edges**2 * beyond(weights)
    )
    return result.clip(min=0)
