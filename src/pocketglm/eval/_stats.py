"""Intervals of measured values, all at 95 % and all repeatable (seeded).

Wilson score interval: Wilson 1927, "Probable inference, the law of succession, and statistical
inference". Percentile bootstrap: Efron and Tibshirani 1993, "An Introduction to the Bootstrap".
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import Metric

Values = npt.NDArray[np.float64]
_Z = 1.959963984540054  # the normal distribution's 97.5 % point
_RESAMPLES = 10_000
_CHUNK = 1_000_000  # rows drawn at a time, to bound the memory


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Interval of a share of `n` independent rows; sensible at 0 and 1 too.

    Raises:
        ValueError: n is not positive.
    """
    if n < 1:
        raise ValueError(f"an interval needs rows, got n = {n}")
    share, z2 = successes / n, _Z * _Z / n
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def mean_metric(rows: Values, seed: int = 0) -> Metric:
    """Mean of per-row values; NaN marks rows that do not count.

    The interval is Wilson's for rows of 0 and 1, else the bootstrap's.

    Raises:
        ValueError: no row counts.
    """
    counted = rows[~np.isnan(rows)]
    if not len(counted):
        raise ValueError("a mean needs at least one row that counts")
    value = float(counted.mean())
    if np.isin(counted, (0.0, 1.0)).all():
        low, high = wilson(int(counted.sum()), len(counted))
    else:
        low, high = _bootstrap_mean(counted, seed)
    return Metric(value, len(counted), low, high)


def paired_bootstrap(
    baseline: Values, candidate: Values, seed: int = 0
) -> tuple[float, float, float]:
    """How much lower the candidate's mean is: (drop, low, high), same unit as the rows.

    baseline, candidate: per-row values [N] of the same rows; a row that is NaN in either is left
    out of both. drop is baseline minus candidate, so a better candidate has a negative drop;
    low and high are the 2.5 % and 97.5 % points over 10,000 resamples of the rows. Resampling
    knows nothing of a kind of row that it has not seen, of which up to 3 in n may be there (rule
    of three, Hanley and Lippman-Hand 1983, for rows between 0 and 1): where no row is worse, high
    is 3/n higher, and where none is better, low is 3/n lower; without any difference -3/n..3/n.

    Raises:
        ValueError: the lengths differ, or no row counts in both.
    """
    if baseline.shape != candidate.shape:
        raise ValueError(f"unpaired rows: {baseline.shape} and {candidate.shape}")
    difference = baseline - candidate
    difference = difference[~np.isnan(difference)]
    if not len(difference):
        raise ValueError("no row counts in both models")
    low, high = _bootstrap_mean(difference, seed) if difference.any() else (0.0, 0.0)
    unseen = min(1.0, 3 / len(difference))
    if not (difference > 0).any():
        high = min(1.0, high + unseen)
    if not (difference < 0).any():
        low = max(-1.0, low - unseen)
    return float(difference.mean()), low, high


def ratio_metric(
    above: Values,
    below: Values,
    *,
    n: int | None = None,
    unit: str = "fraction",
    seed: int = 0,
) -> Metric:
    """sum(above) / sum(below) over the rows [N], such as nats over tokens.

    The interval is the bootstrap's over 10,000 resamples of the rows; of a fraction without a fault
    (or without a hit) it is as wide as the rule of three says, see `paired_bootstrap`. n: what the
    metric counts, None = the rows.

    Raises:
        ValueError: the lengths differ, or `below` sums to nothing.
    """
    rows = len(above)
    if above.shape != below.shape:
        raise ValueError(f"unpaired rows: {above.shape} and {below.shape}")
    if not below.sum():
        raise ValueError("a ratio needs something to divide by")
    rng = np.random.default_rng(seed)
    found = []
    at_a_time = max(1, _CHUNK // rows)
    for start in range(0, _RESAMPLES, at_a_time):
        drawn = rng.integers(0, rows, (min(at_a_time, _RESAMPLES - start), rows))
        tops, bottoms = above[drawn].sum(axis=1), below[drawn].sum(axis=1)
        found.append(tops[bottoms > 0] / bottoms[bottoms > 0])
    low, high = (float(x) for x in np.percentile(np.concatenate(found), [2.5, 97.5]))
    value = float(above.sum() / below.sum())
    if unit == "fraction" and value in (0.0, 1.0):
        low, high = (max(0.0, 1 - 3 / rows), 1.0) if value else (0.0, min(1.0, 3 / rows))
    return Metric(value, rows if n is None else n, low, high, unit)


def _bootstrap_mean(values: Values, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    n = len(values)
    at_a_time = max(1, _CHUNK // n)
    means = [
        values[rng.integers(0, n, (min(at_a_time, _RESAMPLES - start), n))].mean(axis=1)
        for start in range(0, _RESAMPLES, at_a_time)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def macro_f1(gold: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], classes: int) -> float:
    """Mean F1 over the classes that occur in `gold` or `predicted` (class numbers [N])."""
    hits = np.bincount(gold[gold == predicted], minlength=classes)
    seen = np.bincount(gold, minlength=classes) + np.bincount(predicted, minlength=classes)
    present = seen > 0
    return float((2 * hits[present] / seen[present]).mean())


def macro_f1_metric(
    gold: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], classes: int, seed: int = 0
) -> Metric:
    """Macro-F1 with the bootstrap interval over 1,000 resamples of the rows.

    Raises:
        ValueError: there are no rows.
    """
    n = len(gold)
    if not n:
        raise ValueError("macro-F1 needs at least one row")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(1000):
        rows = rng.integers(0, n, n)
        values.append(macro_f1(gold[rows], predicted[rows], classes))
    low, high = np.percentile(values, [2.5, 97.5])
    return Metric(macro_f1(gold, predicted, classes), n, float(low), float(high))
