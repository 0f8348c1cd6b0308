"""What ExecuTorch's partitioner will be given, as plain data: the module is traced with weights of
zeros, so that none is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.graph import Graph, Node, Size, Value
from pocketglm.contracts import ExportOptions
from pocketglm.model.hf import decoder_spec_of, is_decoder, max_length_of, spec_of
from pocketglm.targets._executorch_decoder import DecoderGraph
from pocketglm.targets._executorch_encoder import EncoderGraph
from pocketglm.targets._executorch_lower import METHOD, before_partition
from pocketglm.targets._litert_nodes import AnyRange
from pocketglm.targets._zero_weights import Zeros

_EXAMPLE = 4  # tokens that it is traced with; 0 and 1 would be taken for fixed sizes
_PRODUCTS = ("aten.linear.default", "aten.bmm.default", "aten.mm.default", "aten.addmm.default")


def graphs(ckpt: Checkpoint, options: ExportOptions) -> list[Graph]:
    """The one method's graph, before anything is delegated.

    Raises:
        MissingExtraError: executorch is not installed.
    """
    length = options.max_length or max_length_of(ckpt)
    # multiplications are those of one new token, or of a whole text
    return [graph_of(given(ckpt, options), 1 if is_decoder(ckpt) else length)]


def given(ckpt: Checkpoint, options: ExportOptions) -> Any:
    """The edge program (an ExportedProgram) that XNNPACK's partitioner is given."""
    length = options.max_length or max_length_of(ckpt)
    weights, size = Zeros(ckpt, AnyRange()), min(_EXAMPLE, length)
    free = torch.export.Dim("tokens", min=1, max=length)
    ids = torch.ones(1, size, dtype=torch.int64)
    if is_decoder(ckpt):
        decoder = DecoderGraph(decoder_spec_of(ckpt), weights, length, options.logits)
        position = torch.zeros(1, dtype=torch.int64)
        return before_partition(decoder, (ids, position), ({1: free}, None))
    encoder = EncoderGraph(spec_of(ckpt), weights, length)
    return before_partition(encoder, (ids, ids.clone()), ({1: free}, {1: free}))


def graph_of(program: Any, tokens: int) -> Graph:
    """An edge program (an ExportedProgram) as plain data."""
    values: dict[str, Value] = {}
    alias: dict[str, str] = {}
    nodes: list[Node] = []
    signature = program.graph_signature
    changed = set(signature.buffers_to_mutate.values())
    held = signature.inputs_to_parameters | signature.inputs_to_buffers
    constants = {name for name, target in held.items() if target not in changed}
    constants |= signature.inputs_to_lifted_tensor_constants.keys()
    part = "embeddings"
    for node in program.graph.nodes:
        found = node.meta.get("val")
        if node.op == "placeholder" and isinstance(found, Tensor):
            values[node.name] = _value(node.name, found, node.name in constants)
        if node.op != "call_function" or isinstance(found, int | torch.SymInt):
            continue
        if node.target.__name__ == "getitem":
            alias[node.name] = f"{node.args[0].name}.{node.args[1]}"
            continue
        part = _part(node, part)
        outputs = _results(node, found)
        values |= {name: _value(name, value, False) for name, value in outputs.items()}
        inputs = tuple(
            alias.get(used.name, used.name)
            for used in node.all_input_nodes
            if alias.get(used.name, used.name) in values
        )
        attributes = dict(_attributes(node))
        macs = _macs(node.target.__name__, found, node, tokens)
        nodes.append(
            Node(node.name, node.target.__name__, inputs, tuple(outputs), part, attributes, 1, macs)
        )
    return Graph(METHOD, values, tuple(nodes))


def _results(node: Any, found: Any) -> dict[str, Tensor]:
    """Of a node with several results by their numbers, as `getitem` picks them."""
    if isinstance(found, Tensor):
        return {node.name: found}
    return {f"{node.name}.{i}": v for i, v in enumerate(found or ()) if isinstance(v, Tensor)}


def _value(name: str, found: Tensor, constant: bool) -> Value:
    shape = tuple(size if isinstance(size, int) else None for size in found.shape)
    return Value(name, str(found.dtype).removeprefix("torch."), shape, constant)


def _part(node: Any, before: str) -> str:
    """By the module that a node is from; what a pass put in belongs to the part before it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return before
    pieces = str(stack[-1][0]).split(".")
    if "blocks" in pieces[:-1]:
        return f"block.{pieces[pieces.index('blocks') + 1]}"
    return "embeddings" if before == "embeddings" else "head"


def _attributes(node: Any) -> Iterator[tuple[str, float | int | str | bool]]:
    """argN: its numbers. axis: the second one, counted from the result's end. symbolic: a size is
    known only when it runs. same_order: the result lies in memory as the input does.
    """
    symbolic = False
    for index, value in enumerate(node.args):
        if isinstance(value, bool | int | float | str):
            yield f"arg{index}", value
        elements = value if isinstance(value, list | tuple) else [value]
        symbolic |= any(_is_symbolic(element) for element in elements)
    yield "symbolic", symbolic
    found, first = node.meta.get("val"), node.args[0] if node.args else None
    if not isinstance(found, Tensor):
        return
    if len(node.args) > 1 and type(node.args[1]) is int:
        axis = node.args[1]
        yield "axis", axis - found.dim() if axis >= 0 else axis
    source = first.meta.get("val") if isinstance(first, torch.fx.Node) else None
    if isinstance(source, Tensor):
        order = node.kwargs.get("dim_order") or found.dim_order()
        yield "same_order", list(source.dim_order()) == list(order)


def _is_symbolic(value: Any) -> bool:
    found = value.meta.get("val") if isinstance(value, torch.fx.Node) else value
    return isinstance(found, torch.SymInt) or (
        isinstance(value, torch.fx.Node) and isinstance(found, int)
    )


def _macs(op: str, found: Any, node: Any, tokens: int) -> int:
    if op not in _PRODUCTS:
        return 0
    operand = node.args[1 if op == "aten.addmm.default" else 0].meta["val"]
    sizes: list[Size] = [*found.shape, operand.shape[-1]]
    return math.prod(size if isinstance(size, int) else tokens for size in sizes)
