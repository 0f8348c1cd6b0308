"""INT8 layers whose inputs have a fixed grid: which layers, what shares an input, writing them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint, TensorInfo, copy_side_files
from pocketglm.artifacts.manifest import MANIFEST, write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.model.encoder import Encoder
from pocketglm.model.families import tied_twin
from pocketglm.model.hf import is_embedding, is_head, is_linear, spec_of, stored_name
from pocketglm.model.layers import bare_modules
from pocketglm.ops.affine import (
    choose_scales,
    dequantize,
    quantize,
    squared_error,
    to_integers,
)
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.stored import Layout, as_array, as_tensor, check_finite, store, stored_layout

WEIGHTS = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
Scales = tuple[Tensor, Tensor | None]  # [N, G], and zero points int8 [N, G]
_NO_SCALES: Mapping[str, Scales] = {}


def static_layers(ckpt: Checkpoint, *, head: bool, skip: Iterable[str] = ()) -> dict[str, str]:
    """The linear layers of an encoder that can have static inputs: our name -> the weight's name in
    the checkpoint.

    head: classifier and pooler too. skip: patterns of stored names.
    """
    with bare_modules():
        model = Encoder(spec_of(ckpt))
    found = {}
    for name, module in model.named_modules():
        stored = stored_name(ckpt, f"{name}.weight") if isinstance(module, nn.Linear) else ""
        info = ckpt.tensors.get(stored)
        if info is None or info.dtype not in _FLOATS or matches(stored, skip):
            continue
        if is_linear(stored, info.shape) or (head and is_head(stored)):
            found[name] = stored
    return found


def token_table(ckpt: Checkpoint, skip: Iterable[str] = ()) -> str | None:
    """The stored name of the table of token embeddings, unless it is to be skipped."""
    for name, info in ckpt.tensors.items():
        if is_embedding(name) and info.shape[0] == ckpt.config.get("vocab_size"):
            return None if matches(name, skip) or info.dtype not in _FLOATS else name
    return None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a stored name fits one of the patterns (*, ?)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def unit_of(layer: str) -> str:
    """The unit of a layer: query, key and value see one input, and are one product in a file; where
    they are factorized, their first factors see it.
    """
    return re.sub(r"\.(query|key|value)(\.factor_in)?$", ".input", layer)


def units_of(layers: Iterable[str]) -> dict[str, list[str]]:
    """Layers by unit, in the model's order."""
    units: dict[str, list[str]] = {}
    for layer in layers:
        units.setdefault(unit_of(layer), []).append(layer)
    return units


def layout_of(ckpt: Checkpoint, schemes: Mapping[str, TensorScheme]) -> Layout:
    """The tensors of `ckpt` with the weights named in `schemes` quantized, in file order."""
    layout: Layout = {}
    for name, info in ckpt.tensors.items():
        scheme = schemes.get(name)
        parts = stored_layout(name, info.shape, scheme, info.dtype)
        layout |= parts
        if scheme:
            layout |= {twin: parts[p] for p in parts if (twin := tied_twin(ckpt, p, scheme))}
    return layout


def predicted(ckpt: Checkpoint, schemes: Mapping[str, TensorScheme]) -> Checkpoint:
    """The headers of what `write_static` makes."""
    tensors = {
        name: TensorInfo(name, dtype, shape, ckpt.path / WEIGHTS, 0)
        for name, (dtype, shape) in layout_of(ckpt, schemes).items()
    }
    manifest = ckpt.manifest.model_copy(update={"schemes": dict(schemes)})
    return replace(ckpt, tensors=tensors, manifest=manifest)


def write_static(
    ckpt: Checkpoint,
    folder: Path,
    schemes: Mapping[str, TensorScheme],
    grids: Mapping[str, InputGrid],
    weights: Mapping[str, Tensor],
    *,
    search: bool = True,
    scales: Mapping[str, Scales] = _NO_SCALES,
) -> float:
    """Write `ckpt` with the weights named in `schemes` as integers; the relative error of these.

    grids: of the inputs of static layers, by weight name. weights: values that take the place of
    the checkpoint's, by stored name; the type in which a float tensor is stored stays. scales: for
    weights whose scales are not to be chosen here.

    Raises:
        CheckpointError: a weight to quantize holds NaN or infinity.
    """
    writer = safetensors.Writer(folder / WEIGHTS, layout_of(ckpt, schemes))
    lost = total = 0.0
    for name in ckpt.tensors:
        scheme, changed = schemes.get(name), weights.get(name)
        if scheme is None and changed is None:
            writer.write(name, ckpt.read(name))
            continue
        stored = as_tensor(ckpt.read(name))
        weight = (stored if changed is None else changed.detach().cpu()).float()
        if scheme is None:
            writer.write(name, as_array(weight.to(stored.dtype)))
            continue
        check_finite(ckpt, name, weight)
        steps, zeros = scales.get(name) or choose_scales(weight, scheme, search=search)
        q = to_integers(weight, steps, zeros, scheme)
        for part, array in store(name, q, steps, zeros, scheme, grids.get(name)).items():
            writer.write(part, array)
            if twin := tied_twin(ckpt, part, scheme):
                writer.write(twin, array)
        error, square = squared_error(weight, q, steps, zeros, scheme)
        lost, total = lost + error, total + square
    writer.close()
    copy_side_files(ckpt, folder)
    write_json(folder / "config.json", ckpt.config)
    manifest = ckpt.manifest.model_copy(update={"schemes": dict(schemes)})
    write_json(folder / MANIFEST, manifest)
    return math.sqrt(lost / total) if total else 0.0


def deployed(weight: Tensor, scheme: TensorScheme, *, search: bool = True) -> Tensor:
    """float32 [N, K] as `write_static` will store it."""
    with torch.no_grad():
        return dequantize(*quantize(weight, scheme, search=search), scheme)
