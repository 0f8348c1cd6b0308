"""Factors of a weight against the float64 oracle."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from oracles import factorize as oracle

from pocketglm.ops.lowrank import Decomposition, Moments

SHAPES = [(24, 40), (40, 24), (32, 32)]
RANKS = (1, 5, 16)
Array = npt.NDArray[np.float64]


def case(shape: tuple[int, int], seed: int = 0) -> tuple[Array, Array]:
    """A weight [N, K], and inputs [T, K] whose features are mixed and of unlike sizes."""
    rng = np.random.default_rng(seed)
    columns = shape[1]
    mixing = rng.standard_normal((columns, columns)) * np.geomspace(3, 0.1, columns)
    inputs = rng.standard_normal((200, columns)) @ mixing
    return rng.standard_normal(shape).astype(np.float32).astype(np.float64), inputs


def product(found: Decomposition, rank: int) -> Array:
    inner, outer = found.factors(rank)
    assert (inner.shape[0], outer.shape[1]) == (rank, rank)
    result: Array = outer.double().numpy() @ inner.double().numpy()
    return result


def moments_of(inputs: Array) -> torch.Tensor:
    found = Moments(inputs.shape[1])
    for part in np.array_split(inputs, 3):
        found.add(torch.from_numpy(part))
    return found.matrix


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    weight, _ = case(shape)
    found = Decomposition.of(torch.from_numpy(weight).float())
    ours = product(found, rank)
    np.testing.assert_allclose(ours, oracle.plain(weight, rank), atol=1e-5)
    tail = np.linalg.svd(weight, compute_uv=False)[rank:]
    assert np.square(weight - ours).sum() == pytest.approx(np.square(tail).sum(), rel=1e-5)
    assert found.lost(rank) == pytest.approx(np.square(tail).sum(), rel=1e-9)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_is_svd_llms(shape: tuple[int, int], rank: int) -> None:
    weight, inputs = case(shape)
    moments = inputs.T @ inputs
    found = Decomposition.of(torch.from_numpy(weight).float(), moments_of(inputs))
    ours, theirs = product(found, rank), oracle.whitened(weight, moments, rank)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    left = np.square(inputs @ (weight - ours).T).sum()
    assert left == pytest.approx(oracle.error(weight, theirs, moments), rel=1e-5)
    assert left == pytest.approx(oracle.energies(weight, moments)[rank:].sum(), rel=1e-5)
    assert found.lost(rank) == pytest.approx(left, rel=1e-5)
    energies = oracle.energies(weight, moments)
    np.testing.assert_allclose(found.energies.numpy(), energies, atol=1e-6 * energies[0])


@pytest.mark.parametrize("bug", oracle.BUGS)
def test_a_planted_bug_shows(bug: str) -> None:
    """The wrong product loses clearly more of the outputs than ours."""
    weight, inputs = case((24, 40))
    moments = inputs.T @ inputs
    ours = product(Decomposition.of(torch.from_numpy(weight).float(), moments_of(inputs)), 8)
    wrong = oracle.whitened(weight, moments, 8, bug)
    assert oracle.error(weight, wrong, moments) > 1.05 * oracle.error(weight, ours, moments)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_product_of_that_rank_is_better(shape: tuple[int, int]) -> None:
    """Small changes of the factors never help: it is a minimum of the outputs' error."""
    weight, inputs = case(shape)
    found = Decomposition.of(torch.from_numpy(weight).float(), moments_of(inputs))
    inner, outer = (part.double().numpy() for part in found.factors(6))
    moments, rng = inputs.T @ inputs, np.random.default_rng(1)
    least = oracle.error(weight, outer @ inner, moments)
    for _ in range(20):
        near = outer + 1e-2 * rng.standard_normal(outer.shape)
        assert oracle.error(weight, near @ inner, moments) > least
        near = inner + 1e-2 * rng.standard_normal(inner.shape)
        assert oracle.error(weight, outer @ near, moments) > least


@pytest.mark.parametrize("shape", SHAPES)
def test_few_inputs_do_no_harm(shape: tuple[int, int]) -> None:
    """Inputs that span 4 dimensions: rank 4 keeps their outputs whole."""
    weight, inputs = case(shape)
    few = inputs[:4]
    found = Decomposition.of(torch.from_numpy(weight).float(), moments_of(few))
    ours = product(found, 4)
    assert np.isfinite(ours).all()
    assert np.abs(few @ (weight - ours).T).max() < 1e-3 * np.abs(few @ weight.T).max()
    nothing = Decomposition.of(torch.from_numpy(weight).float(), torch.zeros(2 * (shape[1],)))
    assert np.isfinite(product(nothing, 4)).all()


def test_the_rank_for_a_share() -> None:
    found = Decomposition.of(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])))
    assert found.energies.tolist() == pytest.approx([9, 4, 1, 0])
    shares = {0.1: 1, 9 / 14 - 1e-6: 1, 9 / 14 + 1e-6: 2, 0.95: 3, 1.0: 4}
    assert {share: found.rank_for(share) for share in shares} == shares


def test_damping_adds_to_the_diagonal() -> None:
    found = Moments(2)
    found.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert torch.equal(found.damped(0), torch.tensor([[10.0, 2.0], [2.0, 4.0]]).double())
    assert torch.equal(found.damped(0.5), torch.tensor([[13.5, 2.0], [2.0, 7.5]]).double())
