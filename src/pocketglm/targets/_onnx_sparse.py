"""Top-k attention of a decoder file, in ONNX's standard operators (and rotary positions in one of
ONNX Runtime's own).

It takes and gives what GroupQueryAttention does: rows that are padded on the right, and positions
from the attention mask. Its past is a buffer with room for all tokens, the new ones too, into which
these are written; the present is the same buffer, and where both are one place in memory (as
onnxruntime-genai and `runtimes/_onnx_decoder.py` have it) nothing is copied. A past that may be
shorter would have to be padded, which copies it twice: a decode step at 500 tokens in a buffer of
1,024 took 2.1 to 2.5 ms instead of 1.2 to 1.6 (`autoglm-15m` in INT4, one thread, three runs, busy
machine). Scores of all pairs are held. As in `model/sparse.py`, keys whose score equals the k-th
largest all stay.
"""

from __future__ import annotations

import math

import numpy as np

from pocketglm.model.spec import DecoderSpec
from pocketglm.targets._onnx_graph import GraphBuilder

ROOM = "slots"  # the name of the past's length where it is a buffer with room for the new tokens


class SparseAttention:
    """The nodes of one graph; those that all layers use come first. cos, sin: rotary tables."""

    def __init__(self, g: GraphBuilder, spec: DecoderSpec, top_k: int, cos: str, sin: str) -> None:
        self.g, self.spec, self.tables = g, spec, (cos, sin)
        zero, one = g.number(0), g.number(1)
        total = g.op("ReduceSum", "attention_mask", g.ints(1), keepdims=1)
        tokens = g.op("Shape", "input_ids", start=1, end=2)
        # A padded prompt has more places than tokens; it begins at 0 then.
        start = g.op("Max", g.op("Sub", total, tokens), g.ints(0))
        ahead = g.op("Range", zero, g.op("Squeeze", tokens), one)
        self.positions = g.op("Add", start, ahead)  # [B, S]
        self.total = g.op("Shape", "attention_mask", start=1, end=2)
        slots = g.op("Range", zero, g.op("Squeeze", self.total), one)
        looking = g.op("Unsqueeze", self.positions, g.ints(1, 2, 4))
        self.visible = g.op("LessOrEqual", slots, looking)  # [B, 1, 1, S, T]
        self.count = g.op("Min", self.total, g.ints(top_k))
        batch = g.op("Shape", "input_ids", start=0, end=1)
        shape = g.op("Concat", batch, g.ints(spec.num_kv_heads), tokens, g.ints(1), axis=0)
        heads = g.constant("kv_heads", np.arange(spec.num_kv_heads)[None, :, None, None])
        rows = g.op("Unsqueeze", g.op("Range", zero, g.op("Squeeze", batch), one), g.ints(1, 2, 3))
        slots = g.op("Unsqueeze", self.positions, g.ints(1, 3))
        places = [g.op("Expand", part, shape) for part in (rows, heads, slots)]
        self.places = g.op("Concat", *places, axis=-1)  # [B, kv heads, S, 3]

    def attend(self, q: str, k: str, v: str, index: int) -> str:
        """Layer `index`: projections [B, S, heads * head_dim] -> as q."""
        g, spec = self.g, self.spec
        query = self._turned(self._heads(q), spec.num_heads)
        keys, values = (
            self._extended(new, f"{index}.{part}")
            for part, new in (
                ("key", self._turned(self._heads(k), spec.num_kv_heads)),
                ("value", self._heads(v)),
            )
        )
        groups = spec.num_heads // spec.num_kv_heads
        shape = g.ints(0, spec.num_kv_heads, groups, -1, spec.head_dim)
        query = g.op("Reshape", g.op("Mul", query, g.scalar(spec.head_dim**-0.5)), shape)
        keys = g.op("Transpose", keys, perm=[0, 1, 3, 2])
        scores = g.op("MatMul", query, g.op("Unsqueeze", keys, g.ints(2)))
        nothing = g.scalar(-math.inf)
        scores = g.op("Where", self.visible, scores, nothing)
        largest, _ = g.ops("TopK", 2, scores, self.count, axis=-1, sorted=0)
        least = g.op("ReduceMin", largest, axes=[-1], keepdims=1)
        scores = g.op("Where", g.op("Less", scores, least), nothing, scores)
        shares = g.op("Softmax", scores, axis=-1)
        seen = g.op("MatMul", shares, g.op("Unsqueeze", values, g.ints(2)))
        seen = g.op("Reshape", seen, g.ints(0, spec.num_heads, -1, spec.head_dim))
        return g.op("Reshape", g.op("Transpose", seen, perm=[0, 2, 1, 3]), g.ints(0, 0, -1))

    def _heads(self, x: str) -> str:
        """[B, S, heads * head_dim] -> [B, heads, S, head_dim]."""
        g = self.g
        split = g.op("Reshape", x, g.ints(0, 0, -1, self.spec.head_dim))
        return g.op("Transpose", split, perm=[0, 2, 1, 3])

    def _turned(self, x: str, heads: int) -> str:
        """Rotary positions on [B, heads, S, head_dim]."""
        rope, partial = self.spec.rope, self.spec.rope.dims < self.spec.head_dim
        return self.g.microsoft(
            "RotaryEmbedding",
            x,
            self.positions,
            *self.tables,
            interleaved=int(rope.interleaved),
            **({"num_heads": heads, "rotary_embedding_dim": rope.dims} if partial else {}),
        )

    def _extended(self, new: str, part: str) -> str:
        """Write into the cache; what the queries may look at, [B, kv heads, T, head_dim]."""
        g, past = self.g, f"past_key_values.{part}"
        present = g.op("ScatterND", past, self.places, new, out=f"present.{part}")
        return g.op("Slice", present, g.ints(0), self.total, g.ints(2))
