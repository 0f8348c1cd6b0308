"""What llama.cpp computes of a GGUF file, in float64 numpy; imports nothing of ours.

From the tensors and the metadata alone, after llama.cpp's graphs (src/models/chatglm.cpp, glm4.cpp,
llama.cpp, qwen2.cpp, qwen3.cpp, bert.cpp; src/llama-graph.cpp for FFN and pooling), except that
inputs of quantized layers are not rounded. The container is read by the package gguf, the blocks
are taken apart here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Raw = npt.NDArray[np.uint8]
# ggml's rope types: NORM turns values 2i and 2i + 1, NEOX i and i + n_rot / 2.
NORM = ("chatglm", "glm4", "llama")


def half(low: int, high: int) -> float:
    """An fp16 number by its bits."""
    bits = low | high << 8
    sign, exponent, part = -1.0 if bits >> 15 else 1.0, bits >> 10 & 31, bits & 1023
    if exponent == 0:
        return float(sign * part * 2.0**-24)
    return float(sign * (1 + part / 1024) * 2.0 ** (exponent - 15))


def block_values(data: Sequence[int]) -> tuple[float, list[int]]:
    """Scale and 32 integers of a block of Q8_0 (34 bytes) or Q4_0 (18 bytes)."""
    scale, rest = half(data[0], data[1]), list(data[2:])
    if len(rest) == 32:
        return scale, [b - 256 if b > 127 else b for b in rest]
    return scale, [(b & 15) - 8 for b in rest] + [(b >> 4) - 8 for b in rest]


def quantized_rows(raw: Raw, size: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Integers [N, K] and scales [N, blocks]."""
    integers, scales = [], []
    for row in raw.tolist():
        parts = [block_values(row[i : i + size]) for i in range(0, len(row), size)]
        scales.append([scale for scale, _ in parts])
        integers.append([q for _, values in parts for q in values])
    return np.array(integers), np.array(scales)


@dataclass(frozen=True)
class File:
    """Metadata and tensors of a file, all in memory."""

    meta: dict[str, Any]
    tensors: dict[str, Array]

    @classmethod
    def read(cls, path: Path) -> File:
        reader = gguf.GGUFReader(str(path))
        meta = {name: field.contents() for name, field in reader.fields.items()}
        tensors: dict[str, Array] = {}
        for tensor in reader.tensors:
            kind, data = tensor.tensor_type.name, np.array(tensor.data)
            if kind in ("F32", "F16"):
                tensors[tensor.name] = data.astype(np.float64)
            else:
                q, scales = quantized_rows(data, {"Q8_0": 34, "Q4_0": 18}[kind])
                tensors[tensor.name] = q.astype(np.float64) * np.repeat(scales, 32, axis=1)
        return cls(meta, tensors)

    @property
    def arch(self) -> str:
        return str(self.meta["general.architecture"])

    def key(self, name: str, default: Any = None) -> Any:
        return self.meta.get(f"{self.arch}.{name}", default)

    def linear(self, x: Array, name: str) -> Array:
        y: Array = x @ self.tensors[f"{name}.weight"].T
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y


def rms(x: Array, weight: Array, eps: float) -> Array:
    out: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    return out


def layer_norm(x: Array, file: File, name: str) -> Array:
    eps = float(file.key("attention.layer_norm_epsilon"))
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    out: Array = scaled * file.tensors[f"{name}.weight"] + file.tensors[f"{name}.bias"]
    return out


def rope(head: Array, place: int, file: File) -> Array:
    """One head [head_dim] of the token at `place`."""
    dims = int(file.key("rope.dimension_count"))
    base = float(file.key("rope.freq_base", 10000.0))
    factors = file.tensors.get("rope_freqs.weight")
    out = head.copy()
    for i in range(dims // 2):
        a, b = (2 * i, 2 * i + 1) if file.arch in NORM else (i, i + dims // 2)
        angle = place * base ** (-2 * i / dims) / (1.0 if factors is None else factors[i])
        out[a] = head[a] * math.cos(angle) - head[b] * math.sin(angle)
        out[b] = head[a] * math.sin(angle) + head[b] * math.cos(angle)
    return out


def look(query: Array, keys: Array, values: Array) -> Array:
    """One query [D] over keys and values [T, D]."""
    scores = keys @ query / math.sqrt(len(query))
    shares = np.exp(scores - scores.max())
    out: Array = shares @ values / shares.sum()
    return out


def attention(file: File, at: str, x: Array, causal: bool) -> Array:
    """x [S, H] -> [S, H]."""
    heads = int(file.key("attention.head_count"))
    kv = int(file.key("attention.head_count_kv", heads))
    size = int(file.key("attention.key_length", x.shape[1] // heads))
    q = file.linear(x, f"{at}.attn_q").reshape(len(x), heads, size)
    k = file.linear(x, f"{at}.attn_k").reshape(len(x), kv, size)
    v = file.linear(x, f"{at}.attn_v").reshape(len(x), kv, size)
    if f"{at}.attn_q_norm.weight" in file.tensors:
        eps = float(file.key("attention.layer_norm_rms_epsilon"))
        q = rms(q, file.tensors[f"{at}.attn_q_norm.weight"], eps)
        k = rms(k, file.tensors[f"{at}.attn_k_norm.weight"], eps)
    if causal:
        q, k = (
            np.array([[rope(head, s, file) for head in token] for s, token in enumerate(part)])
            for part in (q, k)
        )
    out = np.zeros_like(q)
    for s in range(len(x)):
        end = s + 1 if causal else len(x)
        for h in range(heads):
            group = h // (heads // kv)
            out[s, h] = look(q[s, h], k[:end, group], v[:end, group])
    return file.linear(out.reshape(len(x), -1), f"{at}.attn_output")


def silu(x: Array) -> Array:
    out: Array = x / (1 + np.exp(-x))
    return out


def gelu_tanh(x: Array) -> Array:
    """ggml's GELU."""
    inner = math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)
    out: Array = 0.5 * x * (1 + np.tanh(inner))
    return out


def logits(file: File, ids: Sequence[int]) -> Array:
    """A decoder's [S, V] for one text."""
    w, eps = file.tensors, float(file.key("attention.layer_norm_rms_epsilon"))
    x = w["token_embd.weight"][list(ids)]
    for layer in range(int(file.key("block_count"))):
        at = f"blk.{layer}"
        y = attention(file, at, rms(x, w[f"{at}.attn_norm.weight"], eps), True)
        if file.arch == "glm4":
            y = rms(y, w[f"{at}.post_attention_norm.weight"], eps)
        x = x + y
        y = rms(x, w[f"{at}.ffn_norm.weight"], eps)
        if file.arch in ("chatglm", "glm4"):  # LLM_FFN_SWIGLU over one tensor
            both = file.linear(y, f"{at}.ffn_up")
            width = both.shape[1] // 2
            inner = silu(both[:, :width]) * both[:, width:]
        else:
            inner = silu(file.linear(y, f"{at}.ffn_gate")) * file.linear(y, f"{at}.ffn_up")
        y = file.linear(inner, f"{at}.ffn_down")
        if file.arch == "glm4":
            y = rms(y, w[f"{at}.post_ffw_norm.weight"], eps)
        x = x + y
    head = w.get("output.weight", w["token_embd.weight"])
    return rms(x, w["output_norm.weight"], eps) @ head.T


def pooled(file: File, ids: Sequence[int]) -> Array:
    """BERT's output for one text: an embedding, not normalized, or class scores."""
    w = file.tensors
    x = w["token_embd.weight"][list(ids)] + w["token_types.weight"][0]
    x = layer_norm(x + w["position_embd.weight"][: len(ids)], file, "token_embd_norm")
    for layer in range(int(file.key("block_count"))):
        at = f"blk.{layer}"
        x = layer_norm(x + attention(file, at, x, False), file, f"{at}.attn_output_norm")
        inner = gelu_tanh(file.linear(x, f"{at}.ffn_up"))
        x = layer_norm(x + file.linear(inner, f"{at}.ffn_down"), file, f"{at}.layer_output_norm")
    kind = int(file.key("pooling_type"))
    if kind == 4:  # LLAMA_POOLING_TYPE_RANK
        scores = file.linear(np.tanh(file.linear(x[:1], "cls")), "cls.output")
        return scores.reshape(-1)
    out: Array = x.mean(0) if kind == 1 else x[0]
    return out
