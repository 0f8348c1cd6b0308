"""The losses of distillation in float64, row by row, from the papers' formulas.

Hinton et al. 2015 (soft targets), Romero et al. 2015 (hidden states), Wang et al. 2021 (relations).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def softmax(values: npt.ArrayLike) -> Array:
    """Over the last axis."""
    x = np.asarray(values, np.float64)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def kl(p: Array, q: Array) -> float:
    """sum p ln(p / q) over all entries; 0 ln 0 = 0."""
    some = p > 0
    return float((p[some] * (np.log(p[some]) - np.log(q[some]))).sum())


def soft_targets(
    student: npt.ArrayLike, teacher: npt.ArrayLike, temperature: float, reverse: bool = False
) -> Array:
    """[N]: the gradient's size is kept by T^2."""
    ours = softmax(np.asarray(student, np.float64) / temperature)
    theirs = softmax(np.asarray(teacher, np.float64) / temperature)
    pairs = zip(ours, theirs, strict=True) if reverse else zip(theirs, ours, strict=True)
    return np.array([temperature**2 * kl(p, q) for p, q in pairs])


def cross_entropy(student: npt.ArrayLike, labels: Sequence[int], smoothing: float = 0.0) -> Array:
    """[N], against 1 - smoothing on the label and the rest spread over all classes."""
    p = softmax(student)
    wanted = np.full(p.shape, smoothing / p.shape[1])
    wanted[np.arange(len(labels)), labels] += 1 - smoothing
    return np.asarray(-(wanted * np.log(p)).sum(axis=1))


def hidden(
    student: npt.ArrayLike,
    teacher: npt.ArrayLike,
    lengths: Sequence[int],
    projection: npt.ArrayLike | None = None,
) -> Array:
    """[N]: squared differences of the real tokens; projection [teacher width, student width]."""
    ours, theirs = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    if projection is not None:
        ours = ours @ np.asarray(projection, np.float64).T
    return np.array([((ours[i, :n] - theirs[i, :n]) ** 2).mean() for i, n in enumerate(lengths)])


def relations(
    student: npt.ArrayLike, teacher: npt.ArrayLike, lengths: Sequence[int], heads: int
) -> Array:
    """[N]: 1 / (heads * tokens) * sum over heads and tokens of KL(teacher's || student's)."""
    result = []
    for ours, theirs, count in zip(
        np.asarray(student, np.float64), np.asarray(teacher, np.float64), lengths, strict=True
    ):
        total = 0.0
        for head in range(heads):
            matrices = []
            for values in (theirs, ours):
                width = values.shape[1] // heads
                part = values[:count, head * width : (head + 1) * width]
                matrices.append(softmax(part @ part.T / np.sqrt(width)))
            total += kl(*matrices)
        result.append(total / (heads * count))
    return np.array(result)
