"""The ranges that the products of static layers have, before the bias.

A checkpoint knows those of the inputs alone, but LiteRT's product of integers also rounds its
result to a fixed grid. Its range is taken from embedded phone-assistant commands in English and
Chinese, and random tokens, and widened on both sides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.data.commands import generate
from pocketglm.model.hf import load_encoder
from pocketglm.model.inputs import input_grids
from pocketglm.ops.fake_quant import quantized_inputs
from pocketglm.targets._litert_linear import INT8_RESULTS
from pocketglm.text.tokenizer import Tokenizer

_ROWS = 64  # texts of each language, and rows of random tokens
_MARGIN = 0.05  # of the range, on either side


def result_ranges(ckpt: Checkpoint, max_length: int) -> dict[str, tuple[float, float]]:
    """By our layer name: the least and the greatest value, widened; empty without static layers."""
    if all(scheme.activation != "static" for scheme in ckpt.manifest.schemes.values()):
        return {}
    model = load_encoder(ckpt)
    grids = input_grids(ckpt, model)
    found: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Linear, inputs: Any, output: torch.Tensor) -> None:
            output = output if module.bias is None else output - module.bias
            low, high = found.get(name, (0.0, 0.0))
            found[name] = min(low, float(output.min())), max(high, float(output.max()))

        return hook

    watched = [name for name in grids if name.endswith(INT8_RESULTS)]
    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in watched]
    with torch.inference_mode(), quantized_inputs(model, grids):
        for ids, mask in _rows(ckpt, max_length):
            model(torch.from_numpy(ids), torch.from_numpy(mask))
    for handle in hooks:
        handle.remove()
    return {name: _widened(low, high) for name, (low, high) in found.items()}


def _rows(ckpt: Checkpoint, max_length: int) -> list[tuple[Any, Any]]:
    """Batches of ids and mask [B, S]."""
    tokenizer = Tokenizer.load(ckpt.path)
    batches = []
    for language in ("en", "zh"):
        texts = [row.text for row in generate("train", language, n=_ROWS)]
        encoded = tokenizer.encode(texts, max_length)
        batches.append((encoded.ids, encoded.mask))
    length = min(max_length, 32)
    vocabulary = tokenizer.inner.get_vocab_size()
    ids = np.random.default_rng(0).integers(0, vocabulary, (_ROWS, length))
    return [*batches, (ids, np.ones_like(ids))]


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = _MARGIN * (high - low)
    return low - margin, high + margin
