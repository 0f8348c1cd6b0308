"""From a module to the bytes of a .pte file, and what XNNPACK took of it, node by node."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pocketglm.errors import require
from pocketglm.runtimes._quiet import silence

METHOD = "forward"
DELEGATE = "executorch_call_delegate"
_IN_DELEGATE = "xnnpack:"  # before the names of operators in export.json


@dataclass(frozen=True, slots=True)
class EdgeNode:
    """One operator of the edge program, which is what the partitioner sees.

    op: e.g. `aten.linear.default`. delegate: the number of the delegate that has it; None: it runs in
    a plain kernel. inputs: the names of the nodes, constants and inputs that it reads.
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
        edge = edge_program(module, example, free, metadata)
        nodes = list(edge_nodes(edge.exported_program()))
        exir = require("executorch.exir", extra="executorch")
        # The cache is written in place; else it would be copied twice at every call.
        form = exir.ExecutorchBackendConfig(run_reinplace_pass=True)
        return LoweredModule(bytes(edge.to_executorch(form).buffer), nodes)


def edge_program(
    module: nn.Module,
    example: Sequence[Tensor],
    free: Sequence[Mapping[int, Any] | None],
    metadata: Mapping[str, Any] | None = None,
    *,
    delegate: bool = True,
) -> Any:
    """ExecuTorch's EdgeProgramManager of `module`; without a delegate what the partitioner is given.

    The names of the nodes are the same in both.
    """
    exir = require("executorch.exir", extra="executorch")
    require("executorch.exir.passes._quant_patterns_and_replacements", extra="executorch")
    require("executorch.kernels.quantized", extra="executorch")
    place = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    partitioner = require(place, extra="executorch").XnnpackPartitioner()
    with torch.no_grad():
        program = torch.export.export(
            module.eval(), tuple(example), dynamic_shapes=tuple(free), strict=False
        )
        if not delegate:
            partitioner = _Nothing.of(partitioner)
        return exir.to_edge_transform_and_lower(
            program,
            partitioner=[partitioner],
            constant_methods=dict(metadata or {}),
            # quantized_decomposed is no part of the core that is checked for
            compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
        )


class _Nothing:
    """Makes a partitioner that keeps the operators whole, as XNNPACK wants them, and takes none."""

    @staticmethod
    def of(partitioner: Any) -> Any:
        """The same one with an empty result."""
        kind = require("executorch.exir.backend.partitioner", extra="executorch").PartitionResult
        partitioner.partition = lambda program: kind(tagged_exported_program=program, partition_tags={})
        return partitioner


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


@contextmanager
def quiet() -> Iterator[None]:
    """Meanwhile the converter's warnings and log lines stay away."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), silence():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
