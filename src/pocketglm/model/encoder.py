"""The one encoder definition: embeddings, blocks, pooling and a head, built from an `EncoderSpec`.

BERT: Devlin et al. 2019, https://arxiv.org/abs/1810.04805. Mean-pooled sentence embeddings:
Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketglm.errors import UsageError
from pocketglm.model.layers import Block, init_weights
from pocketglm.model.spec import EncoderSpec, Pooling


class Embeddings(nn.Module):
    """Word, position and type embeddings, summed and normalized. Every token is of type 0."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.positions = nn.Embedding(spec.max_position_embeddings, spec.hidden_size)
        self.types = nn.Embedding(spec.type_vocab_size, spec.hidden_size)
        self.norm = nn.LayerNorm(spec.hidden_size, spec.layer_norm_eps)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, S] -> [B, S, H]."""
        x = self.tokens(ids) + self.types.weight[0] + self.positions.weight[: ids.shape[1]]
        result: Tensor = self.dropout(self.norm(x))
        return result


class Encoder(nn.Module):
    """Right-padded ids in, class logits or unit-length embeddings out."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.hidden_size
        self.embeddings = Embeddings(spec)
        self.blocks = nn.ModuleList(Block(spec.block(i)) for i in range(spec.num_layers))
        self.pooler = nn.Linear(width, width) if spec.pooler else None
        self.classifier = nn.Linear(width, spec.num_labels) if spec.num_labels else None
        drop = spec.dropout if spec.classifier_dropout is None else spec.classifier_dropout
        self.dropout = nn.Dropout(drop)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, S], mask [B, S] of 0/1 -> float32 [B, C].

        C classes: logits; or C = hidden size: the L2-normalized embedding.

        Raises:
            UsageError: S is more than the model has positions.
        """
        pooled = self.pool(self.hidden(ids, mask), mask)
        if self.classifier is None:
            return F.normalize(pooled.float(), dim=-1)
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits.float()

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last block's output [B, S, H]; ids and mask as in `forward`."""
        limit = self.spec.max_position_embeddings
        if ids.shape[1] > limit:
            raise UsageError(
                f"{ids.shape[1]} tokens in a row, the model has {limit} positions",
                f"cut the text: --max-length {limit} or less",
            )
        attend = mask.bool()[:, None, None, :]
        x: Tensor = self.embeddings(ids)
        for block in self.blocks:
            x = block(x, attend)
        return x

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """What the head sees: hidden [B, S, H], mask [B, S] -> [B, H]."""
        if self.spec.pooling == "mean":
            weight = mask.to(hidden.dtype)[:, :, None]
            return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        first = hidden[:, 0]
        if self.classifier is None or self.pooler is None:
            return first
        return torch.tanh(self.pooler(first))


def init_encoder(spec: EncoderSpec, seed: int = 0) -> Encoder:
    """A new encoder with BERT's random initialization; in eval mode.

    The same spec and seed give the same weights; the global random state is not touched.
    """
    with torch.device("meta"):
        model = Encoder(spec)
    model.to_empty(device="cpu")
    init_weights(model, torch.Generator().manual_seed(seed))
    return model.eval()


def with_classifier(
    model: Encoder, num_labels: int, pooling: Pooling | None = None, seed: int = 0
) -> Encoder:
    """A copy of `model` with a new classification head of `num_labels`; in eval mode.

    pooling: None keeps the model's. With "cls" the model's pooler is taken over, or a new one
    made; with "mean" it is dropped. New layers are normal(0, 0.02) with bias 0.
    """
    pooling = pooling or model.spec.pooling
    spec = replace(
        model.spec,
        head="classification",
        num_labels=num_labels,
        pooling=pooling,
        pooler=pooling == "cls",
    )
    with torch.device("meta"):
        result = Encoder(spec)
    old = model.state_dict()
    wanted = [n for n in result.state_dict() if not n.startswith("classifier.") and n in old]
    result.load_state_dict({n: old[n].clone() for n in wanted}, strict=False, assign=True)
    generator = torch.Generator().manual_seed(seed)
    for part in (result.pooler, result.classifier):
        if part is not None and part.weight.is_meta:
            part.to_empty(device="cpu")
            init_weights(part, generator)
    return result.eval()
