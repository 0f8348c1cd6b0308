"""A decoder as LiteRT graphs, written by hand: `prefill_N` for prompts of N tokens, and `decode`.

They share their constants. Names and layouts are those that LiteRT-LM knows: `tokens` int32 [1, N],
`input_pos` int32 [N], `kv_cache_k_I` and `kv_cache_v_I` float32 [1, kv heads, slots, head_dim] in
and out, `logits`. A call writes its keys and values into N slots from its first position on; those
of padding behind the text are overwritten by the next tokens, and no token looks at later slots.
There are `slots_of` slots, so that the padding of a last, incomplete call always has room.

Rotary positions are tables, looked up by position. Queries of the heads that share a key make one
product. Top-k attention: `model/sparse.py`. The residual stream is named `embeddings`, `block.0`,
`block.1`, ...; parity reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch

from pocketglm.contracts import Floats, Reporter
from pocketglm.model.layers import rotation, unified_widths
from pocketglm.model.spec import DecoderSpec
from pocketglm.targets._litert_graph import FlatModel, Subgraph
from pocketglm.targets._litert_linear import (
    activation,
    binary,
    concat,
    embedding,
    linear,
    part,
    product,
    reshape,
    rms_norm,
    transpose,
)
from pocketglm.targets._litert_weights import Weights

DECODE = "decode"
PREFILLS = (16, 128)  # prompt lengths that a file has graphs of
_MASKED = -10000.0  # score of a slot that is not looked at; exp() of it is 0 in float32


def prefills_of(context: int) -> list[int]:
    """The prompt lengths for texts of at most `context` tokens."""
    return [size for size in PREFILLS if size <= context] or [context]


def slots_of(context: int) -> int:
    """Slots of the cache: the last call's padding fits behind the longest text."""
    return context + prefills_of(context)[-1] - 1


class DecoderModel:
    """Builds one file for texts of at most `context` tokens.

    last: prompts have no logits; the last token's come from `decode`.
    """

    def __init__(self, spec: DecoderSpec, weights: Weights, context: int, *, last: bool) -> None:
        self.spec, self.weights, self.context, self.last = spec, weights, context, last
        self.slots = slots_of(context)
        self.top_k = spec.top_k if spec.top_k is not None and spec.top_k < context else None

    def build(self, reporter: Reporter) -> FlatModel:
        """All graphs."""
        model, sizes = FlatModel(), prefills_of(self.context)
        plans = [(f"prefill_{n}", n, not self.last) for n in sizes] + [(DECODE, 1, True)]
        total = len(plans) * self.spec.num_layers
        for index, (name, tokens, logits) in enumerate(plans):
            tell = partial(self._tell, reporter, name, index * self.spec.num_layers, total)
            _DecoderGraph(self, model.subgraph(name), tokens).build(tell, logits=logits)
        reporter.progress("writing graphs", total, total)
        return model

    def _tell(self, reporter: Reporter, name: str, first: int, total: int, block: int) -> None:
        reporter.progress("writing graphs", first + block, total, f"{name} block.{block}")


class _DecoderGraph:
    """One graph: `tokens` tokens a call."""

    def __init__(self, plan: DecoderModel, g: Subgraph, tokens: int) -> None:
        self.plan, self.spec, self.weights, self.g = plan, plan.spec, plan.weights, g
        self.tokens = tokens

    def build(self, tell: Callable[[int], None], *, logits: bool) -> None:
        """`tell` is called with the number of each block before it is built."""
        g, spec, n = self.g, self.spec, self.tokens
        ids = g.input("tokens", (1, n), "INT32")
        self._positions = g.input("input_pos", (n,), "INT32")
        shape = (1, spec.num_kv_heads, self.plan.slots, spec.head_dim)
        for index in range(spec.num_layers):
            for kind in "kv":
                g.input(f"kv_cache_{kind}_{index}", shape)
        self._cos, self._sin = self._rotary("cos"), self._rotary("sin")
        self._mask, self._start = self._attend(), self._first_slot()
        flat = reshape(g, ids, n, dtype="INT32")
        words = embedding(g, self.weights, "tokens", flat)
        x = reshape(g, words, 1, n, spec.hidden_size, out="embeddings")
        for index in range(spec.num_layers if logits else spec.num_layers - 1):
            tell(index)
            x = self._block(x, index)
        if not logits:
            self._fill(x, spec.num_layers - 1)
        else:
            x = self._norm(x, "norm")
            tied = spec.tied
            g.outputs["logits"] = linear(
                g,
                self.weights,
                x,
                "tokens" if tied else "head",
                bias=False,
                out="logits",
                dynamic=self.weights.dynamic if tied else None,
            )

    # --- positions -------------------------------------------------------------------------------

    def _rotary(self, kind: Literal["cos", "sin"]) -> int:
        """Of this call's positions: [1, N, 1, dims / 2]."""
        g, half, slots = self.g, self.spec.rope.dims // 2, self.plan.slots

        def table() -> Floats:
            turn = rotation(self.spec.rope, torch.arange(slots)[None], torch.float32)
            values: Floats = (turn.cos if kind == "cos" else turn.sin)[0, 0].numpy()
            return values

        rows = g.lazy(f"rotary.{kind}", (slots, half), "FLOAT32", table)
        found = g.op("GATHER", [rows, self._positions], (self.tokens, half), axis=0, batchDims=0)
        return reshape(g, found, 1, self.tokens, 1, half)

    def _attend(self) -> int:
        """Added to the scores: [1, 1, N, slots]."""
        g, n, slots = self.g, self.tokens, self.plan.slots
        places = g.constant("slots", np.arange(slots, dtype=np.int32)[None])
        positions = reshape(g, self._positions, n, 1, dtype="INT32")
        seen = g.op("LESS_EQUAL", [places, positions], (n, slots), dtype="BOOL")
        bias = g.op("SELECT_V2", [seen, g.scalar(0.0), g.scalar(_MASKED)], (n, slots))
        return reshape(g, bias, 1, 1, n, slots)

    def _first_slot(self) -> int:
        """Where this call's keys and values begin in the cache: int32 [4]."""
        g, zero = self.g, self.g.ints(0)
        first = g.op("SLICE", [self._positions, zero, g.ints(1)], (1,), dtype="INT32")
        return g.op("CONCATENATION", [zero, zero, first, zero], (4,), dtype="INT32", axis=0)

    def _turn(self, x: int) -> int:
        """Queries or keys [1, N, heads, head_dim], their first features turned."""
        g, rope, (_, n, heads, size) = self.g, self.spec.rope, self.g.shapes[x]
        half = rope.dims // 2
        turned = part(g, x, 3, 0, rope.dims) if rope.dims < size else x
        if rope.interleaved:
            pairs = reshape(g, turned, 1, n, heads * half, 2)
            a, b = (reshape(g, part(g, pairs, 3, i, 1), 1, n, heads, half) for i in (0, 1))
        else:
            a, b = part(g, turned, 3, 0, half), part(g, turned, 3, half, half)
        first = binary(g, "SUB", self._times(a, self._cos), self._times(b, self._sin))
        second = binary(g, "ADD", self._times(b, self._cos), self._times(a, self._sin))
        if rope.interleaved:
            both = [reshape(g, y, 1, n, heads * half, 1) for y in (first, second)]
            turned = reshape(g, concat(g, both, 3), 1, n, heads, rope.dims)
        else:
            turned = concat(g, [first, second], 3)
        if rope.dims == size:
            return turned
        return concat(g, [turned, part(g, x, 3, rope.dims, size - rope.dims)], 3)

    def _times(self, a: int, b: int) -> int:
        return binary(self.g, "MUL", a, b)

    # --- blocks ----------------------------------------------------------------------------------

    def _block(self, x: int, index: int) -> int:
        g, at, four = self.g, f"blocks.{self.spec.blocks()[index]}.", self.spec.four_norms
        out = f"block.{index}"
        if self.spec.unified:
            y = self._unified(self._norm(x, at + "attention_norm"), at, index)
            return binary(g, "ADD", x, y, out=out)
        y = self._attention(self._norm(x, at + "attention_norm"), at, index)
        y = self._norm(y, at + "attention_post_norm") if four else y
        x = binary(g, "ADD", x, y)
        y = self._ffn(self._norm(x, at + "ffn_norm"), at, index)
        y = self._norm(y, at + "ffn_post_norm") if four else y
        return binary(g, "ADD", x, y, out=out)

    def _fill(self, x: int, index: int) -> None:
        """The keys and values of the last layer alone: nobody reads a prompt's last states."""
        at = f"blocks.{self.spec.blocks()[index]}."
        x = self._norm(x, at + "attention_norm")
        if self.spec.unified:
            _, key, value, *_ = self._parts(x, at, index)
            self._keys_and_values(key, value, f"{at}unified.", index)
            return
        key, value = self._projected(x, at, "key", "value")
        self._keys_and_values(key, value, f"{at}attention.", index)

    def _projected(self, x: int, at: str, *names: str) -> list[int]:
        bias = self.spec.attention_bias
        return [self._linear(x, f"{at}attention.{name}", bias=bias) for name in names]

    def _attention(self, x: int, at: str, index: int) -> int:
        spec = self.spec
        projected = self._projected(x, at, "query", "key", "value")
        seen = self._look(projected, f"{at}attention.", index)
        return self._linear(seen, f"{at}attention.output", bias=spec.output_bias)

    def _unified(self, x: int, at: str, index: int) -> int:
        g, spec = self.g, self.spec
        *projected, gate, up = self._parts(x, at, index)
        seen = self._look(projected, f"{at}unified.", index)
        both = concat(g, [seen, self._times(activation(g, spec.activation, gate), up)], 2)
        return self._linear(both, f"{at}unified.output", bias=spec.output_bias or spec.ffn_bias)

    def _parts(self, x: int, at: str, index: int) -> list[int]:
        """A unified block's query, key, value, gate and up."""
        spec = self.spec
        packed = self._linear(x, f"{at}unified.input", bias=spec.ffn_bias or spec.attention_bias)
        pieces, start = [], 0
        for width in unified_widths(spec.block(index)):
            pieces.append(part(self.g, packed, 2, start, width))
            start += width
        return pieces

    def _ffn(self, x: int, at: str, index: int) -> int:
        g, spec, bias = self.g, self.spec, self.spec.ffn_bias
        if spec.fused_ffn:
            packed, width = self._linear(x, f"{at}ffn.gate_up", bias=bias), spec.ffn()[index]
            gate, up = part(g, packed, 2, 0, width), part(g, packed, 2, width, width)
        else:
            gate, up = (self._linear(x, f"{at}ffn.{name}", bias=bias) for name in ("gate", "up"))
        inner = self._times(activation(g, spec.activation, gate), up)
        return self._linear(inner, f"{at}ffn.down", bias=bias)

    def _look(self, projected: list[int], at: str, index: int) -> int:
        """Queries, keys and values [1, N, heads * head_dim] -> [1, N, heads * head_dim]."""
        g, spec, n, size = self.g, self.spec, self.tokens, self.spec.head_dim
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        query = self._split(projected[0], f"{at}query_norm")
        query = transpose(g, self._turn(query), 0, 2, 1, 3)
        keys, values = self._keys_and_values(projected[1], projected[2], at, index)
        # The heads that share a key are neighbours: one product for all of them.
        query = reshape(g, query, 1, kv_heads, heads // kv_heads * n, size)
        query = self._times(query, g.scalar(size**-0.5))
        scores = product(g, query, keys, transposed=True)
        scores = reshape(g, scores, 1, heads, n, self.plan.slots)
        scores = self._largest(binary(g, "ADD", scores, self._mask))
        shares = g.op("SOFTMAX", [scores], g.shapes[scores], beta=1.0)
        shares = reshape(g, shares, 1, kv_heads, heads // kv_heads * n, self.plan.slots)
        mixed = reshape(g, product(g, shares, values), 1, heads, n, size)
        return reshape(g, transpose(g, mixed, 0, 2, 1, 3), 1, n, heads * size)

    def _keys_and_values(self, key: int, value: int, at: str, index: int) -> tuple[int, int]:
        """The layer's caches with new ones [1, N, kv heads * head_dim]."""
        g = self.g
        key = self._turn(self._split(key, f"{at}key_norm"))
        key, value = (transpose(g, x, 0, 2, 1, 3) for x in (key, self._split(value)))
        return self._keep(key, "k", index), self._keep(value, "v", index)

    def _split(self, x: int, norm: str = "") -> int:
        """[1, N, heads * head_dim] -> [1, N, heads, head_dim]; each head normalized, if need be."""
        size = self.spec.head_dim
        x = reshape(self.g, x, 1, self.tokens, self.g.shapes[x][-1] // size, size)
        return self._norm(x, norm) if norm and self.spec.qk_norm else x

    def _keep(self, new: int, kind: str, index: int) -> int:
        """The cache with new keys or values [1, kv heads, N, head_dim] in their slots."""
        g, name = self.g, f"kv_cache_{kind}_{index}"
        old = g.inputs[name]
        g.outputs[name] = g.op("DYNAMIC_UPDATE_SLICE", [old, new, self._start], g.shapes[old])
        return g.outputs[name]

    def _largest(self, scores: int) -> int:
        """Scores [1, heads, N, slots] without those below the k-th largest of their row."""
        g, k = self.g, self.plan.top_k
        if k is None:
            return scores
        shape = (*g.shapes[scores][:-1], k)
        values, places = g.tensor("largest", shape, "FLOAT32"), g.tensor("places", shape, "INT32")
        g.add("TOPK_V2", [scores, g.number(k)], [values, places], {})
        kept = g.op(
            "GREATER_EQUAL",
            [scores, part(g, values, 3, k - 1, 1)],
            g.shapes[scores],
            dtype="BOOL",
        )
        return g.op("SELECT_V2", [kept, scores, g.scalar(_MASKED)], g.shapes[scores])

    def _linear(self, x: int, layer: str, *, bias: bool) -> int:
        return linear(self.g, self.weights, x, layer, bias=bias)

    def _norm(self, x: int, layer: str) -> int:
        return rms_norm(self.g, self.weights, x, layer, self.spec.rms_norm_eps)
