"""Low-rank adapters in float64, from the paper's equation: h = W x + (alpha / r) B A x.

Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1. Gradients by the chain rule, written
out by hand; rows are examples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Gradients(NamedTuple):
    """Of sum(h * weight) with respect to the input [N, in], A [r, in] and B [out, r]."""

    x: Array
    a: Array
    b: Array


def forward(x: Array, w: Array, bias: Array, a: Array, b: Array, alpha: float) -> Array:
    """x [N, in], w [out, in], bias [out], a [r, in], b [out, r] -> [N, out]."""
    scale = alpha / a.shape[0]
    rows = [w @ row + bias + scale * (b @ (a @ row)) for row in x]
    return np.stack(rows)


def merged(w: Array, a: Array, b: Array, alpha: float) -> Array:
    """The one weight [out, in] that does what both do."""
    product: Array = np.einsum("or,ri->oi", b, a)
    result: Array = w + (alpha / a.shape[0]) * product
    return result


def gradients(x: Array, w: Array, a: Array, b: Array, alpha: float, weight: Array) -> Gradients:
    """For `weight` [N, out], the gradient that arrives from above."""
    scale = alpha / a.shape[0]
    return Gradients(
        x=weight @ merged(w, a, b, alpha),
        a=scale * np.einsum("no,or,ni->ri", weight, b, x),
        b=scale * np.einsum("no,ri,ni->or", weight, a, x),
    )
