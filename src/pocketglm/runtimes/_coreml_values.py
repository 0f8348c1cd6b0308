"""The values that a Core ML program holds: their types, and where they are stored. Torch-free.

A constant is stored inside the program or in `weight.bin`: a header of 64 bytes; for each constant
a record of 64 bytes (0xDEADBEEF, a type code, size in bytes and position of the data, both uint64)
at the offset that the program names, and the data behind it. Types narrower than a byte are packed
from a byte's low bits upwards.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.errors import CheckpointError

Array = npt.NDArray[Any]

AGAIN = "copy the folder again, or export the checkpoint again"
# The number of a MIL data type -> its name.
DTYPES = {
    1: "bool",
    2: "string",
    10: "fp16",
    11: "fp32",
    12: "fp64",
    13: "bf16",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
}
_FLOATS = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}
_SENTINEL, _RECORD = 0xDEADBEEF, 64


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type that holds values of a MIL type; int4 is held in int8, uint4 in uint8."""
    if dtype in _FLOATS:
        return np.dtype(_FLOATS[dtype])
    if bits_of(dtype) < 8:
        return np.dtype(np.int8 if dtype.startswith("int") else np.uint8)
    return np.dtype(dtype)


def bits_of(dtype: str) -> int:
    """Bits of one stored value; of bool and string 8."""
    digits = dtype.lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) if digits else 8


@dataclass(frozen=True, slots=True)
class TensorType:
    """A declared type; a dimension is None where the program leaves it open."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.dtype}[{sizes}]"

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Is a tensor of this shape allowed?"""
        return len(shape) == len(self.shape) and all(
            want in (None, have) for want, have in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant of the program. `key` is equal for two that are the same bytes of weight.bin."""

    type: TensorType
    message: Any
    weights: Mapping[str, Array]

    @property
    def key(self) -> tuple[str, int, str] | None:
        """None: the program holds it itself."""
        if not self.message.HasField("blobFileValue"):
            return None
        blob = self.message.blobFileValue
        return (blob.fileName, blob.offset, str(self.type))

    def read(self) -> Array:
        """Its values in their shape; those of weight.bin are a view of the file where they can be.

        Raises:
            CheckpointError: damaged, or of a kind that is not a tensor.
        """
        shape = tuple(size or 0 for size in self.type.shape)
        count = int(np.prod(shape, dtype=np.int64))
        if self.message.HasField("blobFileValue"):
            blob = self.message.blobFileValue
            data = _blob(self.weights, blob.fileName, blob.offset)
            return _unpacked(data, self.type.dtype, count).reshape(shape)
        values = self.message.immediateValue.tensor
        if values.HasField("bytes"):
            data = np.frombuffer(values.bytes.values, np.uint8)
            return _unpacked(data, self.type.dtype, count).reshape(shape)
        for name in ("ints", "longInts", "floats", "doubles", "bools", "strings"):
            if values.HasField(name):
                listed = list(getattr(values, name).values)
                # Protobuf stores nothing for what is zero, false or empty throughout.
                listed = listed or [""] * count if name == "strings" else listed or [0] * count
                kind = None if name == "strings" else numpy_dtype(self.type.dtype)
                if len(listed) != count:
                    raise CheckpointError(
                        f"a constant of type {self.type} has {len(listed)} values", AGAIN
                    )
                return np.asarray(listed, kind).reshape(shape)
        raise CheckpointError(f"a constant of type {self.type} has no values", AGAIN)


def type_of(message: Any) -> TensorType:
    """A value's declared type; a state's is that of what it holds."""
    if message.HasField("stateType"):
        return type_of(message.stateType.wrappedType)
    if not message.HasField("tensorType"):
        return TensorType("list, tuple or dictionary", ())
    tensor = message.tensorType
    sizes = (int(d.constant.size) if d.HasField("constant") else None for d in tensor.dimensions)
    return TensorType(DTYPES.get(tensor.dataType, f"type {tensor.dataType}"), tuple(sizes))


class Weights(dict[str, Array]):
    """The package's weight files as bytes, by the name that the program calls them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, name: str) -> Array:
        file = self._folder / name.removeprefix("@model_path/")
        if not file.is_file() or not file.resolve().is_relative_to(self._folder.resolve()):
            raise CheckpointError(f"{file} is missing", AGAIN)
        self[name] = np.memmap(file, np.uint8, mode="r")
        return self[name]


def _blob(weights: Mapping[str, Array], name: str, offset: int) -> Array:
    """The bytes of one constant."""
    file = weights[name]
    record = file[offset : offset + _RECORD].tobytes()
    if len(record) < _RECORD:
        raise CheckpointError(f"{name} ends before byte {offset + _RECORD}", AGAIN)
    sentinel, _, size, start = struct.unpack_from("<IIQQ", record)
    if sentinel != _SENTINEL or start + size > len(file):
        raise CheckpointError(f"{name} has no constant at byte {offset}: it is damaged", AGAIN)
    return file[start : start + size]


def _unpacked(data: Array, dtype: str, count: int) -> Array:
    """`count` values of a MIL type from their bytes, flat."""
    bits = bits_of(dtype)
    if len(data) < -(-count * bits // 8):
        raise CheckpointError(
            f"{count} values of {dtype} were expected, there are {len(data)} bytes", AGAIN
        )
    if bits >= 8:
        kind = numpy_dtype(dtype)
        return data[: count * kind.itemsize].view(kind)
    if bits == 4:
        values = np.empty(2 * len(data), np.uint8)
        np.bitwise_and(data, 15, out=values[0::2])
        np.right_shift(data, 4, out=values[1::2])
    else:
        places = np.unpackbits(data, bitorder="little")
        places = places[: len(places) // bits * bits].reshape(-1, bits)
        values = np.packbits(places, axis=1, bitorder="little")[:, 0]
    values = values[:count]
    if dtype.startswith("int"):  # two's complement
        half = 1 << (bits - 1)
        return ((values ^ half).view(np.int8) - np.int8(half)).astype(np.int8, copy=False)
    return values
