"""Decoders as llama.cpp's graphs want them: architecture, metadata, tensors, and what they lack.

    family          architecture  rotary pairs        FFN
    glm             chatglm       side by side        gate and up in one weight, `ffn_up`
    glm4            glm4          side by side        the same, and two more norms
    llama           llama         side by side        gate, up
    qwen2, qwen3    the same      i and i + half      gate, up

GLM's pairs lie side by side in the checkpoint too. Llama's do not: rows of query and key are put in
another order, their biases too. Read from llama.cpp's src/models/*.cpp and src/llama-model.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pocketglm.contracts import Floats
from pocketglm.model.spec import DecoderSpec, Family, RopeSpec
from pocketglm.targets._gguf_file import Entry
from pocketglm.targets._gguf_tensors import Source

ARCHITECTURES: dict[Family, str] = {
    "glm": "chatglm",
    "glm4": "glm4",
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_SQUARE = ("glm", "glm4", "qwen2")  # attention's output weight is [H, H] in their loaders
_PLAIN = "export a checkpoint from before that step"


def reasons(spec: DecoderSpec, context: int) -> list[str]:
    """What of this decoder llama.cpp's graph of its architecture does not compute."""
    found = []
    arch = ARCHITECTURES[spec.family]
    if spec.unified:
        found.append(f"unified blocks: {arch} has attention and FFN one after the other; {_PLAIN}")
    if spec.top_k is not None and spec.top_k < context:
        found.append(
            f"top-k attention ({spec.top_k} keys): llama.cpp looks at all keys; {_PLAIN}, or "
            f"export with --max-length {spec.top_k} or less"
        )
    if spec.layer_ffn:
        found.append(
            f"layers with {min(spec.layer_ffn)} to {max(spec.layer_ffn)} FFN channels: {arch} "
            "has one number for all; prune to the same number in every layer"
        )
    if spec.layer_ranks:
        found.append(f"factorized layers: {arch} has one weight for each; {_PLAIN}")
    width = spec.num_heads * spec.head_dim
    if spec.family in _SQUARE and width != spec.hidden_size:
        found.append(
            f"{spec.num_heads} heads of {spec.head_dim} are {width} features, {arch} wants as "
            f"many as the hidden size, {spec.hidden_size}"
        )
    if spec.rope.scaling and spec.family != "llama":
        found.append(f"stretched rotary positions (llama3): {arch} does not read their factors")
    if spec.family == "qwen3" and spec.attention_bias:
        found.append("attention_bias: qwen3 has no biases in llama.cpp")
    if spec.activation != "silu":
        found.append(f"hidden_act {spec.activation}: {arch} computes silu")
    return found


def metadata(spec: DecoderSpec, context: int) -> dict[str, Entry]:
    """The model's numbers, by llama.cpp's keys."""
    arch = ARCHITECTURES[spec.family]
    counts = {
        "vocab_size": spec.vocab_size,
        "context_length": context,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "rope.dimension_count": spec.rope.dims,
    }
    numbers = {
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "rope.freq_base": spec.rope.theta,
    }
    return {
        **{f"{arch}.{key}": Entry("u32", value) for key, value in counts.items()},
        **{f"{arch}.{key}": Entry("f32", value) for key, value in numbers.items()},
    }


def sources(spec: DecoderSpec) -> Iterator[Source]:
    """The tensors of the file, in order. Layers that share a block each get it."""
    yield Source("token_embd.weight", "tokens.weight")
    if spec.rope.scaling:
        yield Source("rope_freqs.weight", values=rope_factors(spec.rope))
    for index, block in enumerate(spec.blocks()):
        yield from _block(spec, f"blk.{index}", f"blocks.{block}")
    yield Source("output_norm.weight", "norm.weight")
    if not spec.tied:
        yield Source("output.weight", "head.weight")


def _block(spec: DecoderSpec, to: str, of: str) -> Iterator[Source]:
    yield Source(f"{to}.attn_norm.weight", f"{of}.attention_norm.weight")
    turned = spec.family == "llama"
    for name, layer, heads in (
        ("attn_q", "query", spec.num_heads if turned else 0),
        ("attn_k", "key", spec.num_kv_heads if turned else 0),
        ("attn_v", "value", 0),
    ):
        yield Source(f"{to}.{name}.weight", f"{of}.attention.{layer}.weight", heads)
        if spec.attention_bias:
            yield Source(f"{to}.{name}.bias", f"{of}.attention.{layer}.bias", heads)
    if spec.qk_norm:
        yield Source(f"{to}.attn_q_norm.weight", f"{of}.attention.query_norm.weight")
        yield Source(f"{to}.attn_k_norm.weight", f"{of}.attention.key_norm.weight")
    yield Source(f"{to}.attn_output.weight", f"{of}.attention.output.weight")
    if spec.output_bias:
        yield Source(f"{to}.attn_output.bias", f"{of}.attention.output.bias")
    if spec.four_norms:
        yield Source(f"{to}.post_attention_norm.weight", f"{of}.attention_post_norm.weight")
    yield Source(f"{to}.ffn_norm.weight", f"{of}.ffn_norm.weight")
    layers = (
        {"ffn_up": "gate_up", "ffn_down": "down"}
        if spec.fused_ffn
        else {"ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
    )
    for name, layer in layers.items():
        yield Source(f"{to}.{name}.weight", f"{of}.ffn.{layer}.weight")
        if spec.ffn_bias:
            yield Source(f"{to}.{name}.bias", f"{of}.ffn.{layer}.bias")
    if spec.four_norms:
        yield Source(f"{to}.post_ffw_norm.weight", f"{of}.ffn_post_norm.weight")


def rope_factors(rope: RopeSpec) -> Floats:
    """float32 [dims / 2]: what llama.cpp divides each pair's angle by, for Llama 3.1's scaling.

    The formula of `model.layers.frequencies`: waves longer than the old context by `factor`, short
    ones by 1, between them mixed.
    """
    scaling = rope.scaling
    if scaling is None:
        raise ValueError("these rotary positions are not stretched")
    rates = rope.theta ** (-np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    turns = scaling.original_positions * rates / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clip(0, 1)
    factors: Floats = (1 / (keep + (1 - keep) / scaling.factor)).astype(np.float32)
    return factors
