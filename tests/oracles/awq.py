"""AWQ's scales and their error for one layer in float64, written from the paper.

Lin et al. 2023, https://arxiv.org/abs/2306.00978, equations (4) and (5): s = mean|x|^alpha by input
channel, here divided by the root of its greatest times its smallest value; the error is
||Q(W diag(s)) (diag(s)^-1 X) - W X||^2. Q is round to nearest (`oracles/rtn.py`). `bug` plants a
known mistake, to show that tests see it:

unfolded      inputs are not divided by s
inverted      quiet channels get the finer steps
greatest      max |x| instead of the mean
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from oracles import rtn

Array = npt.NDArray[np.float64]
BUGS = ("unfolded", "inverted", "greatest")


def scale(inputs: Array, alpha: float, bug: str = "") -> Array:
    """s [K] for inputs [T, K]."""
    size = np.abs(inputs).max(0) if bug == "greatest" else np.abs(inputs).mean(0)
    s: Array = size ** (-alpha if bug == "inverted" else alpha)
    normalized: Array = s / np.sqrt(s.max() * s.min())
    return normalized


def error(
    inputs: Array, weight: Array, alpha: float, bits: int, group: int, bug: str = ""
) -> float:
    """The squared error of the outputs of weight [N, K]."""
    s = scale(inputs, alpha, bug)
    q, scales, zeros = rtn.quantize(weight * s, bits, group, True, True)
    rounded = (q - zeros.repeat(group, 1)) * scales.repeat(group, 1)
    seen = inputs if bug == "unfolded" else inputs / s
    return float(np.square(seen @ rounded.T - inputs @ weight.T).sum())
