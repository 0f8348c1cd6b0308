"""What a target will write, as plain data: tensors, and operators over them, without any weights.

A target that can say this from a checkpoint's headers offers `contracts.Target.graphs`; the checks
read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Size = int | None  # of an axis; None: known when the model runs
Scales = Literal["none", "tensor", "channel", "block"]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor. constant: it lies in the file. scales, block: how its integers are meant, one scale
    for the tensor, a row, or `block` values of a row.
    """

    name: str
    dtype: str
    shape: tuple[Size, ...]
    constant: bool = False
    scales: Scales = "none"
    block: int = 0


@dataclass(frozen=True, slots=True)
class Node:
    """An operator. inputs: names of values, '' where one is left out. part: of the model
    (`embeddings`, `block.0`, ..., `head`). macs: multiplications and additions of one call.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    part: str
    attributes: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    version: int = 1
    macs: int = 0


@dataclass(frozen=True, slots=True)
class Graph:
    """One computation of a file, its nodes in an order in which they can run."""

    name: str
    values: Mapping[str, Value]
    nodes: tuple[Node, ...]
