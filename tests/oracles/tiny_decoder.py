"""A decoder of shared and unified blocks with top-k attention, a token at a time in float64 numpy;
imports nothing of ours.

Zhao et al. 2019 (top-k attention), PaLM (attention and FFN side by side), RoFormer (rotary).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def look(query: Array, keys: Array, values: Array, top_k: int | None) -> Array:
    """One query [D] over keys and values [T, D] that it may see."""
    scores = [float(query @ key) / math.sqrt(len(query)) for key in keys]
    chosen = list(range(len(scores)))
    if top_k is not None and top_k < len(scores):
        least = sorted(scores, reverse=True)[top_k - 1]
        chosen = [j for j in chosen if scores[j] >= least]
    top = max(scores[j] for j in chosen)
    shares = {j: math.exp(scores[j] - top) for j in chosen}
    total = sum(shares.values())
    return sum((shares[j] / total * values[j] for j in chosen), np.zeros(values.shape[1]))


def attention(q: Array, k: Array, v: Array, top_k: int | None, first: int = 0) -> Array:
    """Causal: q [heads, S, D], the tokens from `first` on; k, v [kv heads, T, D] -> as q."""
    out = np.zeros(q.shape)
    share = len(q) // len(k)
    for head in range(len(q)):
        for place in range(q.shape[1]):
            seen = slice(0, first + place + 1)
            group = head // share
            out[head, place] = look(q[head, place], k[group, seen], v[group, seen], top_k)
    return out


def norm(x: Array, weight: Array, eps: float) -> Array:
    out: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return out


def turned(x: Array, dims: int, theta: float, interleaved: bool) -> Array:
    """x [S, D]: pairs of the first `dims` features turned by position * theta^(-2i / dims)."""
    out = x.copy()
    for place in range(len(x)):
        for i in range(dims // 2):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dims // 2)
            angle = place * theta ** (-2 * i / dims)
            out[place, a] = x[place, a] * math.cos(angle) - x[place, b] * math.sin(angle)
            out[place, b] = x[place, b] * math.cos(angle) + x[place, a] * math.sin(angle)
    return out


def silu(x: Array) -> Array:
    out: Array = x / (1 + np.exp(-x))
    return out


def block(x: Array, w: Mapping[str, Array], c: Mapping[str, Any]) -> Array:
    """x [S, H]; `w`: one block's stored tensors, by what follows `model.layers.N.`."""

    def linear(y: Array, name: str) -> Array:
        bias = w.get(f"{name}.bias")
        out: Array = y @ w[f"{name}.weight"].T
        return out if bias is None else out + bias

    heads, kv, size, eps = c["heads"], c["kv_heads"], c["head_dim"], c["eps"]
    normed = norm(x, w["input_layernorm.weight"], eps)
    if c["unified"]:
        channels = w["unified.out_proj.weight"].shape[1] - heads * size
        cuts = np.cumsum([heads * size, kv * size, kv * size, channels])
        q, k, v, gate, up = np.split(linear(normed, "unified.in_proj"), cuts, axis=1)
    else:
        q, k, v = (linear(normed, f"self_attn.{part}_proj") for part in "qkv")
    q, k, v = (part.reshape(len(x), -1, size).swapaxes(0, 1) for part in (q, k, v))
    if c["qk_norm"]:
        at = "unified" if c["unified"] else "self_attn"
        q, k = norm(q, w[f"{at}.q_norm.weight"], eps), norm(k, w[f"{at}.k_norm.weight"], eps)
    q, k = (
        np.stack([turned(head, c["dims"], c["theta"], c["interleaved"]) for head in part])
        for part in (q, k)
    )
    seen = attention(q, k, v, c["top_k"]).swapaxes(0, 1).reshape(len(x), -1)
    if c["unified"]:
        return x + linear(np.concatenate([seen, silu(gate) * up], axis=1), "unified.out_proj")
    x = x + linear(seen, "self_attn.o_proj")
    normed = norm(x, w["post_attention_layernorm.weight"], eps)
    if "mlp.gate_up_proj.weight" in w:
        gate, up = np.split(linear(normed, "mlp.gate_up_proj"), 2, axis=1)
    else:
        gate, up = linear(normed, "mlp.gate_proj"), linear(normed, "mlp.up_proj")
    return x + linear(silu(gate) * up, "mlp.down_proj")


def logits(
    ids: Sequence[int], w: Mapping[str, Array], blocks: Sequence[int], c: Mapping[str, Any]
) -> Array:
    """[S, V] of one text; `w`: the file's tensors; `blocks`: the stored block of each layer."""
    x = w["model.embed_tokens.weight"][list(ids)]
    for number in blocks:
        at = f"model.layers.{number}."
        x = block(x, {n.removeprefix(at): t for n, t in w.items() if n.startswith(at)}, c)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"], c["eps"]) @ head.T
