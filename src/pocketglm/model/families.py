"""What a checkpoint holds: its family, its spec, and the part of the model a tensor belongs to.

What an encoder's folder means:
* `BertForSequenceClassification`: classes over BERT's pooler (first token).
* `BertModel` and pretraining models: an embedding, pooled as sentence-transformers'
  `1_Pooling/config.json` says (mean where there is none) and always L2-normalized: the cosine of
  two texts, which is what embeddings are compared by, does not change.
* `model_type: pocketglm`: the same fields, with `pooling`; for what upstream classes cannot
  express, such as a mean-pooled classifier (`model/auto.py` opens it in transformers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.errors import CheckpointError, nearest
from pocketglm.model import bert
from pocketglm.model.sentence import read_max_length, read_pooling
from pocketglm.model.spec import EncoderSpec, Head, Pooling, Role

POCKETGLM = "pocketglm"
POCKETGLM_CLASSIFIER = "PocketGLMForSequenceClassification"
POCKETGLM_MODEL = "PocketGLMModel"
FAMILIES = ("bert", POCKETGLM)
_CLASSIFIERS = (bert.CLASSIFIER, POCKETGLM_CLASSIFIER)
_BODIES = (*bert.BODIES, POCKETGLM_MODEL)


def spec_of(ckpt: Checkpoint) -> EncoderSpec:
    """The model that a checkpoint holds, from its config, side files and tensor names.

    Raises:
        CheckpointError: an unknown architecture or configuration; the message lists the known.
    """
    file = ckpt.path / "config.json"
    _check_family(ckpt.config, file)
    head = _head(ckpt)
    pooling = _pooling(ckpt, head)
    classifies = head == "classification"
    pooler = pooling == "cls" if classifies else _holds(ckpt, "pooler.dense.")
    return bert.spec_of(
        ckpt.config,
        file,
        head=head,
        pooling=pooling,
        pooler=pooler,
        num_labels=len(_labels(ckpt)) if classifies else 0,
    )


def labels_of(ckpt: Checkpoint) -> list[str]:
    """Class names in the order of the logits; empty for an embedding model.

    Raises:
        CheckpointError: as `spec_of`, or `id2label` does not number the classes from 0.
    """
    return _labels(ckpt) if spec_of(ckpt).head == "classification" else []


def max_length_of(ckpt: Checkpoint) -> int:
    """Longest row in tokens: the manifest's, else that of sentence-transformers' or the tokenizer's
    files; never more than the model has positions.
    """
    limit = spec_of(ckpt).max_position_embeddings
    return min(limit, ckpt.manifest.max_length or read_max_length(ckpt.path) or limit)


def role_of(name: str) -> Role:
    """The part of the model that a stored tensor belongs to, by name.

    Also knows the parts of a quantized weight (`..._packed`, `..._scale`). Norms are "other".
    """
    return next((role for pattern, role in bert.ROLES if re.search(pattern, name)), "other")


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this is the 2-D weight of a linear layer of the body."""
    return len(shape) == 2 and name.endswith(".weight") and role_of(name) in ("attention", "ffn")


def is_embedding(name: str) -> bool:
    """Whether this is the table of word, position or type embeddings."""
    return re.search(bert.EMBEDDING, name) is not None


def is_head(name: str) -> bool:
    """Whether this is the weight of a linear layer of the head (classifier, pooler, lm_head)."""
    return name.endswith(".weight") and role_of(name) == "head" and "LayerNorm" not in name


def _check_family(config: Mapping[str, Any], file: Path) -> None:
    family = config.get("model_type")
    if family not in FAMILIES:
        code = "; its own Python code (remote code) is not run" if "auto_map" in config else ""
        raise CheckpointError(
            f"{file}: unknown architecture '{family}' (model_type){code}",
            nearest(str(family), FAMILIES),
        )
    for architecture in config.get("architectures") or []:
        if architecture not in (*_CLASSIFIERS, *_BODIES):
            known = (*_CLASSIFIERS, *_BODIES)
            raise CheckpointError(
                f"{file}: unknown architecture '{architecture}'", nearest(str(architecture), known)
            )


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
