"""Models in and out of Hugging Face folders; `families.py` says what a folder holds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import MANIFEST, Manifest, write_json
from pocketglm.artifacts.safetensors import NAMES, TensorInfo
from pocketglm.errors import CheckpointError
from pocketglm.model import bert, causal
from pocketglm.model.decoder import Decoder
from pocketglm.model.encoder import Encoder
from pocketglm.model.families import (
    DECODERS,
    POCKETGLM,
    POCKETGLM_CLASSIFIER,
    POCKETGLM_DECODER,
    POCKETGLM_MODEL,
    decoder_spec_of,
    eos_ids_of,
    is_decoder,
    is_embedding,
    is_head,
    is_linear,
    labels_of,
    max_length_of,
    model_spec_of,
    role_of,
    spec_of,
)
from pocketglm.model.layers import bare_modules
from pocketglm.model.sentence import write_sentence_files
from pocketglm.model.spec import DecoderSpec, EncoderSpec
from pocketglm.model.unequal import DECODER_KEYS, KEYS, own_fields
from pocketglm.ops.stored import as_array, read_weight, stored_layout
from pocketglm.text.tokenizer import TOKENIZER_FILES

__all__ = [
    "POCKETGLM",
    "check_tensors",
    "decoder_spec_of",
    "eos_ids_of",
    "is_decoder",
    "is_embedding",
    "is_head",
    "is_linear",
    "labels_of",
    "load_decoder",
    "load_encoder",
    "max_length_of",
    "model_spec_of",
    "pocketglm_fields",
    "predicted",
    "role_of",
    "save_decoder",
    "save_encoder",
    "spec_of",
    "stored_name",
]

_FLOATS = ("F64", "F32", "F16", "BF16")
_LAYER = r"(?:encoder\.layer|model\.layers)\.(\d+)\."
_INCOMPLETE = "the folder is incomplete or its config.json belongs to another model"


def _skeleton(spec: EncoderSpec | DecoderSpec) -> Encoder | Decoder:
    """The modules without memory for their weights."""
    with bare_modules():
        return Encoder(spec) if isinstance(spec, EncoderSpec) else Decoder(spec)


def _foreign(ckpt: Checkpoint, name: str) -> CheckpointError:
    """The refusal of integers that no manifest explains: GPTQ, AWQ and the like."""
    config = ckpt.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    by = f"by {method}" if method else "by another tool"
    return CheckpointError(
        f"{ckpt.path}: '{name}' is stored as {ckpt.tensors[name].dtype} without a scheme; it was "
        f"quantized {by}",
        "start from the model's float weights (the original repository), and compress those",
    )


# --- loading -------------------------------------------------------------------------------------


def check_tensors(ckpt: Checkpoint) -> None:
    """Compare the stored tensors with the config, by headers alone.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config says (both are
            named), layers are left over, or integers were stored by another tool.
    """
    spec = model_spec_of(ckpt)
    missing = []
    packed = any(name.endswith(".qweight") for name in ckpt.tensors)  # GPTQ, AWQ
    if ("quantization_config" in ckpt.config or packed) and not ckpt.manifest.schemes:
        integers = [n for n, info in ckpt.tensors.items() if info.dtype not in _FLOATS]
        if integers:
            raise _foreign(ckpt, integers[0])
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
    if isinstance(spec, DecoderSpec):
        for name, shape in causal.cache_layout(spec, ckpt.manifest.cache).items():
            _check_scales(ckpt, name, shape)
    if missing:
        raise CheckpointError(
            f"{ckpt.path} has no tensor {missing[0]}"
            + (f" and lacks {len(missing) - 1} more" if len(missing) > 1 else ""),
            _INCOMPLETE,
        )
    layers = [int(n) for n in re.findall(_LAYER, " ".join(ckpt.tensors))]
    blocks = len(spec.first_layers()) if isinstance(spec, DecoderSpec) else spec.num_layers
    if layers and max(layers) >= blocks:
        shared = f" and that they share {blocks} blocks" if blocks < spec.num_layers else ""
        raise CheckpointError(
            f"{ckpt.path} stores {max(layers) + 1} layers, its config.json says "
            f"num_hidden_layers {spec.num_layers}{shared}",
            _INCOMPLETE,
        )


def _check_scales(ckpt: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    info = ckpt.tensors.get(name)
    if info is None or (info.dtype, info.shape) != ("F32", shape):
        found = f"it is {info.dtype} {list(info.shape)}" if info else "it is missing"
        raise CheckpointError(
            f"{ckpt.path}: '{name}', a scale of the INT8 cache, should be F32 {list(shape)}; "
            + found,
            "the folder is incomplete or from another version: run quantize_kv again",
        )


def load_encoder(ckpt: Checkpoint) -> Encoder:
    """The model in float32 and eval mode; quantized weights are dequantized.

    Raises:
        CheckpointError: as `check_tensors`.
    """
    spec_of(ckpt)  # refuses a decoder
    return cast(Encoder, _load(ckpt))


def load_decoder(ckpt: Checkpoint, body: torch.dtype = torch.float32) -> Decoder:
    """The model in float32 and eval mode; quantized weights are dequantized.

    body: the type of the weights of the blocks' linear layers.

    Raises:
        CheckpointError: as `check_tensors`, or it is an encoder.
    """
    decoder_spec_of(ckpt)
    return cast(Decoder, _load(ckpt, body))


def _load(ckpt: Checkpoint, body: torch.dtype = torch.float32) -> Encoder | Decoder:
    check_tensors(ckpt)
    model = _skeleton(model_spec_of(ckpt))
    state = {}
    for name in model.state_dict():
        weight = read_weight(ckpt, stored_name(ckpt, name))
        linear = is_linear(stored_name(ckpt, name), tuple(weight.shape))
        state[name] = weight.to(body) if linear else weight
    model.load_state_dict(state, assign=True)
    return model.eval()


def stored_name(ckpt: Checkpoint, name: str) -> str:
    """Our parameter name -> the name under which this checkpoint stores it (or should)."""
    if is_decoder(ckpt):
        return causal.hf_name(name)
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
    sentence-transformers too); a mean-pooled classifier, and a model whose layers upstream cannot
    express (`EncoderSpec.regular`), is `model_type: pocketglm`.
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
    write_json(folder / MANIFEST, manifest.model_copy(update={"schemes": {}, "cache": None}))


def save_decoder(
    model: Decoder,
    folder: Path,
    *,
    source: Checkpoint | None,
    manifest: Manifest,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Hugging Face folder that transformers opens; arguments as in `save_encoder`.

    The same model gives the same bytes. Memory beside the model's is that of one tensor.
    """
    state = model.state_dict()
    write_decoder(
        model.spec,
        folder,
        lambda name: [as_array(state[name].detach().cpu().to(dtype or torch.float32))],
        source=source,
        manifest=manifest,
        dtype=dtype or torch.float32,
    )


def write_decoder(
    spec: DecoderSpec,
    folder: Path,
    values: Callable[[str], Iterable[npt.NDArray[Any]]],
    *,
    source: Checkpoint | None,
    manifest: Manifest,
    dtype: torch.dtype,
) -> None:
    """As `save_decoder`, with the weights as they come.

    values: our parameter name -> its rows in order, in chunks, already of `dtype`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", decoder_config(spec, source, dtype))
    stored = NAMES[_numpy_type(dtype)]
    shapes = {n: tuple(t.shape) for n, t in _skeleton(spec).state_dict().items()}
    layout = {causal.hf_name(name): (stored, shape) for name, shape in shapes.items()}
    writer = safetensors.Writer(folder / "model.safetensors", layout)
    for name in shapes:
        for chunk in values(name):
            writer.write(causal.hf_name(name), chunk)
    writer.close()
    if source:
        _copy_tokenizer(source.path, folder)
    write_json(folder / MANIFEST, manifest.model_copy(update={"schemes": {}, "cache": None}))


def predicted(
    ckpt: Checkpoint, spec: EncoderSpec | DecoderSpec, dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """The headers of `ckpt` if its model were `spec`, saved in `dtype` by `save_encoder` or
    `save_decoder`. Its labels and everything beside the model stay.
    """
    named, stored = str(dtype).removeprefix("torch."), NAMES[_numpy_type(dtype)]
    if isinstance(spec, EncoderSpec):
        labels = labels_of(ckpt)
        config = dict(sorted((_config(ckpt.config, spec, labels) | {"dtype": named}).items()))
        prefix = bert.PREFIX if spec.head == "classification" else ""
        names = {name: _saved_name(name, prefix) for name in _skeleton(spec).state_dict()}
    else:
        config = decoder_config(spec, ckpt, dtype)
        names = {name: causal.hf_name(name) for name in _skeleton(spec).state_dict()}
    shapes = {names[n]: tuple(t.shape) for n, t in _skeleton(spec).state_dict().items()}
    file = ckpt.path / "model.safetensors"
    return replace(
        ckpt,
        config=config,
        manifest=ckpt.manifest.model_copy(update={"schemes": {}, "cache": None}),
        tensors={n: TensorInfo(n, stored, shape, file, 0) for n, shape in shapes.items()},
    )


def _numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    return as_array(torch.empty(0, dtype=dtype)).dtype


def decoder_config(
    spec: DecoderSpec, source: Checkpoint | None, dtype: torch.dtype
) -> dict[str, Any]:
    """config.json of a float decoder; fields that a spec does not know are the source's."""
    replaced = {"quantization_config", "_name_or_path", "torch_dtype", "auto_map"}
    replaced |= {"family", "rope_scaling", *DECODER_KEYS}
    old = source.config if source else {}
    module = DECODERS[spec.family]
    config = {key: value for key, value in old.items() if key not in replaced} | {
        "architectures": [module.ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "dtype": str(dtype).removeprefix("torch."),
        **module.config_of(spec),
    }
    if not spec.regular:
        config |= pocketglm_fields(spec)
    return dict(sorted(config.items()))


def _saved_name(name: str, prefix: str) -> str:
    hf = bert.hf_name(name)
    return hf if hf.startswith("classifier.") else prefix + hf


def _config(old: Mapping[str, Any], spec: EncoderSpec, labels: list[str]) -> dict[str, Any]:
    """`old` with this spec's fields; saving the result again changes nothing."""
    replaced = {"quantization_config", "_name_or_path", "torch_dtype", "auto_map", "pooling"}
    replaced |= {"family", *KEYS}
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
    if not spec.regular or (classifies and spec.pooling == "mean"):
        config |= pocketglm_fields(spec)
    return config


def pocketglm_fields(spec: EncoderSpec | DecoderSpec) -> dict[str, Any]:
    """The config fields that make a config a `pocketglm` one; everything else stays."""
    if isinstance(spec, DecoderSpec):
        return {
            "architectures": [POCKETGLM_DECODER],
            "model_type": POCKETGLM,
            "family": spec.family,
            **own_fields(spec),
        }
    architecture = POCKETGLM_CLASSIFIER if spec.head == "classification" else POCKETGLM_MODEL
    return {
        "architectures": [architecture],
        "model_type": POCKETGLM,
        "pooling": spec.pooling,
        **own_fields(spec),
    }


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        file, target = source / name, folder / name
        if file.is_file() and not (target.exists() and target.samefile(file)):
            shutil.copyfile(file, target)
