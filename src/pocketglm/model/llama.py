"""Llama in the Hugging Face format, and what took its shape (SmolLM, MobileLLM, TinyLlama).

attention_bias is that of all four projections. Upstream: transformers/models/llama.
"""

from __future__ import annotations

from typing import Any

from pocketglm.model.causal import Fields, read_spec, write_spec
from pocketglm.model.spec import DecoderSpec, Family

ARCHITECTURES: dict[Family, str] = {"llama": "LlamaForCausalLM"}
DEFAULTS = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def spec_of(fields: Fields, family: Family, stored_head: bool) -> DecoderSpec:
    """The spec of a `llama` config; raises as `read_spec`."""
    bias = fields.flag("attention_bias")
    return read_spec(
        fields,
        stored_head,
        family=family,
        attention_bias=bias,
        output_bias=bias,
        ffn_bias=fields.flag("mlp_bias"),
    )


def config_of(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json fields of a spec."""
    return write_spec(spec) | {"attention_bias": spec.attention_bias, "mlp_bias": spec.ffn_bias}
