"""Reading what layers inside of a model compute, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from torch import Tensor, nn

from pocketglm.model.decoder import Decoder
from pocketglm.model.layers import Factored, Passage

Features = Literal["none", "hidden", "relations"]


def taps(model: nn.Module, features: Features, layers: Sequence[int]) -> list[nn.Module]:
    """The modules whose outputs are the features: those after the layers, or query, key and value
    of each (before rotary positions, which both models add alike)."""
    if features == "hidden" and isinstance(model, Decoder):
        return [model.ends[layer] for layer in layers]  # layers may share a block
    blocks = [cast(Any, model).blocks[layer] for layer in layers]
    if features == "relations":
        return [
            part
            for block in blocks
            for part in (block.attention.query, block.attention.key, block.attention.value)
        ]
    return blocks if features == "hidden" else []


def width_of(tap: nn.Module) -> int:
    """Features of a tap's output."""
    if isinstance(tap, nn.Linear | Factored):
        return tap.out_features
    if isinstance(tap, Passage):
        return tap.width
    size: int = cast(Any, tap).attention.query.in_features
    return size


def tapped(modules: Sequence[nn.Module], run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `run` returns, and what each of the modules put out meanwhile."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[number] = output

        return hook

    handles = [module.register_forward_hook(keep(number)) for number, module in enumerate(modules)]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return result, [found[number] for number in range(len(modules))]
