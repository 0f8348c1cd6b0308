"""A LiteRT file's graphs as plain data, made from the checkpoint's headers, small vectors and
scales: weights are not read, samples are not run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.graph import Graph, Node, Scales, Value
from pocketglm.contracts import ExportOptions, Silent
from pocketglm.model.hf import decoder_spec_of, is_decoder, max_length_of, spec_of
from pocketglm.targets._litert_decoder import DecoderModel
from pocketglm.targets._litert_encoder import EncoderGraph
from pocketglm.targets._litert_graph import FlatModel, Subgraph
from pocketglm.targets._litert_weights import Weights

_ATTRIBUTES = ("axis", "keepDims", "beta", "asymmetricQuantizeInputs", "adjY", "approximate")


class AnyRange(dict[str, tuple[float, float]]):
    """Ranges of static results: their values decide no operator and no type."""

    def __missing__(self, layer: str) -> tuple[float, float]:
        return -1.0, 1.0


def graphs(ckpt: Checkpoint, options: ExportOptions) -> list[Graph]:
    """Each signature's graph, as `lower` will write it."""
    weights = Weights(ckpt, AnyRange())
    length = options.max_length or max_length_of(ckpt)
    if is_decoder(ckpt):
        last = options.logits == "last"
        model = DecoderModel(decoder_spec_of(ckpt), weights, length, last=last).build(Silent())
    else:
        model = EncoderGraph(spec_of(ckpt), weights, length).build(Silent())
    return graphs_of(model)


def graphs_of(model: FlatModel) -> list[Graph]:
    """Each subgraph of a model that is built; it need not be written."""
    return [_graph(model, g) for g in model.graphs]


def _graph(model: FlatModel, g: Subgraph) -> Graph:
    types = {v: k.lower() for k, v in vars(model.s.TensorType).items() if k[0] != "_"}
    values = {str(index): _value(types, tensor) for index, tensor in enumerate(g.tensors)}
    versions = {number: code[1] for code, number in model.codes.items()}
    nodes = []
    for part, index in _parts(g):
        operator, kind = g.operators[index], g.kinds[index]
        inputs = tuple("" if i < 0 else str(i) for i in operator.inputs)
        outputs = tuple(map(str, operator.outputs))
        nodes.append(
            Node(
                name=values[outputs[0]].name,
                op=kind,
                inputs=inputs,
                outputs=outputs,
                part=part,
                attributes=_attributes(operator),
                version=versions[operator.opcodeIndex],
                macs=_macs(kind, inputs, outputs, values),
            )
        )
    return Graph(g.signature, values, tuple(nodes))


def _value(types: Mapping[int, str], tensor: Any) -> Value:
    grid, scales, block = tensor.quantization, "none", 0
    if grid is not None and grid.details is not None:
        scales, block = "block", int(grid.details.blockSize)
    elif grid is not None:
        scales = "tensor" if len(grid.scale) == 1 else "channel"
    kind: Scales = scales  # type: ignore[assignment]
    shape = tuple(int(size) for size in tensor.shape)
    return Value(tensor.name, types[tensor.type], shape, bool(tensor.buffer), kind, block)


def _attributes(operator: Any) -> dict[str, Any]:
    options = operator.builtinOptions
    found = {name: getattr(options, name, None) for name in _ATTRIBUTES}
    return {name: value for name, value in found.items() if value is not None}


def _macs(
    kind: str, inputs: tuple[str, ...], outputs: tuple[str, ...], values: Mapping[str, Value]
) -> int:
    if kind not in ("FULLY_CONNECTED", "BATCH_MATMUL"):
        return 0
    size = math.prod(size or 1 for size in values[outputs[0]].shape)
    return size * (values[inputs[0]].shape[-1] or 1)


def _parts(g: Subgraph) -> Iterator[tuple[str, int]]:
    """(part, index) of each operator: parts end with the tensor of their name."""
    ends = [g.tensors[operator.outputs[0]].name for operator in g.operators]
    marks = [i for i, n in enumerate(ends) if n == "embeddings" or n.startswith("block.")]
    names = [ends[i] for i in marks]
    after = f"block.{len(names) - 1}" if not g.outputs.keys() & _RESULTS else "head"
    place = 0
    for index in range(len(ends)):
        yield names[place] if place < len(names) else after, index
        place += place < len(marks) and index == marks[place]


_RESULTS = {"logits", "sentence_embedding"}
