"""A Core ML package's functions as plain data, built with weights of zeros, so that none is read
(but the scales, which decide the program's type).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.graph import Graph, Node, Size, Value
from pocketglm.contracts import ExportOptions
from pocketglm.model.hf import decoder_spec_of, is_decoder, max_length_of, spec_of
from pocketglm.runtimes._quiet import silence
from pocketglm.targets import _coreml_decoder as decoder
from pocketglm.targets._coreml_encoder import EncoderGraph
from pocketglm.targets._coreml_form import form_of
from pocketglm.targets._coreml_graph import mil
from pocketglm.targets._zero_weights import Zeros

_DTYPES = {"fp16": "float16", "fp32": "float32"}


def graphs(ckpt: Checkpoint, options: ExportOptions) -> list[Graph]:
    """Each function of the program.

    Raises:
        MissingExtraError: coremltools is not installed.
    """
    form, weights = form_of(ckpt, options), Zeros(ckpt)
    length = options.max_length or max_length_of(ckpt)
    with silence():
        if not is_decoder(ckpt):
            graph = EncoderGraph(spec_of(ckpt), weights, form, length).build()
            return [_graph("main", graph.function, form.units, length)]
        spec, every = decoder_spec_of(ckpt), options.logits == "all"
        plans = (decoder.PREFILL, decoder.prompt_of(length)), (decoder.DECODE, 1)
        return [
            _graph(
                name,
                decoder.DecoderGraph(spec, weights, form, length, tokens)
                .build(every=every)
                .function,
                form.units,
                tokens,
            )
            for name, tokens in plans
        ]


def _graph(name: str, function: Any, units: str, tokens: int) -> Graph:
    values: dict[str, Value] = {}
    for key, var in function.inputs.items():
        values[key] = _value(var, constant=False)
    nodes: list[Node] = []
    part = "embeddings"
    ends = _ends(function)
    for operation in function.operations:
        kind = operation.op_type
        constant = kind == "const" or kind.startswith("constexpr_")
        for var in operation.outputs:
            values[var.name] = _value(var, constant=constant)
        if constant:
            continue
        inputs = tuple(var.name for var in _read(operation) if var.name in values)
        outputs = tuple(var.name for var in operation.outputs)
        attributes = {"units": units} | _attributes(operation)
        macs = _macs(kind, inputs, values, values[outputs[0]], tokens)
        nodes.append(Node(operation.name, kind, inputs, outputs, part, attributes, macs=macs))
        if outputs[0] in ends:
            part = ends[outputs[0]]
    return Graph(name, values, tuple(nodes))


def _ends(function: Any) -> dict[str, str]:
    """The value that a part ends with -> the part that begins behind it."""
    marks = [
        var.name
        for operation in function.operations
        for var in operation.outputs
        if re.fullmatch(r"embeddings|block_\d+", var.name)
    ]
    after = [*(name.replace("_", ".") for name in marks[1:]), "head"]
    return dict(zip(marks, after, strict=True))


def _read(operation: Any) -> Iterator[Any]:
    """The values that an operator reads, weights and parameters too."""
    for found in operation.inputs.values():
        yield from found if isinstance(found, list | tuple) else [found]


def _value(var: Any, *, constant: bool) -> Value:
    types = mil().lang.types
    inner = var.dtype.wrapped_type() if types.is_state(var.dtype) else var.dtype
    inner = inner.get_primitive() if types.is_tensor(inner) else inner
    kind = types.builtin_to_string(inner)
    shape = tuple(int(n) if isinstance(n, int) else None for n in var.shape or ())
    return Value(var.name, _DTYPES.get(kind, kind), shape, constant)


def _attributes(operation: Any) -> dict[str, float | int | str | bool]:
    found = {}
    for name, var in operation.inputs.items():
        value = getattr(var, "val", None)
        if isinstance(value, bool | int | float | str):
            found[name] = value
    return found


def _macs(
    kind: str,
    inputs: tuple[str, ...],
    values: Mapping[str, Value],
    out: Value,
    tokens: int,
) -> int:
    def size(sizes: tuple[Size, ...]) -> int:
        return math.prod(tokens if n is None else n for n in sizes)

    if kind in ("linear", "conv"):
        weight = next(values[name] for name in inputs if values[name].constant)
        return size(out.shape) * (weight.shape[1] or 1)
    if kind in ("matmul", "einsum"):
        first = values[inputs[0]].shape
        return size(out.shape) * size(first[1:2] if kind == "einsum" else first[-1:])
    return 0
