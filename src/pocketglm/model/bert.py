"""BERT in the Hugging Face format: `config.json` and tensor names, to and from ours.

Serves `model_type: bert`, and `pocketglm` checkpoints whose body is BERT's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pocketglm.errors import CheckpointError, nearest
from pocketglm.model.spec import EncoderSpec, Role
from pocketglm.model.unequal import read_sizes

PREFIX = "bert."  # of body tensors in a file that also has a head
MODEL = "BertModel"
CLASSIFIER = "BertForSequenceClassification"
ACTIVATIONS = ("gelu", "gelu_new", "relu")
BODIES = (MODEL, "BertForMaskedLM", "BertForPreTraining")  # their own heads are ignored

# our field -> (config key, default where upstream has one)
_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "hidden_size": ("hidden_size", None),
    "num_layers": ("num_hidden_layers", None),
    "num_heads": ("num_attention_heads", None),
    "intermediate_size": ("intermediate_size", None),
    "max_position_embeddings": ("max_position_embeddings", 512),
    "type_vocab_size": ("type_vocab_size", 2),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "activation": ("hidden_act", "gelu"),
    "dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    "pad_id": ("pad_token_id", 0),
}
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_FRACTIONS = ("layer_norm_eps", "dropout", "attention_dropout")
_NAMES = {
    "embeddings.tokens": "embeddings.word_embeddings",
    "embeddings.positions": "embeddings.position_embeddings",
    "embeddings.types": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn.up": "intermediate.dense",
    "ffn.down": "output.dense",
    "ffn_norm": "output.LayerNorm",
    "pooler": "pooler.dense",
    "classifier": "classifier",
}
# The first pattern found in a stored name says which part of the model it belongs to.
ROLES: tuple[tuple[str, Role], ...] = (
    (r"(^|\.)(classifier|pooler|lm_head|cls)\.", "head"),
    (r"LayerNorm\.", "other"),
    (r"(^|\.)embeddings\.", "embedding"),
    (r"\.attention\.", "attention"),
    (r"\.(intermediate|output)\.dense\.", "ffn"),
)
EMBEDDING = r"embeddings\.(word|position|token_type)_embeddings\.weight$"


def hf_name(name: str) -> str:
    """Our parameter name -> BertModel's, e.g. `encoder.layer.0.attention.self.query.weight`."""
    module, _, parameter = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+?)(\.factor_in|\.factor_out)?", module)
    if block:
        return f"encoder.layer.{block[1]}.{_NAMES[block[2]]}{block[3] or ''}.{parameter}"
    return f"{_NAMES[module]}.{parameter}"


def old_name(name: str) -> str:
    """What checkpoints converted from TensorFlow call a LayerNorm's tensors."""
    return re.sub(r"LayerNorm\.(weight|bias)$", _gamma_beta, name)


def _gamma_beta(match: re.Match[str]) -> str:
    return "LayerNorm." + {"weight": "gamma", "bias": "beta"}[match[1]]


def spec_of(
    config: Mapping[str, Any], file: Path, *, own: bool = False, **head: Any
) -> EncoderSpec:
    """The spec of a BERT config; `head` gives head, pooling, pooler and num_labels.

    own: it is a `pocketglm` config, in which layers may differ; upstream ignores such fields.

    Raises:
        CheckpointError: a field is missing or has a value that this encoder does not compute.
    """
    values = {ours: config.get(key, default) for ours, (key, default) in _FIELDS.items()}
    values["pad_id"] = values["pad_id"] or 0  # null: the model has no padding token
    for ours in _COUNTS:
        if not isinstance(values[ours], int) or values[ours] < 1:
            raise CheckpointError(
                f"{file}: '{_FIELDS[ours][0]}' should be a positive whole number, "
                f"it is {values[ours]!r}",
                "compare it with the original model's config.json",
            )
    for ours in _FRACTIONS:
        if not isinstance(values[ours], int | float) or not 0 <= values[ours] < 1:
            raise CheckpointError(
                f"{file}: '{_FIELDS[ours][0]}' should be a number from 0 to 1, "
                f"it is {values[ours]!r}",
                "compare it with the original model's config.json",
            )
    if values["activation"] not in ACTIVATIONS:
        raise CheckpointError(
            f"{file}: hidden_act '{values['activation']}' is not supported",
            nearest(str(values["activation"]), ACTIVATIONS),
        )
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise CheckpointError(
            f"{file}: position_embedding_type '{positions}' is not supported", "known: absolute"
        )
    if config.get("is_decoder"):
        raise CheckpointError(
            f"{file}: is_decoder is true; a BERT decoder is not supported", "use an encoder"
        )
    if own:
        values |= read_sizes(config, file, values["num_layers"])
    try:
        return EncoderSpec(**values, classifier_dropout=config.get("classifier_dropout"), **head)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}", "compare it with the original's") from error


def config_of(spec: EncoderSpec) -> dict[str, Any]:
    """The `config.json` fields of a spec's body (not of its head) that upstream knows."""
    values = asdict(spec)
    config = {key: values[ours] for ours, (key, _) in _FIELDS.items()}
    if spec.classifier_dropout is not None:
        config["classifier_dropout"] = spec.classifier_dropout
    return config
