"""Computes what a GGUF file says, part by part, from its tensors and metadata alone.

llama.cpp cannot run a part of a model, so parity is checked with this: the graphs of its
architectures in PyTorch, float32, inputs not quantized. A rotary pair is two neighbours, or
features i and i + half for Qwen; `ffn_up` without `ffn_gate` holds the gate's rows first. Rows of
weights are read when they are used, so that memory is that of a chunk.

llama.cpp itself computes the same with int8 inputs where weights are quantized, and BERT's GELU by
its tanh approximation; here it is the checkpoint's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketglm.contracts import Floats, Ids
from pocketglm.targets._gguf_encoder import ACTIVATION, RANK
from pocketglm.targets._gguf_read import GgufFile

_ROWS = 512  # of the embedding, at a time
_NEIGHBOURS = ("chatglm", "glm4", "llama")
_GELU: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
}


@torch.inference_mode()
def blocks(file: Path, ids: Ids, mask: Ids) -> Iterator[tuple[str, Floats]]:
    """As `contracts.Target` says. Of a decoder, `rows.0:512` and so on come after the embeddings,
    where the head does not use them all.
    """
    read = GgufFile(file)
    part = _Encoder(read) if read.architecture == "bert" else _Decoder(read)
    yield from part.run(ids, mask)


@dataclass(frozen=True, slots=True)
class _Graph:
    """What both kinds share."""

    read: GgufFile

    @property
    def layers(self) -> int:
        return int(self.read.number("block_count"))

    def vector(self, name: str) -> Tensor:
        return torch.from_numpy(self.read.vector(name))

    def embedding(self, ids: Ids) -> Tensor:
        """ids [B, S] -> [B, S, H]."""
        used, place = np.unique(ids, return_inverse=True)
        rows = np.concatenate(
            [self.read.rows("token_embd.weight", int(i), int(i) + 1) for i in used]
        )
        return torch.from_numpy(rows[place.reshape(ids.shape)])

    def linear(self, x: Tensor, layer: str) -> Tensor:
        """x [..., K] -> [..., N]; with a bias if there is one."""
        parts = [
            F.linear(x, torch.from_numpy(rows)) for _, rows in self.read.chunks(f"{layer}.weight")
        ]
        y = torch.cat(parts, dim=-1)
        bias = f"{layer}.bias"
        return y + self.vector(bias) if bias in self.read else y

    def split(self, x: Tensor, size: int) -> Tensor:
        """[B, S, heads * size] -> [B, heads, S, size]."""
        return x.view(*x.shape[:-1], -1, size).transpose(1, 2)


class _Decoder(_Graph):
    """chatglm, glm4, llama, qwen2, qwen3."""

    def run(self, ids: Ids, mask: Ids) -> Iterator[tuple[str, Floats]]:
        x = self.embedding(ids)
        yield "embeddings", x.numpy()
        head = "output" if "output.weight" in self.read else "token_embd"
        vocabulary = self.read.shape("token_embd.weight")[0]
        for start in range(0, vocabulary if head == "output" else 0, _ROWS):
            stop = min(start + _ROWS, vocabulary)
            yield f"rows.{start}:{stop}", self.read.rows("token_embd.weight", start, stop)
        for index in range(self.layers):
            x = self._block(f"blk.{index}", x)
            yield f"block.{index}", x.numpy()
        ends = x[torch.arange(len(ids)), torch.from_numpy(mask.sum(axis=1) - 1)]
        yield "head", self.linear(self._norm(ends, "output_norm.weight"), head).numpy()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        eps = float(self.read.number("attention.layer_norm_rms_epsilon"))
        weight = self.vector(name)
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def _block(self, at: str, x: Tensor) -> Tensor:
        y = self._attention(at, self._norm(x, f"{at}.attn_norm.weight"))
        four = f"{at}.post_attention_norm.weight" in self.read
        x = x + (self._norm(y, f"{at}.post_attention_norm.weight") if four else y)
        y = self._norm(x, f"{at}.ffn_norm.weight")
        if f"{at}.ffn_gate.weight" in self.read:
            gate, up = self.linear(y, f"{at}.ffn_gate"), self.linear(y, f"{at}.ffn_up")
        else:
            gate, up = self.linear(y, f"{at}.ffn_up").chunk(2, dim=-1)
        y = self.linear(F.silu(gate) * up, f"{at}.ffn_down")
        return x + (self._norm(y, f"{at}.post_ffw_norm.weight") if four else y)

    def _attention(self, at: str, x: Tensor) -> Tensor:
        size = int(self.read.number("attention.key_length"))
        q, k, v = (self.split(self.linear(x, f"{at}.attn_{part}"), size) for part in "qkv")
        if f"{at}.attn_q_norm.weight" in self.read:
            q, k = (
                self._norm(q, f"{at}.attn_q_norm.weight"),
                self._norm(k, f"{at}.attn_k_norm.weight"),
            )
        y = F.scaled_dot_product_attention(
            self._turn(q), self._turn(k), v, is_causal=True, enable_gqa=True
        )
        return self.linear(y.transpose(1, 2).flatten(-2), f"{at}.attn_output")

    def _turn(self, x: Tensor) -> Tensor:
        """[B, heads, S, size], the first features of each head turned by their position."""
        dims = int(self.read.number("rope.dimension_count"))
        rates = float(self.read.number("rope.freq_base")) ** (-torch.arange(0, dims, 2) / dims)
        if "rope_freqs.weight" in self.read:
            rates = rates / self.vector("rope_freqs.weight")
        angles = torch.arange(x.shape[2])[:, None] * rates
        cos, sin = angles.cos(), angles.sin()
        turned, rest = x[..., :dims], x[..., dims:]
        beside = self.read.architecture in _NEIGHBOURS
        a, b = (turned[..., 0::2], turned[..., 1::2]) if beside else turned.chunk(2, dim=-1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        turned = torch.stack(pair, -1).flatten(-2) if beside else torch.cat(pair, -1)
        return torch.cat([turned, rest], -1)


class _Encoder(_Graph):
    """bert."""

    def run(self, ids: Ids, mask: Ids) -> Iterator[tuple[str, Floats]]:
        types = torch.from_numpy(self.read.rows("token_types.weight", 0, 1))
        places = torch.from_numpy(self.read.rows("position_embd.weight", 0, ids.shape[1]))
        x = self._norm(self.embedding(ids) + types[0] + places, "token_embd_norm")
        yield "embeddings", x.numpy()
        attend = torch.from_numpy(mask).bool()[:, None, None, :]
        for index in range(self.layers):
            x = self._block(f"blk.{index}", x, attend)
            yield f"block.{index}", x.numpy()
        yield "head", self._head(x, torch.from_numpy(mask)).numpy()

    def _norm(self, x: Tensor, layer: str) -> Tensor:
        eps = float(self.read.number("attention.layer_norm_epsilon"))
        weight, bias = self.vector(f"{layer}.weight"), self.vector(f"{layer}.bias")
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def _block(self, at: str, x: Tensor, attend: Tensor) -> Tensor:
        size = x.shape[-1] // int(self.read.number("attention.head_count"))
        q, k, v = (self.split(self.linear(x, f"{at}.attn_{part}"), size) for part in "qkv")
        scores = (q @ k.transpose(-1, -2) / math.sqrt(size)).masked_fill(~attend, -math.inf)
        seen = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = self._norm(x + self.linear(seen, f"{at}.attn_output"), f"{at}.attn_output_norm")
        inner = _GELU[str(self.read.value(ACTIVATION))](self.linear(x, f"{at}.ffn_up"))
        return self._norm(x + self.linear(inner, f"{at}.ffn_down"), f"{at}.layer_output_norm")

    def _head(self, x: Tensor, mask: Tensor) -> Tensor:
        kind = int(self.read.number("pooling_type"))
        if kind == RANK:
            return self.linear(self.linear(x[:, 0], "cls").tanh(), "cls.output")
        weight = mask.to(x.dtype)[:, :, None]
        pooled = (x * weight).sum(1) / weight.sum(1) if kind == 1 else x[:, 0]
        return F.normalize(pooled, dim=-1)
