"""A checkpoint's weights as the rows of ONNX initializers, read a chunk at a time.

Several layers' rows come one after the other, so that they make one packed weight. Nothing is held
but one chunk, whatever the size of the model. The integers pass without being computed with:
compressed-tensors' words, q + 8 in nibbles from the lowest bits, are as little-endian bytes what
MatMulNBits and GatherBlockQuantized read (`ops/packing.py` has both layouts); INT8 needs its sign
bit turned. Scales are repeated where a runtime's block is smaller than the scheme's group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import CacheScheme, TensorScheme
from pocketglm.contracts import Floats
from pocketglm.model.hf import is_embedding, stored_name
from pocketglm.model.inputs import layer_scales
from pocketglm.ops.packing import UInt8, pack_rows, unpack_int32
from pocketglm.ops.stored import as_tensor

BLOCKS = (128, 64, 32, 16)  # of MatMulNBits; the largest that divides was the fastest when tried
_CHUNK = 4 << 20  # bytes of a float32 or packed chunk


def block_of(scheme: TensorScheme, columns: int) -> int:
    """Columns that share a scale in the file; 0: none of the operators' sizes divides the row."""
    if scheme.group_size is not None:
        return scheme.group_size if scheme.group_size in BLOCKS else 0
    return next((block for block in BLOCKS if columns % block == 0), 0)


def stored_shape(ckpt: Checkpoint, name: str) -> tuple[int, int]:
    """[N, K] of the weight that is stored as `name`."""
    packed = f"{name}_shape"
    shape = ckpt.read(packed) if packed in ckpt.tensors else ckpt.tensors[name].shape
    return int(shape[0]), int(shape[1])


@dataclass(frozen=True, slots=True)
class Rows:
    """Weights by our parameter names (`model/decoder.py`), in chunks of about `chunk` bytes."""

    ckpt: Checkpoint
    chunk: int = _CHUNK

    def scheme(self, layer: str) -> TensorScheme | None:
        """How a layer's weight is quantized; None: it is stored in float."""
        return self.ckpt.manifest.schemes.get(self._stored(layer))

    def factored(self, layer: str) -> bool:
        """Whether a layer's weight is the product of two."""
        if not layer.startswith("blocks."):
            return False
        inner = self._stored(f"{layer}.factor_in")
        return inner in self.ckpt.tensors or f"{inner}_packed" in self.ckpt.tensors

    @property
    def cache(self) -> CacheScheme | None:
        """How keys and values are kept; None: in float."""
        return self.ckpt.manifest.cache

    def cache_scales(self, index: int) -> tuple[Floats, Floats]:
        """Of a layer's keys and values: float32 [kv heads, 1, head_dim] or [1]."""
        key, value = (scale.numpy() for scale in layer_scales(self.ckpt, index))
        return (key, value) if key.size > 1 else (key.reshape(1), value.reshape(1))

    @property
    def dynamic(self) -> bool:
        """Whether the input of a linear layer may be quantized, of any but a tied head."""
        schemes = self.ckpt.manifest.schemes.items()
        return any(s.activation != "none" for name, s in schemes if not is_embedding(name))

    def shape(self, *layers: str) -> tuple[int, int]:
        """[N, K] of the layers' weights one below the other."""
        shapes = [self._shape(layer) for layer in layers]
        return sum(rows for rows, _ in shapes), shapes[0][1]

    def size(self, *names: str) -> int:
        """Values of the vectors `names` together."""
        return sum(math.prod(self.ckpt.tensors[self._name(name)].shape) for name in names)

    def floats(self, *names: str) -> Iterator[Floats]:
        """Unquantized tensors as float32, whatever they are stored as."""
        for name in names:
            stored = self._name(name)
            shape = self.ckpt.tensors[stored].shape
            for start, stop in self._spans(shape[0], 4 * math.prod(shape[1:])):
                yield as_tensor(self.ckpt.read(stored, start, stop)).float().numpy()

    def integers(self, *layers: str) -> Iterator[UInt8]:
        """Quantized weights [rows, K * bits / 8], stored from 0: q + 8 or q + 128."""
        for layer in layers:
            stored, bits = self._stored(layer), self._scheme(layer).bits
            part = stored if bits == 8 else f"{stored}_packed"
            rows, columns = self._shape(layer)
            for start, stop in self._spans(rows, columns * bits // 8):
                found = self.ckpt.read(part, start, stop)
                if bits == 8:
                    yield found.view(np.uint8) ^ np.uint8(0x80)
                else:
                    yield found.astype("<i4", copy=False).view(np.uint8)

    def scales(self, *layers: str) -> Iterator[Floats]:
        """float32 [rows, K / block]."""
        for layer in layers:
            stored, (rows, columns) = self._stored(layer), self._shape(layer)
            blocks = columns // block_of(self._scheme(layer), columns)
            for start, stop in self._spans(rows, 4 * blocks):
                scales = as_tensor(self.ckpt.read(f"{stored}_scale", start, stop)).float()
                yield scales.expand(-1, blocks).contiguous().numpy()

    def zero_points(self, *layers: str) -> Iterator[UInt8]:
        """uint8 [rows, K / block], of INT4 two in a byte; of asymmetric weights."""
        for layer in layers:
            stored, (rows, columns) = self._stored(layer), self._shape(layer)
            scheme = self._scheme(layer)
            blocks = columns // block_of(scheme, columns)
            for start, stop in self._spans(rows, 4 * blocks):
                if scheme.bits == 8:
                    zeros = as_tensor(self.ckpt.read(f"{stored}_zero_point", start, stop))
                else:  # eight rows in a word; a span begins at a multiple of 8
                    words = self.ckpt.read(f"{stored}_zero_point", start // 8, -(-stop // 8))
                    zeros = unpack_int32(words.T, stop - start).T
                yield pack_rows(zeros.expand(-1, blocks).contiguous(), scheme.bits)

    def _spans(self, rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
        step = max(8, self.chunk // max(row_bytes, 1) // 8 * 8)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def _shape(self, layer: str) -> tuple[int, int]:
        return stored_shape(self.ckpt, self._stored(layer))

    def _scheme(self, layer: str) -> TensorScheme:
        return self.ckpt.manifest.schemes[self._stored(layer)]

    def _stored(self, layer: str) -> str:
        return self._name(f"{layer}.weight")

    def _name(self, name: str) -> str:
        return stored_name(self.ckpt, name)
