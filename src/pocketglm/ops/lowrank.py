"""One weight as the product of two: the best of a given rank for its outputs.

Plain: the truncated SVD of W [N, K], which no other product of that rank is nearer to (Eckart and
Young 1936). Whitened: Wang et al. 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for
Large Language Model Compression", https://arxiv.org/abs/2403.07378: with S S^T = X^T X for inputs X
[T, K], the truncated SVD of W S loses least of the outputs, ||X (W - B A)^T||; each singular value
that is left out costs just itself. There A is multiplied by S^-1. Here U, the leading left singular
vectors of W S, alone is needed: U U^T W S is that truncation, so B = U and A = U^T W are the same
product, and inputs that span less than K dimensions do no harm.

Each singular value's root goes to either factor, as there. Of the powers 0, 1/4, 1/2, 3/4 and 1, on
MiniLM's layers at rank 128 to 224, a half was within 8 % of the best for INT8 and INT4 factors; 0
lost up to three times as much.

U is found from the smaller of the two products of W S with itself, in float64. Singular values
below 1e-8 of the greatest are noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SHORTEST = 1e-4  # of the columns of B; the longest has 1


class Moments:
    """X^T X of a layer's inputs, float64 [K, K], added up a batch at a time."""

    def __init__(self, columns: int) -> None:
        self.matrix = torch.zeros(columns, columns, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Inputs [T, K]."""
        x = x.double()
        self.matrix.addmm_(x.T, x)

    def damped(self, share: float) -> Tensor:
        """With this share of the diagonal's mean added to it."""
        found = self.matrix.clone()
        found.diagonal().add_(share * float(found.diagonal().mean()))
        return found


@dataclass(frozen=True, slots=True)
class Decomposition:
    """energies: squared singular values, float64, the greatest first. left: columns that are the
    left singular vectors but for their lengths, float64 [N, number of energies].
    """

    weight: Tensor
    energies: Tensor
    left: Tensor

    @classmethod
    def of(cls, weight: Tensor, moments: Tensor | None = None) -> Decomposition:
        """Of a weight [N, K]; moments: X^T X [K, K] of its inputs, None = those of all inputs are
        alike (plain SVD).
        """
        w = weight.double()
        if len(w) <= w.shape[1]:
            product = w @ w.T if moments is None else w @ moments.double() @ w.T
            energies, vectors = _spectrum(product)
            return cls(w, energies, vectors)
        seen = w if moments is None else w @ _root(moments.double())
        energies, right = _spectrum(seen.T @ seen)
        return cls(w, energies, seen @ right)

    def rank_for(self, share: float) -> int:
        """The smallest rank that keeps this share of the energies; 1.0: all of them."""
        total = self.energies.sum()
        if share >= 1 or not total:
            return len(self.energies)
        kept = self.energies.cumsum(0) / total
        return min(int((kept < share).sum()) + 1, len(self.energies))

    def lost(self, rank: int) -> float:
        """The squared error of the product of this rank."""
        return float(self.energies[rank:].sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A float32 [rank, K] and B float32 [N, rank] with W about B A.

        rank: at most N. The lengths of B's columns are the roots of the singular values.
        """
        basis, _ = torch.linalg.qr(self.left[:, :rank])
        lengths = (self.energies[:rank] / self.energies[0].clamp(min=1e-300)) ** 0.25
        lengths = nn.functional.pad(lengths, (0, rank - len(lengths))).clamp(min=_SHORTEST)
        inner = (basis.T @ self.weight) / lengths[:, None]
        return inner.float(), (basis * lengths).float()


def _spectrum(product: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the greatest first and none negative, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(product)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _root(moments: Tensor) -> Tensor:
    """S with S S^T = moments."""
    values, vectors = torch.linalg.eigh(moments)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
