"""Encoders in and out of Hugging Face folders.

What the folder means:
* `BertForSequenceClassification`: classes over BERT's pooler (first token).
* `BertModel` and pretraining models: an embedding, pooled as sentence-transformers'
  `1_Pooling/config.json` says (mean where there is none) and always L2-normalized: the cosine of
  two texts, which is what embeddings are compared by, does not change.
* `model_type: pocketglm`: the same fields, with `pooling`; for what upstream classes cannot
  express, such as a mean-pooled classifier (`model/auto.py` opens it in transformers).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import MANIFEST, Manifest, write_json
from pocketglm.errors import CheckpointError, nearest
from pocketglm.model import bert
from pocketglm.model.encoder import Encoder
from pocketglm.model.sentence import read_max_length, read_pooling, write_sentence_files
from pocketglm.model.spec import EncoderSpec, Head, Pooling, Role
from pocketglm.ops.stored import as_array, read_weight, stored_layout
from pocketglm.text.tokenizer import TOKENIZER_FILES

POCKETGLM = "pocketglm"
POCKETGLM_CLASSIFIER = "PocketGLMForSequenceClassification"
POCKETGLM_MODEL = "PocketGLMModel"
FAMILIES = ("bert", POCKETGLM)
_CLASSIFIERS = (bert.CLASSIFIER, POCKETGLM_CLASSIFIER)
_BODIES = (*bert.BODIES, POCKETGLM_MODEL)
_FLOATS = ("F64", "F32", "F16", "BF16")
_INCOMPLETE = "the folder is incomplete or its config.json belongs to another model"


# --- what a checkpoint is ------------------------------------------------------------------------


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


def _skeleton(spec: EncoderSpec) -> Encoder:
    """The modules without memory for their weights."""
    with torch.device("meta"):
        return Encoder(spec)


def _foreign(ckpt: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        f"{ckpt.path}: '{name}' is stored as {ckpt.tensors[name].dtype} without a scheme",
        "it was quantized by another tool: start from the model's float weights",
    )


# --- loading -------------------------------------------------------------------------------------


def check_tensors(ckpt: Checkpoint) -> None:
    """Compare the stored tensors with the config, by headers alone.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config says (both are
            named), layers are left over, or integers were stored by another tool.
    """
    spec = spec_of(ckpt)
    missing = []
    for ours, tensor in _skeleton(spec).state_dict().items():
        name, shape = stored_name(ckpt, ours), tuple(tensor.shape)
        scheme = ckpt.manifest.schemes.get(name)
        if scheme is None and f"{name}_packed" in ckpt.tensors:
            raise _foreign(ckpt, f"{name}_packed")
        for part, (_, expected) in stored_layout(name, shape, scheme, "F32").items():
            info = ckpt.tensors.get(part)
            if info is None:
                missing.append(f"'{part}' {list(expected)}")
            elif info.shape != expected:
                raise CheckpointError(
                    f"{ckpt.path}: tensor '{part}' has shape {list(info.shape)}, its config.json "
                    f"asks for {list(expected)}",
                    _INCOMPLETE,
                )
            elif scheme is None and info.dtype not in _FLOATS:
                raise _foreign(ckpt, part)
    if missing:
        raise CheckpointError(
            f"{ckpt.path} has no tensor {missing[0]}"
            + (f" and lacks {len(missing) - 1} more" if len(missing) > 1 else ""),
            _INCOMPLETE,
        )
    layers = [int(n) for n in re.findall(r"encoder\.layer\.(\d+)\.", " ".join(ckpt.tensors))]
    if max(layers) >= spec.num_layers:
        raise CheckpointError(
            f"{ckpt.path} stores {max(layers) + 1} layers, its config.json says "
            f"num_hidden_layers {spec.num_layers}",
            _INCOMPLETE,
        )


def load_encoder(ckpt: Checkpoint) -> Encoder:
    """The model in float32 and eval mode; quantized weights are dequantized.

    Raises:
        CheckpointError: as `check_tensors`.
    """
    check_tensors(ckpt)
    model = _skeleton(spec_of(ckpt))
    state = {name: read_weight(ckpt, stored_name(ckpt, name)) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def stored_name(ckpt: Checkpoint, name: str) -> str:
    """Our parameter name -> the name under which this checkpoint stores it (or should)."""
    hf = bert.hf_name(name)
    if not hf.startswith("classifier.") and any(t.startswith(bert.PREFIX) for t in ckpt.tensors):
        hf = bert.PREFIX + hf
    old = bert.old_name(hf)
    return old if old in ckpt.tensors else hf


# --- saving --------------------------------------------------------------------------------------


def save_encoder(
    model: Encoder,
    folder: Path,
    *,
    source: Checkpoint | None,
    labels: list[str],
    manifest: Manifest,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Hugging Face folder; the same model gives the same bytes.

    source: where unknown config fields and the tokenizer are copied from; None: there is none, and
    the caller saves the tokenizer. labels: class names, empty for an embedding. dtype: how the
    weights are stored, None = float32.

    A classifier over the pooler and an embedding open in transformers as they are (an embedding in
    sentence-transformers too); a mean-pooled classifier is `model_type: pocketglm`.
    """
    spec, dtype = model.spec, dtype or torch.float32
    if len(labels) != spec.num_labels:
        raise ValueError(f"{len(labels)} labels for a head of {spec.num_labels}")
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(source.config if source else {}, spec, labels)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", dict(sorted(config.items())))
    prefix = bert.PREFIX if spec.head == "classification" else ""
    safetensors.write_file(
        folder / "model.safetensors",
        (
            (_saved_name(name, prefix), as_array(tensor.detach().cpu().to(dtype)))
            for name, tensor in model.state_dict().items()
        ),
    )
    if source:
        _copy_tokenizer(source.path, folder)
    if spec.head == "embedding":
        length = manifest.max_length or (
            max_length_of(source) if source else spec.max_position_embeddings
        )
        write_sentence_files(folder, spec, length)
    write_json(folder / MANIFEST, manifest.model_copy(update={"schemes": {}}))


def _saved_name(name: str, prefix: str) -> str:
    hf = bert.hf_name(name)
    return hf if hf.startswith("classifier.") else prefix + hf


def _config(old: Mapping[str, Any], spec: EncoderSpec, labels: list[str]) -> dict[str, Any]:
    """`old` with this spec's fields; saving the result again changes nothing."""
    replaced = ("quantization_config", "_name_or_path", "torch_dtype", "pooling")
    config = {key: value for key, value in old.items() if key not in replaced}
    classifies = spec.head == "classification"
    config |= {
        "architectures": [bert.CLASSIFIER if classifies else bert.MODEL],
        "model_type": "bert",
        **bert.config_of(spec),
    }
    for key in ("id2label", "label2id"):
        config.pop(key, None)
    if classifies:
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
    if classifies and spec.pooling == "mean":
        config |= pocketglm_fields(spec)
    return config


def pocketglm_fields(spec: EncoderSpec) -> dict[str, Any]:
    """The config fields that make a BERT config a `pocketglm` one; everything else stays."""
    architecture = POCKETGLM_CLASSIFIER if spec.head == "classification" else POCKETGLM_MODEL
    return {
        "architectures": [architecture],
        "model_type": POCKETGLM,
        "pooling": spec.pooling,
    }


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        file, target = source / name, folder / name
        if file.is_file() and not (target.exists() and target.samefile(file)):
            shutil.copyfile(file, target)
