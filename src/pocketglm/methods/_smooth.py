"""SmoothQuant: outliers of a layer's input move into its weight, which is quantized per channel.

Xiao et al. 2023, arXiv:2211.10438: s = max|x|^alpha / max|w|^(1 - alpha) of each input channel; the
weight's columns are multiplied by s, and whatever makes the input is divided by it, so that the
model computes the same. That needs a maker that can absorb the division exactly:

    layer                    input made by
    attention.output         attention.value: a channel of the mix is a mean of that channel
    ffn.down, if ReLU        ffn.up: relu(x / s) = relu(x) / s

Not query, key, value and ffn.up: in a post-norm block their input, a LayerNorm's output, is also
the residual, which would be divided as well (the paper's models are pre-norm). Not ffn.down behind
GELU, which is not linear.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pocketglm.model.encoder import Encoder
from pocketglm.model.spec import EncoderSpec

_LEAST = 1e-5  # of the two maxima and of s, as in the paper's own code


def smoothable(spec: EncoderSpec, layers: Collection[str]) -> dict[str, str]:
    """Of the layers named, those that can be smoothed -> the layer that makes their input. Of a
    factorized one the factor that reads, or makes, it.
    """
    pairs = {}
    for index in range(spec.num_layers):
        at, ranks = f"blocks.{index}.", dict(spec.ranks(index))
        wanted = [("attention.output", "attention.value")]
        wanted += [("ffn.down", "ffn.up")] if spec.activation == "relu" else []
        for reader, maker in wanted:
            ends = ".factor_in" * (reader in ranks), ".factor_out" * (maker in ranks)
            pairs[f"{at}{reader}{ends[0]}"] = f"{at}{maker}{ends[1]}"
    return {layer: maker for layer, maker in pairs.items() if layer in layers}


@torch.no_grad()
def smooth(
    model: Encoder, pairs: Mapping[str, str], maxima: Mapping[str, Tensor], alpha: float
) -> None:
    """Rescale the layers and makers in `pairs` in place. maxima: of |x| by channel, float32 [K]."""
    for layer, maker in pairs.items():
        reader, source = (cast(nn.Linear, model.get_submodule(name)) for name in (layer, maker))
        s = factors(maxima[layer], reader.weight.abs().amax(0), alpha)
        reader.weight.mul_(s)
        source.weight.div_(s[:, None])
        source.bias.div_(s)


def factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s [K] of the channels' greatest |x| and |w|; 1 where a channel is never used."""
    used = (inputs > 0) & (weights > 0)
    s = inputs.clamp(min=_LEAST) ** alpha / weights.clamp(min=_LEAST) ** (1 - alpha)
    return torch.where(used, s.clamp(min=_LEAST), torch.ones_like(s))
