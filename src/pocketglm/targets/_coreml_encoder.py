"""The encoder (BERT) as a Core ML program, built from the spec and the stored weights.

Post-norm transformer of Devlin et al. 2019 (arXiv:1810.04805); pooling, head and normalization are
part of the graph. One text a call: of exactly `max_length` tokens, padded, in the layout for the
Neural Engine, which wants fixed shapes; else of 1 to `max_length`.

The values that the blocks end with are named `embeddings`, `block_0`, `block_1`, ...: parity reads
them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketglm.model.spec import EncoderSpec
from pocketglm.targets._coreml_attention import attend, heads, joined, penalty
from pocketglm.targets._coreml_form import Form
from pocketglm.targets._coreml_graph import Graph, Range
from pocketglm.targets._litert_weights import Weights


class EncoderGraph:
    """Builds the function for texts of at most `max_length` tokens."""

    def __init__(self, spec: EncoderSpec, weights: Weights, form: Form, max_length: int) -> None:
        self.spec, self.length = spec, max_length
        size: int | Range = max_length if form.channels else Range(max_length)
        ports = {"input_ids": (1, size), "attention_mask": (1, size)}
        self.g = Graph(form, weights, ports)

    @property
    def output(self) -> str:
        return "sentence_embedding" if self.spec.head == "embedding" else "logits"

    def build(self) -> Graph:
        """int32 ids and mask [1, S] -> float32 logits [1, C], or the embedding [1, H]."""
        with self.g as g:
            mask = g.input("attention_mask")
            self._mask = g.b.cast(x=mask, dtype=g.dtype_name)
            # Of the keys: [1, 1, keys, 1], or [1, 1, 1, keys].
            axes = [1, 3] if g.form.channels else [1, 2]
            self._bias = penalty(g, g.b.expand_dims(x=mask, axes=axes))
            x = self._embeddings(g.input("input_ids"))
            for index in range(self.spec.num_layers):
                x = self._block(x, index)
            g.function.set_outputs([self._head(x)])
        return self.g

    def _embeddings(self, ids: Any) -> Any:
        g = self.g
        words = g.embedding(ids, "embeddings.tokens")
        positions = g.embedding(self._positions(ids), "embeddings.positions")
        # Every token is of type 0.
        name = "embeddings.types.weight"
        shape = (1, -1, 1, 1) if g.form.channels else (1, 1, -1)
        kind = g.constant(
            f"{g.weights.label(name)}_0", lambda: g.weights.floats(name)[0].reshape(shape)
        )
        x = g.b.add(x=words, y=g.b.add(x=positions, y=kind))
        return g.layer_norm(x, "embeddings.norm", self.spec.layer_norm_eps, "embeddings")

    def _positions(self, ids: Any) -> Any:
        """0, 1, 2, ... as many as there are tokens: int32 [1, S]."""
        g = self.g
        if g.form.channels:
            return g.constant("positions", lambda: np.arange(self.length, dtype=np.int32)[None])
        count = g.b.gather(x=g.b.shape(x=ids), indices=np.int32(1), axis=0)
        steps = g.b.range_1d(start=np.int32(0), end=count, step=np.int32(1))
        return g.b.expand_dims(x=steps, axes=[0])

    def _block(self, x: Any, index: int) -> Any:
        g, at, epsilon = self.g, f"blocks.{index}.", self.spec.layer_norm_eps
        attended = g.linear(self._attention(x, at), at + "attention.output")
        x = g.layer_norm(g.b.add(x=attended, y=x), at + "attention_norm", epsilon)
        inner = g.activation(self.spec.activation, g.linear(x, at + "ffn.up"))
        inner = g.linear(inner, at + "ffn.down")
        return g.layer_norm(g.b.add(x=inner, y=x), at + "ffn_norm", epsilon, f"block_{index}")

    def _attention(self, x: Any, at: str) -> Any:
        g, size = self.g, self.spec.head_dim
        query, key, value = (
            heads(g, g.linear(x, f"{at}attention.{name}"), size)
            for name in ("query", "key", "value")
        )
        return joined(g, attend(g, query, key, value, self._bias))

    def _head(self, x: Any) -> Any:
        g, spec = self.g, self.spec
        pooled = self._mean(x) if spec.pooling == "mean" else g.part(x, g.tokens, 0, 1)
        if spec.head == "embedding":
            scaled, _ = g.scaled(pooled, g.features)
            squares = g.b.mul(x=scaled, y=scaled)
            total = g.b.reduce_sum(x=squares, axes=[g.features], keep_dims=True)
            inverse = g.b.rsqrt(x=total, epsilon=g.number(0.0))
            return g.answer(g.b.mul(x=scaled, y=inverse), self.output)
        if spec.pooler:
            pooled = g.b.tanh(x=g.linear(pooled, "pooler"))
        return g.answer(g.linear(pooled, "classifier"), self.output)

    def _mean(self, x: Any) -> Any:
        """Of the tokens that are not padding; each gets its share first, so that no sum is too
        large for fp16.
        """
        g = self.g
        count = g.b.reduce_sum(x=self._mask, axes=[1], keep_dims=True)
        count = g.b.maximum(x=count, y=g.number(1.0))
        share = g.b.real_div(x=self._mask, y=count)
        share = g.b.expand_dims(x=share, axes=[1, 2] if g.form.channels else [2])
        return g.b.reduce_sum(x=g.b.mul(x=x, y=share), axes=[g.tokens], keep_dims=True)
