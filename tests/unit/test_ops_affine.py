"""ops/affine: against the float64 reference, which must catch planted bugs; and its promises."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import rtn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.errors import UnsupportedError
from pocketglm.ops import affine
from pocketglm.ops.affine import (
    SCALE_MAX,
    SCALE_MIN,
    canonical,
    choose_scales,
    dequantize,
    limits,
    quantize,
    squared_error,
    to_integers,
)
from pocketglm.ops.stored import read_weight

SCHEMES = [
    TensorScheme(bits=8),
    TensorScheme(bits=8, symmetric=False),
    TensorScheme(bits=8, group_size=32),
    TensorScheme(bits=4, group_size=32),
    TensorScheme(bits=4, group_size=64),
    TensorScheme(bits=4, group_size=128),
    TensorScheme(bits=4, group_size=32, symmetric=False),
    TensorScheme(bits=4, group_size=256),
]


def name_of(scheme: TensorScheme) -> str:
    return f"int{scheme.bits}-g{scheme.group_size}-{'sym' if scheme.symmetric else 'asym'}"


every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=name_of)


def weights() -> torch.Tensor:
    """Rows of many kinds: normal, tiny, zero, one-sided, an outlier, exact halves of the scale."""
    torch.manual_seed(0)
    w = torch.randn(13, 256) * 0.05
    w[1] *= 1e-4
    w[2] = 0
    w[3] = w[3].abs()
    w[4] = -w[4].abs()
    w[5, 7] = 3.0
    w[6, ::2] *= 20
    for row, top in (
        (7, 127),
        (8, 7),
        (9, 254),
    ):  # scale 1/64 in every group; quotients are k + 1/2
        w[row] = (torch.randint(-top, top, (256,)) + 0.5) / 64
        w[row, ::32] = top / 64
        w[row, 1::32] = -top / 64
    w[10] = 1 / 3  # one value only
    w[11] *= 1e4
    w[12] = torch.randint(-7, 8, (256,)) / 64  # on a grid, but for one half in each group
    w[12, ::32] = 7 / 64
    w[12, 31::32] = 2.5 / 64
    return w


def agrees(scheme: TensorScheme, search: bool, bug: str = "") -> bool:
    """Whether ours equals the reference, but for what float32 against float64 explains."""
    w = weights()
    q, scales, zeros = quantize(w, scheme, search=search)
    exact = w.numpy().astype(np.float64)
    rq, rscales, rzeros = rtn.quantize(
        exact, scheme.bits, scheme.group_size, scheme.symmetric, search, bug
    )
    same = np.repeat(scales.numpy() == rscales, exact.shape[1] // scales.shape[1], axis=1)
    if not search and not same.all():
        return False
    ours = dequantize(q, scales, zeros, scheme).numpy().astype(np.float64)
    size = exact.shape[1] // scales.shape[1]
    error = np.square(ours - exact).reshape(len(w), -1, size).sum(-1)
    rq, rz = rq, np.repeat(rzeros, size, axis=1)
    theirs = np.square((rq - rz) * np.repeat(rscales, size, axis=1) - exact)
    best = theirs.reshape(len(w), -1, size).sum(-1)
    if (np.abs(error - best) > 1e-5 * best + 1e-12).any():
        return False  # another scale is fine only where it is as good
    zero = np.zeros_like(rzeros) if zeros is None else zeros.numpy()
    differs = (np.repeat(zero, size, axis=1) != rz) | (q.numpy() != rq)
    return not (differs & same).any()


@every_scheme
@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
def test_equals_the_reference(scheme: TensorScheme, search: bool) -> None:
    assert agrees(scheme, search)


@pytest.mark.parametrize("bug", rtn.BUGS)
@pytest.mark.parametrize("search", [False, True], ids=["plain", "search"])
def test_the_reference_catches_a_planted_bug(bug: str, search: bool) -> None:
    scheme = {
        "wide": SCHEMES[0],
        "shifted_zero": SCHEMES[6],
        "clip_order": SCHEMES[6],
    }.get(bug, SCHEMES[3])
    assert not agrees(scheme, search, bug)


@pytest.mark.parametrize("bug", rtn.TABLE_BUGS)
def test_the_reference_catches_a_wrong_table(bug: str) -> None:
    assert not agrees(SCHEMES[3], True, bug)


def test_sums_of_the_table_are_exact() -> None:
    """So no order of the sums, and no number of threads, can change what is chosen."""
    table, divisors, _ = affine._table()
    assert torch.equal(table, table.round())
    assert (table % len(divisors) == 0).all()
    assert affine._WIDEST * float(table.max()) + len(divisors) < 2**24  # float32 counts so far
    on_grid = [(n, affine._PARTS * k // n) for n in (4, 5, 6, 7, 8) for k in range(n)]
    assert all(table[affine._PARTS - p, affine._DIVISORS.index(n)] == 0 for n, p in on_grid)


@pytest.mark.parametrize("size", [32, 128])
def test_other_types_and_odd_sizes_give_the_same(size: int) -> None:
    """bf16 is converted exactly; values that the table's scales do not fit are among them."""
    scheme = TensorScheme(bits=4, group_size=size)
    torch.manual_seed(4)
    w = torch.randn(5000, 128) * torch.logspace(-7, 5, 5000)[:, None]
    w = w.bfloat16()
    whole = quantize(w, scheme)
    parts = [quantize(w[i : i + 1234].float(), scheme) for i in range(0, 5000, 1234)]
    assert torch.equal(whole[0], torch.cat([q for q, _, _ in parts]))
    assert torch.equal(whole[1], torch.cat([scales for _, scales, _ in parts]))
    lost, total = squared_error(w, *whole, scheme)
    error = dequantize(*whole, scheme).double() - w.double()
    assert lost == pytest.approx(float(error.square().sum()), rel=1e-5)
    assert total == pytest.approx(float(w.double().square().sum()), rel=1e-5)


def mean_error(w: torch.Tensor, factors: list[float] | None) -> float:
    """Mean squared error of symmetric INT4 by 32: ours, or the best of range / factor."""
    scheme = TensorScheme(bits=4, group_size=32)
    if factors is None:
        return float((dequantize(*quantize(w, scheme), scheme) - w).square().mean())
    groups = w.reshape(-1, 1, 32)
    scales = canonical(groups.abs().amax(2, keepdim=True) / torch.tensor(factors)[:, None])
    found = (groups / scales).round().clamp(-8, 7) * scales
    return float((found - groups).square().mean(2).amin(1).mean())


@pytest.mark.parametrize("kind", ["normal", "laplace", "trained"])
def test_few_candidates_are_almost_as_good_as_many(kind: str, minilm: Path) -> None:
    """Within 0.35 % of 41 candidates: the whole numbers and 34 that clip, evenly spaced."""
    torch.manual_seed(3)
    if kind == "trained":
        ckpt = Checkpoint.open(minilm)
        w = read_weight(ckpt, next(n for n in ckpt.tensors if "3.intermediate.dense.weight" in n))
    elif kind == "normal":
        w = torch.randn(512, 1024)
    else:
        w = torch.distributions.Laplace(0.0, 1.0).sample((512, 1024))
    many = [*map(float, range(1, 8)), *(7 * (1 + 0.65 * i / 32) for i in range(33)), 8.0]
    assert mean_error(w, None) < 1.0035 * mean_error(w, many)
    assert mean_error(w, None) < 0.9 * mean_error(w, [7.0])


@every_scheme
def test_search_is_never_worse_and_helps(scheme: TensorScheme) -> None:
    w = weights()
    size = scheme.group_size or w.shape[1]

    def error(search: bool) -> torch.Tensor:
        loss = dequantize(*quantize(w, scheme, search=search), scheme) - w
        return loss.double().square().reshape(len(w), -1, size).sum(-1)

    plain, searched = error(False), error(True)
    assert (searched <= plain * (1 + 1e-6)).all()
    assert searched.sum() < plain.sum()


@every_scheme
def test_a_weight_on_the_grid_comes_back_exactly(scheme: TensorScheme) -> None:
    once = dequantize(*quantize(weights(), scheme), scheme)
    assert torch.equal(dequantize(*quantize(once, scheme), scheme), once)


@pytest.mark.parametrize("scale", [2.0**-14, 0.0123291015625, 1.0, 300.0])
def test_every_int4_integer_and_full_range_int8_is_recovered(scale: float) -> None:
    for scheme in (SCHEMES[0], SCHEMES[1], SCHEMES[3], SCHEMES[6]):
        low, high = limits(scheme)
        grid = torch.arange(low, high + 1)
        q = torch.cat([grid, torch.zeros(-len(grid) % 128, dtype=grid.dtype)])[None]
        found, scales, zeros = quantize(q * scale, scheme)
        assert torch.equal(dequantize(found, scales, zeros, scheme), q * scale)
        if scheme.group_size is None and scheme.symmetric:
            assert scales.item() == scale


@every_scheme
def test_scales_are_canonical_and_integers_in_range(scheme: TensorScheme) -> None:
    q, scales, zeros = quantize(weights(), scheme)
    assert (scales.dtype, q.dtype) == (torch.float32, torch.int8)
    assert torch.equal(scales, scales.to(torch.bfloat16).float())
    assert torch.equal(scales, scales.to(torch.float16).float())
    assert scales.min() >= SCALE_MIN
    assert scales.max() <= SCALE_MAX
    low, high = limits(scheme)
    assert low <= q.min()
    assert q.max() <= high
    assert (zeros is None) == scheme.symmetric
    assert (dequantize(q, scales, zeros, scheme)[2] == 0).all()  # the zero row stays zero


@every_scheme
def test_rows_do_not_depend_on_their_batch_or_the_threads(scheme: TensorScheme) -> None:
    w = torch.randn(2100, 256, generator=torch.Generator().manual_seed(1))
    q, scales, zeros = quantize(w, scheme)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parts = [quantize(w[start : start + 701], scheme) for start in range(0, 2100, 701)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(q, torch.cat([part[0] for part in parts]))
    assert torch.equal(scales, torch.cat([part[1] for part in parts]))
    if zeros is not None:
        assert torch.equal(zeros, torch.cat([part[2] for part in parts if part[2] is not None]))


def test_inference_mode_and_gradients_leave_nothing_behind() -> None:
    w, found = torch.randn(4, 64), []

    def work() -> None:
        with torch.inference_mode():
            found.append(choose_scales(w, SCHEMES[3])[0].clone())
        found.append(choose_scales(w.clone().requires_grad_(), SCHEMES[3])[0])
        found.append(choose_scales(w, SCHEMES[3])[0])

    thread = threading.Thread(target=work)  # which has no buffers yet
    thread.start()
    thread.join()
    assert len(found) == 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not found[1].requires_grad


def test_a_given_scale_is_used_as_it_is() -> None:
    scheme = TensorScheme(bits=4, group_size=2)
    w = torch.tensor([[0.5, 1.5, 2.5, -9.0]])
    scales = torch.tensor([[1.0, 1.0]])
    assert to_integers(w, scales, None, scheme).tolist() == [[0, 2, 2, -8]]  # ties to even; clipped


def test_int4_uses_minus_eight_on_either_rule() -> None:
    w = torch.linspace(-8, 7, 32)[None] / 4
    scales, _ = choose_scales(w, TensorScheme(bits=4, group_size=32), search=False)
    assert scales.item() == 0.25  # max / 8, since the longer side can reach -8
    scales, _ = choose_scales(-w, TensorScheme(bits=4, group_size=32), search=False)
    assert scales.item() == canonical(torch.tensor(2 / 7)).item()  # max / 7


def test_the_input_is_not_changed_and_may_be_empty() -> None:
    w = weights()
    copy = w.clone()
    quantize(w, SCHEMES[6])
    assert torch.equal(w, copy)
    q, scales, _ = quantize(torch.empty(0, 64), SCHEMES[3])
    assert (q.shape, scales.shape) == ((0, 64), (0, 2))


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UnsupportedError) as error:
        quantize(torch.ones(2, 96), TensorScheme(bits=4, group_size=64))
    assert "K = 96 is not a multiple of group_size 64 (sizes that divide: 32)" in str(error.value)
    with pytest.raises(UnsupportedError, match="32, 64, 128 do not either"):
        quantize(torch.ones(2, 100), TensorScheme(bits=4, group_size=64))
