"""The fixed grids on which a checkpoint's layers quantize their inputs, and computing with them."""

from __future__ import annotations

from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.model.hf import stored_name
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.stored import read_grid


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
