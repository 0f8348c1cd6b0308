"""Cut a model: some layers, heads, FFN channels and hidden dimensions stay, with their weights.

Nothing is retrained or rescaled. A removed head or channel whose output was 0 changes nothing (but
rounding). A removed hidden dimension always does: each norm's mean and variance are from then on
those of the dimensions that stay, even if the removed one was 0.

A head is cut with its key/value group: in an encoder a group is one head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from pocketglm.model.decoder import Decoder
from pocketglm.model.encoder import Encoder
from pocketglm.model.layers import bare_modules
from pocketglm.model.spec import DecoderSpec, EncoderSpec

Spec = EncoderSpec | DecoderSpec
AnyModel = TypeVar("AnyModel", bound=Encoder | Decoder)
Axis = Literal["", "hidden", "heads", "groups", "ffn", "gate_up"]

# Module -> what its weight's dimensions run over; "" is never cut. Norms are not listed.
_AXES: dict[str, tuple[Axis, Axis]] = {
    "embeddings.tokens": ("", "hidden"),
    "embeddings.positions": ("", "hidden"),
    "embeddings.types": ("", "hidden"),
    "tokens": ("", "hidden"),
    "head": ("", "hidden"),
    "classifier": ("", "hidden"),
    "pooler": ("hidden", "hidden"),
    "attention.query": ("heads", "hidden"),
    "attention.key": ("groups", "hidden"),
    "attention.value": ("groups", "hidden"),
    "attention.output": ("hidden", "heads"),
    "ffn.up": ("ffn", "hidden"),
    "ffn.gate": ("ffn", "hidden"),
    "ffn.gate_up": ("gate_up", "hidden"),  # the gate's channels, then those of up
    "ffn.down": ("hidden", "ffn"),
}
_BY_HEAD = ("attention.query_norm", "attention.key_norm")  # over the features of one head


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays, as growing indices. groups, ffn: of each layer of the model, kept or not."""

    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]


def layer_groups(spec: Spec) -> tuple[int, ...]:
    """Key/value groups of each layer; of an encoder its heads."""
    if isinstance(spec, EncoderSpec):
        return spec.heads()
    return (spec.num_kv_heads,) * spec.num_layers


def everything(spec: Spec) -> Kept:
    """All of a model stays."""
    return Kept(
        layers=tuple(range(spec.num_layers)),
        groups=tuple(tuple(range(n)) for n in layer_groups(spec)),
        ffn=tuple(tuple(range(n)) for n in spec.ffn()),
        hidden=tuple(range(spec.hidden_size)),
    )


def cut_spec(spec: Spec, kept: Kept) -> Spec:
    """The spec of what stays.

    Raises:
        ValueError: indices that are not in the model or not in order, or nothing stays, or a
            decoder's layers would have different heads, or its blocks are shared or unified.
    """
    _check(spec, kept)
    if isinstance(spec, DecoderSpec) and (spec.layer_blocks or spec.unified):
        raise ValueError("shared and unified blocks are not cut")
    groups = tuple(len(kept.groups[layer]) for layer in kept.layers)
    ffn = tuple(len(kept.ffn[layer]) for layer in kept.layers)
    ranks = tuple(spec.ranks(layer) for layer in kept.layers)
    sizes: dict[str, Any] = {"num_layers": len(kept.layers), "hidden_size": len(kept.hidden)}
    if isinstance(spec, EncoderSpec):
        # The head size stands: it must not be derived anew from the smaller widths.
        return replace(spec, **sizes, layer_heads=groups, layer_ffn=ffn, layer_ranks=ranks)
    if len(set(groups)) > 1:
        raise ValueError(f"a decoder's layers keep the same number of groups, not {groups}")
    return replace(
        spec,
        **sizes,
        num_heads=spec.num_heads // spec.num_kv_heads * groups[0],
        num_kv_heads=groups[0],
        layer_ffn=ffn,
        layer_ranks=ranks,
    )


def _check(spec: Spec, kept: Kept) -> None:
    whole = everything(spec)
    if len(kept.groups) != len(whole.groups) or len(kept.ffn) != len(whole.ffn):
        raise ValueError(f"indices for {len(kept.groups)} layers of {spec.num_layers}")
    layers = zip((*kept.groups, *kept.ffn), (*whole.groups, *whole.ffn), strict=True)
    for found, known in (
        (kept.layers, whole.layers),
        (kept.hidden, whole.hidden),
        *layers,
    ):
        if not found or list(found) != sorted(set(found)) or not set(found) <= set(known):
            raise ValueError(f"kept {list(found)[:8]}: should grow within 0..{len(known) - 1}")


def axes(name: str) -> tuple[Axis, ...]:
    """What the dimensions of one of our parameters run over."""
    module, _, parameter = re.sub(r"^blocks\.\d+\.", "", name).rpartition(".")
    if module in _BY_HEAD:
        return ("",)
    whole, _, factor = module.rpartition(".")
    if factor == "factor_in":
        return ("", _AXES[whole][1])
    if factor == "factor_out":
        return (_AXES[whole][0], "")[: 1 if parameter == "bias" else 2]
    if parameter == "bias" or module not in _AXES:
        return _AXES.get(module, ("hidden", ""))[:1]
    return _AXES[module]


def layer_of(name: str) -> int | None:
    """The layer that a parameter of ours belongs to."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None


def new_name(name: str, kept: Kept) -> str | None:
    """A parameter's name after the cut; None: its layer goes."""
    layer = layer_of(name)
    if layer is None:
        return name
    if layer not in kept.layers:
        return None
    return re.sub(r"\d+", str(kept.layers.index(layer)), name, count=1)


def indices(name: str, spec: Spec, kept: Kept) -> Iterator[tuple[int, list[int]]]:
    """(dimension, indices that stay) of a parameter, for the dimensions that shrink."""
    layer = layer_of(name)
    groups = kept.groups[layer] if layer is not None else ()
    ffn = kept.ffn[layer] if layer is not None else ()
    size = spec.head_dim
    ratio = 1 if isinstance(spec, EncoderSpec) else spec.num_heads // spec.num_kv_heads
    for dim, axis in enumerate(axes(name)):
        whole = 0
        stay: list[int] = []
        if axis == "hidden":
            whole, stay = spec.hidden_size, list(kept.hidden)
        elif axis in ("heads", "groups") and layer is not None:
            width = size * ratio if axis == "heads" else size
            whole = layer_groups(spec)[layer] * width
            stay = [n for group in groups for n in range(group * width, (group + 1) * width)]
        elif axis in ("ffn", "gate_up") and layer is not None:
            channels = spec.ffn()[layer]
            copies = 2 if axis == "gate_up" else 1
            whole = channels * copies
            stay = [n + channels * copy for copy in range(copies) for n in ffn]
        if len(stay) < whole:
            yield dim, stay


def cut_tensor(name: str, value: Tensor, spec: Spec, kept: Kept) -> Tensor:
    """What stays of a parameter; the very same tensor where nothing of it goes."""
    for dim, stay in indices(name, spec, kept):
        value = value.index_select(dim, torch.tensor(stay, device=value.device))
    return value


def cut(model: AnyModel, kept: Kept) -> AnyModel:
    """A new model of the parts that stay, with copies of their weights; in eval mode.

    Raises:
        ValueError: as `cut_spec`.
    """
    spec = cut_spec(model.spec, kept)
    state = {
        new: cut_tensor(name, value.detach(), model.spec, kept).clone()
        for name, value in model.state_dict().items()
        if (new := new_name(name, kept)) is not None
    }
    make = cast(Callable[[Any], AnyModel], type(model))
    with bare_modules():
        result = make(spec)
    result.load_state_dict(state, assign=True)
    return cast(AnyModel, result.eval())
