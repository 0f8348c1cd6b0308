"""Round-to-nearest quantization of one group of weights, in float64, written from the rule.

The rule: the scale is a bf16 value in [2^-14, 65280], fixed first; then the integers, nearest, ties
to even. Plain maximum: the smallest range that clips nothing. Search: a scale with a small squared
error, and the plain maximum where that is as good. Symmetric 4 bits, groups up to 128: of range /
16 divisors the one with the least estimate: each value is first rounded to 840ths of the range (in
float32), each error then to whole 65536ths of its square. Else, and where such a scale would not be
allowed: range / divisor for some divisors that clip, then (4 bits) multiples of the best of these,
in two rounds, then range / whole number (4 bits: if the first 8 values are within 1/128 of
multiples of one of those). `bug` plants a known mistake, to show that tests see it.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BUGS = ("late_scale", "wide", "away", "no_floor", "truncate", "shifted_zero", "clip_order")
TABLE_BUGS = ("narrow_table", "few_parts", "last_divisor", "no_plain")
DIVISORS = [4, 5, 6, 7, 7.2, 7.35, 7.55, 7.7, 7.85, 8, 8.15, 8.3, 8.5, 8.8, 9.15, 9.65]


def bf16(value: float, bug: str = "") -> float:
    """The nearest bfloat16, ties to even, by the bits of the float32."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    if bug != "truncate":
        bits += 0x7FFF + ((bits >> 16) & 1)
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])


def limits(bits: int, symmetric: bool, bug: str = "") -> tuple[int, int]:
    if bits == 8 and symmetric and bug != "wide":
        return -127, 127
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def canonical(scale: float, bug: str = "") -> float:
    floor = 0.0 if bug == "no_floor" else 2.0**-14
    return min(max(bf16(scale, bug), floor), 65280.0)


def rounds(bits: int, symmetric: bool) -> tuple[list[float], list[list[float]], list[float]]:
    """Searched: divisors of the range; factors of the best so far, by round; divisors again."""
    most = {(8, True): 127, (4, True): 7, (8, False): 255, (4, False): 15}[bits, symmetric]
    if bits == 8:
        clipping = [most * (1 + 0.05 * i) for i in range(1, 9)]
        return clipping, [], [float(n) for n in range(most - 3, most + 1)]
    clipping = [most * factor for factor in (1.17, 1.34)]
    return (
        clipping,
        [[137 / 128, 119 / 128], [131 / 128, 125 / 128]],
        [float(n) for n in range(1, most + 1)],
    )


def estimates(w: Array, span: float, bug: str = "") -> Array:
    """What each of DIVISORS would cost a group with this greatest magnitude."""
    parts = 84 if bug == "few_parts" else 840
    factor = np.float32(parts) / np.float32(max(span, 1e-6))
    x = np.floor(w.astype(np.float32) * factor + np.float32(parts + 0.5)).astype(np.float64) / parts
    steps = np.outer(x - 1, DIVISORS)
    bottom = -7 if bug == "narrow_table" else -8
    error = (np.clip(np.round(steps), bottom, 7) - steps) / DIVISORS
    found: Array = np.round(np.square(error) * 65536).sum(axis=0)
    return found


def quantize_group(
    w: Array, bits: int, symmetric: bool, search: bool, bug: str = ""
) -> tuple[Array, float, int]:
    """Integers, scale and zero point of one group [K]."""
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    bottom, top = limits(bits, symmetric, bug)
    if symmetric:
        plain, span = max(high / top, low / bottom), max(high, -low)
    else:
        plain, span = (high - low) / (top - bottom), high - low
    best: tuple[float, Array, float, int] | None = None

    def consider(raw: list[float]) -> None:
        nonlocal best
        for unrounded in raw:
            scale = canonical(unrounded, bug)
            with np.errstate(all="ignore"):
                zero = 0
                if not symmetric:
                    middle = (bottom + top) / 2 - (low + high) / 2 / scale
                    zero = int(np.clip(np.round(middle), bottom, top)) + (bug == "shifted_zero")
                ratio = w / (unrounded if bug == "late_scale" else scale)
                q = np.trunc(ratio + np.sign(ratio) / 2) if bug == "away" else np.round(ratio)
                q = np.clip(q, bottom, top) + zero if bug == "clip_order" else q + zero
                q = q if bug == "clip_order" else np.clip(q, bottom, top)
                error = float(np.square((q - zero) * scale - w).sum())
            if best is None or error < best[0]:
                best = (error, q, scale, zero)

    consider([plain])
    assert best is not None
    allowed = span == 0 or 9.65 * 2.0**-14 <= span <= 4 * 65280
    if search and bits == 4 and symmetric and len(w) <= 128 and allowed:
        cost = estimates(w, span, bug)
        place = len(cost) - 1 - int(cost[::-1].argmin()) if bug == "last_divisor" else cost.argmin()
        if bug == "no_plain":
            best = (np.inf, *best[1:])
        consider([span / DIVISORS[place]])
    elif search:
        clipping, fine, whole = rounds(bits, symmetric)
        consider([span / divisor for divisor in clipping])
        for factors in fine:
            consider([best[2] * factor for factor in factors])
        off = [np.abs(w[:8] * n / max(span, 2.0**-14) % 1 - 0.5).min() for n in whole]
        if bits == 8 or max(off) >= 0.5 - 1 / 128:
            consider([span / divisor for divisor in whole])
    return best[1], best[2], best[3]


def quantize(
    weight: Array, bits: int, group: int | None, symmetric: bool, search: bool, bug: str = ""
) -> tuple[Array, Array, Array]:
    """Integers [N, K], scales [N, G] and zero points [N, G] of a weight [N, K]."""
    rows, columns = weight.shape
    size = group or columns
    q = np.empty_like(weight)
    scales, zeros = np.empty((rows, columns // size)), np.empty((rows, columns // size))
    for row in range(rows):
        for g in range(columns // size):
            part = slice(g * size, (g + 1) * size)
            q[row, part], scales[row, g], zeros[row, g] = quantize_group(
                weight[row, part], bits, symmetric, search, bug
            )
    return q, scales, zeros
