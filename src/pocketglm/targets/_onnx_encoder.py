"""The encoder (BERT) as an ONNX graph, written by hand from the spec and the stored weights.

Post-norm transformer of Devlin et al. 2019 (arXiv:1810.04805); pooling, head and normalization are
part of the graph. Two dialects: ONNX Runtime's (opset 17 and com.microsoft operators) and, for old
devices, opset 13 with standard operators only. Add and LayerNormalization stay two nodes: ONNX
Runtime's SkipLayerNormalization was the slower when both were tried on the CPU.

The values that the blocks end with are named `embeddings`, `block.0`, `block.1`, ...: parity
reads them.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto

from pocketglm.contracts import Reporter
from pocketglm.model.spec import EncoderSpec
from pocketglm.targets._onnx_graph import GraphBuilder, Shape
from pocketglm.targets._onnx_linear import (
    Weights,
    biases,
    embedding,
    float_columns,
    label,
    linear,
)

STANDARD_OPSET = 13
DEFAULT_OPSET = 17  # the first with LayerNormalization
INPUTS: dict[str, Shape] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
}
_MASKED = -10000.0  # added to the scores of padding; exp() of it is 0 in float32


class EncoderGraph:
    """Builds one model for rows of at most `max_length` tokens: only their positions are written.

    `opset` 13 means standard operators only.
    """

    def __init__(self, spec: EncoderSpec, weights: Weights, max_length: int, opset: int) -> None:
        self.spec = spec
        self.max_length = max_length
        self.weights = weights
        self.opset = opset
        self.standard = opset < DEFAULT_OPSET
        self.g = GraphBuilder()
        self.outputs: dict[str, Shape] = {}

    def build(self, reporter: Reporter) -> onnx.ModelProto:
        """The whole model: int64 ids and mask [B, S] -> logits [B, C], or embeddings [B, H]."""
        self._mask = self.g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
        self._bias = self._raw_mask = ""
        x = self._embeddings()
        for index in range(self.spec.num_layers):
            reporter.progress("writing blocks", index, self.spec.num_layers, f"block.{index}")
            x = self._block(x, index)
        reporter.progress("writing blocks", self.spec.num_layers, self.spec.num_layers)
        self._head(x)
        return self.g.model(INPUTS, self.outputs, self.opset)

    def _embeddings(self) -> str:
        g = self.g
        sequence = g.op("Gather", g.op("Shape", "input_ids"), g.ints(1))
        words = embedding(g, self.weights, "embeddings.tokens", "input_ids")
        zero, one = (g.constant(f"int_{n}", np.array(n, np.int64)) for n in (0, 1))
        rows = g.op("Range", zero, g.op("Squeeze", sequence), one)
        positions = embedding(g, self.weights, "embeddings.positions", rows, self.max_length)
        # Every token is of type 0.
        kind = self.weights.floats("embeddings.types.weight")[0]
        kind_name = g.constant(f"{label('embeddings.types')}.weight", kind)
        x = g.op("Add", words, g.op("Add", positions, kind_name))
        return self._norm(x, "embeddings.norm", out="embeddings")

    def _block(self, x: str, index: int) -> str:
        g, at = self.g, f"blocks.{index}."
        attended = linear(g, self.weights, self._attention(x, index), at + "attention.output")
        x = self._norm(g.op("Add", attended, x), at + "attention_norm")
        inner = self._activation(linear(g, self.weights, x, at + "ffn.up"))
        inner = linear(g, self.weights, inner, at + "ffn.down")
        return self._norm(g.op("Add", inner, x), at + "ffn_norm", out=f"block.{index}")

    def _attention(self, x: str, index: int) -> str:
        """The three projections and the attention itself: [B, S, H] -> [B, S, heads * head_dim].

        Float weights take ONNX Runtime's `Attention`, one kernel for the projections and the rest.
        Integers take one packed projection and `MultiHeadAttention`, not `QAttention`: the product
        of `DynamicQuantizeMatMul` is the one that ONNX Runtime has integer kernels of Arm for.
        """
        g, heads = self.g, self.spec.heads()[index]
        layers = [f"blocks.{index}.attention.{name}" for name in ("query", "key", "value")]
        names = [f"{layer}.weight" for layer in layers]
        forms = [(self.weights.scheme(name), self.weights.grid(name)) for name in names]
        whole = not any(self.weights.factored(layer) for layer in layers)
        alike, scheme = whole and forms.count(forms[0]) == len(forms), forms[0][0]
        if self.standard or not alike:
            projections = [linear(g, self.weights, x, name) for name in layers]
            return self._plain_attention(projections, heads)
        if scheme is None:
            weight = float_columns(g, self.weights, *layers)
            bias = biases(g, self.weights, *layers)
            mask = self._attention_mask()
            return g.microsoft("Attention", x, weight, bias, mask, num_heads=heads)
        packed = linear(g, self.weights, x, *layers)
        width = heads * self.spec.head_dim
        projections = g.ops("Split", 3, packed, g.ints(width, width, width), axis=-1)
        mask = self._attention_mask()
        return g.microsoft("MultiHeadAttention", *projections, "", mask, num_heads=heads)

    def _attention_mask(self) -> str:
        self._raw_mask = self._raw_mask or self.g.op("Cast", "attention_mask", to=TensorProto.INT32)
        return self._raw_mask

    def _plain_attention(self, projections: list[str], heads: int) -> str:
        g, size = self.g, self.spec.head_dim
        if not self._bias:
            padding = g.op("Sub", g.scalar(1.0), g.op("Unsqueeze", self._mask, g.ints(1, 2)))
            self._bias = g.op("Mul", padding, g.scalar(_MASKED))
        query, key, value = (
            g.op("Reshape", projection, g.ints(0, 0, heads, size)) for projection in projections
        )
        scores = g.op(
            "MatMul",
            g.op("Transpose", query, perm=[0, 2, 1, 3]),
            g.op("Transpose", key, perm=[0, 2, 3, 1]),
        )
        scores = g.op("Add", g.op("Mul", scores, g.scalar(size**-0.5)), self._bias)
        shares = g.op("Softmax", scores, axis=-1)
        mixed = g.op("MatMul", shares, g.op("Transpose", value, perm=[0, 2, 1, 3]))
        mixed = g.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return g.op("Reshape", mixed, g.ints(0, 0, heads * size))

    def _norm(self, x: str, layer: str, out: str = "") -> str:
        g, name, epsilon = self.g, label(layer), self.spec.layer_norm_eps
        gamma = g.constant(f"{name}.weight", self.weights.floats(f"{layer}.weight"))
        beta = g.constant(f"{name}.bias", self.weights.floats(f"{layer}.bias"))
        if not self.standard:
            return g.op("LayerNormalization", x, gamma, beta, out=out, axis=-1, epsilon=epsilon)
        centred = g.op("Sub", x, g.op("ReduceMean", x, axes=[-1], keepdims=1))
        squares = g.op("Pow", centred, g.scalar(2.0))
        variance = g.op("ReduceMean", squares, axes=[-1], keepdims=1)
        deviation = g.op("Sqrt", g.op("Add", variance, g.scalar(epsilon)))
        scaled = g.op("Mul", g.op("Div", centred, deviation), gamma)
        return g.op("Add", scaled, beta, out=out)

    def _activation(self, x: str) -> str:
        """Exact GELU, its tanh form (FastGelu), or ReLU: what the checkpoint was trained with."""
        g, kind = self.g, self.spec.activation
        if kind == "relu":
            return g.op("Relu", x)
        if not self.standard:
            return g.microsoft("Gelu" if kind == "gelu" else "FastGelu", x)
        if kind == "gelu":
            inner = g.op("Erf", g.op("Div", x, g.scalar(math.sqrt(2.0))))
        else:
            cube = g.op("Mul", g.op("Mul", g.op("Mul", x, x), x), g.scalar(0.044715))
            inner = g.op("Add", x, cube)
            inner = g.op("Tanh", g.op("Mul", inner, g.scalar(math.sqrt(2.0 / math.pi))))
        return g.op("Mul", g.op("Mul", x, g.op("Add", inner, g.scalar(1.0))), g.scalar(0.5))

    def _head(self, x: str) -> None:
        """Pooling and head; declares the outputs."""
        g, spec = self.g, self.spec
        pooled = self._mean(x) if spec.pooling == "mean" else self._first(x)
        if spec.head == "embedding":
            # Runners that pool by themselves read the tokens' states under this name.
            g.op("Identity", x, out="token_embeddings")
            g.op("LpNormalization", pooled, out="sentence_embedding", axis=-1, p=2)
            self.outputs = {
                "sentence_embedding": ("batch", spec.hidden_size),
                "token_embeddings": ("batch", "sequence", spec.hidden_size),
            }
            return
        if spec.pooler:
            pooled = g.op("Tanh", linear(g, self.weights, pooled, "pooler"))
        g.op("Identity", linear(g, self.weights, pooled, "classifier"), out="logits")
        self.outputs = {"logits": ("batch", spec.num_labels)}

    def _first(self, x: str) -> str:
        return self.g.op("Gather", x, self.g.constant("int_0", np.array(0, np.int64)), axis=1)

    def _mean(self, x: str) -> str:
        g = self.g
        total = g.op("MatMul", g.op("Unsqueeze", self._mask, g.ints(1)), x)
        count = g.op("ReduceSum", self._mask, g.ints(1), keepdims=1)
        return g.op("Div", g.op("Squeeze", total, g.ints(1)), g.op("Max", count, g.scalar(1.0)))
