"""SmoothQuant of one pair of layers in float64, from the paper's formulas (arXiv:2211.10438).

`bug` plants a known mistake, to show that tests see it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BUGS = ("swapped", "output_channels", "forgotten_bias", "wrong_way", "mean")


def smoothed(
    x: Array, maker: Array, bias: Array, reader: Array, alpha: float, bug: str = ""
) -> tuple[Array, Array, Array]:
    """x [N, K] is what the maker [K, J] with its bias [K] gives the reader [M, K].

    Returns the new maker, its bias and the new reader.
    """
    if bug == "swapped":
        alpha = 1 - alpha
    seen = np.abs(x).mean(0) if bug == "mean" else np.abs(x).max(0)
    # M = K in the tests, so that the wrong axis is possible.
    weights = np.abs(reader).max(1 if bug == "output_channels" else 0)
    s = seen**alpha / weights ** (1 - alpha)
    if bug == "wrong_way":
        s = 1 / s
    return maker / s[:, None], bias if bug == "forgotten_bias" else bias / s, reader * s[None, :]
