"""A whole model, block by block, on rows of the task: what enters each block and each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import StepContext
from pocketglm.model.decoder import Decoder
from pocketglm.model.encoder import Encoder
from pocketglm.model.layers import Block, rotation
from pocketglm.train._calibration import batches_of, calibration_rows

Model = Encoder | Decoder


def calibration_batches(ckpt: Checkpoint, context: StepContext, tokens: int) -> list[Tensor]:
    """Training rows as int64 [B, S], of one length in each batch, `tokens` in all."""
    rows = calibration_rows(ckpt, context, tokens)
    return [torch.from_numpy(batch) for batch in batches_of(rows)]


@torch.inference_mode()
def embedded(model: Model, batches: Sequence[Tensor]) -> list[Tensor]:
    """What enters the first block: [B, S, H] for each batch."""
    table = model.embeddings if isinstance(model, Encoder) else model.tokens
    return [table(batch) for batch in batches]


def block_of(model: Model, index: int) -> Block:
    """The block that layer `index` uses."""
    return cast(Block, model.blocks[model.spec.blocks()[index]])


@torch.inference_mode()
def call(model: Model, block: Block, x: Tensor) -> Tensor:
    """One block of `model`: x [B, S, H], rows without padding, each from position 0."""
    rope = block.spec.rope
    turn = rotation(rope, torch.arange(x.shape[1])[None], x.dtype) if rope else None
    attend = torch.ones(1, 1, 1, 1).bool() if isinstance(model, Encoder) else None
    return cast(Tensor, block(x, attend, turn))


@torch.inference_mode()
def finish(model: Model, x: Tensor) -> Tensor:
    """What the model makes of the last block's output [B, S, H]; as `answers`."""
    if isinstance(model, Decoder):
        return model.logits(model.norm(x)).flatten(0, -2)
    pooled = model.pool(x, torch.ones(x.shape[:2], dtype=torch.long))
    if model.classifier is None:
        return nn.functional.normalize(pooled, dim=-1)
    return cast(Tensor, model.classifier(pooled))


@torch.inference_mode()
def answers(model: Model, batch: Tensor) -> Tensor:
    """What the model gives for rows without padding [B, S]: logits or embeddings [B, C], of a
    decoder logits of all tokens [B * S, V].
    """
    found: Tensor = model(batch, torch.ones_like(batch))
    return found.flatten(0, -2)
