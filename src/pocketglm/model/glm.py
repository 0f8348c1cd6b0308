"""GLM in the Hugging Face format: GLM-Edge and GLM-4-9B (`glm`), GLM-4-0414 (`glm4`).

Rotary positions are interleaved and may cover a part of each head; gate and up projection are one
weight, the gate's rows first; attention_bias is that of query, key and value only. `glm4` has two
more norms in a block. Upstream: transformers/models/glm/modular_glm.py and glm4/modular_glm4.py.
"""

from __future__ import annotations

from typing import Any

from pocketglm.model.causal import Fields, read_spec, write_spec
from pocketglm.model.spec import DecoderSpec, Family

ARCHITECTURES: dict[Family, str] = {"glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM"}
DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
}


def spec_of(fields: Fields, family: Family, stored_head: bool) -> DecoderSpec:
    """The spec of a `glm` or `glm4` config; raises as `read_spec`."""
    return read_spec(
        fields,
        stored_head,
        family=family,
        interleaved=True,
        attention_bias=fields.flag("attention_bias"),
        fused_ffn=True,
        four_norms=family == "glm4",
    )


def config_of(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json fields of a spec."""
    config = write_spec(spec)
    partial = spec.rope.dims / spec.head_dim
    config["rope_parameters"]["partial_rotary_factor"] = partial
    return config | {
        "attention_bias": spec.attention_bias,
        "partial_rotary_factor": partial,
    }
