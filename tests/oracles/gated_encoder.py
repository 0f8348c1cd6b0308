"""A BERT classifier in float64 numpy, full size, whose parts carry gates.

A gate of 0 stands for a removed head, channel or layer; a hidden dimension that is not in `hidden`
takes no part in any norm's statistics. Derivatives with respect to gates are central differences.
Devlin et al. 2019; imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_ERF = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True)
class Gates:
    """heads [L][A], ffn [L][F], hidden [H] of 0/1 (in the norms), norms [H] (factor behind them),
    layers: the ones that run."""

    heads: list[Array]
    ffn: list[Array]
    hidden: Array
    norms: Array
    layers: list[int]


def open_gates(heads: list[int], ffn: list[int], hidden: int) -> Gates:
    return Gates(
        [np.ones(n) for n in heads],
        [np.ones(n) for n in ffn],
        np.ones(hidden),
        np.ones(hidden),
        list(range(len(heads))),
    )


def logits(
    w: Mapping[str, Array],
    ids: npt.NDArray[np.int64],
    mask: npt.NDArray[np.int64],
    head_dim: int,
    epsilon: float,
    gates: Gates,
) -> Array:
    """Mean-pooled classifier: ids, mask [B, S] -> [B, C]. `w` by our parameter names."""

    def norm(x: Array, name: str) -> Array:
        keep, count = gates.hidden, gates.hidden.sum()
        x = x * keep
        mean = x.sum(-1, keepdims=True) / count
        variance = (((x - mean) * keep) ** 2).sum(-1, keepdims=True) / count
        y = (x - mean) / np.sqrt(variance + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]
        result: Array = y * keep * gates.norms
        return result

    def linear(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.tokens.weight"][ids] + w["embeddings.types.weight"][0]
    x = norm(x + w["embeddings.positions.weight"][: ids.shape[1]], "embeddings.norm")
    for layer in gates.layers:
        at = f"blocks.{layer}."
        q, k, v = (
            linear(x, f"{at}attention.{part}").reshape(*x.shape[:2], -1, head_dim)
            for part in ("query", "key", "value")
        )
        scores = np.einsum("bsad,btad->bast", q, k) / math.sqrt(head_dim)
        scores = np.where(mask[:, None, None, :] > 0, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("bast,btad->bsad", shares, v) * gates.heads[layer][:, None]
        y = linear(mixed.reshape(*x.shape[:2], -1), f"{at}attention.output")
        x = norm(x + y, f"{at}attention_norm")
        inner = linear(x, f"{at}ffn.up")
        inner = 0.5 * inner * (1 + _ERF(inner / math.sqrt(2))) * gates.ffn[layer]
        x = norm(x + linear(inner, f"{at}ffn.down"), f"{at}ffn_norm")
    pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    result: Array = pooled @ w["classifier.weight"].T + w["classifier.bias"]
    return result


def cross_entropy(z: Array, labels: npt.NDArray[np.int64]) -> float:
    z = z - z.max(-1, keepdims=True)
    logs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return float(-logs[np.arange(len(labels)), labels].mean())


def slope(loss: Callable[[Gates], float], gates: Gates, kind: str, layer: int, unit: int) -> float:
    """d loss / d gate at 1, of `heads`, `ffn` (in `layer`) or `norms`."""

    def moved(by: float) -> Gates:
        if kind == "norms":
            values = gates.norms.copy()
            values[unit] += by
            return replace(gates, norms=values)
        rows = [row.copy() for row in getattr(gates, kind)]
        rows[layer][unit] += by
        return replace(gates, heads=rows) if kind == "heads" else replace(gates, ffn=rows)

    step = 1e-5
    return (loss(moved(step)) - loss(moved(-step))) / (2 * step)
