"""Reads a saved Core ML package (.mlpackage) with an ML program: its functions, operations, types
and constants, from the files' bytes alone. Torch-free.

A constant is stored inside the program or in `weight.bin`: a header of 64 bytes; for each constant
a record of 64 bytes (0xDEADBEEF, a type code, sizes in bytes and position of the data, both
uint64) at the offset that the program names, and the data behind it. Types narrower than a byte are
packed from a byte's low bits upwards.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from pocketglm.errors import CheckpointError, UsageError, nearest
from pocketglm.runtimes._coreml_proto import parse_model

Array = npt.NDArray[Any]

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
# Of the description of inputs and outputs.
_PORT_DTYPES = {65552: "fp16", 65568: "fp32", 65600: "fp64", 131104: "int32", 131080: "int8"}
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
class Port:
    """An input, output or state of a function.

    shapes: those that an input with enumerated shapes takes. ranges: smallest and largest size of
    each dimension (None: no limit) of one with ranges. default: the shape that the description
    names, () if none.
    """

    name: str
    type: TensorType
    default: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int | None], ...] = ()

    def takes(self, shape: tuple[int, ...]) -> bool:
        """May a value have this shape?"""
        if not self.type.holds(shape) or (self.shapes and shape not in self.shapes):
            return False
        return all(
            low <= size and (high is None or size <= high)
            for size, (low, high) in zip(shape, self.ranges, strict=False)
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
                        f"a constant of type {self.type} has {len(listed)} values", _AGAIN
                    )
                return np.asarray(listed, kind).reshape(shape)
        raise CheckpointError(f"a constant of type {self.type} has no values", _AGAIN)


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. inputs: argument -> names of values, or constants; mostly one.

    outputs: name and declared type of each. value: that of a `const`.
    """

    type: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[tuple[str, TensorType], ...]
    value: Constant | None = None
    blocks: int = 0

    @property
    def name(self) -> str:
        """The first output's; an operation without one is called after what it takes."""
        if self.outputs:
            return self.outputs[0][0]
        return ", ".join(n for names in self.inputs.values() for n in names if isinstance(n, str))


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the program. results: the names of its outputs' values, in order."""

    name: str
    opset: str
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    states: Mapping[str, Port]
    operations: tuple[Operation, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many operations of each type, constants left out."""
        found: dict[str, int] = {}
        for operation in self.operations:
            if operation.type != "const":
                found[operation.type] = found.get(operation.type, 0) + 1
        return found


@dataclass(frozen=True, slots=True)
class Package:
    """A read package. version: of the specification (9: iOS 18).

    shared: decoded constants that an open evaluator holds, so that two functions, or two
    evaluators, do not hold them twice.
    """

    path: Path
    version: int
    functions: Mapping[str, Function]
    default: str
    shared: WeakValueDictionary[Any, Any] = field(default_factory=WeakValueDictionary)

    def function(self, name: str | None = None) -> Function:
        """A function by its name; None: the default one.

        Raises:
            UsageError: there is none of this name.
        """
        if (name or self.default) not in self.functions:
            raise UsageError(
                f"{self.path} has no function {name or self.default}",
                nearest(name or self.default, self.functions),
            )
        return self.functions[name or self.default]

    def stored(self, name: str, function: str | None = None) -> dict[str, Array]:
        """What is stored for the value `name`: {"val": ...} of a const; of a constexpr operation
        its arguments, such as `data` (the integers), `scale` and `offset`.

        Raises:
            UsageError: no const or constexpr operation has this name.
        """
        operations = {
            op.outputs[0][0]: op for op in self.function(function).operations if op.outputs
        }
        found = operations.get(name)
        if found and found.value:
            return {"val": found.value.read()}
        if found and found.type.startswith("constexpr_"):
            return {
                key: _constant(values[0], operations).read() for key, values in found.inputs.items()
            }
        known = [n for n, op in operations.items() if op.type.startswith("constexpr_")]
        raise UsageError(f"{self.path} stores no weight {name}", nearest(name, known))


_AGAIN = "copy the folder again, or export the checkpoint again"


def _constant(value: str | Constant, operations: Mapping[str, Operation]) -> Constant:
    if isinstance(value, str):
        constant = operations[value].value
        if constant is None:
            raise UsageError(f"{value} is not stored but computed", f"ask for {value} itself")
        return constant
    return value


def read_package(path: Path) -> Package:
    """Read a package; `weight.bin` is mapped, not read.

    Raises:
        CheckpointError: not a package, damaged, or not an ML program.
    """
    model, folder = _model_file(path)
    try:
        message = parse_model(model.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{model} is damaged: {error}", _AGAIN) from error
    if not message.HasField("mlProgram"):
        raise CheckpointError(
            f"{path} is not an ML program", "convert the model with convert_to='mlprogram'"
        )
    weights = _Weights(folder)
    described = {entry.name: entry for entry in message.description.functions}
    functions = {
        name: _function(name, function, described.get(name, message.description), weights)
        for name, function in sorted(message.mlProgram.functions.items())
    }
    default = message.description.defaultFunctionName or "main"
    return Package(path, message.specificationVersion, functions, default)


def _model_file(path: Path) -> tuple[Path, Path]:
    """The model file that the package's manifest names, and the folder it is in."""
    try:
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        model = path / "Data" / entry["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a Core ML package: {error}", _AGAIN) from error
    if not model.is_file() or not model.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(f"{path} has no model file {entry['path']}", _AGAIN)
    return model, model.parent


class _Weights(dict[str, Array]):
    """The package's weight files as bytes, by the name that the program calls them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, name: str) -> Array:
        file = self._folder / name.removeprefix("@model_path/")
        if not file.is_file() or not file.resolve().is_relative_to(self._folder.resolve()):
            raise CheckpointError(f"{file} is missing", _AGAIN)
        self[name] = np.memmap(file, np.uint8, mode="r")
        return self[name]


def _blob(weights: Mapping[str, Array], name: str, offset: int) -> Array:
    """The bytes of one constant."""
    file = weights[name]
    record = file[offset : offset + _RECORD].tobytes()
    if len(record) < _RECORD:
        raise CheckpointError(f"{name} ends before byte {offset + _RECORD}", _AGAIN)
    sentinel, _, size, start = struct.unpack_from("<IIQQ", record)
    if sentinel != _SENTINEL or start + size > len(file):
        raise CheckpointError(f"{name} has no constant at byte {offset}: it is damaged", _AGAIN)
    return file[start : start + size]


def _unpacked(data: Array, dtype: str, count: int) -> Array:
    """`count` values of a MIL type from their bytes, flat."""
    bits = bits_of(dtype)
    if len(data) < -(-count * bits // 8):
        raise CheckpointError(
            f"{count} values of {dtype} were expected, there are {len(data)} bytes", _AGAIN
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


def _type(message: Any) -> TensorType:
    """A value's declared type; a state's is that of what it holds."""
    if message.HasField("stateType"):
        return _type(message.stateType.wrappedType)
    if not message.HasField("tensorType"):
        return TensorType("list, tuple or dictionary", ())
    tensor = message.tensorType
    sizes = (int(d.constant.size) if d.HasField("constant") else None for d in tensor.dimensions)
    return TensorType(DTYPES.get(tensor.dataType, f"type {tensor.dataType}"), tuple(sizes))


def _function(name: str, message: Any, described: Any, weights: Mapping[str, Array]) -> Function:
    block = message.block_specializations[message.opset]
    operations = tuple(_operation(entry, weights) for entry in block.operations)
    types = {entry.name: _type(entry.type) for entry in message.inputs}
    states = {entry.name for entry in message.inputs if entry.type.HasField("stateType")}
    for operation in operations:
        types.update(operation.outputs)
    ports = {entry.name: entry.type for entry in (*described.input, *described.output)}
    return Function(
        name=name,
        opset=message.opset,
        inputs={
            n.name: _port(n.name, types, ports) for n in message.inputs if n.name not in states
        },
        outputs={n: _port(n, types, ports) for n in block.outputs},
        states={n.name: _port(n.name, types, ports) for n in message.inputs if n.name in states},
        operations=operations,
    )


def _port(name: str, types: Mapping[str, TensorType], described: Mapping[str, Any]) -> Port:
    if name not in described or not described[name].HasField("multiArrayType"):
        return Port(name, types[name])
    array = described[name].multiArrayType
    ranges = array.shapeRange.sizeRanges if array.HasField("shapeRange") else ()
    return Port(
        name,
        types[name],
        default=tuple(array.shape),
        shapes=tuple(tuple(s.shape) for s in array.enumeratedShapes.shapes),
        ranges=tuple((r.lowerBound, None if r.upperBound < 0 else r.upperBound) for r in ranges),
    )


def _operation(message: Any, weights: Mapping[str, Array]) -> Operation:
    def constant(value: Any) -> Constant:
        return Constant(_type(value.type), value, weights)

    inputs: dict[str, tuple[str | Constant, ...]] = {
        key: tuple(
            b.name if not b.HasField("value") else constant(b.value) for b in entry.arguments
        )
        for key, entry in sorted(message.inputs.items())
    }
    for key, value in sorted(message.attributes.items()):  # constexpr operations before iOS 18
        if key not in ("name", "val"):
            inputs[key] = (constant(value),)
    return Operation(
        type=message.type,
        inputs=inputs,
        outputs=tuple((entry.name, _type(entry.type)) for entry in message.outputs),
        value=constant(message.attributes["val"]) if message.type == "const" else None,
        blocks=len(message.blocks),
    )
