"""Byte layouts of quantized integers.

compressed-tensors `pack-quantized`: q + 8, eight values in an int32, the first in the lowest bits.
ONNX Runtime MatMulNBits and GatherBlockQuantized (com.microsoft operator documentation): values
moved to start from 0, the first of two INT4 values in the low nibble; zero points likewise along
the blocks of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

UInt8 = npt.NDArray[np.uint8]


def pack_int32(q: torch.Tensor) -> npt.NDArray[np.int32]:
    """INT4 values int8 [N, K] in -8..7 -> int32 [N, ceil(K / 8)], filled up with 0 bits."""
    pairs = _nibbles(_pad(_unsigned(q, 4), 8, 0))
    return pairs.view(np.dtype("<i4")).astype(np.int32, copy=False)


def unpack_int32(packed: npt.NDArray[Any], columns: int) -> torch.Tensor:
    """Inverse of `pack_int32`: int32 [N, words] -> int8 [N, columns]."""
    words = np.ascontiguousarray(packed).astype("<i4", copy=False).view(np.uint8).astype("<u2")
    words |= words << 4  # the second value of each byte goes to the word's high byte
    words &= 0x0F0F
    values = words.view(np.int8)
    values -= 8
    return torch.from_numpy(np.ascontiguousarray(values[:, :columns]))


def pack_rows(values: torch.Tensor, bits: int) -> UInt8:
    """A table's rows, or zero points: int8 [N, K] -> uint8 [N, K]; 4 bits: [N, ceil(K / 2)]."""
    moved = _unsigned(values, bits)
    return _nibbles(_pad(moved, 2, 0)) if bits == 4 else moved


def pack_blocks(q: torch.Tensor, bits: int, block: int) -> UInt8:
    """MatMulNBits' B for q int8 [N, K]: uint8 [N, blocks, block * bits / 8].

    A last, incomplete block is filled up with the integer 0.
    """
    rows = len(q)
    padded = torch.nn.functional.pad(q, (0, -q.shape[1] % block))
    return pack_rows(padded, bits).reshape(rows, -1, block * bits // 8)


def _unsigned(q: torch.Tensor, bits: int) -> UInt8:
    """Values moved to start from 0, modulo 256: what lies in -2^(bits-1).. comes out right."""
    return np.add(q.contiguous().numpy().view(np.uint8), np.uint8(2 ** (bits - 1)))


def _pad(values: UInt8, multiple: int, fill: int) -> UInt8:
    missing = -values.shape[1] % multiple
    return np.pad(values, ((0, 0), (0, missing)), constant_values=fill) if missing else values


def _nibbles(values: UInt8) -> UInt8:
    """[N, even] values of 4 bits -> [N, half] bytes, the first value in the low nibble."""
    pairs = np.ascontiguousarray(values).view("<u2")
    halves: UInt8 = (pairs | pairs >> 4).astype(np.uint8)  # which keeps the low byte
    return halves
