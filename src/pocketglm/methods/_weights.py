"""Which weights become INT8 or INT4, and in which scheme: the settings that the methods share.

INT8 per output channel or INT4 by group, symmetric or not; the rule and the scale search are in
`ops/affine.py`. The token embedding and the head stay float unless they are asked for; a tied head
is the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from pydantic import Field

from pocketglm.artifacts.checkpoint import Checkpoint, TensorInfo
from pocketglm.artifacts.scheme import Activation, TensorScheme
from pocketglm.contracts import Config, StepContext
from pocketglm.model.hf import (
    decoder_spec_of,
    is_decoder,
    is_embedding,
    is_head,
    is_linear,
    model_spec_of,
)
from pocketglm.model.layers import Block, bare_modules
from pocketglm.ops.affine import group_reason, quantize
from pocketglm.train._calibration import calibration_reasons

Bits = Literal[4, 8]


class WeightConfig(Config):
    """Settings; `docs/extensions.md` is generated from the descriptions."""

    bits: Bits = Field(8, description="bits of the linear layers")
    group_size: Literal[32, 64, 128] | None = Field(
        None, description="columns that share a scale; default: the row (8 bits), 32 (4 bits)"
    )
    symmetric: bool = Field(True, description="no zero points; what every runtime reads right")
    embeddings: Bits | None = Field(None, description="bits of the token embedding; None = float")
    head: Bits | None = Field(
        None, description="bits of classifier, pooler or lm_head; None = float"
    )
    activation: Activation | None = Field(
        None,
        description="how a runtime may quantize the layers' inputs; default: none for 4 bits, "
        "dynamic_tensor for 8, dynamic_block for 8 in groups",
    )
    search: bool = Field(True, description="look for the scale with the least squared error")
    skip: list[str] = Field([], description="patterns (*, ?) of tensor names that stay float")


def skip_reasons(skip: Sequence[str], ckpt: Checkpoint) -> list[str]:
    """Patterns that match nothing."""
    return [
        f"skip: '{pattern}' matches no tensor, e.g. '*.layer.0.*'"
        for pattern in skip
        if not any(fnmatchcase(name, pattern) for name in ckpt.tensors)
    ]


def weight_reasons(config: WeightConfig, ckpt: Checkpoint) -> list[str]:
    if ckpt.manifest.schemes or "quantization_config" in ckpt.config:
        return ["it is already quantized: start from the float checkpoint"]
    reasons = skip_reasons(config.skip, ckpt)
    if config.activation == "static":
        reasons.append("activation: static needs calibration data, which this method does not see")
    schemes = (select_scheme(config, ckpt, info) for info in ckpt.tensors.values())
    grouped = {s.group_size for s in schemes if s and s.activation == "dynamic_tensor"} - {None}
    reasons += [
        f"activation: dynamic_tensor goes with whole rows, not with groups of {size}: no runtime "
        "has a kernel for it; leave it out, or set dynamic_block (fast) or none (exact)"
        for size in grouped
    ]
    if config.head != config.embeddings and config.head and _tied(ckpt):
        reasons.append(
            f"head={config.head}: the head is the token embedding (tied): set "
            f"embeddings={config.head}, which quantizes both"
        )
    chosen = {info: select_scheme(config, ckpt, info) for info in ckpt.tensors.values()}
    if not any(chosen.values()):
        reasons.append("it has no tensor to quantize with these settings")
    for info, scheme in chosen.items():
        if scheme and (reason := group_reason(info.name, info.shape[1], scheme)):
            reasons.append(reason)
    return reasons


def _tied(ckpt: Checkpoint) -> bool:
    return is_decoder(ckpt) and decoder_spec_of(ckpt).tied


def select_scheme(config: WeightConfig, ckpt: Checkpoint, info: TensorInfo) -> TensorScheme | None:
    if info.dtype not in ("F64", "F32", "F16", "BF16") or len(info.shape) != 2:
        return None
    if any(fnmatchcase(info.name, pattern) for pattern in config.skip):
        return None
    if is_linear(info.name, info.shape):
        return _scheme(config, config.bits, linear=True)
    if is_head(info.name):
        return _scheme(config, config.head, linear=True)
    # The position and type tables are too small to be worth their error.
    if is_embedding(info.name) and info.shape[0] == ckpt.config.get("vocab_size"):
        # A tied table is also the head, a linear layer. The forms by tensor and by token stay away
        # from it: transformers would round an embedding's input, which is token ids.
        by_block = config.activation == "dynamic_block" and _tied(ckpt)
        return _scheme(config, config.embeddings, linear=by_block)
    return None


def _scheme(config: WeightConfig, bits: Bits | None, *, linear: bool) -> TensorScheme | None:
    if bits is None:
        return None
    group = (config.group_size if bits == config.bits else None) or (32 if bits == 4 else None)
    usual: Activation = "none" if bits == 4 else "dynamic_block" if group else "dynamic_tensor"
    return TensorScheme(
        bits=bits,
        group_size=group,
        symmetric=config.symmetric,
        activation=(config.activation or usual) if linear else "none",
    )


class BlockConfig(WeightConfig):
    """Settings of the methods that see a block's inputs."""

    bits: Bits = Field(4, description="bits of the linear layers")
    tokens: int = Field(8192, ge=1, description="tokens of the training rows to calibrate with")


def block_reasons(config: BlockConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    """As `BlockMethod.check`."""
    return weight_reasons(config, ckpt) + calibration_reasons(ckpt, context)


def round_to_nearest(
    config: WeightConfig, weight: torch.Tensor, scheme: TensorScheme
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `TensorMethod.quantize`."""
    return quantize(weight, scheme, search=config.search)


def block_shapes(ckpt: Checkpoint, index: int) -> dict[str, tuple[int, int]]:
    """[N, K] of the linear layers of one block, by their names in it."""
    spec = model_spec_of(ckpt)
    with bare_modules():
        block = Block(spec.block(spec.first_layers()[index]))
    found = {}
    for name, value in block.state_dict().items():
        if value.ndim == 2:
            found[name.removesuffix(".weight")] = (value.shape[0], value.shape[1])
    return found
