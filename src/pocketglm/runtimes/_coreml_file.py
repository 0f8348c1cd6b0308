"""Reads a saved Core ML package (.mlpackage) with an ML program: its functions, operations, types
and constants, from the files' bytes alone. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from google.protobuf.message import DecodeError

from pocketglm.errors import CheckpointError, UsageError, nearest
from pocketglm.runtimes._coreml_proto import parse_model
from pocketglm.runtimes._coreml_values import AGAIN, Array, Constant, TensorType, Weights, type_of


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
        raise CheckpointError(f"{model} is damaged: {error}", AGAIN) from error
    if not message.HasField("mlProgram"):
        raise CheckpointError(
            f"{path} is not an ML program", "convert the model with convert_to='mlprogram'"
        )
    weights = Weights(folder)
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
        raise CheckpointError(f"{path} is not a Core ML package: {error}", AGAIN) from error
    if not model.is_file() or not model.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(f"{path} has no model file {entry['path']}", AGAIN)
    return model, model.parent


def _function(name: str, message: Any, described: Any, weights: Mapping[str, Array]) -> Function:
    if message.opset not in message.block_specializations:
        raise CheckpointError(f"function {name} has no operations for its {message.opset}", AGAIN)
    block = message.block_specializations[message.opset]
    operations = tuple(_operation(entry, weights) for entry in block.operations)
    types = {entry.name: type_of(entry.type) for entry in message.inputs}
    states = {entry.name for entry in message.inputs if entry.type.HasField("stateType")}
    for operation in operations:
        types.update(operation.outputs)
    if unmade := [entry for entry in block.outputs if entry not in types]:
        raise CheckpointError(f"function {name} computes no {unmade[0]}, its output", AGAIN)
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
        return Constant(type_of(value.type), value, weights)

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
        outputs=tuple((entry.name, type_of(entry.type)) for entry in message.outputs),
        value=constant(message.attributes["val"]) if message.type == "const" else None,
        blocks=len(message.blocks),
    )
