"""Attention in a Core ML program, in both layouts (see `_coreml_form.Form`).

channels: heads [1, heads, head_dim, tokens]; one head after the other, as in "Deploying
Transformers on the Apple Neural Engine" (machinelearning.apple.com, 2022).
rows: heads [1, heads, tokens, head_dim]; the heads that share a key make one product.
"""

from __future__ import annotations

from typing import Any

from pocketglm.targets._coreml_graph import MASKED, Graph


def heads(g: Graph, x: Any, size: int) -> Any:
    """A value's features in heads of `size`."""
    if g.form.channels:
        return g.b.reshape(x=x, shape=[1, x.shape[1] // size, size, x.shape[3]])
    x = g.b.reshape(x=x, shape=[1, -1, x.shape[2] // size, size])
    return g.b.transpose(x=x, perm=[0, 2, 1, 3])


def joined(g: Graph, x: Any) -> Any:
    """The inverse of `heads`."""
    if g.form.channels:
        _, count, size, tokens = x.shape
        return g.b.reshape(x=x, shape=[1, count * size, 1, tokens])
    _, count, _, size = x.shape
    return g.b.reshape(x=g.b.transpose(x=x, perm=[0, 2, 1, 3]), shape=[1, -1, count * size])


def penalty(g: Graph, seen: Any) -> Any:
    """What is added to scores: 0 where `seen` (of any type) is true, else `MASKED`."""
    kept = g.b.cast(x=seen, dtype=g.dtype_name)
    missing = g.b.sub(x=kept, y=g.number(1.0))
    return g.b.mul(x=missing, y=g.number(-MASKED))


def attend(
    g: Graph, query: Any, keys: Any, values: Any, bias: Any, top_k: int | None = None
) -> Any:
    """Heads of queries, and as many or fewer of keys and values -> heads.

    bias: added to the scores [1, 1, queries, keys], or [1, 1, keys, queries] in channels.
    """
    size = query.shape[2 if g.form.channels else 3]
    query = g.b.mul(x=query, y=g.number(size**-0.5))
    if not g.form.channels:
        return _together(g, query, keys, values, bias, top_k)
    count = query.shape[1] // keys.shape[1]
    seen = []
    for key, value, group in zip(
        _split(g, keys), _split(g, values), _grouped(_split(g, query), count), strict=True
    ):
        for one in group:
            scores = g.b.matmul(x=key, y=one, transpose_x=True)  # [1, 1, keys, queries]
            scores = _largest(g, g.b.add(x=scores, y=bias), 2, top_k)
            seen.append(g.b.matmul(x=value, y=g.b.softmax(x=scores, axis=2)))
    return g.b.concat(values=seen, axis=1) if len(seen) > 1 else seen[0]


def _together(g: Graph, query: Any, keys: Any, values: Any, bias: Any, top_k: int | None) -> Any:
    _, count, tokens, size = query.shape
    kv_heads, slots = keys.shape[1], keys.shape[2]
    grouped = count != kv_heads
    if grouped:
        query = g.b.reshape(x=query, shape=[1, kv_heads, count // kv_heads * tokens, size])
    scores = g.b.matmul(x=query, y=keys, transpose_y=True)
    if grouped:
        scores = g.b.reshape(x=scores, shape=[1, count, tokens, slots])
    shares = g.b.softmax(x=_largest(g, g.b.add(x=scores, y=bias), 3, top_k), axis=3)
    if grouped:
        shares = g.b.reshape(x=shares, shape=[1, kv_heads, count // kv_heads * tokens, slots])
    mixed = g.b.matmul(x=shares, y=values)
    return g.b.reshape(x=mixed, shape=[1, count, tokens, size]) if grouped else mixed


def _largest(g: Graph, scores: Any, axis: int, top_k: int | None) -> Any:
    """Scores without those below the k-th largest along an axis."""
    if top_k is None:
        return scores
    values, _ = g.b.topk(x=scores, k=top_k, axis=axis)
    kept = g.b.greater_equal(x=scores, y=g.part(values, axis, top_k - 1, 1))
    return g.b.add(x=scores, y=penalty(g, kept))


def _split(g: Graph, x: Any) -> list[Any]:
    """Head by head."""
    count = x.shape[1]
    return list(g.b.split(x=x, num_splits=count, axis=1)) if count > 1 else [x]


def _grouped(parts: list[Any], count: int) -> list[list[Any]]:
    return [parts[i : i + count] for i in range(0, len(parts), count)]
