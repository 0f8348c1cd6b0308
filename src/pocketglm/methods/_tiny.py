"""A dense decoder's weights in fewer, shared and unified blocks.

Layers that are fused or share a block get one weight for all of them: the mean of theirs, or that
of the first or the last. A unified block computes x + attention(norm x) + FFN(norm x), where the
dense one's FFN saw attention's output too. Its weights are the dense ones stacked; both norms'
weights are multiplied into the columns that read them, so the one norm begins with ones. That is
exact, whatever the norms are; only what FFN reads of attention is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

from pocketglm.model.decoder import Decoder
from pocketglm.model.layers import bare_modules
from pocketglm.model.sizes import shapes
from pocketglm.model.spec import DecoderSpec

Source = Literal["average", "first", "last"]
_INPUTS = (
    ("attention.query", "attention_norm"),
    ("attention.key", "attention_norm"),
    ("attention.value", "attention_norm"),
)
_OUTPUTS = ("attention.output", "ffn.down")
_HEAD_NORMS = ("query_norm", "key_norm")


@dataclass(frozen=True, slots=True)
class Structure:
    """What becomes of a dense decoder. fused: its layers behind each new one; blocks: the block of
    each new layer.
    """

    fused: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    unify: bool
    top_k: int | None

    def members(self) -> list[tuple[int, ...]]:
        """The dense layers behind each block."""
        return [
            tuple(n for new, at in zip(self.fused, self.blocks, strict=True) if at == block
                  for n in new)
            for block in range(self.blocks[-1] + 1)
        ]  # fmt: skip


def evenly(count: int, groups: int) -> tuple[int, ...]:
    """The group of each of `count` neighbours, in `groups` whose sizes differ by one at most."""
    return tuple(index * groups // count for index in range(count))


def structure_of(
    layers: int, fuse: int, blocks: int | None, unify: bool, top_k: int | None
) -> Structure:
    """fuse: layers that become one; blocks: how many the new layers share, None = one each."""
    count = -(-layers // fuse)
    places = evenly(layers, count)
    fused = tuple(tuple(n for n in range(layers) if places[n] == new) for new in range(count))
    return Structure(fused, evenly(count, min(blocks or count, count)), unify, top_k)


def tiny_spec(spec: DecoderSpec, wanted: Structure) -> DecoderSpec:
    """The spec of the result.

    Raises:
        ValueError: layers that share a block have other sizes, or a block has four norms and
            cannot be unified.
    """
    ffn = spec.ffn()
    for members in wanted.members():
        sizes = [ffn[n] for n in members]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"layers {list(members)} have {sizes} FFN channels: layers that become one block "
                "should have the same"
            )
    return replace(
        spec,
        num_layers=len(wanted.blocks),
        layer_ffn=tuple(ffn[new[0]] for new in wanted.fused),
        layer_blocks=wanted.blocks,
        unified=wanted.unify,
        top_k=wanted.top_k or spec.top_k,
    )


def parameters(spec: DecoderSpec) -> int:
    """Values of a model, the embedding among them."""
    return sum(map(prod, shapes(spec).values()))


@torch.no_grad()
def tiny_model(model: Decoder, wanted: Structure, source: Source) -> Decoder:
    """A new model with that structure, in eval mode."""
    spec = tiny_spec(model.spec, wanted)
    old = model.state_dict()
    state = {name: value.clone() for name, value in old.items() if not name.startswith("blocks.")}
    for number, members in enumerate(wanted.members()):
        layers = [_layer(old, n) for n in members]
        if wanted.unify:
            layers = [unified(layer, model.spec) for layer in layers]
        for name in layers[0]:
            state[f"blocks.{number}.{name}"] = merged([layer[name] for layer in layers], source)
    with bare_modules():
        result = Decoder(spec)
    result.load_state_dict(state, assign=True)
    return result.eval()


def _layer(state: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    at = f"blocks.{index}."
    return {n.removeprefix(at): value for n, value in state.items() if n.startswith(at)}


def merged(values: Sequence[Tensor], source: Source) -> Tensor:
    """One tensor for several of a shape; of one, the same values."""
    if source != "average" or len(values) == 1:
        return values[-1 if source == "last" else 0].clone()
    return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)


def unified(layer: Mapping[str, Tensor], spec: DecoderSpec) -> dict[str, Tensor]:
    """A dense block's tensors as a unified one's, by their names in the block."""
    ffn = ("ffn.gate_up",) if spec.fused_ffn else ("ffn.gate", "ffn.up")
    inputs = (*_INPUTS, *((name, "ffn_norm") for name in ffn))
    columns = [layer[f"{name}.weight"] * layer[f"{norm}.weight"] for name, norm in inputs]
    state = {
        "attention_norm.weight": torch.ones_like(layer["attention_norm.weight"]),
        "unified.input.weight": torch.cat(columns),
        "unified.output.weight": torch.cat([layer[f"{n}.weight"] for n in _OUTPUTS], dim=1),
    }
    if spec.attention_bias or spec.ffn_bias:
        state["unified.input.bias"] = torch.cat(
            [
                layer.get(f"{name}.bias", torch.zeros(len(layer[f"{name}.weight"])))
                for name, _ in inputs
            ]
        )
    if spec.output_bias or spec.ffn_bias:
        width = torch.zeros(spec.hidden_size)
        state["unified.output.bias"] = sum((layer.get(f"{n}.bias", width) for n in _OUTPUTS), width)
    for name in _HEAD_NORMS:
        if f"attention.{name}.weight" in layer:
            state[f"unified.{name}.weight"] = layer[f"attention.{name}.weight"]
    return state
