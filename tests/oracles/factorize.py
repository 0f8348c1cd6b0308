"""A weight as the product of two in float64, written from the papers.

Eckart & Young 1936: the best product of rank r is the SVD cut off after r singular values, and its
squared error is the sum of the squares of the others. SVD-LLM (Wang et al. 2024,
https://arxiv.org/abs/2403.07378), section 3.1: with S the Cholesky factor of X^T X for inputs X
[T, K], W S = U D V^T; A = diag(sqrt d) V^T S^-1 and B = U diag(sqrt d), of the first r. `bug`
plants a known mistake, to show that tests see it:

unwhitened    S is left out (plain SVD)
transposed    S^T in the place of S
uninverted    A lacks S^-1
smallest      the last r singular values are kept
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BUGS = ("unwhitened", "transposed", "uninverted", "smallest")


def plain(weight: Array, rank: int) -> Array:
    """The product B A [N, K]."""
    u, d, v = np.linalg.svd(weight, full_matrices=False)
    found: Array = u[:, :rank] * d[:rank] @ v[:rank]
    return found


def whitened(weight: Array, moments: Array, rank: int, bug: str = "") -> Array:
    """The product B A [N, K] for X^T X [K, K], which is positive definite."""
    s = np.linalg.cholesky(moments)
    s = np.eye(len(s)) if bug == "unwhitened" else s.T if bug == "transposed" else s
    u, d, v = np.linalg.svd(weight @ s, full_matrices=False)
    some = slice(-rank, None) if bug == "smallest" else slice(rank)
    root = np.sqrt(d[some])
    inverse = np.eye(len(s)) if bug == "uninverted" else np.linalg.inv(s)
    found: Array = (u[:, some] * root) @ (root[:, None] * v[some] @ inverse)
    return found


def error(weight: Array, product: Array, moments: Array) -> float:
    """||X (W - B A)^T||^2 for X^T X."""
    difference = weight - product
    return float(np.trace(difference @ moments @ difference.T))


def energies(weight: Array, moments: Array) -> Array:
    """Squared singular values of W S, the greatest first."""
    found: Array = np.linalg.svd(weight @ np.linalg.cholesky(moments), compute_uv=False) ** 2
    return found
