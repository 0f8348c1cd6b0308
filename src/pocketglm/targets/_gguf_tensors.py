"""A checkpoint's weights as the rows of GGUF tensors, read and written a chunk at a time.

Blocks of 32 values along K, each with its scale d as fp16 (ggml, `ggml-common.h`):

    Q8_0   d, 32 int8                         w = d * q
    Q4_0   d, 16 bytes: value j in the low    w = d * (nibble - 8)
           nibble of byte j, value j + 16 in
           the high one

The integers are the checkpoint's own. A scale that more than 32 columns share is repeated: every
scale of the portable scheme is an fp16 number, so nothing is rounded. What is not quantized is F16
where the checkpoint has 16 bits a value, else F32; vectors are F32, as llama.cpp demands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import Floats
from pocketglm.errors import CheckpointError
from pocketglm.model.hf import stored_name
from pocketglm.ops.packing import UInt8
from pocketglm.ops.stored import Quantized, check_finite, read_quantized, read_weight
from pocketglm.targets._gguf_file import F16, F32, Q4_0, Q8_0, Tensor, TensorType

BLOCK = 32
_CHUNK = 1 << 20  # values that are converted at a time
_SIXTEEN_BITS = ("F16", "BF16")
Order = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor of the file comes from.

    parameter: of ours, as `model/decoder.py` and `encoder.py` name them. heads: its rows are those
    of so many heads, and in each the two halves of the rotary pairs are put side by side; 0: rows
    stay as they are. rows: only the first ones; None: all. exact: F32 whatever the checkpoint has.
    values: the tensor itself, where no parameter holds it.
    """

    name: str
    parameter: str = ""
    heads: int = 0
    rows: int | None = None
    exact: bool = False
    values: Floats | None = None


def interleaved(rows: int, heads: int) -> Order:
    """Which row of a weight each row of the file is: features i and i + half of a head become
    2 i and 2 i + 1.
    """
    order = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2)
    return np.ascontiguousarray(order).reshape(-1)


def refusal(scheme: TensorScheme, columns: int) -> str:
    """Why no tensor type carries this scheme, and what would be carried, or ''."""
    if not scheme.symmetric:
        return "it has zero points, which Q8_0 and Q4_0 have no place for (Q4_1 rounds them)"
    if scheme.activation == "static":
        return "activation static: llama.cpp quantizes inputs by itself, in blocks of 32"
    if columns % BLOCK:
        return f"K = {columns} is not a multiple of {BLOCK}: keep it float with skip"
    if scheme.group_size is not None and scheme.group_size % BLOCK:
        return f"group_size {scheme.group_size}: a block has {BLOCK} columns"
    return ""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a checkpoint, as they lie in the file."""

    ckpt: Checkpoint

    def stored(self, source: Source) -> str:
        """The checkpoint's name of a source's parameter."""
        return stored_name(self.ckpt, source.parameter)

    def scheme(self, source: Source) -> TensorScheme | None:
        """How it is quantized; None: it is not."""
        if source.values is not None:
            return None
        return self.ckpt.manifest.schemes.get(self.stored(source))

    def type(self, source: Source) -> TensorType:
        """The tensor type that carries it."""
        if scheme := self.scheme(source):
            return Q8_0 if scheme.bits == 8 else Q4_0
        if source.values is not None or source.exact or len(self.shape(source)) == 1:
            return F32
        return F16 if self.ckpt.tensors[self.stored(source)].dtype in _SIXTEEN_BITS else F32

    def shape(self, source: Source) -> tuple[int, ...]:
        """Rows first."""
        if source.values is not None:
            return source.values.shape
        shape = self.stored_shape(self.stored(source))
        return shape if source.rows is None else (min(source.rows, shape[0]), *shape[1:])

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """That of the weight that the checkpoint stores as `name`."""
        packed = f"{name}_shape"
        if packed in self.ckpt.tensors:
            return tuple(int(n) for n in self.ckpt.read(packed))
        return self.ckpt.tensors[name].shape

    def tensor(self, source: Source) -> Tensor:
        """What the header says of it."""
        return Tensor(source.name, self.type(source), self.shape(source))

    def chunks(self, source: Source) -> Iterator[npt.NDArray[Any]]:
        """Its bytes, in order.

        Raises:
            CheckpointError: a value is NaN, infinite or too large for its type.
        """
        if source.values is not None:
            yield source.values.astype("<f4")
            return
        kind, name = self.type(source), self.stored(source)
        for start, stop, order in self._spans(source):
            if kind in (Q8_0, Q4_0):
                part = read_quantized(self.ckpt, name, start, stop)
                check_finite(self.ckpt, name, part.scales, start)
                rows = packed_rows(part)
                yield rows if order is None else rows[order]
            else:
                values = read_weight(self.ckpt, name, start, stop)
                check_finite(self.ckpt, name, values, start)
                array = values.numpy() if order is None else values.numpy()[order]
                yield self._as_floats(name, array, kind)

    def _spans(self, source: Source) -> Iterator[tuple[int, int, Order | None]]:
        """Ranges of rows; where rows are put in another order, all at once."""
        rows, *columns = self.shape(source)
        if source.heads:
            yield 0, rows, interleaved(rows, source.heads)
            return
        step = max(8, _CHUNK // max(columns[0] if columns else 1, 1) // 8 * 8)
        for start in range(0, rows, step):
            yield start, min(start + step, rows), None

    def _as_floats(self, name: str, values: Floats, kind: TensorType) -> npt.NDArray[Any]:
        if kind == F32:
            return values.astype("<f4", copy=False)
        with np.errstate(over="ignore"):
            halves = values.astype("<f2")
        if not np.isfinite(halves).all():
            raise CheckpointError(
                f"{self.ckpt.path}: '{name}' holds {float(np.abs(values).max()):.3g}, more than "
                "F16 can (65504)",
                "store it as float32, or quantize it",
            )
        return halves


def packed_rows(part: Quantized) -> UInt8:
    """Rows of blocks, uint8 [N, bytes], for integers int8 [N, K] and scales [N, G].

    Raises:
        CheckpointError: a scale is no fp16 number.
    """
    q = np.ascontiguousarray(part.q.numpy())
    rows, columns = q.shape
    blocks = q.reshape(rows, columns // BLOCK, BLOCK)
    repeats = blocks.shape[1] // part.scales.shape[1]
    scales = torch.repeat_interleave(part.scales, repeats, dim=1).numpy()
    halves = scales.astype("<f2")
    if not np.array_equal(halves.astype(np.float32), scales):
        worst = scales[halves.astype(np.float32) != scales][0]
        raise CheckpointError(
            f"the scale {worst:.9g} is no fp16 number, which GGUF stores",
            "compress the float model again with this version",
        )
    if part.scheme.bits == 8:
        values = blocks.view(np.uint8)
    else:
        nibbles = (blocks + np.int8(8)).view(np.uint8)
        values = nibbles[..., :16] | nibbles[..., 16:] << np.uint8(4)
    prefix = halves[..., None].view(np.uint8)
    return np.concatenate([prefix, values], axis=-1).reshape(rows, -1)
