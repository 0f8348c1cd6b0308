"""Byte layouts of quantized integers.

compressed-tensors `pack-quantized`: q + 8, eight values in an int32, the first in the lowest bits.
ONNX Runtime MatMulNBits (com.microsoft operator documentation): unsigned values per block along K,
the first of two in the low nibble; zero points likewise along the blocks of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pocketglm.artifacts.scheme import TensorScheme

UInt8 = npt.NDArray[np.uint8]


def pack_int32(q: torch.Tensor) -> npt.NDArray[np.int32]:
    """INT4 values int8 [N, K] in -8..7 -> int32 [N, ceil(K / 8)], filled up with 0 bits."""
    pairs = _nibbles(_pad(_unsigned(q, 4), 8, 0))
    return pairs.view(np.dtype("<i4")).astype(np.int32, copy=False)


def unpack_int32(packed: npt.NDArray[Any], columns: int) -> torch.Tensor:
    """Inverse of `pack_int32`: int32 [N, words] -> int8 [N, columns]."""
    pairs = np.ascontiguousarray(packed).astype("<i4", copy=False).view(np.uint8)
    values = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(packed), -1)
    return torch.from_numpy(values[:, :columns].astype(np.int8) - np.int8(8))


def pack_nibbles(q: torch.Tensor, scheme: TensorScheme, block: int | None = None) -> UInt8:
    """MatMulNBits' B for q int8 [N, K]: uint8 [N, blocks, block * bits / 8].

    `block` is the scheme's group size unless given (a per-channel weight has none: then its scale
    is repeated per block). Values are q + 8 or q + 128, the operator's default zero point, with
    which a last, incomplete block is filled up.

    Raises:
        ValueError: there is neither a group size nor a block.
    """
    size = block or scheme.group_size
    if not size:
        raise ValueError("a per-channel weight needs a block size for MatMulNBits")
    values = _pad(_unsigned(q, scheme.bits), size, 2 ** (scheme.bits - 1))
    if scheme.bits == 4:
        values, size = _nibbles(values), size // 2
    return values.reshape(len(values), -1, size)


def pack_zero_points(zero_points: torch.Tensor, scheme: TensorScheme) -> UInt8:
    """MatMulNBits' zero_points for int8 [N, G]; 4 bits: uint8 [N, ceil(G / 2)], 8: [N, G]."""
    values = _unsigned(zero_points, scheme.bits)
    return _nibbles(_pad(values, 2, 0)) if scheme.bits == 4 else values


def _unsigned(q: torch.Tensor, bits: int) -> UInt8:
    return np.asarray(q.numpy().astype(np.int16) + 2 ** (bits - 1), np.uint8)


def _pad(values: UInt8, multiple: int, fill: int) -> UInt8:
    missing = -values.shape[1] % multiple
    return np.pad(values, ((0, 0), (0, missing)), constant_values=fill) if missing else values


def _nibbles(values: UInt8) -> UInt8:
    """[N, even] values of 4 bits -> [N, half] bytes, the first value in the low nibble."""
    return np.ascontiguousarray(values[:, 0::2] | (values[:, 1::2] << 4))
