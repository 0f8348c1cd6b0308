"""What the decoder families share on disk: config fields, rotary settings and tensor names.

A family's file says what is its own: biases, norms, fused weights, defaults. Both forms of the
rotary settings are read and written: transformers 5's `rope_parameters`, and before it
`rope_theta`, `partial_rotary_factor` and `rope_scaling` beside each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pocketglm.artifacts.scheme import CacheScheme
from pocketglm.errors import CheckpointError, nearest
from pocketglm.model.spec import Activation, DecoderSpec, Role, RopeScaling, RopeSpec

# our field -> config key
_COUNTS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
}
_FRACTIONS = {"rms_norm_eps": "rms_norm_eps", "attention_dropout": "attention_dropout"}
_NAMES = {
    "tokens": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_self_attn_layernorm",
    "ffn.gate_up": "mlp.gate_up_proj",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_mlp_layernorm",
    "unified.input": "unified.in_proj",
    "unified.output": "unified.out_proj",
    "unified.query_norm": "unified.q_norm",
    "unified.key_norm": "unified.k_norm",
}
# As in bert.py: the first pattern found in a stored name says which part it belongs to.
ROLES: tuple[tuple[str, Role], ...] = (
    (r"(^|\.)lm_head\.", "head"),
    (r"norm\.", "other"),
    (r"(^|\.)embed_tokens\.", "embedding"),
    (r"\.self_attn\.", "attention"),
    (r"\.(mlp|unified)\.", "ffn"),
)
EMBEDDING = r"(^|\.)embed_tokens\.weight$"
EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_HINT = "compare it with the original model's config.json"


def hf_name(name: str) -> str:
    """Our parameter name -> the one on disk, e.g. `model.layers.0.self_attn.q_proj.weight`."""
    module, _, parameter = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+?)(\.factor_in|\.factor_out)?", module)
    if block:
        return f"model.layers.{block[1]}.{_NAMES[block[2]]}{block[3] or ''}.{parameter}"
    return f"{_NAMES[module]}.{parameter}"


def cache_scale_names(index: int) -> tuple[str, str]:
    """The tensors of the scales of a layer's cached keys and values, as compressed-tensors names
    them.
    """
    at = f"model.layers.{index}.self_attn"
    return f"{at}.k_scale", f"{at}.v_scale"


def cache_layout(spec: DecoderSpec, scheme: CacheScheme | None) -> dict[str, tuple[int, ...]]:
    """The tensors of all layers' scales, float32, and their shapes; none of a float cache."""
    if scheme is None:
        return {}
    shape = (1,) if scheme.per == "tensor" else (spec.num_kv_heads, spec.head_dim)
    return {n: shape for index in range(spec.num_layers) for n in cache_scale_names(index)}


@dataclass(frozen=True, slots=True)
class Fields:
    """A family's config.json; `defaults` are what upstream assumes where a key is absent."""

    values: Mapping[str, Any]
    file: Path
    defaults: Mapping[str, Any]

    def get(self, key: str) -> Any:
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def count(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, value, "a positive whole number")
        return value

    def number(self, key: str, values: Mapping[str, Any], default: float | None = None) -> float:
        value = values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise self.error(key, value, "a positive number")
        return float(value)

    def error(self, key: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: '{key}' should be {wanted}, it is {value!r}", _HINT)


def read_spec(fields: Fields, stored_head: bool, **own: Any) -> DecoderSpec:
    """The spec of a config; `own` are the values that the family decides.

    stored_head: the checkpoint holds a head of its own, whatever `tie_word_embeddings` says (as in
    transformers 5).

    Raises:
        CheckpointError: a field is missing or has a value that this decoder does not compute.
    """
    values = _with_head_sizes(fields)
    spec: dict[str, Any] = {ours: values.count(key) for ours, key in _COUNTS.items()}
    for ours, key in _FRACTIONS.items():
        spec[ours] = fields.number(key, fields.values, fields.defaults[key])
    activation: Any = str(fields.get("hidden_act"))
    if activation not in get_args(Activation):
        raise CheckpointError(
            f"{fields.file}: hidden_act '{activation}' is not supported",
            nearest(activation, get_args(Activation)),
        )
    _refuse_sliding(fields)
    bos, pad = token_ids(fields, "bos_token_id"), token_ids(fields, "pad_token_id")
    try:
        return DecoderSpec(
            **spec,
            activation=activation,
            rope=_rope(fields, values.count("head_dim"), own.pop("interleaved", False)),
            tied=fields.flag("tie_word_embeddings") and not stored_head,
            bos_id=bos[0] if bos else None,
            eos_ids=token_ids(fields, "eos_token_id"),
            pad_id=pad[0] if pad else None,
            **own,
        )
    except ValueError as error:
        raise CheckpointError(f"{fields.file}: {error}", _HINT) from error


def _with_head_sizes(fields: Fields) -> Fields:
    """`fields` with what upstream derives: one key/value head a head, heads that fill the width."""
    defaults = dict(fields.defaults)
    heads = fields.count("num_attention_heads")
    defaults.setdefault("num_key_value_heads", heads)
    defaults.setdefault("head_dim", fields.count("hidden_size") // heads)
    return Fields(fields.values, fields.file, defaults)


def _refuse_sliding(fields: Fields) -> None:
    kinds = fields.values.get("layer_types") or []
    if fields.values.get("use_sliding_window") or set(kinds) - {"full_attention"}:
        raise CheckpointError(
            f"{fields.file}: sliding-window attention is not supported",
            "use a model with full attention in every layer",
        )


def token_ids(fields: Fields, key: str) -> tuple[int, ...]:
    """One id, a list of ids, or none."""
    value = fields.values[key] if key in fields.values else fields.defaults.get(key)
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in ids):
        raise fields.error(key, value, "a token id or a list of them")
    return ids


def _rope(fields: Fields, head_dim: int, interleaved: bool) -> RopeSpec:
    config = fields.values
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise fields.error("rope_parameters", rope, "a mapping")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(
            f"{fields.file}: rope type '{kind}' is not supported", "known: default, llama3"
        )
    rope = {k: config[k] for k in ("rope_theta", "partial_rotary_factor") if k in config} | rope
    whole = fields.defaults.get("partial_rotary_factor")
    factor = fields.number("partial_rotary_factor", rope, whole or 1.0)
    if whole is None and factor != 1.0:
        raise CheckpointError(
            f"{fields.file}: partial_rotary_factor {factor} is not supported in this family",
            "known: 1.0 (models of type glm and glm4 may have another)",
        )
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            factor=fields.number("factor", rope),
            low_freq_factor=fields.number("low_freq_factor", rope),
            high_freq_factor=fields.number("high_freq_factor", rope),
            original_positions=int(
                fields.number(
                    "original_max_position_embeddings",
                    rope,
                    config.get("max_position_embeddings"),
                )
            ),
        )
    theta = fields.number("rope_theta", rope, fields.defaults.get("rope_theta", 10000.0))
    return RopeSpec(int(head_dim * factor), theta, interleaved, scaling)


def write_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json fields that every family has."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope.theta}
    if spec.rope.scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": spec.rope.scaling.factor,
            "low_freq_factor": spec.rope.scaling.low_freq_factor,
            "high_freq_factor": spec.rope.scaling.high_freq_factor,
            "original_max_position_embeddings": spec.rope.scaling.original_positions,
        }
    eos = spec.eos_ids
    return {
        **{key: getattr(spec, ours) for ours, key in (_COUNTS | _FRACTIONS).items()},
        "hidden_act": spec.activation,
        "tie_word_embeddings": spec.tied,
        "rope_parameters": rope,
        "rope_theta": spec.rope.theta,
        **({"rope_scaling": dict(rope)} if spec.rope.scaling else {}),
        "bos_token_id": spec.bos_id,
        "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": spec.pad_id,
    }
