"""GPTQ of one block: its layers in the order in which the block computes.

A layer's inputs are those of the block with all layers before it quantized already. Layers with
one input (query, key, value; gate, up) are done together. `ops/hessian.py` has the method itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import BlockResult, BlockWork
from pocketglm.ops.affine import choose_scales, dequantize, quantize
from pocketglm.ops.hessian import Hessian, gptq, inverse_factor, output_error

# Layers of a block by their input, as it computes.
STAGES = (
    ("attention.query", "attention.key", "attention.value"),
    ("attention.output",),
    ("ffn.gate_up", "ffn.gate", "ffn.up"),
    ("ffn.down",),
    ("unified.input",),
    ("unified.output",),
)
_MEASURED = 512  # output channels of a layer whose error is measured, evenly spread

Integers = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """damping: a share of the mean of the Hessian's diagonal. act_order: the columns with the
    greatest inputs first. weighted: scales are searched for with the columns' importance.
    """

    damping: float
    act_order: bool
    weighted: bool
    search: bool


class _EnoughError(Exception):
    """Ends a block's computation where a layer's input is known."""


def layer_of(block: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, block.get_submodule(name))


def stages_of(layers: Iterable[str]) -> list[list[str]]:
    """The layers by stage; stages without one are left out. Of a factorized layer the first factor
    has its input, the second one an input of its own.
    """
    found = set(layers)
    stages: list[list[str]] = []
    for stage in STAGES:
        names = [name for layer in stage for name in (layer, f"{layer}.factor_in")]
        stages.append([name for name in names if name in found])
        stages += [[name] for layer in stage if (name := f"{layer}.factor_out") in found]
    return [stage for stage in stages if stage]


@torch.inference_mode()
def inputs_of(
    block: nn.Module,
    name: str,
    call: Callable[[Tensor], Tensor],
    hidden: Sequence[Tensor],
) -> Iterator[Tensor]:
    """What enters layer `name`, [T, K] for each batch; the block is computed no further."""
    caught: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0].flatten(0, -2))
        raise _EnoughError

    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        for batch in hidden:
            with suppress(_EnoughError):
                call(batch)
            yield caught.pop()
    finally:
        handle.remove()


def gptq_block(options: GptqOptions, work: BlockWork) -> BlockResult:
    """Quantize the layers of `work.schemes`; each takes the values of its integers at once.

    Figures: `LAYER.error`, `LAYER.rtn`, `LAYER.total`: the squared error of its outputs, that of
    round to nearest for the same inputs, and the squared outputs themselves.
    """
    found: dict[str, Integers] = {}
    figures: dict[str, float] = {}
    for stage in stages_of(work.schemes):
        hessian = _hessian(work, stage[0])
        order = None
        if options.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
        factor = inverse_factor(hessian, options.damping, order)
        for name in stage:
            weight, scheme = layer_of(work.block, name).weight.data, work.schemes[name]
            importance = hessian.diagonal() if options.weighted else None
            scales, zeros = choose_scales(
                weight, scheme, search=options.search, importance=importance
            )
            q = gptq(weight, scales, zeros, scheme, factor, order)
            found[name] = q, scales, zeros
            figures |= _figures(name, weight, found[name], scheme, hessian, options.search)
            weight.copy_(dequantize(q, scales, zeros, scheme))
    return BlockResult(found, figures, words_of([figures]))


def _hessian(work: BlockWork, name: str) -> Tensor:
    columns = layer_of(work.block, name).weight.shape[1]
    hessian = Hessian(columns, sum(batch.shape[0] * batch.shape[1] for batch in work.hidden))
    for x in inputs_of(work.block, name, work.call, work.hidden):
        hessian.add(x)
    return hessian.matrix


def _figures(
    name: str,
    weight: Tensor,
    found: Integers,
    scheme: TensorScheme,
    hessian: Tensor,
    search: bool,
) -> dict[str, float]:
    """Of a layer whose weight is still float, on some of its output channels."""
    some = slice(None, None, -(-len(weight) // _MEASURED))
    part = weight[some]
    q, scales, zeros = found
    ours = dequantize(q[some], scales[some], None if zeros is None else zeros[some], scheme)
    nearest = dequantize(*quantize(part, scheme, search=search), scheme)
    return {
        f"{name}.error": output_error(ours - part, hessian),
        f"{name}.rtn": output_error(nearest - part, hessian),
        f"{name}.total": output_error(part, hessian),
    }


def effect_of(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Relative errors of the layers' outputs, all blocks together: `error` and that of round to
    nearest, `rtn_error`, for all layers and by kind.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    for block in figures:
        for name, value in block.items():
            layer, _, kind = name.rpartition(".")
            sums[name] += value
            sums[f".{kind}"] += value / max(block[f"{layer}.total"], 1e-30)
    count = sum(name.endswith(".total") for block in figures for name in block)
    effect = {
        "error": (sums[".error"] / max(count, 1)) ** 0.5,
        "rtn_error": (sums[".rtn"] / max(count, 1)) ** 0.5,
    }
    for name in [name for name in sums if name.endswith(".total") and name != ".total"]:
        layer, total = name.removesuffix(".total"), max(sums[name], 1e-30)
        effect[f"error.{layer}"] = (sums[f"{layer}.error"] / total) ** 0.5
        effect[f"rtn_error.{layer}"] = (sums[f"{layer}.rtn"] / total) ** 0.5
    return {name: float(f"{value:.6g}") for name, value in effect.items()}


def words_of(figures: Sequence[Mapping[str, float]]) -> str:
    effect = effect_of(figures)
    return f"error {effect['error']:.4f}, round to nearest {effect['rtn_error']:.4f}"


def gptq_bytes(shapes: Iterable[tuple[int, int]]) -> int:
    """Bytes that a block with layers of these shapes [N, K] needs beside its weights and inputs."""
    return max(
        (
            # H, and twice its size to invert; then H, its factor, and what the columns work on.
            4 * columns * max(3 * columns, 2 * columns + 2 * rows)
            + rows * columns
            + 12 * min(rows, _MEASURED) * columns
            for rows, columns in shapes
        ),
        default=0,
    )
