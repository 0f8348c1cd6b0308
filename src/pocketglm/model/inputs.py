"""What a checkpoint has calibrated: grids of the layers' inputs, scales of a decoder's cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.errors import CheckpointError
from pocketglm.model.causal import cache_scale_names
from pocketglm.model.hf import decoder_spec_of, stored_name
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.stored import as_tensor, read_grid


def input_grids(ckpt: Checkpoint, model: nn.Module) -> dict[str, InputGrid]:
    """Grids by the name of the linear layer in `model`, that of `ckpt`; empty where none is static.

    Raises:
        CheckpointError: a grid is damaged.
    """
    if all(scheme.activation != "static" for scheme in ckpt.manifest.schemes.values()):
        return {}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            grid = read_grid(ckpt, stored_name(ckpt, f"{name}.weight"))
            if grid is not None:
                found[name] = grid
    return found


def cache_scales(ckpt: Checkpoint) -> Tensor | None:
    """The scales of an INT8 cache, as `Decoder.cache_scales` takes them; None: it is float.

    Raises:
        CheckpointError: a scale is not positive.
    """
    if ckpt.manifest.cache is None:
        return None
    layers = range(decoder_spec_of(ckpt).num_layers)
    return torch.stack([torch.stack(layer_scales(ckpt, index)) for index in layers])


def layer_scales(ckpt: Checkpoint, index: int) -> list[Tensor]:
    """Those of one layer's keys and values: [kv heads, 1, head_dim] or [1, 1, 1] each."""
    found = []
    for name in cache_scale_names(index):
        scale = as_tensor(ckpt.read(name))
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(
                f"{ckpt.path}: '{name}' holds {float(scale.min())}, a scale is positive",
                "the file is damaged: run quantize_kv again",
            )
        found.append(scale.reshape(len(scale), 1, -1))
    return found
