"""Core ML's constexpr operations: stored weights to dense ones. numpy, torch-free."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.runtimes._coreml_layers import along
from pocketglm.runtimes._coreml_table import Table, definer

Array = npt.NDArray[Any]
TABLE: Table = {}
define = definer(TABLE)


@define("scale", same=("quantized_data",))
def constexpr_affine_dequantize(
    quantized_data: Array, zero_point: Array, scale: Array, axis: Any
) -> Array:
    """(integers - zero point) scale, for the whole tensor or along one axis."""
    values = quantized_data.astype(np.float32)
    values -= along(zero_point.astype(np.float32), axis, values.ndim)
    values *= along(scale, axis, values.ndim)
    return values


@define("scale")
def constexpr_blockwise_shift_scale(
    data: Array, scale: Array, offset: Array | None = None
) -> Array:
    """(integers - offset) scale, in blocks along any axes."""
    split, each = _blocks(data.shape, scale.shape)
    values = data.astype(np.float32).reshape(split)
    if offset is not None:
        values -= offset.astype(np.float32).reshape(each)
    values *= scale.reshape(each)
    return values.reshape(data.shape)


def _blocks(shape: tuple[int, ...], counts: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The shape with each axis as (blocks, size of one), and that of one value a block."""
    if len(shape) != len(counts) or any(s % c for s, c in zip(shape, counts, strict=True)):
        raise ValueError(f"{list(counts)} blocks do not divide {list(shape)}")
    split = [n for size, count in zip(shape, counts, strict=True) for n in (count, size // count)]
    return split, [n for count in counts for n in (count, 1)]


@define("lut")
def constexpr_lut_to_dense(
    indices: Array, lut: Array, vector_axis: Any = None, shape: Array | None = None
) -> Array:
    """Values from look-up tables, one a block (iOS 18, no vectors) or one for all (iOS 16)."""
    if shape is not None:
        bits = lut.size.bit_length() - 1
        sizes = [int(size) for size in shape]
        places = np.unpackbits(indices, bitorder="little")[: int(np.prod(sizes)) * bits]
        numbers = np.packbits(places.reshape(-1, bits), axis=1, bitorder="little")
        return np.asarray(lut[numbers[:, 0]].reshape(sizes))
    if lut.shape[-1] != 1:
        raise ValueError(f"look-up tables of vectors of {lut.shape[-1]}")
    split, each = _blocks(indices.shape, lut.shape[: indices.ndim])
    table = np.arange(np.prod(lut.shape[: indices.ndim])).reshape(each)
    numbers = table * lut.shape[-2] + indices.reshape(split)
    return np.asarray(lut.reshape(-1)[numbers].reshape(indices.shape))


@define("=output_dtype")
def constexpr_cast(source_val: Array, output_dtype: str) -> Array:
    """A stored tensor in another float type."""
    return source_val.astype(np.float32)
