"""What a checkpoint holds: its family, its spec, and the part of the model a tensor belongs to.

What an encoder's folder means:
* `BertForSequenceClassification`: classes over BERT's pooler (first token).
* `BertModel` and pretraining models: an embedding, pooled as sentence-transformers'
  `1_Pooling/config.json` says (mean where there is none) and always L2-normalized: the cosine of
  two texts, which is what embeddings are compared by, does not change.
* `model_type: pocketglm`: the same fields, with `pooling`; for what upstream classes cannot
  express, such as a mean-pooled classifier, layers of unequal sizes after pruning (`head_dim`,
  `layer_num_attention_heads`, `layer_intermediate_size`) or factorized ones (`layer_ranks`).
  `model/auto.py` opens it in transformers.

A decoder's folder is a causal language model of one of `DECODERS`; where upstream cannot express
how its weights are stored, or its layers' FFNs differ or are factorized, or it has the structure of
`methods/tiny.py` (shared or unified blocks, top-k attention), it is `model_type: pocketglm` with
the `family`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from pocketglm.artifacts.checkpoint import Checkpoint, read_json, remote_code_hint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.errors import CheckpointError, nearest
from pocketglm.model import bert, causal, glm, llama, qwen
from pocketglm.model.sentence import read_max_length, read_pooling
from pocketglm.model.spec import DecoderSpec, EncoderSpec, Head, Pooling, Role
from pocketglm.model.unequal import read_structure

POCKETGLM = "pocketglm"
POCKETGLM_CLASSIFIER = "PocketGLMForSequenceClassification"
POCKETGLM_MODEL = "PocketGLMModel"
POCKETGLM_DECODER = "PocketGLMForCausalLM"
# model_type -> the module that reads and writes its config
DECODERS: dict[str, ModuleType] = {
    family: module for module in (glm, llama, qwen) for family in module.ARCHITECTURES
}
FAMILIES = ("bert", *DECODERS, POCKETGLM)
_LOG = logging.getLogger(__name__)
_CLASSIFIERS = (bert.CLASSIFIER, POCKETGLM_CLASSIFIER)
_BODIES = (*bert.BODIES, POCKETGLM_MODEL)
_ROLES = (*bert.ROLES, *causal.ROLES)


def is_decoder(ckpt: Checkpoint) -> bool:
    """Whether this is a causal language model; False: an encoder.

    Raises:
        CheckpointError: an unknown architecture; the message lists the known ones.
    """
    return _family(ckpt) in DECODERS


def spec_of(ckpt: Checkpoint) -> EncoderSpec:
    """The encoder that a checkpoint holds, from its config, side files and tensor names.

    Raises:
        CheckpointError: an unknown architecture or configuration, or a decoder.
    """
    family = _family(ckpt)
    if family in DECODERS:
        raise CheckpointError(
            f"{ckpt.path} is a decoder ({family}); this works on encoders",
            "use a BERT or MiniLM model, or a verb that takes decoders: inspect, compress",
        )
    file = ckpt.path / "config.json"
    head = _head(ckpt)
    pooling = _pooling(ckpt, head)
    classifies = head == "classification"
    pooler = pooling == "cls" if classifies else _holds(ckpt, "pooler.dense.")
    return bert.spec_of(
        ckpt.config,
        file,
        own=ckpt.config["model_type"] == POCKETGLM,
        head=head,
        pooling=pooling,
        pooler=pooler,
        num_labels=len(_labels(ckpt)) if classifies else 0,
    )


def decoder_spec_of(ckpt: Checkpoint) -> DecoderSpec:
    """The decoder that a checkpoint holds.

    Raises:
        CheckpointError: an unknown architecture or configuration, or an encoder.
    """
    family = _family(ckpt)
    if family not in DECODERS:
        raise CheckpointError(
            f"{ckpt.path} is an encoder ({family}); this works on decoders",
            f"use a language model of type {', '.join(sorted(DECODERS))}",
        )
    module = DECODERS[family]
    fields = causal.Fields(ckpt.config, ckpt.path / "config.json", module.DEFAULTS)
    stored_head = causal.HEAD in ckpt.tensors or f"{causal.HEAD}_packed" in ckpt.tensors
    spec: DecoderSpec = module.spec_of(fields, family, stored_head)
    if ckpt.config["model_type"] != POCKETGLM:
        return spec
    own = read_structure(ckpt.config, fields.file, spec.num_layers)
    try:
        return replace(spec, **own)
    except ValueError as error:
        raise CheckpointError(
            f"{fields.file}: {error}",
            "compare it with the config.json that `pocketglm compress` wrote",
        ) from error


def model_spec_of(ckpt: Checkpoint) -> EncoderSpec | DecoderSpec:
    """`decoder_spec_of` or `spec_of`, whichever fits."""
    return decoder_spec_of(ckpt) if is_decoder(ckpt) else spec_of(ckpt)


def labels_of(ckpt: Checkpoint) -> list[str]:
    """Class names in the order of the logits; empty for an embedding model and a decoder.

    Raises:
        CheckpointError: as `spec_of`, or `id2label` does not number the classes from 0.
    """
    if is_decoder(ckpt):
        return []
    return _labels(ckpt) if spec_of(ckpt).head == "classification" else []


def max_length_of(ckpt: Checkpoint) -> int:
    """Longest row in tokens: the manifest's, else that of sentence-transformers' or the tokenizer's
    files; never more than the model has positions.
    """
    limit = model_spec_of(ckpt).max_position_embeddings
    return min(limit, ckpt.manifest.max_length or read_max_length(ckpt.path) or limit)


def eos_ids_of(ckpt: Checkpoint) -> tuple[int, ...]:
    """The tokens that end a text: generation_config.json's where it names any, else the config's.

    Raises:
        CheckpointError: as `decoder_spec_of`, or they are no token ids.
    """
    file = ckpt.path / "generation_config.json"
    config = read_json(file) if file.is_file() else {}
    own = causal.token_ids(causal.Fields(config, file, {}), "eos_token_id")
    return own or decoder_spec_of(ckpt).eos_ids


def role_of(name: str) -> Role:
    """The part of the model that a stored tensor belongs to, by name.

    Also knows the parts of a quantized weight (`..._packed`, `..._scale`). Norms are "other".
    """
    return next((role for pattern, role in _ROLES if re.search(pattern, name)), "other")


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this is the 2-D weight of a linear layer of the body."""
    return len(shape) == 2 and name.endswith(".weight") and role_of(name) in ("attention", "ffn")


def is_embedding(name: str) -> bool:
    """Whether this is the table of word, position or type embeddings."""
    return re.search(f"{bert.EMBEDDING}|{causal.EMBEDDING}", name) is not None


def is_head(name: str) -> bool:
    """Whether this is the weight of a linear layer of the head (classifier, pooler, lm_head)."""
    return name.endswith(".weight") and role_of(name) == "head" and "LayerNorm" not in name


def tied_twin(ckpt: Checkpoint, part: str, scheme: TensorScheme) -> str | None:
    """The second name of an embedding's scales or zero points where the head is tied to it.

    transformers ties the integers alone, and looks for the head's scales under the head's name.
    """
    base, end = part.removesuffix("_scale").removesuffix("_zero_point"), part.rpartition(".")[2]
    if (
        scheme.bits != 8
        or end == "weight"
        or base != causal.EMBEDDING_WEIGHT
        or not is_decoder(ckpt)
    ):
        return None
    return causal.HEAD + part.removeprefix(base) if decoder_spec_of(ckpt).tied else None


def _family(ckpt: Checkpoint) -> str:
    """`bert` or one of DECODERS."""
    config, file = ckpt.config, ckpt.path / "config.json"
    family = config.get("model_type")
    if family not in FAMILIES:
        _refuse_unknown(config, file)
    own = family == POCKETGLM
    family = str(config.get("family", "bert") if own else family)
    if own and family not in ("bert", *DECODERS):
        raise CheckpointError(
            f"{file}: unknown family '{family}'", nearest(family, ("bert", *DECODERS))
        )
    known: tuple[str, ...] = (*_CLASSIFIERS, *_BODIES)
    if family in DECODERS:
        known = (DECODERS[family].ARCHITECTURES[family], POCKETGLM_DECODER)
    for architecture in config.get("architectures") or []:
        if architecture not in known:
            code, hint = "", nearest(str(architecture), known)
            if _needs_code(config, file):
                code = "; its own Python code (remote code) is not run"
                hint = remote_code_hint(file.parent, config)
            raise CheckpointError(f"{file}: unknown architecture '{architecture}'{code}", hint)
    if note := remote_code_note(ckpt):
        _say(note)
    return family


def _refuse_unknown(config: Mapping[str, Any], file: Path) -> NoReturn:
    family = str(config.get("model_type"))
    code, hint = "", nearest(family, FAMILIES)
    if family == "chatglm" or _needs_code(config, file):
        code = "; its own Python code (remote code) is not run"
        hint = f"{remote_code_hint(file.parent, config)}; {hint}"
    raise CheckpointError(f"{file}: unknown architecture '{family}' (model_type){code}", hint)


def _needs_code(config: Mapping[str, Any], file: Path) -> bool:
    return "auto_map" in config or any(file.parent.glob("modeling_*.py"))


def remote_code_note(ckpt: Checkpoint) -> str | None:
    """What to tell of a known model whose folder asks for its own Python code, else None."""
    if "auto_map" not in ckpt.config:
        return None
    return (
        f"{ckpt.path} asks for its own Python code (auto_map in config.json): that is never run, "
        f"the standard architecture '{ckpt.config['model_type']}' is used"
    )


@functools.cache
def _say(note: str) -> None:
    """Once in a process; on stderr, unless the program that uses this package says otherwise."""
    _LOG.warning(note)


def _holds(ckpt: Checkpoint, start: str) -> bool:
    return any(name.removeprefix(bert.PREFIX).startswith(start) for name in ckpt.tensors)


def _head(ckpt: Checkpoint) -> Head:
    architectures = ckpt.config.get("architectures")
    if architectures:
        return "classification" if architectures[0] in _CLASSIFIERS else "embedding"
    return "classification" if _holds(ckpt, "classifier.") else "embedding"


def _pooling(ckpt: Checkpoint, head: Head) -> Pooling:
    stated = ckpt.config.get("pooling") if ckpt.config["model_type"] == POCKETGLM else None
    if stated is None:
        return "cls" if head == "classification" else read_pooling(ckpt.path)
    if stated not in ("mean", "cls"):
        raise CheckpointError(
            f"{ckpt.path / 'config.json'}: pooling '{stated}' is not supported", "known: mean, cls"
        )
    pooling: Pooling = stated
    return pooling


def _labels(ckpt: Checkpoint) -> list[str]:
    names = ckpt.config.get("id2label")
    if names is None:
        return [f"LABEL_{index}" for index in range(ckpt.config.get("num_labels", 2))]
    if not isinstance(names, dict) or sorted(names, key=_number) != [
        str(index) for index in range(len(names))
    ]:
        raise CheckpointError(
            f"{ckpt.path / 'config.json'}: id2label should number the classes from 0 without gaps",
            "compare it with the original model's config.json",
        )
    return [str(names[str(index)]) for index in range(len(names))]


def _number(key: str) -> int:
    return int(key) if key.isdecimal() else -1
