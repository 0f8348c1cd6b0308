"""A small builder of ONNX graphs: nodes and initializers, each named once, in the order given.

Operator specs: https://onnx.ai/onnx/operators/ (domain ''), and ONNX Runtime's ContribOperators.md
(domain com.microsoft).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
IR_VERSIONS = {13: 7, 17: 8}  # opset -> the file version that belongs to it

Shape = Sequence[int | str]


class GraphBuilder:
    """Collects one graph; `model()` gives it. The same calls give the same bytes."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._counts: Counter[str] = Counter()

    def op(
        self, kind: str, *inputs: str, domain: str = "", out: str = "", **attributes: Any
    ) -> str:
        """Append a node with one output; returns the output's name ('' inputs are absent)."""
        return self.ops(kind, 1, *inputs, domain=domain, out=out, **attributes)[0]

    def ops(
        self,
        kind: str,
        count: int,
        *inputs: str,
        domain: str = "",
        out: str = "",
        outs: Sequence[str] = (),
        **values: Any,
    ) -> list[str]:
        """Append a node with `count` outputs; returns their names.

        outs: names for the outputs after the first; '' leaves one out.
        """
        self._counts[kind] += 1
        name = f"{kind}_{self._counts[kind]}"
        outputs = [out or name] if count == 1 else [f"{name}.{index}" for index in range(count)]
        outputs[1:] = outs or outputs[1:]
        self._nodes.append(
            helper.make_node(kind, list(inputs), outputs, name=name, domain=domain, **values)
        )
        return outputs

    def microsoft(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node of ONNX Runtime's own operators."""
        return self.op(kind, *inputs, domain=MICROSOFT, **attributes)

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        """An initializer; a name that was given before keeps its value."""
        if name not in self._initializers:
            # order="C" keeps a scalar a scalar; np.ascontiguousarray would make it a vector.
            tensor = numpy_helper.from_array(np.array(value, order="C"), name)
            self._initializers[name] = tensor
        return name

    def external(self, tensor: onnx.TensorProto) -> str:
        """An initializer whose bytes lie in another file."""
        self._initializers[tensor.name] = tensor
        return tensor.name

    def holds(self, name: str) -> bool:
        """Whether there is an initializer of this name."""
        return name in self._initializers

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant("ints" + "".join(f"_{v}" for v in values), np.array(values, np.int64))

    def number(self, value: int) -> str:
        """A constant int64 scalar."""
        return self.constant(f"int_{value}", np.array(value, np.int64))

    def scalar(self, value: float) -> str:
        """A constant float32 scalar."""
        return self.constant(f"float_{value!r}", np.array(value, np.float32))

    @property
    def operators(self) -> dict[str, int]:
        """How many nodes of each operator the graph has, other domains written out."""
        names = [f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in self._nodes]
        return dict(sorted(Counter(names).items()))

    def constant_bytes(self) -> dict[str, int]:
        """Bytes of each initializer."""
        return {name: _nbytes(tensor) for name, tensor in self._initializers.items()}

    def model(
        self,
        inputs: Mapping[str, Shape],
        outputs: Mapping[str, Shape],
        opset: int,
        *,
        name: str = "encoder",
        caches: Mapping[str, Shape] = MappingProxyType({}),
        int8: Collection[str] = (),
    ) -> onnx.ModelProto:
        """The finished model: int64 inputs, then float32 `caches`; float32 outputs. int8: caches
        and outputs that are integers instead.
        """
        opsets = [helper.make_opsetid("", opset)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        graph = helper.make_graph(
            self._nodes,
            name,
            [
                *(
                    helper.make_tensor_value_info(n, TensorProto.INT64, s)
                    for n, s in inputs.items()
                ),
                *_values(caches, int8),
            ],
            _values(outputs, int8),
            list(self._initializers.values()),
        )
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSIONS[opset], producer_name="pocketglm"
        )


def _values(ports: Mapping[str, Shape], int8: Collection[str]) -> list[onnx.ValueInfoProto]:
    types = {name: TensorProto.INT8 if name in int8 else TensorProto.FLOAT for name in ports}
    return [helper.make_tensor_value_info(n, types[n], s) for n, s in ports.items()]


def _nbytes(tensor: onnx.TensorProto) -> int:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries.get("length", len(tensor.raw_data)))
