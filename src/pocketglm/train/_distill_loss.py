"""The losses of knowledge distillation, each by row or position; the caller weighs and sums them.

Soft targets: Hinton et al. 2015, https://arxiv.org/abs/1503.02531. Hidden states: FitNets, Romero
et al. 2015, https://arxiv.org/abs/1412.6550. Relations: MiniLMv2, Wang et al. 2021,
https://arxiv.org/abs/2012.15828. All compute in float32, whatever autocast says.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_NEVER = -1e4  # a logit whose probability is exactly 0 in float32, while its logarithm stays finite


def soft_targets(
    student: Tensor, teacher: Tensor, temperature: float, *, reverse: bool = False
) -> Tensor:
    """T^2 * KL(teacher || student) of logits [..., C] divided by T -> [...], in nats.

    T^2 keeps the gradient's size the same at every temperature. reverse: KL(student || teacher).
    """
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher.float() / temperature, dim=-1)
    p, q = (ours, theirs) if reverse else (theirs, ours)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def hidden_distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of states [B, S, H] over the features and the real tokens -> [B]."""
    square = (student.float() - teacher.float()).square().mean(-1)
    real = mask.to(square.dtype)
    return (square * real).sum(-1) / real.sum(-1).clamp(min=1)


def relation_distance(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """KL of the teacher's token-to-token relations from the student's -> [B].

    Queries, keys or values [B, S, W], of any two widths that `heads` divides: each is split into
    `heads` parts, whose scaled dot products with themselves, softmax over the real tokens, are the
    relations. Mean over heads and real tokens.
    """
    with torch.autocast(mask.device.type, enabled=False):
        ours, theirs = (_relations(values, mask, heads) for values in (student, teacher))
        divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean(1)  # [B, S]
    real = mask.to(divergence.dtype)
    return (divergence * real).sum(-1) / real.sum(-1).clamp(min=1)


def _relations(values: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Log-probabilities [B, heads, S, S] of each token's relation to the others."""
    rows, tokens, width = values.shape
    parts = values.float().reshape(rows, tokens, heads, width // heads).transpose(1, 2)
    products = parts @ parts.transpose(-1, -2) / math.sqrt(parts.shape[-1])
    return F.log_softmax(products.masked_fill(mask[:, None, None, :] == 0, _NEVER), dim=-1)
