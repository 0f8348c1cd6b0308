"""How much each part of a model matters, and which parts a smaller one keeps.

A unit is a head (with its key/value group), an FFN channel or a hidden dimension. Scores are
float64 [units]; greater = keep.
* l1, l2: the norm of a unit's weights.
* taylor: |sum of w * dL/dw| over the weights that read a unit's output, the first-order change of
  the loss when that output becomes 0 (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771).
* activation: mean |output| of a unit (Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679).
Block influence, 1 - cos(input, output) of a whole layer: Men et al. 2024,
https://arxiv.org/abs/2403.03853. N:M masks: Mishra et al. 2021, https://arxiv.org/abs/2104.08378.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_HALF = 16  # bits of a float's pattern that one pass of `least` counts by


class Part(NamedTuple):
    """Values [..., copies * units * size, ...]: along `dim`, unit by unit, `copies` times."""

    values: Tensor
    dim: int
    copies: int = 1


def unit_sums(part: Part, units: int) -> Tensor:
    """The sum of a part's values over each unit, float64 [units]."""
    rows = part.values.movedim(part.dim, 0)
    return rows.double().reshape(part.copies, units, -1).sum((0, 2))


def magnitudes(parts: Iterable[Part], units: int, power: int, *, alike: bool = False) -> Tensor:
    """The l1 (`power` 1) or l2 norm (2) of each unit's weights in all `parts`.

    alike: each part counts the same, whatever its size (a table of 30,000 rows would otherwise
    decide alone which hidden dimensions stay).
    """
    total = torch.zeros(units, dtype=torch.float64)
    for part in parts:
        sums = unit_sums(part._replace(values=part.values.double().abs() ** power), units)
        total += sums / sums.mean().clamp(min=torch.finfo(torch.float64).tiny) if alike else sums
    return total.sqrt() if power == 2 else total


def taylor(parts: Iterable[tuple[Part, Tensor]], units: int) -> Tensor:
    """|sum of w * dL/dw| of each unit; `parts` come with their gradients."""
    total = torch.zeros(units, dtype=torch.float64)
    for part, gradient in parts:
        total += unit_sums(part._replace(values=part.values.double() * gradient.double()), units)
    return total.abs()


class MeanMagnitude:
    """mean |x| of each feature over the real tokens of a stream of batches."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, x: Tensor, mask: Tensor) -> None:
        """x [B, S, C], mask [B, S] of 0/1."""
        tokens = x[mask.bool()].detach().double().abs()
        self._sum = tokens.sum(0) if self._sum is None else self._sum + tokens.sum(0)
        self._count += len(tokens)

    def scores(self, units: int) -> Tensor:
        """Float64 [units]: the mean over a unit's features.

        Raises:
            ValueError: nothing was added.
        """
        if self._sum is None or not self._count:
            raise ValueError("no token was added")
        return self._sum.reshape(units, -1).mean(1) / self._count


def influence(before: Tensor, after: Tensor, mask: Tensor) -> float:
    """The sum of 1 - cos(before, after) over real tokens; [B, S, H], mask [B, S]."""
    a, b = (x[mask.bool()].detach().double() for x in (before, after))
    return float((1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).sum())


# --- choosing ------------------------------------------------------------------------------------


def kept_size(size: int, ratio: float, multiple: int) -> int:
    """What stays of `size` when `ratio` of it goes: the nearest multiple, at least one.

    All stays where `ratio` is 0, though `size` be no multiple, and where there is no full multiple.
    """
    if ratio == 0 or size < multiple:
        return size
    steps = int(size * (1 - ratio) / multiple + 0.5)
    return max(min(steps, size // multiple), 1) * multiple


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` units with the greatest scores, in order; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def allocate(
    scores: Sequence[Tensor], total: int, multiple: int, floor: Sequence[int]
) -> list[int]:
    """How many units each layer keeps when all layers compete: `total` together.

    A layer gives up its weakest `multiple` units at a time, judged by their mean score, and keeps
    `floor` of its own. total and floor are multiples of `multiple`.
    """
    counts = list(floor)
    chunks = []
    for layer, values in enumerate(scores):
        ordered = torch.sort(values, descending=True).values
        whole = len(ordered) // multiple
        means = ordered[: whole * multiple].reshape(whole, multiple).mean(1).tolist()
        first = floor[layer] // multiple
        chunks += [(-mean, layer) for mean in means[first:]]
    # Within a layer means fall, so whatever is taken is the layer's best.
    for _, layer in sorted(chunks)[: max(0, (total - sum(counts)) // multiple)]:
        counts[layer] += multiple
    return counts


def shared_scale(scores: Tensor) -> Tensor:
    """Scores of one layer divided by their root mean square, to compare them with other layers'."""
    return scores / scores.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)


# --- single weights ------------------------------------------------------------------------------


class Threshold(NamedTuple):
    """Magnitudes below `value` go, and the first `ties` of those equal to it."""

    value: float
    ties: int


def least(chunks: Callable[[], Iterable[Tensor]], count: int) -> Threshold:
    """The threshold under which exactly `count` of all values lie, by magnitude as float32.

    chunks: gives the values anew at each call, in the same order; two passes, memory of a chunk.
    The pattern of a non-negative float grows with it, so its two halves are counted in turn.

    Raises:
        ValueError: there are fewer than `count` values.
    """
    if count == 0:
        return Threshold(0.0, 0)
    high = _histogram(bits >> _HALF for bits in map(_patterns, chunks()))
    if count > high.sum():
        raise ValueError(f"{count} of {high.sum()} values")
    before = np.concatenate([[0], np.cumsum(high)])
    top = int(np.searchsorted(before, count)) - 1
    low = _histogram(
        bits[bits >> _HALF == top] & ((1 << _HALF) - 1) for bits in map(_patterns, chunks())
    )
    inside = before[top] + np.concatenate([[0], np.cumsum(low)])
    bottom = int(np.searchsorted(inside, count)) - 1
    pattern = np.array([top << _HALF | bottom], np.uint32)
    return Threshold(float(pattern.view(np.float32)[0]), int(count - inside[bottom]))


def _patterns(values: Tensor) -> npt.NDArray[np.uint32]:
    bits: npt.NDArray[np.uint32] = values.detach().float().abs().flatten().numpy().view(np.uint32)
    return bits


def _histogram(halves: Iterable[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    total = np.zeros(1 << _HALF, np.int64)
    for values in halves:
        total += np.bincount(values, minlength=1 << _HALF)
    return total


def below(values: Tensor, threshold: Threshold) -> tuple[Tensor, Threshold]:
    """Which values go (bool, their shape), and the threshold for the values that follow."""
    size = values.float().abs()
    equal = size == threshold.value
    tied = equal & (equal.flatten().cumsum(0).reshape(equal.shape) <= threshold.ties)
    left = threshold.ties - int(tied.sum())
    return (size < threshold.value) | tied, threshold._replace(ties=left)


def n_m_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Which values of [rows, columns] go so that `n` of every `m` neighbours in a row stay.

    columns should be a multiple of m. Of equal magnitudes the first stay.
    """
    groups = weight.float().abs().reshape(len(weight), -1, m)
    order = torch.argsort(groups, dim=-1, descending=True, stable=True)
    gone = torch.zeros_like(groups, dtype=torch.bool)
    gone.scatter_(-1, order[..., n:], True)
    return gone.flatten(1)
