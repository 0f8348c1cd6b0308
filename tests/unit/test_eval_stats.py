"""Intervals and the paired bootstrap, against closed forms and other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from pocketglm.eval._stats import (
    macro_f1,
    macro_f1_metric,
    mean_metric,
    paired_bootstrap,
    wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 40), (7, 7), (5, 17), (4320, 4500)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    expected = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_needs_rows() -> None:
    with pytest.raises(ValueError, match="n = 0"):
        wilson(0, 0)


def test_mean_of_right_and_wrong_rows_skips_nan() -> None:
    metric = mean_metric(np.array([1.0, 0.0, np.nan, 1.0, 1.0]))
    assert (metric.value, metric.n) == (0.75, 4)
    assert (metric.low, metric.high) == wilson(3, 4)
    with pytest.raises(ValueError, match="at least one row"):
        mean_metric(np.array([np.nan]))


def test_mean_of_other_values_has_the_interval_of_the_normal_limit() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, 900)
    metric = mean_metric(values)
    half = 1.96 * values.std() / math.sqrt(900)
    assert metric.value == pytest.approx(values.mean())
    assert metric.low == pytest.approx(values.mean() - half, abs=0.01)
    assert metric.high == pytest.approx(values.mean() + half, abs=0.01)
    assert mean_metric(values) == metric  # seeded


def test_paired_bootstrap_is_the_plain_bootstrap_of_the_differences() -> None:
    rng = np.random.default_rng(1)
    baseline = (rng.random(1500) < 0.95).astype(np.float64)
    candidate = np.where(rng.random(1500) < 0.03, 1 - baseline, baseline)
    drop, low, high = paired_bootstrap(baseline, candidate)
    difference = baseline - candidate
    assert drop == pytest.approx(difference.mean())
    resamples = rng.integers(0, 1500, (4000, 1500))
    expected = np.percentile(difference[resamples].mean(axis=1), [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(expected), abs=8e-4)
    assert low < drop < high
    unpaired = 1.96 * math.sqrt(baseline.var() / 1500 + candidate.var() / 1500)
    assert high - low < 1.6 * unpaired  # pairing removes what both models share
    assert paired_bootstrap(baseline, candidate) == (drop, low, high)


def test_paired_bootstrap_sign_nan_and_bad_input() -> None:
    baseline = np.array([1.0, 1.0, np.nan, 1.0])
    candidate = np.array([0.0, 0.0, 0.0, np.nan])
    assert paired_bootstrap(baseline, candidate) == (1.0, 0.0, 1.0)  # worse: positive drop
    assert paired_bootstrap(candidate, baseline) == (-1.0, -1.0, 0.0)
    assert paired_bootstrap(baseline, baseline) == (0.0, -1.0, 1.0)  # 3 / n: three rows
    with pytest.raises(ValueError, match="unpaired"):
        paired_bootstrap(baseline, candidate[:2])
    with pytest.raises(ValueError, match="no row counts"):
        paired_bootstrap(np.array([np.nan]), np.array([1.0]))


def test_a_better_candidate_never_has_a_worse_interval() -> None:
    n, bounds = 300, {}
    for better in (-60, -20, -5, -2, -1, 0, 1, 2, 5, 20, 60):  # rows that it wins, or loses
        baseline, candidate = np.full(n, 0.5), np.full(n, 0.5)
        candidate[: abs(better)] = 1.0 if better > 0 else 0.0
        baseline[: abs(better)] = 1.0 - candidate[: abs(better)]
        drop, low, high = paired_bootstrap(baseline, candidate)
        assert -1 <= low <= drop <= high <= 1
        bounds[better] = low, high
    steps = np.diff(np.array(list(bounds.values())), axis=0)
    assert (steps <= 0).all()
    assert bounds[0] == (-3 / n, 3 / n)  # no row differs
    assert bounds[1][1] == 3 / n  # one row better proves little
    assert bounds[-1][0] == -3 / n
    assert bounds[-60][0] > 0.1  # sixty rows of 300 lost: the rule of three does not hide it


def test_macro_f1_is_sklearns() -> None:
    rng = np.random.default_rng(2)
    gold = rng.integers(0, 9, 300)
    predicted = np.where(rng.random(300) < 0.7, gold, rng.integers(0, 11, 300))
    expected = sklearn.metrics.f1_score(gold, predicted, average="macro")
    assert macro_f1(gold, predicted, 12) == pytest.approx(expected)  # class 11 never occurs
    metric = macro_f1_metric(gold, predicted, 12)
    assert metric.n == 300
    assert metric.low < metric.value < metric.high
    assert 0.06 < metric.high - metric.low < 0.2
    with pytest.raises(ValueError, match="at least one row"):
        macro_f1_metric(gold[:0], predicted[:0], 12)
