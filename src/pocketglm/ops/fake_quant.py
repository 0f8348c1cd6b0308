"""Quantization simulated in float, with gradients: training and measuring use deployed numerics.

Forward is the deployed rounding, bit by bit: activations as ONNX's QuantizeLinear and
DequantizeLinear with a fixed scale do it, weights by the packer's own functions (`affine.py`).
Backward is the straight-through estimator of Bengio et al. 2013 (arXiv:1308.3432): the gradient
passes where a value was rounded, and is 0 where it was clipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.ops.affine import choose_scales, dequantize, limits, to_integers

LOW, HIGH = -128, 127  # of activations, symmetric or not


@dataclass(frozen=True, slots=True)
class InputGrid:
    """How a layer's input is quantized: x = (q - zero_point) * scale, q from -128 to 127.

    `scale` is a float32 value.
    """

    scale: float
    zero_point: int = 0

    @property
    def symmetric(self) -> bool:
        return self.zero_point == 0

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest value that is not clipped."""
        return (LOW - self.zero_point) * self.scale, (HIGH - self.zero_point) * self.scale


# On this grid; each row on one of its own (None); each block of so many values on one of its own.
Grid = InputGrid | int | None
_NONE: Mapping[str, Grid] = {}


def fake_quant_activation(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int | None = None
) -> Tensor:
    """x of any shape -> the nearest values of the grid; ties go to the even integer.

    Computed in float32, as devices do, whatever the type of x.

    scale: positive; a tensor where it is trained, then it gets no gradient from here.
    """
    zero = 0 if zero_point is None else zero_point
    q = (x.detach().float() / scale).round_() + zero
    inside = (q >= LOW) & (q <= HIGH)
    value = (q.clamp_(LOW, HIGH) - zero) * scale
    return _straight_through(x, value.to(x.dtype), inside)


def fake_quant_dynamic(x: Tensor) -> Tensor:
    """x [B, ...] -> each row on a grid of its own, as ONNX's DynamicQuantizeLinear makes one.

    The range holds 0 and every value of the row, in 255 steps; so nothing is clipped, and the
    gradient passes everywhere. On a phone a text comes alone: a row here is a tensor there.
    """
    rows = x.detach().float().flatten(1)
    low, high = rows.amin(1).clamp_(max=0), rows.amax(1).clamp_(min=0)
    shape = (-1, *(1,) * (x.ndim - 1))
    scale = ((high - low) / (HIGH - LOW)).clamp_(min=torch.finfo(torch.float32).tiny)
    zero = (LOW - low / scale).round_().clamp_(LOW, HIGH)
    scale, zero = scale.view(shape), zero.view(shape)
    q = (x.detach().float() / scale).round_().add_(zero).clamp_(LOW, HIGH)
    value = ((q - zero) * scale).to(x.dtype)
    return x + (value - x.detach()) if torch.is_grad_enabled() and x.requires_grad else value


def fake_quant_blocks(x: Tensor, size: int) -> Tensor:
    """x [..., K] -> each block of `size` values on a symmetric grid of its own, as ONNX Runtime's
    MatMulNBits of accuracy level 4 rounds its input; the last block may be shorter.

    The range holds every value of the block in 127 steps each way; so nothing is clipped, and the
    gradient passes everywhere.
    """
    plain = x.detach().float()
    padded = F.pad(plain, (0, -x.shape[-1] % size))
    blocks = padded.reshape(*padded.shape[:-1], -1, size)
    scale = (blocks.abs().amax(-1, keepdim=True) / HIGH).clamp_(min=torch.finfo(torch.float32).tiny)
    value: Tensor = ((blocks / scale).round_() * scale).flatten(-2)[..., : x.shape[-1]]
    value = value.to(x.dtype)
    return x + (value - x.detach()) if torch.is_grad_enabled() and x.requires_grad else value


def fake_quant_weight(
    weight: Tensor,
    scheme: TensorScheme,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    *,
    search: bool = True,
) -> Tensor:
    """weight [N, K] -> what a checkpoint that stores it in `scheme` gives back, float32.

    scales [N, G], zero_points int8 [N, G]: fixed ones; None: chosen as the packer does, `search` as
    in `affine.quantize`.
    """
    plain = weight.detach()
    if scales is None:
        scales, zero_points = choose_scales(plain, scheme, search=search)
    value, inside = rounded_weight(plain, scheme, scales, zero_points)
    return _straight_through(weight, value.to(weight.dtype), inside)


def rounded_weight(
    weight: Tensor, scheme: TensorScheme, scales: Tensor, zero_points: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the integers of weight [N, K] stand for, float32, and which of its values are not
    clipped, bool."""
    q = to_integers(weight, scales, zero_points, scheme)
    value = dequantize(q, scales, zero_points, scheme)
    # A value that rounds to the last integer is not clipped unless it lies beyond half a step.
    reach = scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    low, high = limits(scheme)
    at_end = (q == low) | (q == high)
    return value, ~at_end | ((weight - value).abs() <= reach / 2)


def _straight_through(x: Tensor, value: Tensor, inside: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return value
    return cast(Tensor, _StraightThrough.apply(x, value, inside))  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """Gives `value`; its gradient goes to `x` where `inside`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


@contextmanager
def quantized_inputs(
    model: nn.Module, grids: Mapping[str, Grid], outputs: Mapping[str, Grid] = _NONE
) -> Iterator[None]:
    """Meanwhile the modules named in `grids` see their first argument [B, ...] fake-quantized; what
    those named in `outputs` give is, too.
    """
    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(_round_input, grid))
        for name, grid in grids.items()
    ]
    handles += [
        model.get_submodule(name).register_forward_hook(partial(_round_output, grid))
        for name, grid in outputs.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(x: Tensor, grid: Grid) -> Tensor:
    if grid is None:
        return fake_quant_dynamic(x)
    if isinstance(grid, int):
        return fake_quant_blocks(x, grid)
    return fake_quant_activation(x, grid.scale, grid.zero_point)


def _round_input(grid: Grid, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return _rounded(args[0], grid), *args[1:]


def _round_output(grid: Grid, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return _rounded(output, grid)
