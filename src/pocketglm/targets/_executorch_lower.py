"""From a module to the bytes of a .pte file, and what XNNPACK took of it, node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocketglm.errors import require
from pocketglm.runtimes._quiet import quiet

METHOD = "forward"
DELEGATE = "executorch_call_delegate"
_IN_DELEGATE = "xnnpack:"  # before the names of operators in export.json


@dataclass(frozen=True, slots=True)
class EdgeNode:
    """One operator of the edge program, which is what the partitioner sees.

    op: e.g. `aten.linear.default`. delegate: the number of the delegate that has it; None: it runs
    in a plain kernel. inputs: the names of the nodes, constants and inputs that it reads.
    """

    name: str
    op: str
    delegate: int | None
    inputs: tuple[str, ...]
    shape: tuple[Any, ...] | None

    @property
    def delegated(self) -> bool:
        return self.delegate is not None


@dataclass(frozen=True, slots=True)
class LoweredModule:
    """The file, and the operators that it was made of."""

    data: bytes
    nodes: list[EdgeNode]

    @property
    def operators(self) -> dict[str, int]:
        """How often each stands in the file; those that XNNPACK has with its name before theirs."""
        counts = Counter(f"{_IN_DELEGATE if n.delegated else ''}{n.op}" for n in self.nodes)
        pieces = len({n.delegate for n in self.nodes if n.delegated})
        return dict(sorted((counts | {DELEGATE: pieces}).items()))


def lower_module(
    module: nn.Module,
    example: Sequence[Tensor],
    free: Sequence[Mapping[int, Any] | None],
    metadata: Mapping[str, Any] | None = None,
) -> LoweredModule:
    """Lower `module`, in eval mode, to one method with XNNPACK.

    free: of each example input its axes of any size, as torch.export's `Dim`. metadata: values that
    the file gives as methods of their own.

    Raises:
        MissingExtraError: executorch is not installed.
    """
    with quiet():
        edge = _edge_program(module, example, free, metadata or {}, _partitioner())
        nodes = list(edge_nodes(edge.exported_program()))
        exir = require("executorch.exir", extra="executorch")
        # The cache is written in place; else it would be copied twice at every call.
        form = exir.ExecutorchBackendConfig(run_reinplace_pass=True)
        return LoweredModule(bytes(edge.to_executorch(form).buffer), nodes)


def before_partition(
    module: nn.Module, example: Sequence[Tensor], free: Sequence[Mapping[int, Any] | None]
) -> Any:
    """The edge program (an ExportedProgram) that XNNPACK's partitioner is given for `module`.

    Its nodes have the names that they have in `lower_module`'s result.
    """
    partitioner = _partitioner()

    def stop(program: Any) -> Any:
        raise _ReachedError(program)

    partitioner.partition = stop
    with quiet():
        try:
            _edge_program(module, example, free, {}, partitioner)
        except _ReachedError as reached:
            return reached.program
    raise AssertionError("the partitioner was not asked")


class _ReachedError(Exception):
    def __init__(self, program: Any) -> None:
        self.program = program


def _partitioner() -> Any:
    place = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    return require(place, extra="executorch").XnnpackPartitioner()


def _edge_program(
    module: nn.Module,
    example: Sequence[Tensor],
    free: Sequence[Mapping[int, Any] | None],
    metadata: Mapping[str, Any],
    partitioner: Any,
) -> Any:
    """ExecuTorch's EdgeProgramManager."""
    exir = require("executorch.exir", extra="executorch")
    require("executorch.exir.passes._quant_patterns_and_replacements", extra="executorch")
    require("executorch.kernels.quantized", extra="executorch")
    with torch.no_grad():
        program = torch.export.export(
            module.eval(), tuple(example), dynamic_shapes=tuple(free), strict=False
        )
        return exir.to_edge_transform_and_lower(
            program,
            partitioner=[partitioner],
            constant_methods=dict(metadata),
            # quantized_decomposed is no part of the core that is checked for
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
        )


def edge_nodes(program: Any) -> Iterator[EdgeNode]:
    """The operators of an edge program (an ExportedProgram), also those inside of its delegates."""
    number = 0
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target.__name__ != DELEGATE:
            if found := _node(node, None):
                yield found
            continue
        inner = getattr(program.graph_module, node.args[0].name).original_module
        for part in inner.graph.nodes:
            if part.op == "call_function" and (found := _node(part, number)):
                yield found
        number += 1


def _node(node: Any, delegate: int | None) -> EdgeNode | None:
    """None: it only picks one result, or computes a size."""
    value, name = node.meta.get("val"), node.target.__name__
    if name == "getitem" or isinstance(value, int | torch.SymInt):
        return None
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    return EdgeNode(node.name, name, delegate, tuple(n.name for n in node.all_input_nodes), shape)
