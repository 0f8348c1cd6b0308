"""The encoder (BERT) as a LiteRT graph, written by hand from the spec and the stored weights.

Post-norm transformer of Devlin et al. 2019 (arXiv:1810.04805); pooling, head and normalization are
part of the graph. One text a call, of `max_length` tokens, or of fewer if the caller resizes the
inputs: every shape follows from theirs before the graph runs, so that delegates can take it.

The values that the blocks end with are named `embeddings`, `block.0`, `block.1`, ...: parity reads
them.
"""

from __future__ import annotations

from pocketglm.contracts import Reporter
from pocketglm.model.spec import EncoderSpec
from pocketglm.targets._litert_graph import FlatModel, Subgraph
from pocketglm.targets._litert_linear import (
    activation,
    binary,
    embedding,
    layer_norm,
    linear,
    part,
    product,
    reshape,
    transpose,
)
from pocketglm.targets._litert_weights import Weights

SIGNATURE = "serving_default"
_MASKED = -10000.0  # added to the scores of padding; exp() of it is 0 in float32


class EncoderGraph:
    """Builds one model for texts of at most `max_length` tokens."""

    def __init__(self, spec: EncoderSpec, weights: Weights, max_length: int) -> None:
        self.spec, self.weights, self.length = spec, weights, max_length
        self.model = FlatModel()
        self.g: Subgraph = self.model.subgraph(SIGNATURE)

    def build(self, reporter: Reporter) -> FlatModel:
        """int32 ids and mask [1, S] -> logits [1, C], or the embedding [1, H]."""
        g, shape = self.g, (1, self.length)
        ids = g.input("input_ids", shape, "INT32", free=1)
        mask = g.input("attention_mask", shape, "INT32", free=1)
        self._mask = g.op(
            "CAST",
            [mask],
            shape,
            inDataType=2,
            outDataType=0,  # int32 to float32
        )
        padding = binary(g, "SUB", g.scalar(1.0), self._mask)
        padding = reshape(g, padding, 1, 1, 1, self.length, free=3)
        self._bias = binary(g, "MUL", padding, g.scalar(_MASKED))
        x = self._embeddings(ids, mask)
        for index in range(self.spec.num_layers):
            reporter.progress("writing blocks", index, self.spec.num_layers, f"block.{index}")
            x = self._block(x, index)
        reporter.progress("writing blocks", self.spec.num_layers, self.spec.num_layers)
        self._head(x)
        return self.model

    def _embeddings(self, ids: int, mask: int) -> int:
        g, length = self.g, self.length
        flat = reshape(g, ids, length, free=0, dtype="INT32")
        words = embedding(g, self.weights, "embeddings.tokens", flat)
        # 0, 1, 2, ... as many as there are tokens
        ones = g.op("EQUAL", [mask, mask], (1, length), dtype="BOOL")
        ones = g.op("CAST", [ones], (1, length), dtype="INT32", inDataType=6, outDataType=2)
        rows = g.op("CUMSUM", [ones, g.number(1)], (1, length), dtype="INT32", exclusive=True)
        rows = reshape(g, rows, length, free=0, dtype="INT32")
        positions = embedding(g, self.weights, "embeddings.positions", rows, length)
        # Every token is of type 0.
        name = "embeddings.types.weight"
        kind = g.constant(f"{self.weights.label(name)}.0", self.weights.floats(name)[0])
        x = binary(g, "ADD", words, binary(g, "ADD", positions, kind))
        x = reshape(g, x, 1, length, self.spec.hidden_size, free=1)
        return self._norm(x, "embeddings.norm", "embeddings")

    def _block(self, x: int, index: int) -> int:
        g, at = self.g, f"blocks.{index}."
        attended = self._linear(self._attention(x, index), at + "attention.output")
        x = self._norm(binary(g, "ADD", attended, x), at + "attention_norm", f"attended.{index}")
        inner = activation(g, self.spec.activation, self._linear(x, at + "ffn.up"))
        inner = self._linear(inner, at + "ffn.down")
        return self._norm(binary(g, "ADD", inner, x), at + "ffn_norm", f"block.{index}")

    def _attention(self, x: int, index: int) -> int:
        g, heads, size = self.g, self.spec.heads()[index], self.spec.head_dim
        query, key, value = (
            transpose(
                g,
                reshape(
                    g,
                    self._linear(x, f"blocks.{index}.attention.{name}"),
                    *(1, self.length, heads, size),
                    free=1,
                ),
                *(0, 2, 1, 3),
            )
            for name in ("query", "key", "value")
        )
        query = binary(g, "MUL", query, g.scalar(size**-0.5))
        scores = binary(g, "ADD", product(g, query, key, transposed=True), self._bias)
        shares = g.op("SOFTMAX", [scores], g.shapes[scores], beta=1.0)
        mixed = transpose(g, product(g, shares, value), 0, 2, 1, 3)
        return reshape(g, mixed, 1, self.length, heads * size, free=1)

    def _linear(self, x: int, layer: str, out: str = "") -> int:
        return linear(self.g, self.weights, x, layer, out=out)

    def _norm(self, x: int, layer: str, out: str) -> int:
        return layer_norm(self.g, self.weights, x, layer, self.spec.layer_norm_eps, out)

    def _head(self, x: int) -> None:
        g, spec, width = self.g, self.spec, self.spec.hidden_size
        pooled = self._mean(x) if spec.pooling == "mean" else self._first(x)
        if spec.head == "embedding":
            squares = binary(g, "MUL", pooled, pooled)
            total = g.op("SUM", [squares, g.ints(1)], (1, 1), keepDims=True)
            total = binary(g, "MAXIMUM", total, g.scalar(1e-24))
            inverse = g.op("RSQRT", [total], (1, 1))
            g.outputs["sentence_embedding"] = g.op(
                "MUL", [pooled, inverse], (1, width), out="sentence_embedding"
            )
            return
        if spec.pooler:
            pooled = g.op("TANH", [self._linear(pooled, "pooler")], (1, width))
        g.outputs["logits"] = self._linear(pooled, "classifier", out="logits")

    def _first(self, x: int) -> int:
        return reshape(self.g, part(self.g, x, 1, 0, 1), 1, self.spec.hidden_size)

    def _mean(self, x: int) -> int:
        g, width = self.g, self.spec.hidden_size
        weight = reshape(g, self._mask, 1, self.length, 1, free=1)
        total = g.op("SUM", [binary(g, "MUL", x, weight), g.ints(1)], (1, width), keepDims=False)
        count = g.op("SUM", [self._mask, g.ints(1)], (1, 1), keepDims=True)
        return binary(g, "DIV", total, binary(g, "MAXIMUM", count, g.scalar(1.0)))
