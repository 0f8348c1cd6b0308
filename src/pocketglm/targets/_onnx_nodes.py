"""An ONNX file's graph as plain data, made from the checkpoint's headers: weights are not read.

Shapes of standard operators come from the `onnx` package's own inference, a node at a time; those
of ONNX Runtime's operators from the table below. Axes without a number (batch, tokens) stay open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, TypeProto, defs, helper
from onnx.shape_inference import infer_node_outputs

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.graph import Graph, Node, Size, Value
from pocketglm.contracts import ExportOptions, Floats, Silent
from pocketglm.model.hf import decoder_spec_of, is_decoder, max_length_of, spec_of, stored_name
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.stored import Quantized, read_grid
from pocketglm.targets._onnx_decoder import DecoderGraph
from pocketglm.targets._onnx_encoder import DEFAULT_OPSET, EncoderGraph
from pocketglm.targets._onnx_external import ExternalData
from pocketglm.targets._onnx_graph import GraphBuilder
from pocketglm.targets._onnx_linear import Weights
from pocketglm.targets._onnx_rows import Rows, stored_shape

_SMALL = 64  # values of a constant up to which shapes may depend on it
_TOKEN = 1  # of a decoder's step

Shape = tuple[Size, ...]


def graphs(ckpt: Checkpoint, options: ExportOptions) -> list[Graph]:
    """The one graph, as `lower` will write it."""
    length = options.max_length or max_length_of(ckpt)
    if is_decoder(ckpt):
        spec, last = decoder_spec_of(ckpt), options.logits == "last"
        decoder = DecoderGraph(spec, Rows(ckpt), _NoData(), length, last=last)
        return [graph_of(decoder.build(Silent()), _TOKEN, length)]
    opset = options.opset or DEFAULT_OPSET
    encoder = EncoderGraph(spec_of(ckpt), _Headers(ckpt), length, opset)
    encoder.g = _Outline()
    return [graph_of(encoder.build(Silent()), length, length)]


class _NoData(ExternalData):
    """Nothing is read or written."""

    def __init__(self) -> None:
        pass

    def write(
        self,
        name: str,
        dtype: npt.DTypeLike,
        shape: tuple[int, ...],
        chunks: Iterable[npt.NDArray[Any]],
    ) -> TensorProto:
        return TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
            dims=shape,
            data_location=TensorProto.EXTERNAL,
        )


class _Headers(Weights):
    """Zeros of the weights' shapes, in memory that is never touched."""

    def floats(self, name: str) -> Floats:
        return np.zeros(self._shape(name), np.float32)

    def integers(self, name: str) -> Quantized:
        scheme = self.ckpt.manifest.schemes[stored_name(self.ckpt, name)]
        rows, columns = stored_shape(self.ckpt, stored_name(self.ckpt, name))
        groups = columns // scheme.group_size if scheme.group_size else 1
        zeros = None if scheme.symmetric else torch.zeros((rows, groups), dtype=torch.int8)
        q = torch.zeros((rows, columns), dtype=torch.int8)
        return Quantized(q, torch.zeros((rows, groups)), zeros, scheme, self.grid(name))

    def grid(self, name: str) -> InputGrid | None:
        return read_grid(self.ckpt, stored_name(self.ckpt, name))

    def _shape(self, name: str) -> tuple[int, ...]:
        stored = stored_name(self.ckpt, name)
        if name.endswith(".weight") and self.scheme(name) is not None:
            return stored_shape(self.ckpt, stored)
        return tuple(self.ckpt.tensors[stored].shape)


class _Outline(GraphBuilder):
    """Keeps of large constants type and shape alone."""

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        if value.size <= _SMALL:
            return super().constant(name, value)
        if not self.holds(name):
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            self.external(TensorProto(name=name, data_type=kind, dims=value.shape))
        return name


# --- from a model to plain data -------------------------------------------------------------------


def graph_of(model: onnx.ModelProto, tokens: int, context: int) -> Graph:
    """A model whose constants may have no bytes. tokens, context: with which its multiplications
    are counted, where the file leaves them open.
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    types = {v.name: v.type for v in model.graph.input}
    stored = {t.name: t for t in model.graph.initializer}
    for name, tensor in stored.items():
        types[name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
    known = {name: t for name, t in stored.items() if math.prod(t.dims) <= _SMALL and _full(t)}
    for node in model.graph.node:
        types.update(_outputs(node, types, known, opsets))
    values = {name: _value(name, kind, name in stored) for name, kind in types.items()}
    nodes = []
    for part, node in _parts(model.graph.node):
        op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        nodes.append(
            Node(
                name=node.name,
                op=op,
                inputs=tuple(node.input),
                outputs=tuple(name for name in node.output if name),
                part=part,
                attributes=_attributes(node),
                version=opsets[node.domain],
                macs=_macs(node, values, tokens, context),
            )
        )
    return Graph(model.graph.name, values, tuple(nodes))


def _full(tensor: TensorProto) -> bool:
    """Whether it has its bytes."""
    return tensor.data_location != TensorProto.EXTERNAL and bool(
        tensor.raw_data or not math.prod(tensor.dims)
    )


def _outputs(
    node: onnx.NodeProto,
    types: Mapping[str, TypeProto],
    known: Mapping[str, TensorProto],
    opsets: Mapping[str, int],
) -> dict[str, TypeProto]:
    if node.domain or node.op_type not in _standard(opsets[""]):
        shapes = [_shape(types[name]) if name else () for name in node.input]
        found = _contrib(node, shapes)
        names = [name for name in node.output if name]
        kinds = [_kind(types, node)] * len(names)
        return {
            name: helper.make_tensor_type_proto(kind, list(shape))
            for name, kind, shape in zip(names, kinds, found, strict=False)
        }
    schema = defs.get_schema(node.op_type, opsets[""], "")
    present = {name for name in node.input if name}
    data = {name: known[name] for name in present if name in known}
    inferred: dict[str, TypeProto] = infer_node_outputs(
        schema,
        node,
        {name: types[name] for name in present},
        data,
        opset_imports=[helper.make_opsetid(d, v) for d, v in opsets.items()],
    )
    return inferred


@cache
def _standard(opset: int) -> frozenset[str]:
    """ONNX's own operators; ONNX Runtime has a norm of its own in their domain."""
    return frozenset(
        schema.name
        for schema in defs.get_all_schemas_with_history()
        if not schema.domain and schema.since_version <= opset
    )


def _kind(types: Mapping[str, TypeProto], node: onnx.NodeProto) -> int:
    """All of ONNX Runtime's operators that are used here give float32, but a cache in INT8."""
    if node.op_type == "GroupQueryAttention":
        return TensorProto.FLOAT
    kind = types[node.input[0]].tensor_type.elem_type
    return kind if kind == TensorProto.FLOAT16 else TensorProto.FLOAT


def _contrib(node: onnx.NodeProto, shapes: Sequence[Shape]) -> list[Shape]:
    """Shapes of the outputs of one of ONNX Runtime's operators; specs: ContribOperators.md."""
    first, attributes = shapes[0], _attributes(node)
    match node.op_type:
        case "DynamicQuantizeMatMul":
            return [(*first[:-1], shapes[1][-1])]
        case "MatMulNBits":
            return [(*first[:-1], int(attributes["N"]))]
        case "FusedMatMul":
            return [(*first[:-1], shapes[1][-2 if attributes.get("transB") else -1])]
        case "Attention":
            return [(*first[:-1], (shapes[1][-1] or 0) // 3)]
        case "GatherBlockQuantized":
            width = (shapes[2][-1] or 0) * int(attributes["block_size"])
            columns = (first[-1] or 0) * 8 // int(attributes["bits"])
            return [(*shapes[1], min(width, columns))]
        case "GroupQueryAttention":
            heads, kv = int(attributes["num_heads"]), int(attributes["kv_num_heads"])
            packed = not node.input[1]
            width = first[-1] or 0
            width = width * heads // (heads + 2 * kv) if packed else width
            return [(*first[:-1], width), shapes[3], shapes[4]]
        case _:  # as its first input: norms, activations, MultiHeadAttention, RotaryEmbedding
            return [first] * len(node.output)


def _shape(kind: TypeProto) -> Shape:
    dims = kind.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def _value(name: str, kind: TypeProto, constant: bool) -> Value:
    dtype = helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type).name
    return Value(name, dtype, _shape(kind), constant)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    return {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in found.items()
        if isinstance(value, bool | int | float | str | bytes)
    }


def _macs(node: onnx.NodeProto, values: Mapping[str, Value], tokens: int, context: int) -> int:
    """One row; axes that are left open have `tokens` entries, the first one 1."""

    def sizes(shape: Shape) -> int:
        return math.prod(
            (tokens if axis else 1) if n is None else n for axis, n in enumerate(shape)
        )

    out = sizes(values[node.output[0]].shape)
    first = values[node.input[0]].shape
    match node.op_type:
        case "MatMul" | "DynamicQuantizeMatMul" | "MatMulNBits" | "FusedMatMul":
            return out * (first[-1] or context)
        case "Attention":
            return out * 3 * (first[-1] or 0) + 2 * out * context
        case "MultiHeadAttention" | "GroupQueryAttention":
            return 2 * out * context
    return 0


def _parts(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.NodeProto]]:
    """(part, node): a part ends with the value of its name."""
    ordered = list(nodes)
    ends = {name: i for i, node in enumerate(ordered) for name in node.output if _is_end(name)}
    names = sorted(ends, key=lambda name: ends[name])
    place = 0
    for index, node in enumerate(ordered):
        yield names[place] if place < len(names) else "head", node
        place += place < len(names) and index == ends[names[place]]


def _is_end(name: str) -> bool:
    return name == "embeddings" or name.startswith("block.")
