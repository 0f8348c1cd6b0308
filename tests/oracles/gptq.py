"""GPTQ of one weight in float64, written from the paper's equations, one column at a time.

Frantar et al. 2023, https://arxiv.org/abs/2210.17323: equation (2) of the greedy update they build
on, applied to all rows in a fixed order. After each column the inverse Hessian of the columns that
are left is computed anew by inverting that part of H: no Cholesky factor, no blocks. Scales and
zero points are given. `bug` plants a known mistake, to show that tests see it:

no_feedback     a column's error is not passed on (round to nearest)
block_only      the error stops at the end of its block of columns
wrong_slice     the columns behind a block get the update of their left neighbour
wrong_order     the update uses the inverse of the columns already done
added           the error is added instead of subtracted
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BUGS = ("no_feedback", "block_only", "wrong_slice", "wrong_order", "added")


def hessian(inputs: Array, damping: float) -> Array:
    """2 X^T X plus damping times the mean of its diagonal, for X [T, K]."""
    h = 2 * inputs.T @ inputs
    found: Array = h + damping * np.diag(h).mean() * np.eye(len(h))
    return found


def gptq(
    weight: Array,
    h: Array,
    scales: Array,
    zeros: Array,
    group: int,
    low: int,
    high: int,
    order: Sequence[int] | None = None,
    bug: str = "",
    block: int = 16,
) -> Array:
    """Integers [N, K] for weight [N, K], H [K, K], scales and zeros [N, K / group]."""
    w, q = weight.copy(), np.zeros_like(weight)
    left = list(range(weight.shape[1])) if order is None else list(order)
    number = 0
    while left:
        column = left[0]
        g = column // group
        q[:, column] = np.clip(np.round(w[:, column] / scales[:, g]) + zeros[:, g], low, high)
        error = w[:, column] - (q[:, column] - zeros[:, g]) * scales[:, g]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        if bug == "wrong_order":
            inverse = np.linalg.inv(h)[np.ix_(left, left)]
        update = np.outer(error / inverse[0, 0], inverse[0])
        update[:, 0] = error
        reach = block - number % block
        if bug == "no_feedback":
            update[:, 1:] = 0
        if bug == "block_only":
            update[:, reach:] = 0
        if bug == "wrong_slice":
            update[:, reach + 1 :] = update[:, reach:-1].copy()
        w[:, left] -= -update if bug == "added" else update
        left = left[1:]
        number += 1
    return q


def dequantize(q: Array, scales: Array, zeros: Array, group: int) -> Array:
    """[N, K]."""
    return (q - zeros.repeat(group, 1)) * scales.repeat(group, 1)


def error(inputs: Array, weight: Array, found: Array) -> float:
    """||X W^T - X Q^T||^2."""
    return float(np.square(inputs @ (weight - found).T).sum())
