"""Integers, scales and zero points of one weight: w = (q - zero_point) * scale.

The one quantization rule of PocketGLM; training's fake quantization, every method and every target
use these functions. Ranges: symmetric INT8 -127..127, symmetric INT4 -8..7, asymmetric the whole
storage range. A scale is a bf16 value between fp16's smallest normal (6.1e-5) and 65280, so that
bf16, fp16 and float32 all hold it exactly, and it is fixed before the integers are chosen: the
integers are the nearest ones (ties to even) for the scale that is stored, not for its unrounded
ancestor.

The scale is searched for the least squared error, as in "Post training 4-bit quantization of
convolutional networks" (Banner et al., NeurIPS 2019), here by enumeration. Symmetric INT4 in groups
compares 16 scales at once: a table holds the error that each would cause to a value that is a whole
number of 840ths of the range, so that a group's errors are the sum of some of its rows (`_table`).
The one that is found and the plain maximum are then compared exactly. The mean squared error is
above that of 41 evenly spaced scales by 0.21 % on normal weights, 0.15 % on Laplace's and 0.13 % on
Student's t with 4 degrees (groups of 32; of 128: 0.32, 0.26 and 0.22 %); below the plain maximum's
by 12, 9 and 8 % (18, 17 and 17 %). The other schemes try fewer scales, coarse to fine (`_search`).

Only element-wise float32 operations, sums of whole numbers and sums in one fixed order decide, so
the result does not depend on how rows are batched, on the number of threads, or on the machine.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import torch

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.errors import UnsupportedError

SCALE_MIN = 2.0**-14  # fp16's smallest normal number
SCALE_MAX = 65280.0  # the largest bf16 value below fp16's maximum, 65504
GROUP_SIZES = (32, 64, 128)
_CHUNK = 1 << 18  # elements that the search works on at a time: they stay in the cache
# Symmetric INT4 by table: the range is divided by these. 4 to 8 bring a weight back that is on a
# grid already (its largest integer, perhaps times a power of two, is one of them); the others had
# the least error together.
_DIVISORS = (4, 5, 6, 7, 7.2, 7.35, 7.55, 7.7, 7.85, 8, 8.15, 8.3, 8.5, 8.8, 9.15, 9.65)
_PIECE = 1 << 19  # elements that the table search works on at a time: fewer calls count more
_PARTS = 840  # of the range: multiples of its 4th, 5th, 6th, 7th and 8th part are exact
_UNITS = 1 << 16  # errors are whole numbers of these: float32 sums of a group, times 16, are exact
_WIDEST = 128  # the largest group of which that holds
_SPAN_MIN, _SPAN_MAX = _DIVISORS[-1] * SCALE_MIN, _DIVISORS[0] * SCALE_MAX
# Scales to try, by bits. The range is divided by levels * factor: clips the more, the greater.
_CLIPPING = {
    4: (1.17, 1.34),
    8: (1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4),
}
# Then, by round: the best so far times 1 + and 1 - this (the products are exact).
_FINE = {4: (9 / 128, 3 / 128), 8: ()}
_SAMPLE, _NEAR = 8, 1 / 128  # a group may be on a grid if so many values are so near to it


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
    """Quantize float [N, K]; float32 decides, whatever the type.

    Returns q int8 [N, K], scales float32 [N, G], zero points int8 [N, G] (None if symmetric).
    With `search` no group has a larger squared error than its plain-maximum scale gives.
    A weight that this function made comes back exactly.

    Raises:
        UnsupportedError: the group size does not divide K.
    """
    scales, zero_points = choose_scales(weight, scheme, search=search)
    return to_integers(weight, scales, zero_points, scheme), scales, zero_points


def choose_scales(
    weight: torch.Tensor,
    scheme: TensorScheme,
    *,
    search: bool = True,
    importance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales float32 [N, G] and zero points int8 [N, G] (None if symmetric) for float [N, K].

    importance: factors [K] of the squared errors that the search adds up; None: all are 1.
    """
    check_groups("weight", weight.shape[1], scheme)
    if search and importance is None and _has_table(scheme):
        return _choose_by_table(weight, scheme), None
    factors = None if importance is None else _grouped(importance.float()[None], scheme)
    chunks = (weight[rows].float() for rows in _row_ranges(*weight.shape))
    parts = [_choose(_grouped(chunk, scheme), scheme, search, factors) for chunk in chunks]
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
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in _row_ranges(*weight.shape):
        q = (_grouped(weight[rows].float(), scheme) / scales[rows].unsqueeze(-1)).round_()
        if zero_points is not None:
            q += zero_points[rows].unsqueeze(-1)
        integers[rows] = q.clamp_(low, high).flatten(1)
    return integers


def squared_error(
    weight: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    scheme: TensorScheme,
) -> tuple[float, float]:
    """Sums over float [N, K]: squared differences from what is stored, and squares."""
    lost = total = 0.0
    for rows in _row_ranges(*weight.shape):
        zeros = None if zero_points is None else zero_points[rows]
        w = weight[rows].float()
        error = dequantize(q[rows], scales[rows], zeros, scheme).sub_(w).square_()
        lost += float(error.sum(1).double().sum())  # rows in float32, all in float64
        total += float(torch.square(w, out=error).sum(1).double().sum())
    return lost, total


def dequantize(
    q: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    scheme: TensorScheme,
) -> torch.Tensor:
    """q int8 [N, K], scales [N, G], zero points int8 [N, G] -> float32 [N, K], exactly."""
    w = _grouped(q.to(torch.float32, copy=True), scheme)
    if zero_points is not None:
        w -= zero_points.unsqueeze(-1)
    w *= scales.float().unsqueeze(-1)
    return w.reshape(q.shape)


def canonical(scales: torch.Tensor) -> torch.Tensor:
    """The nearest allowed scales: bf16 values in the normal range of fp16; float32, never 0."""
    return scales.float().to(torch.bfloat16).float().clamp_(SCALE_MIN, SCALE_MAX)


def _row_ranges(rows: int, columns: int) -> Iterator[slice]:
    """All rows, about _CHUNK elements at a time; one empty range if there are none."""
    step = max(1, _CHUNK // max(columns, 1))
    return (slice(start, start + step) for start in range(0, max(rows, 1), step))


def _grouped(weight: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """[N, K] -> [N, G, K / G]."""
    rows, columns = weight.shape
    return weight.reshape(rows, scheme.groups(columns), scheme.group_size or columns)


# --- symmetric INT4 by table ---------------------------------------------------------------------


def _has_table(scheme: TensorScheme) -> bool:
    size = scheme.group_size
    return scheme.bits == 4 and scheme.symmetric and size is not None and size <= _WIDEST


@functools.cache
def _table() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared error of values at -840/840 to 840/840 of the range, for each divisor [1681, 16], in
    units times 16, which leaves room for the divisor's number in the sum; divisors; numbers.
    """
    parts = torch.arange(-_PARTS, _PARTS + 1, dtype=torch.float64).unsqueeze(1) / _PARTS
    divisors = torch.tensor(_DIVISORS, dtype=torch.float64)
    error = (parts * divisors).round_().clamp_(-8, 7) / divisors - parts
    table = (error.square_() * _UNITS).round_().float() * len(_DIVISORS)
    return table, divisors.float(), torch.arange(len(_DIVISORS), dtype=torch.float32)


def _choose_by_table(weight: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """Scales [N, G] of float [N, K]."""
    groups = weight.detach().reshape(-1, scheme.group_size or 1)
    scales = torch.empty(len(groups))
    step = _PIECE // groups.shape[1]
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        _search_by_table(groups[part], scales[part], scheme)
    return scales.reshape(len(weight), scheme.groups(weight.shape[1])).to(weight.device)


class _Buffers(threading.local):
    """Each thread's own, which stay in its cache."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # the next call may be outside of it
            self.w = torch.empty(_PIECE)
            self.pair = torch.empty(2 * _PIECE)
            self.index = torch.empty(_PIECE, dtype=torch.int32)


_buffers = _Buffers()


def _search_by_table(groups: torch.Tensor, scales: torch.Tensor, scheme: TensorScheme) -> None:
    """Write the scales [M] of float [M, size]."""
    count, size = groups.shape
    w = _buffers.w[: groups.numel()].view(count, size).copy_(groups)
    low, high = w.amin(1), w.amax(1)
    scale = torch.empty(2, count, 1)  # by the table; of the plain maximum
    scale[0, :, 0] = _estimated(w, torch.maximum(-low, high), scheme)
    scale[1, :, 0] = canonical(torch.maximum(low * (-1 / 8), high / 7))
    q = torch.div(w, scale, out=_buffers.pair[: 2 * w.numel()].view(2, count, size))
    q.round_().clamp_(-8, 7)
    error = torch.addcmul(w, q, scale, value=-1, out=q).square_()
    error[0] -= error[1]
    for half, other in _halves(error[0].T):
        half += other
    torch.where(error[0, :, 0] < 0, *scale.squeeze(2), out=scales)


def _estimated(w: torch.Tensor, span: torch.Tensor, scheme: TensorScheme) -> torch.Tensor:
    """The best scale [M] by the table of w [M, size], of the greatest magnitudes [M]."""
    table, divisors, numbers = _table()
    parts = torch.mul(w, (_PARTS / span).unsqueeze(1), out=_buffers.pair[: w.numel()].view_as(w))
    smallest, largest = torch.stack(span.aminmax()).tolist()
    usual = smallest >= _SPAN_MIN and largest <= _SPAN_MAX
    if not usual:  # in some groups not all of the table's scales are allowed
        strange = (~((span >= _SPAN_MIN) & (span <= _SPAN_MAX))).nonzero().squeeze(1)
        parts[strange] = 0
    index = _buffers.index[: w.numel()]
    index.view_as(w).copy_(parts.add_(_PARTS + 0.5))  # cut off to the nearest
    starts = torch.arange(0, w.numel(), w.shape[1], dtype=torch.int32)
    errors = torch.embedding_bag(table, index, starts)[0]
    errors += numbers
    for half, other in _halves(errors.T):
        torch.minimum(half, other, out=half)
    scale = canonical(span / divisors[errors[:, 0].int() & (len(_DIVISORS) - 1)])
    if not usual:
        scale[strange] = _choose(w[strange].unsqueeze(0), scheme, search=True)[0][0]
    return scale


def _choose(
    w: torch.Tensor, scheme: TensorScheme, search: bool, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [N, G] of w [N, G, K / G]; importance [1, G, K / G]."""
    shape = w.shape[:2]
    if importance is not None:
        importance = importance.expand_as(w).flatten(0, 1).T.contiguous()
    w = w.flatten(0, 1).T.contiguous()  # groups innermost: their scales are read in a row
    low, high = w.amin(0).clamp_(max=0), w.amax(0).clamp_(min=0)
    bottom, top = limits(scheme)
    if scheme.symmetric:
        span, plain = torch.maximum(-low, high), torch.maximum(low / bottom, high / top)
    else:
        span, plain = high - low, (high - low) / (top - bottom)
    best = _Best(w, low, high, scheme, canonical(plain), importance)
    if search:
        _search(best, span)
    return best.scale.reshape(shape), _zero_point(low, high, best.scale, scheme).reshape(shape)


def _search(best: _Best, span: torch.Tensor) -> None:
    """Improve the plain maximum, the smallest scale that clips nothing; `span` [M] is the range.

    Tried are the range over some divisors that clip; then, by round, multiples of the best so far;
    and the range over whole numbers, which brings a weight that is on a grid already back to it
    (INT8: rounding the scale to bf16 moves the top integer by one or two at most). INT4 has many of
    these, so there only groups that may lie on such a grid are tried.
    """
    bottom, top = limits(best.scheme)
    bits, levels = best.scheme.bits, top if best.scheme.symmetric else top - bottom
    best.consider(best.scale)
    best.consider(*(span / (levels * factor) for factor in _CLIPPING[bits]))
    for step in _FINE[bits]:
        best.consider(best.scale * (1 + step), best.scale * (1 - step))
    if bits == 8:
        best.consider(*(span / divisor for divisor in range(levels - 3, levels + 1)))
        return
    whole = torch.arange(1, levels + 1).unsqueeze(1)
    regular = _on_grid(best.w[:1], span, whole).nonzero().squeeze(-1)
    regular = regular[_on_grid(best.w[:_SAMPLE, regular], span[regular], whole)]
    if len(regular):
        few = best.part(regular)
        few.consider(*(span[regular] / whole))
        best.scale[regular] = few.scale


def _on_grid(w: torch.Tensor, span: torch.Tensor, divisors: torch.Tensor) -> torch.Tensor:
    """Which groups [M] of w [K, M] seem to be whole multiples of span / one of the divisors."""
    r = (w / span.clamp(min=SCALE_MIN)).unsqueeze(1) * divisors
    return r.sub_(r.round()).abs_().amax(0).amin(0) <= _NEAR


class _Best:
    """The best scale so far [M] of each group of w [K / G, M], and its squared error, of which each
    value's share is multiplied by its `importance`.
    """

    def __init__(
        self,
        w: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        scheme: TensorScheme,
        scale: torch.Tensor,
        importance: torch.Tensor | None = None,
    ) -> None:
        self.w, self.low, self.high, self.scheme, self.scale = w, low, high, scheme, scale
        self.importance = importance
        self.error = torch.full_like(scale, torch.inf)
        self._q = torch.empty_like(w)  # spares an allocation per pass
        self._halves = list(_halves(self._q))

    def part(self, index: torch.Tensor) -> _Best:
        """The same for groups `index` alone."""
        few = _Best(
            self.w[:, index],
            self.low[index],
            self.high[index],
            self.scheme,
            self.scale[index],
            None if self.importance is None else self.importance[:, index],
        )
        few.error = self.error[index]
        return few

    def consider(self, *scales: torch.Tensor) -> None:
        """Take each of `scales` [M] where its error is smaller; a tie keeps the earlier one."""
        for scale in canonical(torch.stack(scales)):
            error = self._error(scale)
            self.scale = torch.where(error < self.error, scale, self.scale)
            self.error = torch.minimum(error, self.error)

    def _error(self, scale: torch.Tensor) -> torch.Tensor:
        """Squared error [M] after quantization; valid until the next call."""
        bottom, top = limits(self.scheme)
        q = torch.mul(self.w, 1 / scale, out=self._q).round_()
        if self.scheme.symmetric:
            q.clamp_(bottom, top)
        else:  # clamping q - zero to shifted limits is clamping q
            zero = _zero_point(self.low, self.high, scale, self.scheme)
            torch.clamp(q, bottom - zero, top - zero, out=q)
        torch.addcmul(self.w, q, scale, value=-1, out=q).square_()
        if self.importance is not None:
            q *= self.importance
        for half, other in self._halves:
            half += other
        return q[0]


def _zero_point(
    low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, scheme: TensorScheme
) -> torch.Tensor:
    """The integer that means 0: the middle of the range goes to the middle of the integers."""
    if scheme.symmetric:
        return torch.zeros_like(scale)
    bottom, top = limits(scheme)
    return ((bottom + top) / 2 - (low + high) / 2 / scale).round_().clamp_(bottom, top)


def _halves(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of `x` that, added one to the other in turn, leave the sum over the first axis in x[0].

    One fixed order, unlike torch.sum.
    """
    while (n := len(x)) > 1:
        yield x[: n // 2], x[n // 2 : n // 2 * 2]
        if n % 2:
            yield x[0], x[-1]
        x = x[: n // 2]
