"""Computes what a .pte file says in PyTorch, float32, with activation quantization off.

The program's own kernels are PyTorch's operators of the same name; XNNPACK's operators are written
here. Integers of the file become float where they are used, what rounds activations passes its
input on. Each value is a list, one entry for each text: a weight is read once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketglm.errors import CheckpointError
from pocketglm.targets._executorch_read import NOWHERE, PteFile, XnnGraph

_QUANTIZED = "quantized_decomposed::"
_PRIM = "executorch_prim::"
_PRIMS: dict[str, Callable[[Any, Any], Any]] = {
    "et_view.default": lambda x, sizes: x.reshape(sizes),
    "add.Scalar": lambda a, b: a + b,
    "sub.Scalar": lambda a, b: a - b,
    "mul.Scalar": lambda a, b: a * b,
    "floordiv.Scalar": lambda a, b: a // b,
}
_ROUNDING = tuple(  # of activations
    f"{_QUANTIZED}{kind}"
    for kind in ("quantize_per", "dequantize_per_token", "dequantize_per_tensor")
)


@dataclass(frozen=True, slots=True)
class Event:
    """An operator that has run: its name (`add`, `rsqrt`, ...), what it read and what it gave, one
    entry for each text. stored: which of what it read is a constant of the file. repeat: of a
    lookup, the same of other ids.
    """

    kind: str
    inputs: list[list[Any]]
    output: list[Tensor]
    stored: list[bool]
    repeat: Callable[[Tensor], Tensor] | None = None


class Run:
    """One run of the method, over several texts at once."""

    def __init__(self, file: PteFile, inputs: Sequence[Sequence[Tensor]]) -> None:
        """inputs: those of the method, for each text."""
        self.file, self.count = file, len(inputs)
        self._values: dict[int, list[Any]] = {}
        self._stored: set[int] = set()
        for place, entries in zip(file.plan.inputs, zip(*inputs, strict=True), strict=True):
            self._values[place] = list(entries)

    @property
    def result(self) -> list[Tensor]:
        """The method's output, after the run."""
        return self._values[self.file.plan.outputs[-1]]

    def events(self) -> Iterator[Event]:
        """Run it all."""
        for call in self.file.instructions:
            kind = type(call).__name__
            if kind == "KernelCall":
                yield self._kernel(self.file.operator(call), call.args)
            elif kind == "DelegateCall":
                yield from self._delegate(call)
            elif kind != "FreeCall":
                raise CheckpointError(f"the program has a {kind}, which is not known here")

    # --- the program's kernels -------------------------------------------------------------------

    def _kernel(self, name: str, args: list[int]) -> Event:
        if name.startswith(_PRIM):
            return self._prim(name.removeprefix(_PRIM), args)
        operator, schema = _overload(name)
        given = [a.name for a in schema.arguments if not a.is_out]
        outs = len(schema.arguments) - len(given)
        inputs = [self._value(place) for place in args[: len(given)]]
        stored = [place in self._stored for place in args[: len(given)]]
        rows = [dict(zip(given, row, strict=True)) for row in zip(*inputs, strict=True)]
        results = [_call(name, operator, row) for row in rows]
        ends = args[len(given) : len(given) + outs] if outs else args[-1:]
        for index, place in enumerate(ends):
            found = [result[index] if outs > 1 else result for result in results]
            if outs:  # a kernel that changes the type knows it from its result's
                kind = self.file.kind(place)
                found = [x.to(kind) for x in found]
            self._values[place] = found
        short = name.partition("::")[2].partition(".")[0]
        repeat = partial(_again, name, operator, rows[0])
        return Event(short, inputs, self._values[ends[0]], stored, repeat)

    def _prim(self, name: str, args: list[int]) -> Event:
        """ExecuTorch's own: a view, and arithmetic of sizes."""
        function = _PRIMS.get(name)
        if function is None:
            raise CheckpointError(f"the program calls {_PRIM}{name}, which is not known here")
        inputs = [self._value(place) for place in args[:2]]
        self._values[args[-1]] = [function(a, b) for a, b in zip(*inputs, strict=True)]
        return Event(name, inputs, self._values[args[-1]], [p in self._stored for p in args[:2]])

    def _value(self, place: int) -> list[Any]:
        """A value of the program for each text."""
        if place in self._values:
            return self._values[place]
        value = self.file.plan.values[place].val
        kind = type(value).__name__
        if kind == "Tensor":
            found = self.file.constant(value)
            if found is None:  # a cache that nothing was written to
                return [torch.zeros(tuple(value.sizes)) for _ in range(self.count)]
            self._stored.add(place)
            return [found] * self.count
        if kind in ("OptionalTensorList", "TensorList"):
            lists = [None if i < 0 else self._value(i) for i in value.items]
            return [[x and x[row] for x in lists] for row in range(self.count)]
        if kind == "IntList":
            numbers = [self._value(i) for i in value.items]
            return [[x[row] for x in numbers] for row in range(self.count)]
        if kind == "Null":
            return [None] * self.count
        item = {
            "Int": "int_val",
            "Double": "double_val",
            "Bool": "bool_val",
            "String": "string_val",
        }
        return [getattr(value, item[kind])] * self.count

    # --- XNNPACK ---------------------------------------------------------------------------------

    def _delegate(self, call: Any) -> Iterator[Event]:
        graph = self.file.graph(call.delegate_index)
        values: dict[int, list[Any]] = {}
        ends = {number: call.args[place] for number, place in graph.externals.items()}
        stored = set()
        for number in graph.inputs:
            values[number] = self._value(ends[number])
            if ends[number] in self._stored:
                stored.add(number)
        for kind, node, whole in graph.nodes:
            yield self._xnn(graph, kind, node, whole, values, stored)
        for number in graph.outputs:
            self._values[ends[number]] = values[number]

    def _xnn(
        self,
        graph: XnnGraph,
        kind: str,
        node: dict[str, Any],
        whole: dict[str, Any],
        values: dict[int, list[Any]],
        stored: set[int],
    ) -> Event:
        names = [n for n in (*_ENDS, "filter_id", "bias_id") if node.get(n, NOWHERE) != NOWHERE]
        inputs, constant = [], []
        for number in (node[name] for name in names):
            found = None if number in values else graph.constant(number)
            if found is not None:
                q, scales = found
                inputs.append([q if scales is None else _restored(q, scales)] * self.count)
            else:
                inputs.append(values[number])
            constant.append(found is not None or number in stored)
        function = _XNN.get(kind)
        if function is None:
            raise CheckpointError(f"XNNPACK's {kind} is not known here")
        limits = whole.get("output_min_max")
        results = [_limited(function(node, *row), limits) for row in zip(*inputs, strict=True)]
        values[node["output_id"]] = results
        return Event(kind.removeprefix("XNN"), inputs, results, constant)


_ENDS = ("input_id", *(f"input{number}_id" for number in range(1, 6)))


def _restored(q: Tensor, scales: Tensor) -> Tensor:
    return (q.view(*scales.shape, -1) * scales[..., None]).view(q.shape)


def _limited(x: Tensor, limits: dict[str, Any] | None) -> Tensor:
    """XNNPACK's ReLU is a limit of the operator before it."""
    if limits is None:
        return x
    return x.clamp(float(limits["output_min"]), float(limits["output_max"]))


def _reshape(node: dict[str, Any], x: Tensor) -> Tensor:
    return x.reshape([size or -1 for size in node["new_shape"]])


def _slice(node: dict[str, Any], x: Tensor) -> Tensor:
    for axis, (start, size) in enumerate(zip(node["offsets"], node["sizes"], strict=True)):
        x = x.narrow(axis, start, size or x.shape[axis] - start)
    return x


def _joined(node: dict[str, Any], *parts: Tensor) -> Tensor:
    return torch.cat(parts, node["axis"])


_XNN: dict[str, Callable[..., Tensor]] = {
    "XNNAbs": lambda n, x: x.abs(),
    "XNNAdd": lambda n, a, b: a + b,
    "XNNBatchMatrixMultiply": lambda n, a, b: a @ b,
    "XNNClamp": lambda n, x: x,  # its limits are the operator's
    "XNNConvert": lambda n, x: x,  # to integers and back
    "XNNCopy": lambda n, x: x,
    "XNNDiv": lambda n, a, b: a / b,
    "XNNFullyConnected": lambda n, x, w, b=None: F.linear(x, w, b),
    "XNNGelu": lambda n, x: F.gelu(x),
    "XNNMultiply": lambda n, a, b: a * b,
    "XNNReciprocalSquareRoot": lambda n, x: x.rsqrt(),
    "XNNSigmoid": lambda n, x: x.sigmoid(),
    "XNNSoftmax": lambda n, x: x.softmax(-1),
    "XNNSquare": lambda n, x: x * x,
    "XNNStaticReshape": _reshape,
    "XNNStaticSlice": _slice,
    "XNNStaticTranspose": lambda n, x: x.permute(n["perm"]),
    "XNNSubtract": lambda n, a, b: a - b,
    "XNNTanh": lambda n, x: x.tanh(),
    **dict.fromkeys((f"XNNConcatenate{count}" for count in range(2, 6)), _joined),
}


# --- by name -------------------------------------------------------------------------------------


def _overload(name: str) -> tuple[Any, Any]:
    """PyTorch's operator of a kernel's name, and the schema of the kernel's arguments."""
    space, _, rest = name.partition("::")
    base, _, kind = rest.partition(".")
    packet = getattr(getattr(torch.ops, space), base)
    schema = getattr(packet, kind or "default")._schema
    given = {a.name: str(a.type) for a in schema.arguments if not a.is_out}
    for other in packet.overloads():
        found = getattr(packet, other)
        own = {a.name: str(a.type) for a in found._schema.arguments if not a.is_out}
        free = {a.name for a in found._schema.arguments if a.has_default_value()}
        whole = len(own) == len(found._schema.arguments)
        if whole and given.items() <= own.items() and own.keys() - given.keys() <= free:
            return found, schema
    raise CheckpointError(f"the program calls {name}, which is not known here")


def _call(name: str, operator: Any, row: dict[str, Any]) -> Any:
    """The operator on one text's values."""
    if name.startswith(_ROUNDING):
        return row["input"]
    if name.startswith(f"{_QUANTIZED}choose_qparams"):
        return torch.empty(0), torch.empty(0)
    values = _few_rows(row) if "weight_scales" in row and "indices" in row else dict(row)
    for key in ("dtype", "out_dtype", "output_dtype"):
        if values.get(key) is not None:
            values[key] = _DTYPES[values[key]]
    return operator(**values)


def _few_rows(row: dict[str, Any]) -> dict[str, Any]:
    """A lookup in the rows that it needs alone: the operator would restore the whole table."""
    ids = row["indices"].reshape(-1)
    tables = {
        key: row[key][ids]
        for key in ("weight", "weight_scales", "weight_zero_points")
        if row[key] is not None
    }
    return row | tables | {"indices": torch.arange(len(ids)).view(row["indices"].shape)}


def _again(name: str, operator: Any, row: dict[str, Any], ids: Tensor) -> Tensor:
    """A lookup of other ids."""
    found: Tensor = _call(name, operator, row | {"indices": ids})
    return found


_DTYPES = {0: torch.uint8, 1: torch.int8, 3: torch.int32, 4: torch.int64, 6: torch.float32}
_DTYPES |= {5: torch.float16, 7: torch.float64, 11: torch.bool, 15: torch.bfloat16}
