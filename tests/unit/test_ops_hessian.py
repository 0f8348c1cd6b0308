"""ops/hessian.py against a float64 reference that inverts H anew for every column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles import gptq as oracle

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.ops.affine import (
    SCALE_MIN,
    choose_scales,
    dequantize,
    limits,
    quantize,
    squared_error,
    to_integers,
)
from pocketglm.ops.hessian import Hessian, gptq, inverse_factor, output_error

DAMPING = 0.01
SCHEMES = {
    "int4 by 32": TensorScheme(bits=4, group_size=32),
    "int4 by 64, asymmetric": TensorScheme(bits=4, group_size=64, symmetric=False),
    "int8 by 128": TensorScheme(bits=8, group_size=128),
    "int8 by row": TensorScheme(bits=8),
}


def problem(rows: int = 24, columns: int = 256, seed: int = 0) -> tuple[Any, Any]:
    """A weight [N, K] and correlated inputs [T, K] with some loud channels, float64."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) / columns**0.5
    x = rng.normal(size=(3 * columns, columns)) @ (np.eye(columns) + 2 * mix)
    x[:, ::17] *= 6
    return rng.normal(size=(rows, columns)) * 0.05, x


def ours(weight: Any, x: Any, scheme: TensorScheme, *, act_order: bool = False) -> Any:
    """Our integers, scales and zero points, and the order."""
    w = torch.from_numpy(weight).float()
    hessian = Hessian(w.shape[1], len(x))
    for batch in torch.split(torch.from_numpy(x).float(), 100):
        hessian.add(batch)
    order = hessian.matrix.diagonal().argsort(descending=True, stable=True) if act_order else None
    scales, zeros = choose_scales(w, scheme)
    factor = inverse_factor(hessian.matrix, DAMPING, order)
    return gptq(w, scales, zeros, scheme, factor, order), scales, zeros, order


def reference(
    weight: Any, x: Any, scheme: TensorScheme, found: Any, bug: str = "", block: int = 128
) -> tuple[Any, float]:
    """The reference's integers for our scales, and its output error."""
    _, scales, zeros, order = found
    s = scales.double().numpy()
    z = np.zeros_like(s) if zeros is None else zeros.double().numpy()
    size, (low, high) = scheme.group_size or weight.shape[1], limits(scheme)
    h = oracle.hessian(x, DAMPING)
    order = None if order is None else order.tolist()
    # float32 weights: what ours was given
    w = weight.astype(np.float32).astype(np.float64)
    q = oracle.gptq(w, h, s, z, size, low, high, order, bug, block)
    return q, oracle.error(x, w, oracle.dequantize(q, s, z, size))


def error_of(weight: Any, x: Any, scheme: TensorScheme, found: Any) -> float:
    q, scales, zeros, _ = found
    w = weight.astype(np.float32).astype(np.float64)
    return oracle.error(x, w, dequantize(q, scales, zeros, scheme).double().numpy())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
def test_the_output_error_is_that_of_the_reference(name: str, act_order: bool) -> None:
    scheme = SCHEMES[name]
    weight, x = problem()
    found = ours(weight, x, scheme, act_order=act_order)
    q, wanted = reference(weight, x, scheme, found)
    assert error_of(weight, x, scheme, found) == pytest.approx(wanted, rel=0.01)
    assert (found[0].numpy() == q).mean() > 0.99, "other integers"


@pytest.mark.parametrize("bug", oracle.BUGS)
@pytest.mark.parametrize("name", ["int4 by 32", "int8 by row"])
def test_a_planted_bug_is_seen(name: str, bug: str) -> None:
    """Each known mistake moves the error by far more than the 1 % that is allowed."""
    scheme = SCHEMES[name]
    weight, x = problem()
    found = ours(weight, x, scheme)
    _, wrong = reference(weight, x, scheme, found, bug)
    assert abs(wrong / error_of(weight, x, scheme, found) - 1) > 0.02


@pytest.mark.parametrize("name", SCHEMES)
def test_it_beats_round_to_nearest(name: str) -> None:
    scheme = SCHEMES[name]
    weight, x = problem()
    found = ours(weight, x, scheme)
    nearest = (*quantize(torch.from_numpy(weight).float(), scheme), None)
    assert error_of(weight, x, scheme, found) < 0.75 * error_of(weight, x, scheme, nearest)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("act_order", [False, True])
def test_a_weight_on_its_grid_comes_back_exactly(name: str, act_order: bool) -> None:
    scheme = SCHEMES[name]
    weight, x = problem()
    q, scales, zeros = quantize(torch.from_numpy(weight).float(), scheme)
    exact = dequantize(q, scales, zeros, scheme)
    again, steps, points, _ = ours(exact.double().numpy(), x, scheme, act_order=act_order)
    assert torch.equal(dequantize(again, steps, points, scheme), exact)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, x = problem()
    hessian = Hessian(x.shape[1], len(x))
    hessian.add(torch.from_numpy(x))
    factor = inverse_factor(hessian.matrix, DAMPING).double()
    h = oracle.hessian(x, DAMPING) / len(x)
    assert torch.equal(factor, factor.triu())
    found = (factor.T @ factor).numpy() @ h
    assert np.abs(found - np.eye(len(h))).max() < 1e-3


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_inputs_than_columns_and_dead_columns(damping: float) -> None:
    """H is singular then: the damping grows until it can be inverted."""
    weight, x = problem()
    x = x[:5].copy()
    x[:, 3] = 0
    w, scheme = torch.from_numpy(weight).float(), SCHEMES["int4 by 32"]
    hessian = Hessian(w.shape[1], len(x))
    hessian.add(torch.from_numpy(x))
    factor = inverse_factor(hessian.matrix, damping)
    assert factor.isfinite().all()
    scales, zeros = choose_scales(w, scheme)
    q = gptq(w, scales, zeros, scheme, factor)
    found = output_error(dequantize(q, scales, zeros, scheme) - w, hessian.matrix)
    nearest = dequantize(*quantize(w, scheme), scheme) - w
    assert found < output_error(nearest, hessian.matrix)


def test_without_inputs_it_rounds_to_nearest() -> None:
    weight, x = problem()
    found = ours(weight, 0 * x, SCHEMES["int4 by 32"])
    assert torch.equal(
        found[0], quantize(torch.from_numpy(weight).float(), SCHEMES["int4 by 32"])[0]
    )


def test_output_error_is_the_outputs_own() -> None:
    weight, x = problem()
    hessian = Hessian(x.shape[1], len(x))
    hessian.add(torch.from_numpy(x))
    found = output_error(torch.from_numpy(weight).float(), hessian.matrix)
    assert found == pytest.approx(2 / len(x) * np.square(x @ weight.T).sum(), rel=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_important_columns_get_scales_of_their_own(name: str) -> None:
    """The weighted error does not grow; equal weights change next to nothing (without importance,
    symmetric INT4 has a search of its own, as good); scales keep the rule.
    """
    scheme = SCHEMES[name]
    w = torch.from_numpy(problem()[0]).float()
    importance = torch.from_numpy(np.random.default_rng(1).uniform(0.01, 10, w.shape[1])).float()
    plain, zeros = choose_scales(w, scheme)
    scales, points = choose_scales(w, scheme, importance=importance)
    assert torch.equal(scales.bfloat16().float(), scales)
    assert scales.min() >= SCALE_MIN
    same, same_zeros = choose_scales(w, scheme, importance=torch.full((w.shape[1],), 4.0))
    errors = [
        squared_error(w, to_integers(w, s, z, scheme), s, z, scheme)[0]
        for s, z in ((same, same_zeros), (plain, zeros))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)

    def lost(s: torch.Tensor, z: torch.Tensor | None) -> float:
        from_grid = dequantize(to_integers(w, s, z, scheme), s, z, scheme)
        return float(((from_grid - w).square() * importance).sum())

    assert lost(scales, points) <= lost(plain, zeros)
