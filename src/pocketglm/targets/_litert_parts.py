"""Runs parts of a written .tflite file with activation quantization off.

Weights become float32, dequantized from the file's own integers and scales, and what rounds
activations is left out; so a wrong integer, scale or connection in the file still shows. Read with
the format's generated classes alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.contracts import Floats
from pocketglm.errors import require
from pocketglm.targets._litert_graph import IDENTIFIER, Array, schema

ALL = slice(None)
_ROUNDING = ("QUANTIZE", "DEQUANTIZE")


class FlatFile:
    """A file's subgraphs by their signatures, and its constants in float."""

    def __init__(self, file: Path) -> None:
        self.s = schema()
        with file.open("rb") as stream:
            self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._array = np.frombuffer(self._bytes, np.uint8)
        self.model = self.s.ModelT.InitFromPackedBuf(self._bytes, 0)
        names = {v: k for k, v in vars(self.s.BuiltinOperator).items() if k[0] != "_"}
        self._kinds: list[str] = [names[code.builtinCode] for code in self.model.operatorCodes]
        self._types = {v: k for k, v in vars(self.s.TensorType).items() if k[0] != "_"}
        definitions = self.model.signatureDefs
        self.graphs = {
            d.signatureKey.decode(): self.model.subgraphs[d.subgraphIndex] for d in definitions
        }
        self.definitions = {d.signatureKey.decode(): d for d in definitions}

    def kind(self, operator: Any) -> str:
        """The operator's name in the schema."""
        name: str = self._kinds[operator.opcodeIndex]
        return name

    def outputs(self, signature: str) -> dict[str, str]:
        """The outputs' names, and those of their tensors."""
        tensors = self.graphs[signature].tensors
        entries = self.definitions[signature].outputs
        return {e.name.decode(): tensors[e.tensorIndex].name.decode() for e in entries}

    def names(self, signature: str) -> dict[str, int]:
        """The tensors of a subgraph by name."""
        return {t.name.decode(): i for i, t in enumerate(self.graphs[signature].tensors)}

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor is a constant."""
        buffer = self.model.buffers[tensor.buffer]
        return buffer.offset > 1 or (buffer.data is not None and len(buffer.data) > 0)

    def stored(self, tensor: Any) -> Array:
        """A constant as it is stored, of INT4 int8."""
        buffer = self.model.buffers[tensor.buffer]
        if buffer.offset > 1:
            data = self._array[buffer.offset : buffer.offset + buffer.size]
        else:
            data = np.asarray(buffer.data, np.uint8)
        shape, kind = [int(size) for size in tensor.shape], self._types[tensor.type]
        if kind != "INT4":
            values: Array = data.view(kind.lower()).reshape(shape)
            return values
        both: Array = np.stack([data << 4, data], axis=-1).view(np.int8) >> 4
        return both.reshape(shape)

    def floats(self, graph: Any, tensor: Any, rows: slice = ALL) -> Array:
        """Rows of a constant in float32 if it is quantized, else as they are stored."""
        values, grid = self.stored(tensor), tensor.quantization
        if grid is None:
            return values[rows] if values.ndim else values
        if grid.detailsType == self.s.QuantizationDetails.BlockwiseQuantization:
            scales = self.stored(graph.tensors[grid.details.scales])[rows].astype(np.float32)
            whole: Array = values[rows] * np.repeat(scales, grid.details.blockSize, axis=1)
            return whole
        scale = np.asarray(grid.scale, np.float32)[rows]
        scaled: Array = values[rows] * scale.reshape(-1, *[1] * (values.ndim - 1))
        return scaled

    def part(
        self, signature: str, outputs: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
    ) -> Part:
        """What leads from the tensors of these names and shapes to the outputs of these names."""
        graph, names = self.graphs[signature], self.names(signature)
        alias: dict[int, int] = {}
        operators = []
        for operator in graph.operators:
            ins = [alias.get(int(i), int(i)) for i in operator.inputs]
            outs = [int(i) for i in operator.outputs]
            if self.kind(operator) in _ROUNDING:
                alias[outs[0]] = ins[0]
            else:
                operators.append((operator, ins, outs))
        fed = [names[name] for name in shapes]
        wanted = [alias.get(names[name], names[name]) for name in outputs]
        needed, kept = set(wanted), []
        for operator, ins, outs in reversed(operators):
            if needed & (set(outs) - set(fed)):
                needed |= set(ins)
                kept.append((operator, ins, outs))
        return Part(
            self._model(graph, kept[::-1], dict(zip(fed, shapes.values(), strict=True)), wanted)
        )

    def _model(
        self,
        graph: Any,
        operators: list[tuple[Any, list[int], list[int]]],
        fed: Mapping[int, tuple[int, ...]],
        wanted: Sequence[int],
    ) -> bytes:
        s = self.s
        used = dict.fromkeys([*fed, *wanted])
        for _, ins, outs in operators:
            used |= dict.fromkeys(i for i in [*ins, *outs] if i >= 0)
        place = {old: new for new, old in enumerate(used)} | {-1: -1}
        model, sub = s.ModelT(), s.SubGraphT()
        model.version, model.operatorCodes = 3, self.model.operatorCodes
        model.buffers, model.subgraphs = [s.BufferT()], [sub]
        sub.tensors = []
        for old in used:
            tensor, source = s.TensorT(), graph.tensors[old]
            tensor.name, tensor.shape = f"t{old}", list(fed.get(old, source.shape))
            tensor.type, tensor.hasRank = source.type, True
            if source.quantization is not None and source.quantization.scale is not None:
                tensor.type = s.TensorType.FLOAT32
            if self.holds(source):
                values = self.floats(graph, source)
                tensor.type = getattr(s.TensorType, values.dtype.name.upper())
                buffer = s.BufferT()
                buffer.data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
                tensor.buffer = len(model.buffers)
                model.buffers.append(buffer)
            sub.tensors.append(tensor)
        sub.operators = [_moved(s, *entry, place) for entry in operators]
        sub.inputs, sub.outputs = [place[i] for i in fed], [place[i] for i in wanted]
        builder = require("flatbuffers", extra="litert").Builder(1 << 16)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())


def _moved(s: Any, operator: Any, ins: list[int], outs: list[int], place: dict[int, int]) -> Any:
    found = s.OperatorT()
    found.opcodeIndex = operator.opcodeIndex
    found.builtinOptionsType = operator.builtinOptionsType
    found.builtinOptions = operator.builtinOptions
    found.inputs, found.outputs = [place[i] for i in ins], [place[i] for i in outs]
    return found


class Part:
    """An open part, in LiteRT's plain float kernels."""

    def __init__(self, model: bytes) -> None:
        litert = require("ai_edge_litert.interpreter", extra="litert")
        plain = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self._model = litert.Interpreter(
            model_content=model, experimental_op_resolver_type=plain, num_threads=1
        )
        self._model.allocate_tensors()
        self._inputs = [entry["index"] for entry in self._model.get_input_details()]
        self._outputs = [entry["index"] for entry in self._model.get_output_details()]

    def __call__(self, *values: Array) -> list[Floats]:
        """The outputs for the inputs, both in the order in which they were named."""
        for index, value in zip(self._inputs, values, strict=True):
            self._model.set_tensor(index, value)
        self._model.invoke()
        return [self._model.get_tensor(index) for index in self._outputs]
