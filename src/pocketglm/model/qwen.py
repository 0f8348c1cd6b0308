"""Qwen in the Hugging Face format: Qwen2 and 2.5 (`qwen2`), Qwen3 (`qwen3`).

`qwen2` always has biases on query, key and value; `qwen3` has a norm on each query and key head
instead, and `attention_bias` for all four projections. Upstream: transformers/models/qwen2, qwen3.
"""

from __future__ import annotations

from typing import Any

from pocketglm.model.causal import Fields, read_spec, write_spec
from pocketglm.model.spec import DecoderSpec, Family

ARCHITECTURES: dict[Family, str] = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DEFAULTS = {
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


def spec_of(fields: Fields, family: Family, stored_head: bool) -> DecoderSpec:
    """The spec of a `qwen2` or `qwen3` config; raises as `read_spec`."""
    if family == "qwen2":
        return read_spec(fields, stored_head, family=family, attention_bias=True)
    wide = Fields(fields.values, fields.file, {**fields.defaults, "head_dim": 128})
    bias = fields.flag("attention_bias")
    return read_spec(
        wide, stored_head, family=family, qk_norm=True, attention_bias=bias, output_bias=bias
    )


def config_of(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json fields of a spec."""
    config = write_spec(spec)
    if spec.family == "qwen3":
        config["attention_bias"] = spec.attention_bias
    return config
