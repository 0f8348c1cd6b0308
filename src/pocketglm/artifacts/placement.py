"""Where a model's operators will run on a device: what `checks/placement` predicts.

A delegate takes operators away from a runtime's plain kernels, to a GPU, an NPU or faster kernels
of the CPU. What it leaves falls back to the CPU, and each piece of the graph that it takes costs a
hand-over on both sides.
"""

from __future__ import annotations

from typing import Literal

from pocketglm.contracts import Config

Evidence = Literal["measured", "source", "documented", "inferred"]
Unit = Literal["cpu", "gpu", "npu"]
Judgement = Literal["good", "partial", "little"]


class Rest(Config):
    """Operators of one kind that a delegate leaves, all for one reason. first: the first one's name
    in the file, with its part of the model. rewrite: what to change; '': nothing is known.
    evidence, source: how the rule is known, and from where.
    """

    op: str
    count: int
    first: str
    part: str
    because: str
    rewrite: str = ""
    evidence: Evidence
    source: str
    macs: int = 0


class PartShare(Config):
    """A part of the model: its operators and multiplications, and those that the delegate takes."""

    part: str
    nodes: int
    taken: int
    macs: int
    macs_taken: int


class Placement(Config):
    """One delegate's share of one graph of an export on a device.

    delegate: `litert-xnnpack`, ...; title: in words. lowered: false: it would take this of a file
    that was lowered for it, and takes nothing of the one that the target writes. runs_on: the unit;
    accelerator: its name on this device. partitions: connected pieces that the delegate takes.
    left: what falls back, most work first. evidence: how its rules are known at best. judgement:
    `little` below half of the multiplications, `partial` below nine tenths.
    """

    target: str
    device: str
    delegate: str
    title: str
    lowered: bool = True
    runs_on: Unit
    accelerator: str
    graph: str
    nodes: int
    taken: int
    partitions: int
    macs: int
    macs_taken: int
    parts: list[PartShare]
    left: list[Rest] = []
    evidence: Evidence
    judgement: Judgement
    note: str = ""

    @property
    def share(self) -> float:
        """Of the multiplications (where there are none, of the operators) that it takes, 0 to 1."""
        if self.macs:
            return self.macs_taken / self.macs
        return self.taken / self.nodes if self.nodes else 0.0
