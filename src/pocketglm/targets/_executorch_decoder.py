"""A decoder as one method `forward(tokens int64 [1, S], input_pos int64 [1]) -> logits`.

That is what ExecuTorch's LLM runner calls. The cache is in the method's buffers: keys transposed,
[kv heads, head_dim, T], values [kv heads, T, head_dim]; a call writes its tokens' from `input_pos`
on, and no token looks at later slots, so a new text begins with `input_pos` 0. S is free, 1 to T.

What the delegate would leave outside is written so that it takes it: gate and up, or a unified
block's five parts, are products of their own rows of one weight; rotary positions are a product
with the matrix that swaps a pair's features, and two tables; the queries of heads that share a key
are rows of one product. So one delegate goes from one cache update to the next.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pocketglm.model.layers import rotation, unified_widths
from pocketglm.model.spec import DecoderSpec, RopeSpec
from pocketglm.targets._executorch_layers import Float, activation, embedding, linear, norm
from pocketglm.targets._litert_weights import Weights

_MASKED = -10000.0  # score of a slot that is not looked at; exp() of it is 0 in float32


class DecoderGraph(nn.Module):
    """For texts of at most `context` tokens; logits of the last one [1, V], or of all [1, S, V]."""

    slots: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self, spec: DecoderSpec, weights: Weights, context: int, logits: Literal["last", "all"]
    ) -> None:
        super().__init__()
        self.spec, self.last = spec, logits == "last"
        self.register_buffer("slots", torch.arange(context))
        turn = rotation(spec.rope, torch.arange(context)[None], torch.float32)
        self.register_buffer("cos", turn.cos[0, 0].clone())
        self.register_buffer("sin", turn.sin[0, 0].clone())
        self.wide_cos, self.wide_sin, self.swap = rotary_matrices(spec.rope, spec.head_dim)
        self.tokens = embedding(weights, "tokens")
        blocks = [_Block(spec, weights, index) for index in spec.first_layers()]
        self.blocks = nn.ModuleList(blocks)
        shape = spec.num_kv_heads, spec.head_dim, context
        for index in range(spec.num_layers):
            self.register_buffer(f"keys_{index}", torch.zeros(shape))
            self.register_buffer(f"values_{index}", torch.zeros(shape).transpose(1, 2).contiguous())
        self.norm = norm(weights, "norm", spec.rms_norm_eps, centred=False)
        name, dynamic = ("tokens", weights.dynamic) if spec.tied else ("head", None)
        self.head = linear(weights, name, bias=False, dynamic=dynamic)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """See above."""
        positions = self.slots[: tokens.shape[1]] + input_pos
        turn = self.wide_cos(self.cos[positions]), self.wide_sin(self.sin[positions]), self.swap
        seen = self.slots[None] <= positions[:, None]
        bias = torch.where(seen, 0.0, _MASKED)[:, None]
        x: Tensor = self.tokens(tokens)
        for index, number in enumerate(self.spec.blocks()):
            past = getattr(self, f"keys_{index}"), getattr(self, f"values_{index}"), positions
            x = self.blocks[number](x, turn, bias, past)
        x = self.norm(x[:, -1] if self.last else x)
        logits: Tensor = self.head(x)
        return logits


Turn = tuple[Tensor, Tensor, nn.Module]
Past = tuple[Tensor, Tensor, Tensor]


class _Block(nn.Module):
    """The block that layer `index` is the first to use."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    query_norm: nn.Module
    key_norm: nn.Module
    attention_norm: nn.Module
    attention_post_norm: nn.Module
    ffn_norm: nn.Module
    ffn_post_norm: nn.Module

    def __init__(self, spec: DecoderSpec, weights: Weights, index: int) -> None:
        super().__init__()
        self.spec, at = spec, f"blocks.{spec.blocks()[index]}."
        self.activation = activation(spec.activation)
        for name in ("attention_norm", *_norms(spec)):
            self.add_module(name, norm(weights, at + name, spec.rms_norm_eps, centred=False))
        where = "unified" if spec.unified else "attention"
        for name in ("query_norm", "key_norm") if spec.qk_norm else ():
            module = norm(weights, f"{at}{where}.{name}", spec.rms_norm_eps, centred=False)
            self.add_module(name, module)
        for name, (layer, bias, rows) in _layers(spec, index).items():
            self.add_module(name, linear(weights, at + layer, bias=bias, rows=rows))

    def forward(self, x: Tensor, turn: Turn, bias: Tensor, past: Past) -> Tensor:
        """x [1, S, H] -> [1, S, H]."""
        y = self.attention_norm(x)
        mixed = self._attention(y, turn, bias, past)
        if self.spec.unified:
            inner = self.activation(self.gate(y)) * self.up(y)
            joined: Tensor = x + self.output(torch.cat((mixed, inner), -1))
            return joined
        y = self.output(mixed)
        x = x + (self.attention_post_norm(y) if self.spec.four_norms else y)
        y = self.ffn_norm(x)
        y = self.down(self.activation(self.gate(y)) * self.up(y))
        result: Tensor = x + (self.ffn_post_norm(y) if self.spec.four_norms else y)
        return result

    def _attention(self, y: Tensor, turn: Turn, bias: Tensor, past: Past) -> Tensor:
        """[1, S, H] -> [1, S, heads * head_dim]."""
        spec, (keys, values, positions) = self.spec, past
        size, kv_heads = spec.head_dim, spec.num_kv_heads
        shared = spec.num_heads // kv_heads
        q = self.query(y).view(1, -1, spec.num_heads, size)
        k = self.key(y).view(1, -1, kv_heads, size)
        v = self.value(y).view(-1, kv_heads, size)
        if spec.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = _turned(q.permute(0, 2, 1, 3), turn), _turned(k.permute(0, 2, 1, 3), turn)
        torch.ops.aten.index_put_(keys, [None, None, positions], k.view(kv_heads, -1, size).mT)
        torch.ops.aten.index_put_(values, [None, positions], v.permute(1, 0, 2))
        q = q.view(kv_heads, shared, -1, size).permute(0, 2, 1, 3)
        q = q.contiguous().view(kv_heads, -1, size) * size**-0.5
        scores = torch.bmm(q, keys).view(kv_heads, -1, shared, keys.shape[-1]) + bias
        shares = self._largest(scores).softmax(-1).view(kv_heads, -1, keys.shape[-1])
        mixed = torch.bmm(shares, values).view(kv_heads, -1, shared, size)
        return mixed.permute(1, 0, 2, 3).contiguous().view(1, -1, spec.num_heads * size)

    def _largest(self, scores: Tensor) -> Tensor:
        """Without those below the k-th largest of their row: see `model/sparse.py`."""
        k = self.spec.top_k
        if k is None or k >= scores.shape[-1]:
            return scores
        least = scores.topk(k, dim=-1).values[..., -1:]
        return torch.where(scores >= least, scores, _MASKED)


def _norms(spec: DecoderSpec) -> tuple[str, ...]:
    if spec.unified:
        return ()
    return ("ffn_norm", *(("attention_post_norm", "ffn_post_norm") if spec.four_norms else ()))


def _layers(spec: DecoderSpec, index: int) -> dict[str, tuple[str, bool, slice]]:
    """A block's products: the stored layer, whether it has a bias, and which of its rows."""
    inner, bias, whole = spec.ffn()[index], spec.ffn_bias, slice(None)
    if spec.unified:
        found, start = {}, 0
        widths = unified_widths(spec.block(index))
        for name, width in zip(("query", "key", "value", "gate", "up"), widths, strict=True):
            rows = slice(start, start + width)
            found[name] = ("unified.input", bias or spec.attention_bias, rows)
            start += width
        return found | {"output": ("unified.output", bias or spec.output_bias, whole)}
    found = {
        name: (f"attention.{name}", spec.attention_bias, whole)
        for name in ("query", "key", "value")
    }
    found["output"] = ("attention.output", spec.output_bias, whole)
    if spec.fused_ffn:
        found["gate"] = ("ffn.gate_up", bias, slice(0, inner))
        found["up"] = ("ffn.gate_up", bias, slice(inner, 2 * inner))
    else:
        found |= {name: (f"ffn.{name}", bias, whole) for name in ("gate", "up")}
    return found | {"down": ("ffn.down", bias, whole)}


# --- rotary positions ----------------------------------------------------------------------------


def rotary_matrices(rope: RopeSpec, size: int) -> tuple[Float, Float, Float]:
    """What widens cosines and sines [S, dims / 2] to the features of a head [S, size] (1 and 0
    where nothing turns), and what gives each feature its pair's other one, the first ones negative.
    """
    half = rope.dims // 2
    pair = torch.arange(half)
    first = 2 * pair if rope.interleaved else pair
    second = first + (1 if rope.interleaved else half)
    wide, swap = torch.zeros(size, half), torch.zeros(size, size)
    wide[first, pair] = wide[second, pair] = 1.0
    swap[first, second], swap[second, first] = -1.0, 1.0
    rest = torch.ones(size)
    rest[: rope.dims] = 0.0
    return Float(wide, rest), Float(wide.clone()), Float(swap)


def _turned(x: Tensor, turn: Turn) -> Tensor:
    """Queries or keys [1, heads, S, head_dim]."""
    cos, sin, swap = turn
    found: Tensor = x * cos + swap(x) * sin
    return found
