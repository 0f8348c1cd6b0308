"""Histogram and calibrators against float64 references over the raw values."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from oracles import calibration as oracle

from pocketglm.errors import CheckpointError
from pocketglm.ops.calibration import Calibrator, calibrate, choose_range, grid_of
from pocketglm.ops.histogram import Histogram

Array = npt.NDArray[np.float64]
SMALL = 512  # bins: the oracles count them one by one


def samples(kind: str, n: int = 6000) -> Array:
    """float32 values, as float64."""
    rng = np.random.default_rng(3)
    if kind == "outliers":
        x = np.append(rng.normal(size=n - 4), [30.0, -17.0, 25.0, 41.0])
    elif kind == "after gelu":
        x = torch.nn.functional.gelu(torch.from_numpy(rng.normal(size=n))).numpy()
    elif kind == "heavy tails":
        x = rng.standard_t(3, n)
    elif kind == "positive":
        x = rng.exponential(2.0, n)
    elif kind == "negative":
        x = -rng.exponential(0.01, n)
    else:
        x = rng.normal(50.0 if kind == "far from 0" else 0.0, 1.0, n)
    return x.astype(np.float32).astype(np.float64)


KINDS = (
    "normal",
    "heavy tails",
    "outliers",
    "after gelu",
    "positive",
    "negative",
    "far from 0",
)
both = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def filled(x: Array, bins: int = SMALL, parts: int = 7) -> Histogram:
    histogram = Histogram("x", bins)
    for part in np.array_split(x, parts):
        histogram.add(torch.tensor(part.copy()).float())
    return histogram


# --- the histogram -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_values(kind: str) -> None:
    x = samples(kind)
    histogram = filled(x)
    assert (histogram.low, histogram.high) == (min(x.min(), 0), max(x.max(), 0))
    assert histogram.total == len(x)
    edges = histogram.edges()
    wanted = [((x >= a) & (x < b)).sum() for a, b in pairwise(edges)]
    assert histogram.counts.tolist() == wanted
    size = np.abs(x)
    places = np.arange(SMALL) * histogram.width
    if kind != "negative":  # -x on an edge lies in the bin above it, x below
        assert (
            abs(np.cumsum(histogram.folded())[100] - (size < places[100] + histogram.width).sum())
            < 2
        )
    assert histogram.folded().sum() == len(x)
    span = histogram.high - histogram.low
    assert SMALL / 2 - 1 <= span / histogram.width <= SMALL


@pytest.mark.parametrize("kind", KINDS)
def test_order_and_batches_change_nothing(kind: str) -> None:
    x = samples(kind)
    one = filled(x, parts=1)
    for other in (filled(np.sort(x), parts=50), filled(np.sort(x)[::-1], parts=11)):
        assert (one.counts == other.counts).all()
        assert (one.start, one.width) == (other.start, other.width)


def test_the_range_may_grow_by_much() -> None:
    x = np.array([0.0, 1e-30, -1e-20, 3.0, -70000.0, 1e30, 2.0], np.float32).astype(np.float64)
    one, steps = filled(x, parts=1), filled(x, parts=7)
    assert (one.counts == steps.counts).all()
    assert one.total == 7


def test_zeros_and_nothing() -> None:
    histogram = filled(np.zeros(5), parts=1)
    assert histogram.total == 5
    for case in (histogram, Histogram("x")):
        for calibrator in ("minmax", "percentile", "entropy", "mse"):
            grid = calibrate(case, calibrator, symmetric=False)
            assert 0 < grid.scale < 1e-15
    histogram.add(torch.empty(0))
    assert histogram.total == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    histogram = Histogram("blocks.3.ffn.down")
    with pytest.raises(CheckpointError, match=r"'blocks\.3\.ffn\.down' hold NaN or infinity"):
        histogram.add(torch.tensor([1.0, bad, 2.0]))


def test_memory_does_not_grow_with_the_data() -> None:
    histogram = Histogram("x")
    values = torch.linspace(-3, 4, 1 << 16)
    histogram.add(values)
    tracemalloc.start()
    for scale in range(1, 60):
        histogram.add(values * scale)
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < 100_000
    assert histogram.counts.nbytes == 16384
    assert histogram.total == 60 * len(values)


# --- ranges --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_exact(kind: str, symmetric: bool) -> None:
    x = samples(kind)
    low, high = choose_range(filled(x), "minmax", symmetric=symmetric)
    if symmetric:
        assert (low, high) == (-np.abs(x).max(), np.abs(x).max())
    else:
        assert (low, high) == (min(x.min(), 0), max(x.max(), 0))


@both
@pytest.mark.parametrize("share", [0.9, 0.999, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_within_a_bin(kind: str, share: float, symmetric: bool) -> None:
    x = samples(kind)
    histogram = filled(x)
    found = choose_range(histogram, "percentile", symmetric=symmetric, percentile=100 * share)
    assert np.abs(np.subtract(found, oracle.percentile_range(x, share, symmetric))).max() <= (
        histogram.width
    )


def entropy_misses(bug: str, kind: str, symmetric: bool) -> float:
    """By how many bins the found range differs from the oracle's."""
    x = samples(kind)
    histogram = filled(x)
    found = choose_range(histogram, "entropy", symmetric=symmetric)
    wanted = oracle.entropy_range(x, histogram.width, symmetric, bug)
    return float(np.abs(np.subtract(found, wanted)).max() / histogram.width)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_is_within_a_bin(kind: str, symmetric: bool) -> None:
    assert entropy_misses("", kind, symmetric) <= 1


def mse_excess(bug: str, kind: str) -> float:
    """The symmetric range's measured error over the least possible, minus 1."""
    x = samples(kind)
    histogram = filled(x)
    _, high = choose_range(histogram, "mse", symmetric=True)
    best = oracle.mse_reach(x, histogram.width, bug)
    least = oracle.error(x, -best, best, True)
    return abs(oracle.error(x, -high, high, True) / least - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_mse_finds_the_least_error(kind: str) -> None:
    assert mse_excess("", kind) <= 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_asymmetric_mse_finds_the_least_error(kind: str) -> None:
    x = samples(kind)
    histogram = filled(x)
    low, high = choose_range(histogram, "mse", symmetric=False)
    tried = [
        oracle.error(x, a * histogram.low, b * histogram.high, False)
        for a in np.linspace(0, 1, 25)
        for b in np.linspace(0, 1, 25)
        if a * histogram.low < b * histogram.high
    ]
    assert oracle.error(x, low, high, False) <= 1.02 * min(tried)


def test_clipping_pays_where_there_are_outliers() -> None:
    histogram = filled(samples("outliers"))
    calibrators: tuple[Calibrator, ...] = ("minmax", "percentile", "entropy", "mse")
    reach = {
        name: choose_range(histogram, name, symmetric=True, percentile=99.9)[1]
        for name in calibrators
    }
    assert reach["minmax"] == 41.0
    assert 2 < reach["percentile"] < reach["entropy"] < 30, reach
    assert 30 < reach["mse"] < 41.0, reach  # four squared distances outweigh all the rounding


@both
def test_grids(symmetric: bool) -> None:
    for low, high in ((-1.0, 3.0), (0.0, 2.0), (-0.17, 5.1), (-4.0, 0.0)):
        grid = grid_of(low, high, symmetric=symmetric)
        scale, zero = oracle.grid(low, high, symmetric)
        assert grid.scale == np.float32(scale)
        assert grid.zero_point == zero
        half = 0.5001 * grid.scale
        assert grid.range[0] <= low + half
        assert grid.range[1] >= high - half


def test_planted_bugs_are_caught() -> None:
    x = samples("after gelu")
    histogram = filled(x)
    caught = {}
    tails = choose_range(histogram, "percentile", symmetric=False, percentile=99)
    grids = {s: grid_of(-0.171, 3.0, symmetric=s) for s in (True, False)}
    negative = filled(samples("negative"))
    for bug in oracle.BUGS:
        wrong = [
            _far(tails, oracle.percentile_range(x, 0.99, False, bug), histogram.width),
            _far(
                choose_range(negative, "percentile", symmetric=True, percentile=99),
                oracle.percentile_range(samples("negative"), 0.99, True, bug),
                negative.width,
            ),
            *(grids[s].scale != np.float32(oracle.grid(-0.171, 3.0, s, bug)[0]) for s in grids),
            *(grids[s].zero_point != oracle.grid(-0.171, 3.0, s, bug)[1] for s in grids),
            *(entropy_misses(bug, kind, True) > 1 for kind in ("normal", "far from 0")),
            mse_excess(bug, "outliers") > 0.02,
        ]
        caught[bug] = any(wrong)
    assert all(caught.values()), caught


def _far(found: tuple[float, float], wanted: tuple[float, float], width: float) -> bool:
    return bool(np.abs(np.subtract(found, wanted)).max() > width)
