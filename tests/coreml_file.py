"""Reads .mlpackage folders with coremltools' generated messages alone; nothing of ours takes part.

weight.bin: a record of 64 bytes (sentinel, type, uint64 size, uint64 position) at the offset that
the program names, and the values at the position.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]
REASON = "needs the extra: pip install 'pocketglm[coreml]'"
DATA = Path("Data/com.apple.CoreML")
_TYPES = {10: np.float16, 11: np.float32, 21: np.int8, 23: np.int32}
_INT4 = 25


@dataclass
class Stored:
    """A quantized weight: integers [N, K], scales and zero points [N, G]; `at`: where its integers
    lie in weight.bin.
    """

    q: Array
    scales: Array
    zeros: Array | None
    at: int


def model_of(package: Path) -> Any:
    proto: Any = pytest.importorskip("coremltools.proto.Model_pb2", reason=REASON)
    return proto.Model.FromString((package / DATA / "model.mlmodel").read_bytes())


def functions_of(package: Path) -> dict[str, list[Any]]:
    """The operations of each function."""
    program = model_of(package).mlProgram
    return {
        name: list(function.block_specializations[function.opset].operations)
        for name, function in program.functions.items()
    }


def read_weights(package: Path, function: str | None = None) -> dict[str, Stored]:
    """The quantized matrices of a function (the only one if not named), by name."""
    operations = functions_of(package)
    name = function or next(iter(operations))
    raw = (package / DATA / "weights/weight.bin").read_bytes()
    found = {}
    for operation in operations[name]:
        if operation.type == "constexpr_blockwise_shift_scale":
            given = {k: v.arguments[0].value for k, v in operation.inputs.items()}
            q, scales, zeros = given["data"], given["scale"], given.get("offset")
        elif operation.type == "constexpr_affine_dequantize":
            given = operation.attributes
            q, scales, zeros = given["quantized_data"], given["scale"], given["zero_point"]
        else:
            continue
        values, at = _value(raw, q)
        rows = len(values)
        zero = None if zeros is None else _value(raw, zeros)[0].reshape(rows, -1)
        found[operation.outputs[0].name] = Stored(
            values.reshape(rows, -1),
            _value(raw, scales)[0].reshape(rows, -1).astype(np.float32),
            zero if zero is not None and zero.any() else None,
            at,
        )
    return found


def _value(raw: bytes, value: Any) -> tuple[Array, int]:
    """A constant and where it lies in weight.bin; -1: in the model file."""
    kind = value.type.tensorType.dataType
    shape = [int(d.constant.size) for d in value.type.tensorType.dimensions]
    count = int(np.prod(shape))
    at, data = -1, value.immediateValue.tensor.bytes.values
    if value.HasField("blobFileValue"):
        sentinel, _, size, at = struct.unpack_from("<IIQQ", raw, value.blobFileValue.offset)
        assert sentinel == 0xDEADBEEF
        data = raw[at : at + size]
    if kind == _INT4:  # the first of two is in the low nibble
        pairs = np.frombuffer(data, np.uint8)
        both = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(-1)[:count].astype(np.int8)
        return ((both ^ 8) - 8).reshape(shape), at
    return np.frombuffer(data, _TYPES[kind])[:count].reshape(shape), at


def flip(package: Path, name: str, index: int, function: str | None = None) -> None:
    """Change the lowest bit of one stored byte of a weight's integers."""
    file = package / DATA / "weights/weight.bin"
    raw = bytearray(file.read_bytes())
    raw[read_weights(package, function)[name].at + index] ^= 1
    file.write_bytes(raw)
