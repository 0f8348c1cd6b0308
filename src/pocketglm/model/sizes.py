"""What a size of the family holds: names and shapes of its parameters, and bytes by precision."""

from __future__ import annotations

import torch

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.model.decoder import Decoder
from pocketglm.model.family import SIZES, spec_of_size
from pocketglm.model.spec import DecoderSpec

__all__ = ["SIZES", "shapes", "spec_of_size", "weight_bytes"]


def shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Our parameter names and their shapes, counted without memory for the weights."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(spec).state_dict().items()}


def weight_bytes(spec: DecoderSpec) -> dict[str, int]:
    """Bytes of all weights: `fp16`; `int8` (every matrix by row); `int4` (groups of 32, with the
    embedding and head in INT8). Norms and biases count as fp16.
    """
    total = {"fp16": 0, "int8": 0, "int4": 0}
    row, group = TensorScheme(bits=8), TensorScheme(bits=4, group_size=32)
    for name, shape in shapes(spec).items():
        if len(shape) == 1:
            sizes = dict.fromkeys(total, 2 * shape[0])
        else:
            rows, columns = shape
            scheme = group if name.startswith("blocks.") else row
            sizes = {
                "fp16": 2 * rows * columns,
                "int8": row.nbytes(rows, columns),
                "int4": scheme.nbytes(rows, columns),
            }
        total = {precision: total[precision] + sizes[precision] for precision in total}
    return total
