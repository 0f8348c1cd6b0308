"""INT8 keys and values in float64, written from the definition: an integer is the nearest to
x / scale from -128 to 127, and a scale is a reach over 127.

The reach is the greatest |x| of a feature over the samples, or a quantile of it; two features that
a rotary position turns into each other share that of their length as a complex number. `bug` plants
a known mistake, to show that tests see it:

single      a turned feature's own greatest value counts, not its pair's length
truncated   integers are cut, not rounded
wrapped     what is too great comes back at the other end
exchanged   keys have the scales of values, values those of keys
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BUGS = ("single", "truncated", "wrapped", "exchanged")


def lengths(x: Array, dims: int, interleaved: bool, bug: str = "") -> Array:
    """x [T, heads, D], of which the first `dims` features are turned in pairs."""
    found = np.abs(x)
    if bug == "single":
        return found
    for i in range(dims // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dims // 2)
        found[..., a] = found[..., b] = np.abs(x[..., a] + 1j * x[..., b])
    return found


def scales(
    x: Array, per: str, dims: int, interleaved: bool, share: float = 1.0, bug: str = ""
) -> Array:
    """[heads, D] or [1]; share: of the values that are not clipped."""
    found = lengths(x, dims, interleaved, bug)
    found = found.reshape(-1, 1) if per == "tensor" else found
    ordered = np.sort(found, axis=0)
    kept: Array = ordered[int(np.ceil(share * len(ordered))) - 1] / 127
    return kept


def rounded(x: Array, scale: Array, bug: str = "") -> Array:
    """x [T, heads, D], as the cache gives it back."""
    q = np.trunc(x / scale) if bug == "truncated" else np.rint(x / scale)
    q = (q + 128) % 256 - 128 if bug == "wrapped" else np.clip(q, -128, 127)
    result: Array = q * scale
    return result


def attention(q: Array, k: Array, v: Array, k_scale: Any, v_scale: Any, bug: str = "") -> Array:
    """Causal attention of queries [T, heads, D] to a cache of keys and values [T, kv heads, D]:
    [T, heads, D].
    """
    if bug == "exchanged":
        k_scale, v_scale = v_scale, k_scale
    k, v = rounded(k, k_scale, bug), rounded(v, v_scale, bug)
    out, group = np.zeros_like(q), q.shape[1] // k.shape[1]
    for t in range(len(q)):
        for head in range(q.shape[1]):
            score = k[: t + 1, head // group] @ q[t, head] / np.sqrt(q.shape[2])
            weight = np.exp(score - score.max())
            out[t, head] = weight / weight.sum() @ v[: t + 1, head // group]
    return out
