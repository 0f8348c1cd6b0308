"""Integers, scales and zero points of one weight: w = (q - zero_point) * scale.

The one quantization rule of PocketGLM; training's fake quantization, every method and every target
use these functions. Ranges: symmetric INT8 -127..127, symmetric INT4 -8..7, asymmetric the whole
storage range. A scale is a bf16 value between fp16's smallest normal (6.1e-5) and 65280, so that
bf16, fp16 and float32 all hold it exactly, and it is fixed before the integers are chosen: the
integers are the nearest ones (ties to even) for the scale that is stored, not for its unrounded
ancestor.

The scale is searched (squared error over a grid of divisors, which holds the plain maximum) as in
"Post training 4-bit quantization of convolutional networks" (Banner et al., NeurIPS 2019), here
by plain enumeration. Only element-wise float32 operations decide, so the result does not depend
on how rows are batched, on the number of threads, or on the machine.
"""

from __future__ import annotations

import torch

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.errors import UnsupportedError

SCALE_MIN = 2.0**-14  # fp16's smallest normal number
SCALE_MAX = 65280.0  # the largest bf16 value below fp16's maximum, 65504
GROUP_SIZES = (32, 64, 128)
_CHUNK = 1 << 18  # elements that the search works on at a time: they stay in the cache


def limits(scheme: TensorScheme) -> tuple[int, int]:
    """The smallest and the largest integer of a scheme."""
    top = 2 ** (scheme.bits - 1) - 1
    return (-top if scheme.symmetric and scheme.bits == 8 else -top - 1), top


def check_groups(name: str, columns: int, scheme: TensorScheme) -> None:
    """Refuse a group size that does not divide the columns of tensor `name`.

    Raises:
        UnsupportedError: names the tensor, K, the group size and the sizes that would divide.
    """
    if reason := group_reason(name, columns, scheme):
        raise UnsupportedError("this group size does not fit", [reason])


def group_reason(name: str, columns: int, scheme: TensorScheme) -> str:
    """Why `scheme` cannot group `columns` values, or ''."""
    if scheme.group_size is None or columns % scheme.group_size == 0:
        return ""
    fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
    offer = f"sizes that divide: {', '.join(fitting)}" if fitting else "32, 64, 128 do not either"
    return f"{name}: K = {columns} is not a multiple of group_size {scheme.group_size} ({offer})"


def quantize(
    weight: torch.Tensor, scheme: TensorScheme, *, search: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize float32 [N, K].

    Returns q int8 [N, K], scales float32 [N, G], zero points int8 [N, G] (None if symmetric).
    With `search` no group has a larger squared error than its plain-maximum scale gives.
    A weight that this function made comes back exactly.

    Raises:
        UnsupportedError: the group size does not divide K.
    """
    scales, zero_points = choose_scales(weight, scheme, search=search)
    return to_integers(weight, scales, zero_points, scheme), scales, zero_points


def choose_scales(
    weight: torch.Tensor, scheme: TensorScheme, *, search: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales float32 [N, G] and zero points int8 [N, G] (None if symmetric) for float32 [N, K]."""
    check_groups("weight", weight.shape[1], scheme)
    rows = max(1, _CHUNK // max(weight.shape[1], 1))
    chunks = [weight[start : start + rows] for start in range(0, max(len(weight), 1), rows)]
    parts = [_choose(_grouped(chunk.float(), scheme), scheme, search) for chunk in chunks]
    scales = torch.cat([scale for scale, _ in parts])
    if scheme.symmetric:
        return scales, None
    return scales, torch.cat([zero for _, zero in parts]).to(torch.int8)


def to_integers(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    scheme: TensorScheme,
) -> torch.Tensor:
    """The nearest integers int8 [N, K] for given scales [N, G]; ties go to the even one."""
    low, high = limits(scheme)
    q = (_grouped(weight.float(), scheme) / scales.unsqueeze(-1)).round_()
    if zero_points is not None:
        q += zero_points.unsqueeze(-1)
    return q.clamp_(low, high).to(torch.int8).reshape(weight.shape)


def dequantize(
    q: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    scheme: TensorScheme,
) -> torch.Tensor:
    """q int8 [N, K], scales [N, G], zero points int8 [N, G] -> float32 [N, K], exactly."""
    w = _grouped(q.float(), scheme)
    if zero_points is not None:
        w = w - zero_points.unsqueeze(-1)
    return (w * scales.float().unsqueeze(-1)).reshape(q.shape)


def canonical(scales: torch.Tensor) -> torch.Tensor:
    """The nearest allowed scales: bf16 values in the normal range of fp16; float32, never 0."""
    return scales.float().to(torch.bfloat16).float().clamp_(SCALE_MIN, SCALE_MAX)


def _grouped(weight: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """[N, K] -> [N, G, K / G]."""
    rows, columns = weight.shape
    return weight.reshape(rows, scheme.groups(columns), scheme.group_size or columns)


def _choose(
    w: torch.Tensor, scheme: TensorScheme, search: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best scale and zero point [N, G] of w [N, G, K / G]; a tie keeps the earlier candidate."""
    w = w.permute(2, 0, 1).contiguous()  # groups innermost: their scales are read in a row
    low, high = w.amin(0).clamp_(max=0), w.amax(0).clamp_(min=0)
    candidates = _candidates(low, high, scheme, search)
    best_scale = canonical(candidates[0])
    best_zero = _zero_point(low, high, best_scale, scheme)
    if not search:
        return best_scale, best_zero
    best_error = _error(w, best_scale, best_zero, scheme)
    for candidate in candidates[1:]:
        scale = canonical(candidate)
        zero = _zero_point(low, high, scale, scheme)
        error = _error(w, scale, zero, scheme)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)
    return best_scale, best_zero


def _candidates(
    low: torch.Tensor, high: torch.Tensor, scheme: TensorScheme, search: bool
) -> list[torch.Tensor]:
    """Scales to try; first the plain maximum, the smallest scale that clips nothing.

    The others are the range over a divisor. Whole divisors up to the number of levels bring a
    weight that is on a grid already back to it (INT8: rounding the scale to bf16 moves the top
    integer by one or two at most); larger ones clip. For INT4, max/8 is among them: it is the
    better choice where the side that can reach -8 is the longer one.
    """
    bottom, top = limits(scheme)
    levels = top - bottom
    if scheme.symmetric:
        span, plain, most = torch.maximum(-low, high), torch.maximum(low / bottom, high / top), top
    else:
        span, plain, most = high - low, (high - low) / levels, levels
    if not search:
        return [plain]
    whole = range(1, most + 1) if scheme.bits == 4 else range(most - 3, most + 1)
    steps, deepest = (32, 0.65) if scheme.bits == 4 else (8, 0.4)
    clipping = [most * (1 + deepest * i / steps) for i in range(1, steps + 1)]
    if scheme.symmetric and scheme.bits == 4:
        clipping.append(8.0)
    return [plain, *(span / divisor for divisor in (*whole, *clipping))]


def _zero_point(
    low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, scheme: TensorScheme
) -> torch.Tensor:
    """The integer that means 0: the middle of the range goes to the middle of the integers."""
    if scheme.symmetric:
        return torch.zeros_like(scale)
    bottom, top = limits(scheme)
    return ((bottom + top) / 2 - (low + high) / 2 / scale).round_().clamp_(bottom, top)


def _error(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, scheme: TensorScheme
) -> torch.Tensor:
    """Squared error [N, G] of w [K / G, N, G] after quantization."""
    bottom, top = limits(scheme)
    q = (w / scale).round_()
    # Clamping q - zero to shifted limits is clamping q, with two passes less.
    q = q.clamp_(bottom, top) if scheme.symmetric else q.clamp_(bottom - zero, top - zero)
    return _sum(q.mul_(scale).sub_(w).square_())


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis by halving: one fixed order, unlike torch.sum."""
    while (n := len(x)) > 1:
        folded = x[: n // 2] + x[n // 2 : n // 2 * 2]
        if n % 2:
            folded[0] += x[-1]
        x = folded
    return x[0]
