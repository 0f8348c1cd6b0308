"""GPTQ: integers of one weight, chosen column by column so that a layer's output changes least.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", https://arxiv.org/abs/2210.17323. For a weight W [N, K] and inputs X [T, K] the
error ||X W^T - X Q^T||^2 has the Hessian H = 2 X^T X, [K, K]. Each column's rounding error is made
up for by the columns that are still float; U, the upper Cholesky factor of H^-1, says how.

Scales are all chosen before the first column is rounded ("static groups"), from the weight as it
was, so they obey the rule of `ops/affine.py`, and a weight on its grid comes back exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.ops.affine import limits

BLOCK = 128  # columns whose errors reach the columns behind them in one product
_LEAST_DAMPING, _MORE = 1e-6, 10.0


class Hessian:
    """H = 2 / n X^T X of a layer's n inputs, float32 [K, K], added up a batch at a time."""

    def __init__(self, columns: int, count: int) -> None:
        self.matrix = torch.zeros(columns, columns)
        self._factor = (2 / max(count, 1)) ** 0.5

    def add(self, x: Tensor) -> None:
        """Inputs [T, K]."""
        x = x.float() * self._factor
        self.matrix.addmm_(x.T, x)


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """U float32 [K, K], upper triangular, with U^T U = (H + damping * mean(diag H) * I)^-1.

    order: columns [K] in the order in which they will be rounded. A matrix that is not positive
    definite (fewer inputs than columns, and no damping) gets ten times the damping, until it is.
    Memory beside H: two matrices of its size.
    """
    if order is None:
        order = torch.arange(len(hessian))
    mean = float(hessian.diagonal().mean())
    if not mean:  # no input at all: no column can make up for another
        return torch.eye(len(hessian))
    backwards = order.flip(0)
    while True:
        # With P H P = L L^T, P the reversal, H = R R^T where R = P L P is upper triangular; then
        # R^-1 is the factor: one Cholesky and one triangular inverse, and H^-1 is never formed.
        reversed_ = hessian[backwards[:, None], backwards]
        reversed_.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(reversed_)
        if not int(info):
            break
        damping = max(damping * _MORE, _LEAST_DAMPING)
    del reversed_
    inverse = torch.eye(len(hessian))
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)


def gptq(
    weight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    scheme: TensorScheme,
    factor: Tensor,
    order: Tensor | None = None,
) -> Tensor:
    """Integers int8 [N, K] of float32 [N, K] for given scales [N, G], zero points int8 [N, G].

    factor: of `inverse_factor` with the same `order`.
    """
    columns = weight.shape[1]
    size = scheme.group_size or columns
    if order is None:
        order = torch.arange(columns)
    w = weight.T[order].contiguous()  # a column of W is a row here
    q = torch.empty(w.shape, dtype=torch.int8)
    steps = scales.T.contiguous()
    zeros = torch.zeros_like(steps) if zero_points is None else zero_points.T.float().contiguous()
    low, high = limits(scheme)
    places = order.tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(stop - start, w.shape[1])
        for at in range(start, stop):
            group = places[at] // size
            integers = (w[at] / steps[group]).round_().add_(zeros[group]).clamp_(low, high)
            q[places[at]] = integers
            error = errors[at - start]
            torch.sub(w[at], integers.sub_(zeros[group]).mul_(steps[group]), out=error)
            error /= factor[at, at]
            w[at + 1 : stop].addr_(factor[at, at + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return q.T.contiguous()


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """||X D^T||^2 of a change D [N, K] of a weight, times 2 / n: the sum of (D H) * D."""
    return float(((difference @ hessian) * difference).sum(1).double().sum())
