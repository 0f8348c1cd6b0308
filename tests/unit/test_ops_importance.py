"""Thresholds, masks and shares against an oracle that sorts lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles import pruning as oracle

from pocketglm.ops.importance import (
    MeanMagnitude,
    Part,
    Threshold,
    allocate,
    below,
    best,
    influence,
    kept_size,
    least,
    magnitudes,
    n_m_mask,
    shared_scale,
    taylor,
    unit_sums,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- units ---------------------------------------------------------------------------------------


def test_units_lie_one_after_the_other_in_each_copy() -> None:
    weight = torch.arange(24.0).reshape(12, 2)
    assert unit_sums(Part(weight, 0), 3).tolist() == [28, 92, 156]  # 4 rows each
    assert unit_sums(Part(weight.T, 1), 3).tolist() == [28, 92, 156]
    rows = weight.sum(1)
    fused = [float(rows[i] + rows[i + 6]) for i in range(6)]
    assert unit_sums(Part(weight, 0, copies=2), 6).tolist() == fused


@pytest.mark.parametrize("power", [1, 2])
def test_magnitudes_are_norms(power: int) -> None:
    a, b = random(6, 5), random(4, 6, seed=1)
    found = magnitudes([Part(a, 0), Part(b, 1)], 3, power)
    for unit in range(3):
        rows = slice(2 * unit, 2 * unit + 2)
        values = np.concatenate([a[rows].ravel(), b[:, rows].ravel()]).astype(np.float64)
        assert float(found[unit]) == pytest.approx(np.linalg.norm(values, power))


def test_a_large_table_does_not_decide_alone() -> None:
    table, small = torch.ones(1000, 2), torch.tensor([[1.0, 3.0]])
    found = magnitudes([Part(table, 1), Part(small, 1)], 2, 1, alike=True)
    assert found.tolist() == [1.5, 2.5]
    assert magnitudes([Part(torch.zeros(4, 2), 1)], 2, 2, alike=True).tolist() == [0, 0]


def test_taylor_adds_before_it_takes_the_magnitude() -> None:
    weight, gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, -1], [1, 1]])
    assert taylor([(Part(weight, 0), gradient)], 2).tolist() == [0, 7]


def test_mean_magnitude_counts_real_tokens_once() -> None:
    mean, x = MeanMagnitude(), random(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    mean.add(x[:1], mask[:1])
    mean.add(x[1:], mask[1:])
    tokens = x[mask.bool()].abs().double()
    assert torch.allclose(mean.scores(4), tokens.mean(0))
    assert torch.allclose(mean.scores(2), tokens.reshape(3, 2, 2).mean((0, 2)))


def test_influence_is_one_minus_the_cosine() -> None:
    x, mask = random(1, 3, 4), torch.tensor([[1, 1, 0]])
    assert influence(x, 2 * x, mask) == pytest.approx(0, abs=1e-6)
    assert influence(x, -x, mask) == pytest.approx(4)
    turned = torch.stack([-x[..., 1], x[..., 0], -x[..., 3], x[..., 2]], -1)
    assert influence(x, turned, mask) == pytest.approx(2)


# --- choosing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "ratio", "multiple", "kept"),
    [
        (1536, 0.3, 32, 1088),
        (1536, 0.5, 32, 768),
        (1536, 0.7, 32, 448),
        (1536, 0.999, 32, 32),
        (384, 0.01, 32, 384),
        (40, 0.0, 32, 40),
        (40, 0.1, 32, 32),
        (60, 0.02, 32, 32),
        (24, 0.9, 32, 24),
        (12, 0.3, 1, 8),
        (12, 0.95, 1, 1),
        (6, 0.5, 1, 3),
    ],
)
def test_kept_size(size: int, ratio: float, multiple: int, kept: int) -> None:
    assert kept_size(size, ratio, multiple) == kept


def test_the_best_are_in_order_and_the_first_of_equals() -> None:
    assert best(torch.tensor([1.0, 5.0, 3.0, 5.0, 5.0]), 3) == (1, 3, 4)
    assert best(torch.tensor([2.0, 2.0, 2.0]), 2) == (0, 1)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("total", [24, 40, 64])
def test_layers_compete(multiple: int, total: int) -> None:
    scores = [random(16, seed=s).abs().double() * (1 + s) for s in range(5)]
    floor = [4, 8, 4, 4, 4]
    found = allocate(scores, total, multiple, floor)
    assert found == oracle.shares([s.tolist() for s in scores], total, multiple, floor)
    assert sum(found) == total
    wrong = oracle.shares([(-s).tolist() for s in scores], total, multiple, floor)
    assert found != wrong or total == sum(floor)


def test_shared_scale() -> None:
    assert shared_scale(torch.tensor([3.0, 4.0]).double() * 7).square().mean() == pytest.approx(1)
    assert shared_scale(torch.zeros(2).double()).tolist() == [0, 0]


# --- single weights ------------------------------------------------------------------------------


def tensors() -> list[torch.Tensor]:
    """With zeros, equal magnitudes of both signs, tiny and huge values."""
    plain = random(7, 8)
    tied = torch.tensor([[0.5, -0.5, 0.0, 0.25] * 2] * 3)
    extreme = random(2, 8, seed=2) * torch.tensor([[1e-40], [1e30]])
    return [plain, tied, extreme]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 6, 40, 56, 60, 61, 95, 96])
def test_exactly_the_smallest_go(count: int, dtype: torch.dtype) -> None:
    values = [t.clamp(-6e4, 6e4).to(dtype) for t in tensors()]
    threshold = least(lambda: values, count)
    lists = [t.float().flatten().tolist() for t in values]
    wanted, planted = oracle.smallest(lists, count), oracle.smallest(lists, max(count - 1, 1))
    found = []
    for value in values:
        gone, threshold = below(value, threshold)
        assert gone.shape == value.shape
        found.append(gone.flatten().tolist())
    assert found == wanted
    assert (found != planted) == (count != 1)
    assert threshold.ties == 0


def test_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="4 of 3"):
        least(lambda: [torch.ones(3)], 4)
    assert least(lambda: [torch.ones(3)], 0) == Threshold(0.0, 0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_n_of_m_neighbours(n: int, m: int) -> None:
    weight: Any = torch.cat(tensors())
    found = n_m_mask(weight, n, m)
    assert found.tolist() == [oracle.n_of_m(row, n, m) for row in weight.tolist()]
    assert found.tolist() != [oracle.n_of_m(row, n - 1, m) for row in weight.tolist()]
    assert (found.reshape(-1, m).sum(1) == m - n).all()
