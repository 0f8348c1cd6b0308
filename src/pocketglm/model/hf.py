"""Models in and out of Hugging Face folders; `families.py` says what a folder holds."""

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
from pocketglm.errors import CheckpointError
from pocketglm.model import bert
from pocketglm.model.encoder import Encoder
from pocketglm.model.families import (
    POCKETGLM,
    POCKETGLM_CLASSIFIER,
    POCKETGLM_MODEL,
    is_embedding,
    is_head,
    is_linear,
    labels_of,
    max_length_of,
    role_of,
    spec_of,
)
from pocketglm.model.sentence import write_sentence_files
from pocketglm.model.spec import EncoderSpec
from pocketglm.ops.stored import as_array, read_weight, stored_layout
from pocketglm.text.tokenizer import TOKENIZER_FILES

__all__ = [
    "POCKETGLM",
    "check_tensors",
    "is_embedding",
    "is_head",
    "is_linear",
    "labels_of",
    "load_encoder",
    "max_length_of",
    "pocketglm_fields",
    "role_of",
    "save_encoder",
    "spec_of",
    "stored_name",
]

_FLOATS = ("F64", "F32", "F16", "BF16")
_INCOMPLETE = "the folder is incomplete or its config.json belongs to another model"


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
