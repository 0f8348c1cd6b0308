"""Scores of a model's heads, FFN channels and hidden dimensions, by the rules of ops/importance.py.

What a unit's output is: of a head its part of what `attention.output` reads, of an FFN channel what
`ffn.down` reads, of a hidden dimension what the norms write (everything else reads that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketglm.model.decoder import Decoder
from pocketglm.model.encoder import Encoder
from pocketglm.model.surgery import axes, layer_groups, layer_of
from pocketglm.ops.importance import MeanMagnitude, Part, influence, magnitudes, taylor

Model = Encoder | Decoder


@dataclass(frozen=True, slots=True)
class Batch:
    """ids int64 [B, S], mask [B, S]; labels int64 [B] of a classifier (Taylor needs them)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True, slots=True)
class UnitScores:
    """Float64 scores: groups and ffn of each layer, hidden of the whole model. Greater = keep."""

    groups: Sequence[Tensor]
    ffn: Sequence[Tensor]
    hidden: Tensor


def weight_scores(model: Model, power: int) -> UnitScores:
    """l1 (`power` 1) or l2 (2) of all weights that a unit has."""
    spec = model.spec
    groups: list[list[Part]] = [[] for _ in range(spec.num_layers)]
    ffn: list[list[Part]] = [[] for _ in range(spec.num_layers)]
    hidden: list[Part] = []
    for name, value in model.named_parameters():
        layer = layer_of(name)
        for dim, axis in enumerate(axes(name)):
            if axis == "hidden" and value.ndim == 2:
                hidden.append(Part(value.detach(), dim))
            elif axis in ("heads", "groups") and layer is not None:
                groups[layer].append(Part(value.detach(), dim))
            elif axis in ("ffn", "gate_up") and layer is not None:
                ffn[layer].append(Part(value.detach(), dim, 2 if axis == "gate_up" else 1))
    return UnitScores(
        [magnitudes(p, n, power) for p, n in zip(groups, layer_groups(spec), strict=True)],
        [magnitudes(p, n, power) for p, n in zip(ffn, spec.ffn(), strict=True)],
        magnitudes(hidden, spec.hidden_size, power, alike=True),
    )


def taylor_scores(model: Model, batches: Iterable[Batch]) -> UnitScores:
    """The mean over batches of |sum of w * dL/dw|; the model's gradients are used up.

    L: cross-entropy with the labels; of a decoder, with the next token.

    Raises:
        ValueError: no batch.
    """
    spec, blocks = model.spec, list(_blocks(model))
    found: list[UnitScores] = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            _loss(model, batch).backward()  # type: ignore[no-untyped-call]
        found.append(
            UnitScores(
                [
                    taylor([_with_gradient(b.attention.output.weight, 1)], n)
                    for b, n in zip(blocks, layer_groups(spec), strict=True)
                ],
                [
                    taylor([_with_gradient(b.ffn.down.weight, 1)], n)
                    for b, n in zip(blocks, spec.ffn(), strict=True)
                ],
                taylor(
                    [_with_gradient(p, 0) for norm in _norms(model) for p in norm.parameters()],
                    spec.hidden_size,
                ),
            )
        )
    model.zero_grad(set_to_none=True)
    if not found:
        raise ValueError("no batch")
    layers = range(spec.num_layers)
    return UnitScores(
        [torch.stack([scores.groups[i] for scores in found]).mean(0) for i in layers],
        [torch.stack([scores.ffn[i] for scores in found]).mean(0) for i in layers],
        torch.stack([scores.hidden for scores in found]).mean(0),
    )


def activation_scores(model: Model, batches: Iterable[Batch]) -> UnitScores:
    """The mean |output| of every unit over the batches' real tokens.

    Raises:
        ValueError: no token.
    """
    blocks, norms = list(_blocks(model)), list(_norms(model))
    inputs = [b.attention.output for b in blocks] + [b.ffn.down for b in blocks]
    means = {module: MeanMagnitude() for module in (*inputs, *norms)}
    read = {module: _reader(means[module], of_input=True) for module in inputs}
    read |= {module: _reader(means[module], of_input=False) for module in norms}
    _watch(model, batches, read)
    spec, count = model.spec, len(blocks)
    groups = zip(inputs[:count], layer_groups(spec), strict=True)
    ffn = zip(inputs[count:], spec.ffn(), strict=True)
    hidden = [means[norm].scores(spec.hidden_size) for norm in norms]
    return UnitScores(
        [means[module].scores(n) for module, n in groups],
        [means[module].scores(n) for module, n in ffn],
        torch.stack(hidden).sum(0),
    )


def layer_influence(model: Model, batches: Iterable[Batch]) -> list[float]:
    """Mean 1 - cos(input, output) of each layer over the batches' real tokens.

    Raises:
        ValueError: no token.
    """
    blocks = list(_blocks(model))
    sums = dict.fromkeys(blocks, 0.0)
    tokens = 0

    def reader(block: nn.Module) -> Any:
        def read(inputs: tuple[Any, ...], output: Tensor, mask: Tensor) -> None:
            sums[block] += influence(inputs[0], output, mask)

        return read

    for batch in batches:
        tokens += int(batch.mask.sum())
        _watch(model, [batch], {block: reader(block) for block in blocks})
    if not tokens:
        raise ValueError("no token")
    return [sums[block] / tokens for block in blocks]


# --- walking -------------------------------------------------------------------------------------


def _blocks(model: Model) -> Iterable[Any]:
    return model.blocks


def _norms(model: Model) -> Iterable[nn.Module]:
    """The norms over the hidden size, not those of single heads."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and axes(f"{name}.weight") == ("hidden",):
            yield module


def _with_gradient(weight: Tensor, dim: int) -> tuple[Part, Tensor]:
    gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
    return Part(weight.detach(), dim), gradient


def _loss(model: Model, batch: Batch) -> Tensor:
    if isinstance(model, Decoder):
        logits = model(batch.ids, batch.mask)[:, :-1]
        targets = batch.ids[:, 1:].masked_fill(batch.mask[:, 1:] == 0, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    if batch.labels is None:
        raise ValueError("taylor needs labels")
    return F.cross_entropy(model(batch.ids, batch.mask), batch.labels)


_Read = Callable[[tuple[Any, ...], Tensor, Tensor], None]


def _reader(mean: MeanMagnitude, *, of_input: bool) -> _Read:
    def read(inputs: tuple[Any, ...], output: Tensor, mask: Tensor) -> None:
        mean.add(inputs[0] if of_input else output, mask)

    return read


@torch.inference_mode()
def _watch(model: Model, batches: Iterable[Batch], read: dict[Any, _Read]) -> None:
    """Run the model; `read` gets the inputs, output and mask of each of its modules."""
    current: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        read[module](inputs, output, current[-1])

    handles = [module.register_forward_hook(hook) for module in read]
    try:
        for batch in batches:
            current.append(batch.mask)
            model.hidden(batch.ids, batch.mask)
    finally:
        for handle in handles:
            handle.remove()
