"""Mixed precision in float64: the divergence of outputs, and the best options under a budget.

The divergence is Kullback & Leibler 1951's, of the distributions that the logits stand for, a mean
over the rows; the options are found by trying every combination. `bug` plants a known mistake, to
show that tests see it:

reversed    KL(found || wanted)
logits      the logits themselves in the place of log-probabilities
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BUGS = ("reversed", "logits")


def divergence(wanted: Array, found: Array, bug: str = "") -> float:
    """In nats, for logits [rows, C]."""
    if bug == "reversed":
        wanted, found = found, wanted
    p, q = (x if bug == "logits" else x - _log_sum(x) for x in (wanted, found))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_sum(x: Array) -> Array:
    top = x.max(1, keepdims=True)
    found: Array = top + np.log(np.exp(x - top).sum(1, keepdims=True))
    return found


def best(parts: Sequence[Sequence[tuple[int, float]]], budget: int) -> float:
    """The least sum of losses of one (bytes, loss) of each part within the budget."""
    return min(
        sum(loss for _, loss in chosen)
        for chosen in itertools.product(*parts)
        if sum(nbytes for nbytes, _ in chosen) <= budget
    )
