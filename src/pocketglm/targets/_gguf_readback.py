"""Are the values in a GGUF file the checkpoint's own? Bit by bit, tensor by tensor.

The file is read by the package `gguf`, the blocks are taken apart here, by the format's description
(`_gguf_tensors.py`), and compared with the integers and scales that the checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.errors import ParityError
from pocketglm.ops.stored import read_quantized, read_weight
from pocketglm.targets._gguf_read import GgufFile
from pocketglm.targets._gguf_tensors import Source, Weights

_ROWS = 1024  # compared at a time
Array = npt.NDArray[Any]
Parts = tuple[Array, Array]  # integers [N, K] and scales [N, blocks]; or floats, and nothing


def check_values(file: Path, weights: Weights, sources: Sequence[Source]) -> None:
    """Compare every tensor with what it comes from.

    Raises:
        ParityError: a tensor is missing, too many, of another shape, or one of its values differs.
    """
    read = GgufFile(file)
    wanted = [source.name for source in sources]
    if read.names != wanted:
        odd = sorted(set(read.names) ^ set(wanted)) or ["their order"]
        raise _defect(f"{file.name} holds other tensors than planned: {odd[0]}")
    for source in sources:
        shape, found = weights.shape(source), read.shape(source.name)
        if shape != found:
            raise _defect(f"'{source.name}' has shape {list(found)}, wanted is {list(shape)}")
        for start, expected, got in _pairs(read, weights, source):
            for ours, theirs in zip(expected, got, strict=True):
                if not np.array_equal(ours, theirs):
                    bad = (ours != theirs).reshape(len(ours), -1).any(axis=1).nonzero()[0]
                    raise _defect(
                        f"'{source.name}' is not {weights.stored(source) or 'as computed'} of the "
                        f"checkpoint, first in row {start + int(bad[0])}"
                    )


def _pairs(read: GgufFile, weights: Weights, source: Source) -> Iterator[tuple[int, Parts, Parts]]:
    """First row, what should be there, what is there."""
    name, nothing = source.name, np.empty(0)
    shape = weights.shape(source)
    if source.values is not None:
        yield 0, (source.values, nothing), (read.vector(name), nothing)
        return
    stored, scheme = weights.stored(source), weights.scheme(source)
    step = shape[0] if source.heads or len(shape) == 1 else _ROWS
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        if scheme is None:
            values = _turned(read_weight(weights.ckpt, stored, start, stop).numpy(), source)
            raw = read.raw(name) if len(shape) == 1 else read.raw(name, start, stop)
            kind = np.dtype("<f2") if read.type(name) == "F16" else np.dtype("<f4")
            got = raw.view(kind).reshape(values.shape)
            yield start, (values.astype(kind), nothing), (got, nothing)
        else:
            part = read_quantized(weights.ckpt, stored, start, stop)
            q, scales = (_turned(t.numpy(), source) for t in (part.q, part.scales))
            found = unpacked(read.raw(name, start, stop), read.type(name))
            repeats = found[1].shape[1] // scales.shape[1]
            yield start, (q, np.repeat(scales, repeats, axis=1)), found


def _turned(rows: Array, source: Source) -> Array:
    """Llama's query and key: row h, i, half of each head after row h, half, i."""
    if not source.heads:
        return rows
    halves = rows.reshape(source.heads, 2, len(rows) // source.heads // 2, -1)
    pairs = np.stack([halves[:, 0], halves[:, 1]], axis=2)
    return pairs.reshape(rows.shape)


def unpacked(raw: npt.NDArray[np.uint8], kind: str) -> Parts:
    """Integers int8 [N, K] and scales float32 [N, K / 32] of rows of blocks, uint8 [N, bytes]."""
    size = {"Q8_0": 34, "Q4_0": 18}[kind]
    blocks = raw.reshape(len(raw), -1, size)
    scales = blocks[..., :2].copy().view("<f2")[..., 0].astype(np.float32)
    rest = blocks[..., 2:]
    if kind == "Q4_0":
        nibbles = np.concatenate([rest & 0x0F, rest >> 4], axis=-1)
        return nibbles.astype(np.int8).reshape(len(raw), -1) - np.int8(8), scales
    return np.ascontiguousarray(rest).view(np.int8).reshape(len(raw), -1), scales


def _defect(message: str) -> ParityError:
    return ParityError(
        message, "this is a defect of the export: please report it with this checkpoint's config"
    )
