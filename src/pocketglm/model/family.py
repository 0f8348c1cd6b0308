"""The family's sizes: GLM decoders, deep and thin, grouped-query attention, tied embedding.

Every width is a multiple of 128, so INT4 groups of 32, 64 and 128 divide them all. Deep and thin:
MobileLLM, https://arxiv.org/abs/2402.14905. `glm-edge-1.5b` is the published GLM-Edge-1.5B-Chat.
A test counts each one's parameters.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from pocketglm.errors import UsageError, nearest
from pocketglm.model.spec import DecoderSpec, RopeSpec

_EDGE_EOS = (59246, 59253, 59255)


def _size(
    vocab: int, hidden: int, layers: int, heads: int, kv: int, head: int, ffn: int, positions: int
) -> DecoderSpec:
    return DecoderSpec(
        family="glm",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head,
        intermediate_size=ffn,
        rope=RopeSpec(head, interleaved=True),
        max_position_embeddings=positions,
        fused_ffn=True,
        tied=True,
    )


# fmt: off
#                            vocab hidden layers heads kv head   ffn positions
SIZES = MappingProxyType({
    "autoglm-nano":    _size( 3072,   256,    4,    4, 1,  64,  512,  512),  # 3.0 M
    "autoglm-15m":     _size(32000,   256,   10,    4, 2,  64,  640, 1024),  # 15.1 M
    "autoglm-tiny":    _size(32000,   640,   15,   10, 2,  64, 2176, 2048),  # 97.9 M
    "autoglm-mini":    _size(32000,   896,   20,   14, 2,  64, 2688, 2048),  # 209.9 M
    "autoglm-300m":    _size(32000,  1024,   22,   16, 4,  64, 3072, 2048),  # 298.1 M
    "autoglm-base":    _size(32000,  1792,   30,   14, 2, 128, 5120, 4096),  # 1.10 B
    "autoglm-teacher": _size(32000,  1792,   33,   14, 2, 128, 5120, 4096),  # 1.21 B
    "glm-edge-1.5b":   replace(
                       _size(59264,  2048,   28,   16, 4, 128, 6144, 8192),  # 1.47 B
                       eos_ids=_EDGE_EOS, pad_id=_EDGE_EOS[0]),
})
# fmt: on


def spec_of_size(name: str, vocab_size: int | None = None) -> DecoderSpec:
    """The spec of a size, with another vocabulary if asked for.

    Raises:
        UsageError: there is no such size; the message lists the known ones.
    """
    if name not in SIZES:
        raise UsageError(f"unknown size '{name}'", nearest(name, SIZES))
    spec = SIZES[name]
    return replace(spec, vocab_size=vocab_size) if vocab_size else spec
