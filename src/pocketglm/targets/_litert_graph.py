"""Writes a .tflite file by hand: subgraphs, their operators, and constants that they share.

A constant is one buffer however many subgraphs read it. Small ones lie in the flatbuffer; the
others follow it, each made when it is written, so that no more than one is in memory. Format:
TensorFlow Lite's schema.fbs, version 3 (buffers with `offset` and `size`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.errors import require

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

IDENTIFIER = b"TFL3"
NAMED = {"FLOAT32": 4.0, "FLOAT16": 2.0, "INT32": 4.0, "INT8": 1.0, "INT4": 0.5, "BOOL": 1.0}
_TYPES = {"float32": "FLOAT32", "float16": "FLOAT16", "int32": "INT32", "int8": "INT8"}
_INLINE = 256  # bytes up to which a constant lies in the flatbuffer
_ALIGNMENT = 64
_PLACEHOLDER = 2  # an offset that is stored: 0 and 1 mean that the data lie in the flatbuffer
# Where the table of an operator's options has another name than the operator.
_OPTIONS = {
    "MEAN": "ReducerOptions",
    "SUM": "ReducerOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "TOPK_V2": "TopKV2Options",
    "SELECT_V2": "SelectV2Options",
    "MAXIMUM": "MaximumMinimumOptions",
}
_WITHOUT = {"RSQRT", "LOGISTIC", "TANH", "RELU", "EMBEDDING_LOOKUP"}


def schema() -> ModuleType:
    """The format's classes, generated from its schema.

    Raises:
        MissingExtraError: ai-edge-litert is not installed.
    """
    return require("ai_edge_litert.schema_py_generated", extra="litert")


@dataclass(frozen=True, slots=True)
class Grid:
    """How a tensor's integers are meant: scales along axis 0, or blocks of columns.

    block: columns that share a scale; `scales` is then float16 [N, K / block]. zero: the integer of
    0.0, of activations alone.
    """

    scales: Array
    block: int = 0
    zero: int = 0


@dataclass(slots=True)
class _Buffer:
    """A constant's bytes: `data`, or `make` when they are written."""

    size: int
    data: Array | None
    make: Callable[[], Array] | None
    offset: int = _PLACEHOLDER


class FlatModel:
    """All subgraphs and buffers of one file."""

    def __init__(self) -> None:
        self.s = schema()
        self.graphs: list[Subgraph] = []
        self.buffers = [_Buffer(0, None, None)]
        self.named: dict[str, int] = {}
        self.codes: dict[tuple[str, int], int] = {}

    def subgraph(self, signature: str) -> Subgraph:
        """A new one, which callers know as `signature`."""
        graph = Subgraph(self, signature)
        self.graphs.append(graph)
        return graph

    def buffer(self, name: str, size: int, make: Callable[[], Array]) -> int:
        """The number of a constant's buffer; one of the same name is used again."""
        if name not in self.named:
            data = _bytes(make()) if size <= _INLINE else None
            self.named[name] = len(self.buffers)
            self.buffers.append(_Buffer(size, data, None if data is not None else make))
        return self.named[name]

    def code(self, kind: str, version: int) -> int:
        """The number of an operator's code."""
        return self.codes.setdefault((kind, version), len(self.codes))

    @property
    def operators(self) -> dict[str, int]:
        """How often each operator occurs, in all subgraphs."""
        kinds = [kind for graph in self.graphs for kind in graph.kinds]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    def constant_bytes(self) -> dict[str, int]:
        """Bytes of each constant."""
        return {name: self.buffers[index].size for name, index in self.named.items()}

    def write(self, file: Path) -> None:
        """The file: the flatbuffer, then the large buffers, each at a multiple of 64 bytes."""
        start = len(self._packed())
        for buffer in self.buffers:
            if buffer.make is not None:
                buffer.offset = start = -(-start // _ALIGNMENT) * _ALIGNMENT
                start += buffer.size
        with file.open("wb") as stream:
            stream.write(self._packed())
            for buffer in self.buffers:
                if buffer.make is not None:
                    stream.write(b"\0" * (buffer.offset - stream.tell()))
                    data = _bytes(buffer.make())
                    if data.size != buffer.size:
                        raise ValueError(f"{data.size} bytes, {buffer.size} were announced")
                    stream.write(data.data)

    def _packed(self) -> bytes:
        """The flatbuffer; its length does not depend on the offsets."""
        s = self.s
        model = s.ModelT()
        model.version, model.description = 3, "PocketGLM"
        model.operatorCodes = [self._code(*code) for code in self.codes]
        model.buffers = [self._buffer(buffer) for buffer in self.buffers]
        model.subgraphs = [graph.packed() for graph in self.graphs]
        model.signatureDefs = [graph.definition(i) for i, graph in enumerate(self.graphs)]
        builder = require("flatbuffers", extra="litert").Builder(1 << 16)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _code(self, kind: str, version: int) -> Any:
        code = self.s.OperatorCodeT()
        code.builtinCode = getattr(self.s.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = version
        return code

    def _buffer(self, buffer: _Buffer) -> Any:
        found = self.s.BufferT()
        if buffer.data is not None:
            found.data = buffer.data
        elif buffer.make is not None:
            found.offset, found.size = buffer.offset, buffer.size
        return found


class Subgraph:
    """One computation. Tensors are numbers; `shapes` has those of all."""

    def __init__(self, model: FlatModel, signature: str) -> None:
        self.model, self.signature = model, signature
        self.tensors: list[Any] = []
        self.shapes: list[Shape] = []
        self.kinds: list[str] = []
        self.inputs: dict[str, int] = {}
        self.outputs: dict[str, int] = {}
        self.operators: list[Any] = []
        self._constants: dict[str, int] = {}

    # --- tensors ---------------------------------------------------------------------------------

    def input(self, name: str, shape: Shape, kind: str = "FLOAT32", free: int = -1) -> int:
        """An input; the size of axis `free` may be changed by the caller."""
        self.inputs[name] = index = self.tensor(f"{self.signature}_{name}", shape, kind)
        if free >= 0:
            self.tensors[index].shapeSignature = [
                -1 if axis == free else size for axis, size in enumerate(shape)
            ]
        return index

    def tensor(self, name: str, shape: Shape, kind: str, buffer: int = 0) -> int:
        """A new tensor's number."""
        found = self.model.s.TensorT()
        found.name, found.shape = name, list(shape)
        found.type, found.buffer = getattr(self.model.s.TensorType, kind), buffer
        found.hasRank = True
        self.tensors.append(found)
        self.shapes.append(shape)
        return len(self.tensors) - 1

    def constant(self, name: str, value: Array) -> int:
        """A small constant, known now."""
        kind = _TYPES[value.dtype.name]
        return self.lazy(name, value.shape, kind, lambda: value)

    def lazy(
        self,
        name: str,
        shape: Shape,
        kind: str,
        make: Callable[[], Array],
        grid: Grid | None = None,
    ) -> int:
        """A constant that is made when the file is written. `make` gives the stored bytes' values,
        of INT4 two in a byte.
        """
        if name not in self._constants:
            size = int(-(-np.prod(shape, dtype=np.int64) * NAMED[kind] // 1))
            index = self.tensor(name, shape, kind, self.model.buffer(name, size, make))
            if grid is not None:
                self.set_grid(index, grid)
            self._constants[name] = index
        return self._constants[name]

    def set_grid(self, index: int, grid: Grid) -> None:
        """Say how the integers of a tensor are meant."""
        s = self.model.s
        found = s.QuantizationParametersT()
        if grid.block:
            name = f"{self.tensors[index].name}.scales"
            details = s.BlockwiseQuantizationT()
            details.scales = self.lazy(name, grid.scales.shape, "FLOAT16", lambda: grid.scales)
            details.zeroPoints, details.blockSize = -1, grid.block
            found.detailsType = s.QuantizationDetails.BlockwiseQuantization
            found.details = details
        else:
            found.scale = grid.scales.astype(np.float32)
            found.zeroPoint = np.full(grid.scales.shape, grid.zero, np.int64)
        self.tensors[index].quantization = found

    def ints(self, *values: int) -> int:
        """int32 [n]."""
        return self.constant(f"int_{'_'.join(map(str, values))}", np.array(values, np.int32))

    def number(self, value: int) -> int:
        """int32 []."""
        return self.constant(f"number_{value}", np.array(value, np.int32))

    def scalar(self, value: float) -> int:
        """float32 []."""
        return self.constant(f"float_{value!r}", np.array(value, np.float32))

    # --- operators -------------------------------------------------------------------------------

    def op(
        self,
        kind: str,
        inputs: Sequence[int],
        shape: Shape,
        *,
        out: str = "",
        dtype: str = "FLOAT32",
        version: int = 1,
        **options: Any,
    ) -> int:
        """One operator; its result, named `out`. An input -1 is absent.

        version: the operator's; a runtime or delegate that knows only older ones leaves it.
        """
        name = out or f"{kind.lower()}.{len(self.operators)}"
        result = self.tensor(name, shape, dtype)
        self.add(kind, inputs, [result], options, version)
        return result

    def add(
        self,
        kind: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        options: dict[str, Any],
        version: int = 1,
    ) -> None:
        """An operator whose outputs are there."""
        operator = self.model.s.OperatorT()
        operator.opcodeIndex = self.model.code(kind, version)
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        if kind not in _WITHOUT:
            words = (word.capitalize() for word in kind.split("_"))
            table = _OPTIONS.get(kind, f"{''.join(words)}Options")
            operator.builtinOptionsType = getattr(self.model.s.BuiltinOptions, table)
            operator.builtinOptions = getattr(self.model.s, f"{table}T")()
            for key, value in options.items():
                if not hasattr(operator.builtinOptions, key):
                    raise ValueError(f"{kind} has no option {key}")
                setattr(operator.builtinOptions, key, value)
        self.operators.append(operator)
        self.kinds.append(kind)

    # --- the file --------------------------------------------------------------------------------

    def packed(self) -> Any:
        """The schema's object of this subgraph."""
        found = self.model.s.SubGraphT()
        found.name, found.tensors, found.operators = self.signature, self.tensors, self.operators
        found.inputs, found.outputs = list(self.inputs.values()), list(self.outputs.values())
        return found

    def definition(self, index: int) -> Any:
        """The schema's object of the signature."""
        s = self.model.s
        found = s.SignatureDefT()
        found.signatureKey, found.subgraphIndex = self.signature, index
        for names, target in ((self.inputs, "inputs"), (self.outputs, "outputs")):
            maps = []
            for name, tensor in names.items():
                entry = s.TensorMapT()
                entry.name, entry.tensorIndex = name, tensor
                maps.append(entry)
            setattr(found, target, maps)
        return found


def _bytes(values: Array) -> Array:
    """As uint8 [bytes], little-endian."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
