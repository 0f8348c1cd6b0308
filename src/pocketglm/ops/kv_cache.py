"""INT8 keys and values: their scales, chosen from samples, and the rounding itself.

Integers from -128 to 127, no zero points. The rounding is that of ONNX Runtime's
GroupQueryAttention, bit by bit: times the float32 reciprocal of the scale, ties to even. It keeps
keys with their rotary positions turned in. So a pair of features that are turned together gets one
scale, from the greatest length that the pair had: whatever the position, a turned pair as long as
that is not clipped, and texts longer than the samples are safe.

* minmax: nothing that was seen is clipped, at any position.
* percentile: that share of the values (of turned pairs: of their lengths) is not.
* mse: of the greatest value times 2^(-n/8), down to a sixteenth, the reach with the least squared
  error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CacheCalibrator = Literal["minmax", "percentile", "mse"]

LOW, HIGH = -128, 127
_REACHES = tuple(2 ** (-n / 8) for n in range(33))
_LEAST = 2.0**-12  # of a tensor's greatest scale: features that were 0 on the samples
_SCALE_MIN = 2.0**-60  # of a tensor that was


def round_kv(x: Tensor, scale: Tensor) -> Tensor:
    """Keys or values [B, kv heads, S, head_dim] -> int8; scale float32, broadcast to them."""
    return (x.float() * (1 / scale)).round_().clamp_(LOW, HIGH).to(torch.int8)


def restore_kv(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the integers stand for."""
    return (q.float() * scale).to(dtype)


@dataclass(frozen=True, slots=True)
class Turned:
    """Which features of a head are turned, in pairs: the first `dims`, neighbours or halves."""

    dims: int = 0
    interleaved: bool = False

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The first and the second features of the pairs, int64 [dims / 2]."""
        if self.interleaved:
            return torch.arange(0, self.dims, 2), torch.arange(1, self.dims, 2)
        half = self.dims // 2
        return torch.arange(half), torch.arange(half, self.dims)


def choose_kv_scales(
    x: Tensor,
    calibrator: CacheCalibrator,
    *,
    per: Literal["tensor", "channel"],
    turned: Turned,
    percentile: float = 99.99,
) -> Tensor:
    """float32 [kv heads, head_dim], or [1] per tensor, from samples [T, kv heads, head_dim].

    percentile: of calibrator "percentile", above 0 and at most 100.
    """
    lengths = _lengths(x, turned)
    if per == "tensor":
        lengths = lengths.reshape(-1, 1)
    if calibrator == "percentile":
        rank = max(math.ceil(percentile / 100 * len(lengths) * (1 - 1e-12)), 1)
        reach = lengths.kthvalue(rank, dim=0).values
    else:
        reach = lengths.amax(0)
        if calibrator == "mse":
            reach = reach * _best(x, reach / HIGH, turned)
    scale = reach / HIGH
    return scale.clamp_min(max(float(scale.max()) * _LEAST, _SCALE_MIN))


def _lengths(x: Tensor, turned: Turned) -> Tensor:
    """|x|; of features that are turned the length of their pair."""
    lengths, (first, second) = x.abs(), turned.pairs()
    lengths[..., first] = lengths[..., second] = torch.hypot(x[..., first], x[..., second])
    return lengths


def _best(x: Tensor, scale: Tensor, turned: Turned) -> Tensor:
    """The factor of `scale` (shaped as the result of `choose_kv_scales`) with the least error."""
    first, second = turned.pairs()
    least, best = torch.full_like(scale, math.inf, dtype=torch.float64), torch.ones_like(scale)
    for factor in _REACHES:
        now = (scale * factor).clamp_min(_SCALE_MIN)
        errors = restore_kv(round_kv(x, now), now).sub_(x).square_().sum(0, dtype=torch.float64)
        if scale.numel() == 1:
            error = errors.sum().reshape(1)
        else:
            error = errors.clone()
            error[..., first] = error[..., second] = errors[..., first] + errors[..., second]
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, factor, best)
    return best
