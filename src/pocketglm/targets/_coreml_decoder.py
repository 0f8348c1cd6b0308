"""A decoder as a Core ML program of two functions: `prefill` for prompts, `decode` for one token.

They share their constants and, in the app, one state: keys and values of each layer, fp16. A call
takes `input_ids` int32 [1, N] and `position` int32 [1], the place of the first of them; it writes
their keys and values into N slots from there on (`slice_update`, a write and a read of the state)
and gives `logits` of the last of them, or of all. Keys and values of padding behind the text are
overwritten by the next tokens, and no token looks at later slots. There are `slots_of` slots, so
that the padding of a last, incomplete call has room.

Layout "rows": states [1, kv heads, slots, head_dim]; "channels": [1, kv heads, head_dim, slots].
Rotary positions are tables, looked up by position. Top-k attention: `model/sparse.py`. The residual
stream is named `embeddings`, `block_0`, `block_1`, ...; parity reads it.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from pocketglm.contracts import Floats
from pocketglm.model.layers import rotation, unified_widths
from pocketglm.model.spec import DecoderSpec
from pocketglm.targets._coreml_attention import attend, heads, joined, penalty
from pocketglm.targets._coreml_form import Form
from pocketglm.targets._coreml_graph import Graph, Shape
from pocketglm.targets._litert_weights import Weights

PREFILL, DECODE = "prefill", "decode"
_PROMPT = 64  # tokens that a call of `prefill` takes
_ALIGNED = 32  # fp16 values in 64 bytes, to which the Neural Engine pads the last axis


def prompt_of(context: int) -> int:
    """Tokens that a call of `prefill` takes, of texts of at most `context`."""
    return min(_PROMPT, context)


def slots_of(context: int) -> int:
    """Slots of the cache: the last call's padding fits behind the longest text."""
    return -(-(context + prompt_of(context) - 1) // _ALIGNED) * _ALIGNED


class DecoderGraph:
    """Builds one function, of `tokens` tokens a call."""

    def __init__(
        self, spec: DecoderSpec, weights: Weights, form: Form, context: int, tokens: int
    ) -> None:
        self.spec, self.count, self.slots = spec, tokens, slots_of(context)
        self.top_k = spec.top_k if spec.top_k is not None and spec.top_k < context else None
        shape: Shape = (1, spec.num_kv_heads, self.slots, spec.head_dim)
        if form.channels:
            shape = (1, spec.num_kv_heads, spec.head_dim, self.slots)
        states = {f"{kind}_{i}": shape for i in range(spec.num_layers) for kind in ("key", "value")}
        ports: dict[str, Any] = {"input_ids": (1, tokens), "position": (1,)}
        self.g = Graph(form, weights, ports, states)

    def build(self, *, every: bool) -> Graph:
        """The function; `every`: it has all positions' logits [1, N, V], else the last's
        [1, 1, V].
        """
        with self.g as g:
            self._place(g.input("position"))
            spec = self.spec
            x = g.embedding(g.input("input_ids"), "tokens", shared=spec.tied, name="embeddings")
            for index in range(spec.num_layers):
                x = self._block(x, index)
            if not every and self.count > 1:
                x = g.part(x, g.tokens, self.count - 1, 1)
            x = g.rms_norm(x, "norm", spec.rms_norm_eps)
            x = g.linear(x, "tokens" if spec.tied else "head", bias=False)
            if g.form.channels:  # [1, V, 1, N]
                x = g.b.transpose(x=g.b.squeeze(x=x, axes=[2]), perm=[0, 2, 1])
            g.function.set_outputs([g.b.cast(x=x, dtype="fp32", name="logits")])
        return self.g

    # --- positions -------------------------------------------------------------------------------

    def _place(self, first: Any) -> None:
        """What follows from the first token's position: rotation, mask, slots."""
        g, rows = self.g, not self.g.form.channels
        steps = g.constant(f"steps_{self.count}", lambda: np.arange(self.count, dtype=np.int32))
        positions = g.b.add(x=steps, y=first)
        self._cos, self._sin = (self._rotary(kind, positions) for kind in ("cos", "sin"))
        places = g.constant(
            "slots",
            lambda: np.arange(self.slots, dtype=np.int32).reshape((1, -1) if rows else (-1, 1)),
        )
        asking = g.b.expand_dims(x=positions, axes=[1 if rows else 0])
        seen = g.b.less_equal(x=places, y=asking)
        self._bias = penalty(g, g.b.expand_dims(x=seen, axes=[0, 1]))
        zeros = np.zeros(2 if rows else 3, np.int32)
        parts = [zeros, first, np.zeros(1, np.int32)] if rows else [zeros, first]
        self._begin = g.b.concat(values=parts, axis=0)
        size, kv_heads = self.spec.head_dim, self.spec.num_kv_heads
        sizes = (self.count, size) if rows else (size, self.count)
        self._end = g.b.add(x=self._begin, y=np.array([1, kv_heads, *sizes], np.int32))

    def _rotary(self, kind: Literal["cos", "sin"], positions: Any) -> Any:
        """Of these positions: [1, 1, N, dims / 2], or [1, 1, dims / 2, N]."""
        g, rope = self.g, self.spec.rope

        def table() -> Floats:
            turn = rotation(rope, torch.arange(self.slots)[None], torch.float32)
            values: Floats = (turn.cos if kind == "cos" else turn.sin)[0, 0].numpy()
            return values.T if g.form.channels else values

        found = g.b.gather(
            x=g.constant(f"rotary_{kind}", table),
            indices=positions,
            axis=1 if g.form.channels else 0,
        )
        return g.b.expand_dims(x=found, axes=[0, 1])

    def _turn(self, x: Any) -> Any:
        """Heads of queries or keys, their first features turned."""
        g, rope, size = self.g, self.spec.rope, self.spec.head_dim
        axis, half = (2 if g.form.channels else 3), rope.dims // 2
        if rope.interleaved:
            a, b = (self._every_second(x, axis, start) for start in (0, 1))
        else:
            a, b = g.part(x, axis, 0, half), g.part(x, axis, half, half)
        first = g.b.sub(x=g.b.mul(x=a, y=self._cos), y=g.b.mul(x=b, y=self._sin))
        second = g.b.add(x=g.b.mul(x=b, y=self._cos), y=g.b.mul(x=a, y=self._sin))
        parts = [first, second]
        if rope.interleaved:
            shape = [rope.dims if i == axis else n for i, n in enumerate(x.shape)]
            pairs = g.b.stack(values=parts, axis=axis + 1)
            parts = [g.b.reshape(x=pairs, shape=shape)]
        if rope.dims < size:
            parts.append(g.part(x, axis, rope.dims, size - rope.dims))
        return g.b.concat(values=parts, axis=axis) if len(parts) > 1 else parts[0]

    def _every_second(self, x: Any, axis: int, start: int) -> Any:
        """Of the rotary features from `start` on."""
        dims, rank = self.spec.rope.dims, len(x.shape)
        return self.g.b.slice_by_index(
            x=x,
            begin=[start if i == axis else 0 for i in range(rank)],
            end=[dims if i == axis else 0 for i in range(rank)],
            stride=[2 if i == axis else 1 for i in range(rank)],
            end_mask=[i != axis for i in range(rank)],
        )

    # --- blocks ----------------------------------------------------------------------------------

    def _block(self, x: Any, index: int) -> Any:
        g, at, four = self.g, f"blocks.{self.spec.blocks()[index]}.", self.spec.four_norms
        name = f"block_{index}"
        if self.spec.unified:
            y = self._unified(self._norm(x, at + "attention_norm"), at, index)
            return g.b.add(x=x, y=y, name=name)
        y = self._attention(self._norm(x, at + "attention_norm"), at, index)
        y = self._norm(y, at + "attention_post_norm") if four else y
        x = g.b.add(x=x, y=y)
        y = self._ffn(self._norm(x, at + "ffn_norm"), at, index)
        y = self._norm(y, at + "ffn_post_norm") if four else y
        return g.b.add(x=x, y=y, name=name)

    def _attention(self, x: Any, at: str, index: int) -> Any:
        spec = self.spec
        projected = [
            self.g.linear(x, f"{at}attention.{name}", bias=spec.attention_bias)
            for name in ("query", "key", "value")
        ]
        seen = self._look(projected, f"{at}attention.", index)
        return self.g.linear(seen, f"{at}attention.output", bias=spec.output_bias)

    def _unified(self, x: Any, at: str, index: int) -> Any:
        g, spec = self.g, self.spec
        packed = g.linear(x, f"{at}unified.input", bias=spec.ffn_bias or spec.attention_bias)
        parts, start = [], 0
        for width in unified_widths(spec.block(index)):
            parts.append(g.part(packed, g.features, start, width))
            start += width
        *projected, gate, up = parts
        seen = self._look(projected, f"{at}unified.", index)
        inner = g.b.mul(x=g.activation(spec.activation, gate), y=up)
        both = g.b.concat(values=[seen, inner], axis=g.features)
        return g.linear(both, f"{at}unified.output", bias=spec.output_bias or spec.ffn_bias)

    def _ffn(self, x: Any, at: str, index: int) -> Any:
        g, spec, bias = self.g, self.spec, self.spec.ffn_bias
        if spec.fused_ffn:
            packed, width = g.linear(x, f"{at}ffn.gate_up", bias=bias), spec.ffn()[index]
            gate, up = (g.part(packed, g.features, start, width) for start in (0, width))
        else:
            gate, up = (g.linear(x, f"{at}ffn.{name}", bias=bias) for name in ("gate", "up"))
        inner = g.b.mul(x=g.activation(spec.activation, gate), y=up)
        return g.linear(inner, f"{at}ffn.down", bias=bias)

    def _look(self, projected: list[Any], at: str, index: int) -> Any:
        """Queries, keys and values of this call -> what its queries see."""
        g, size = self.g, self.spec.head_dim
        query, key, value = (heads(g, x, size) for x in projected)
        if self.spec.qk_norm:
            axis, epsilon = (2 if g.form.channels else 3), self.spec.rms_norm_eps
            query = g.rms_norm(query, f"{at}query_norm", epsilon, axis)
            key = g.rms_norm(key, f"{at}key_norm", epsilon, axis)
        keys = self._keep(self._turn(key), f"key_{index}")
        values = self._keep(value, f"value_{index}")
        return joined(g, attend(g, self._turn(query), keys, values, self._bias, self.top_k))

    def _keep(self, new: Any, name: str) -> Any:
        """The cache with new keys or values in their slots."""
        g, state = self.g, self.g.input(name)
        new = new if g.form.half else g.b.cast(x=new, dtype="fp16")
        old = g.b.read_state(input=state)
        kept = g.b.slice_update(x=old, update=new, begin=self._begin, end=self._end)
        kept = g.b.coreml_update_state(state=state, value=kept)
        return kept if g.form.half else g.b.cast(x=kept, dtype="fp32")

    def _norm(self, x: Any, layer: str) -> Any:
        return self.g.rms_norm(x, layer, self.spec.rms_norm_eps)
