"""Seconds that a workload takes, from bytes, operations and nodes: the physics of the cost model.

    one token of an answer    (weights + cache) / (memory * bandwidth) + operations / (gemv * peak)
                              + nodes * node_s
    a prompt, or a text       weights / (memory * bandwidth) + operations / (gemm * peak)
                              + nodes * node_s

`memory`, `gemv` and `gemm` are shares of what the device could do at best, fitted to published
measurements; nodes is the number of operators and node_s what starting one costs. The terms are
added, not maximised: a real runtime overlaps them only in part, and a sum stays smooth. After
"Roofline: An Insightful Visual Performance Model" (Williams et al., 2009).
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from pocketglm.contracts import Config

Unit = Literal["cpu", "gpu", "npu"]
Amount = Annotated[float, Field(ge=0)]
Above = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
NODES_PER_LAYER = 14  # operators that are left of a block after fusion: 7 products, norms, rest


class Workload(Config):
    """One model in one form, and what is asked of it.

    parameters: all. table_parameters: of them, those of a token table that is only looked up (0
    where the head shares it, which reads it for every token). weight_bytes: of the whole file.
    read_bytes: of the weights that one token reads. kv_bytes_per_token: cache of one position.
    bits: of the weights that are not in the table. activations: the form of a product's inputs;
    `float` with 8 bits or less means that weights are widened first. prompt: tokens in (an
    encoder's text). generated: tokens out. context: positions that the cache is made for (0: as
    many as prompt and answer need). nodes: operators of one pass; null: 14 a layer.
    prompt_parameters: those that every token of a prompt passes through (all but the table, and of
    a decoder but the head, which only the last token needs); null: all but the table.
    """

    kind: Literal["encoder", "decoder"]
    parameters: Above
    table_parameters: Amount = 0
    layers: Count
    hidden_size: Count
    weight_bytes: Above
    read_bytes: Above
    kv_bytes_per_token: Amount = 0
    bits: Literal[2, 3, 4, 5, 6, 8, 16, 32]
    activations: Literal["float", "int8", "int16"]
    prompt: Count = 64
    generated: Annotated[int, Field(ge=0)] = 0
    context: Annotated[int, Field(ge=0)] = 0
    nodes: Count | None = None
    prompt_parameters: Above | None = None

    @model_validator(mode="after")
    def _whole(self) -> Workload:
        if self.table_parameters >= self.parameters:
            raise ValueError("table_parameters must be less than parameters")
        if self.read_bytes > self.weight_bytes:
            raise ValueError("read_bytes cannot exceed weight_bytes")
        return self

    @property
    def integer(self) -> bool:
        """Whether products run on integers."""
        return self.bits <= 8 and self.activations != "float"

    @property
    def positions(self) -> int:
        """Positions of the cache."""
        return max(self.context, self.prompt + self.generated)

    @property
    def calls(self) -> int:
        return self.nodes or NODES_PER_LAYER * self.layers


class Machine(Config):
    """What one unit of a device could do at best. bandwidth: bytes a second. integer, floating:
    operations a second (a multiply-add is two) on 8-bit integers and on floats.
    """

    bandwidth: Above
    integer: Above
    floating: Above

    def peak(self, workload: Workload) -> float:
        return self.integer if workload.integer else self.floating


class Rates(Config):
    """How much of it a runtime gets. memory, gemv, gemm, gemm_float: shares of the peak, the last
    two of a product of many rows on integers and on floats. cache: bytes moved for one of an fp16
    cache. whole: the cache has a fixed size, and all of it is read. node_s: seconds.
    """

    memory: Above
    gemv: Above
    gemm: Above
    gemm_float: Above
    cache: Amount = 1
    whole: bool = False
    node_s: Amount


class Terms(NamedTuple):
    """Seconds at all of the peak: of weights, of an fp16 cache, of operations; and operators."""

    weights: float
    cache: float
    operations: float
    calls: int


def pass_operations(workload: Workload, tokens: int) -> float:
    """Operations of one pass over `tokens` positions; attention over them included."""
    each = workload.prompt_parameters or workload.parameters - workload.table_parameters
    body = 2.0 * each * tokens
    seen = tokens if workload.kind == "encoder" else tokens / 2
    return body + 4.0 * workload.layers * workload.hidden_size * tokens * seen


def prompt_terms(workload: Workload, machine: Machine) -> Terms:
    """Of one pass over the prompt (decoder) or the text (encoder)."""
    return Terms(
        weights=workload.read_bytes / machine.bandwidth,
        cache=0.0,
        operations=pass_operations(workload, workload.prompt) / machine.peak(workload),
        calls=workload.calls,
    )


def token_terms(workload: Workload, machine: Machine, whole: bool) -> Terms:
    """Of one token of the answer, at the mean length of the cache while it is written. whole: all
    positions that the cache is made for are read.
    """
    cached = workload.positions if whole else workload.prompt + workload.generated / 2
    operations = 2.0 * (workload.parameters - workload.table_parameters)
    return Terms(
        weights=workload.read_bytes / machine.bandwidth,
        cache=workload.kv_bytes_per_token * cached / machine.bandwidth,
        operations=operations / machine.peak(workload),
        calls=workload.calls,
    )


def prompt_seconds(workload: Workload, machine: Machine, rates: Rates) -> float:
    """One pass over the prompt (decoder) or the text (encoder)."""
    terms = prompt_terms(workload, machine)
    share = rates.gemm if workload.integer else rates.gemm_float
    return terms.weights / rates.memory + terms.operations / share + terms.calls * rates.node_s


def token_seconds(workload: Workload, machine: Machine, rates: Rates) -> float:
    """One token of the answer."""
    terms = token_terms(workload, machine, rates.whole)
    moved = terms.weights + rates.cache * terms.cache
    return moved / rates.memory + terms.operations / rates.gemv + terms.calls * rates.node_s
