"""New tokens for a decoder that is about to learn them.

A new row of the embedding begins as the mean of all rows (Hewitt 2021, "Initializing New Word
Embeddings for Pretrained Language Models") plus normal noise of their own spread, which tells the
new tokens apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pocketglm.model.decoder import Decoder
from pocketglm.model.layers import bare_modules

_MULTIPLE = 64  # rows of an embedding, for the kernels


def rows_for(rows: int, size: int) -> int:
    """Rows of an embedding of `rows` that shall have room for `size` tokens."""
    return rows if size <= rows else -(-size // _MULTIPLE) * _MULTIPLE


@torch.no_grad()
def with_rows(model: Decoder, first: int, size: int, seed: int) -> Decoder:
    """The model with new rows `first` to `size` - 1 in embedding and head.

    These grow, if need be, to a multiple of 64 rows. The other rows and weights are the same
    tensors as `model`'s, or equal to them.
    """
    rows = rows_for(model.spec.vocab_size, size)
    stop = rows if rows > model.spec.vocab_size else size
    with bare_modules():
        grown = Decoder(replace(model.spec, vocab_size=rows))
    state = model.state_dict()
    for name in ("tokens.weight", "head.weight"):
        if name in state:
            state[name] = _with_new(state[name], first, stop, seed)
    grown.load_state_dict(state, assign=True)
    return grown.train(model.training)


def _with_new(weight: Tensor, first: int, stop: int, seed: int) -> Tensor:
    """`weight` [V, H] with the rows `first` to `stop` - 1 made new."""
    known = weight[:first].float()
    noise = np.random.default_rng(seed).standard_normal((stop - first, weight.shape[1]), np.float32)
    new = known.mean(0) + known.std() * torch.from_numpy(noise)
    return torch.cat([weight[:first], new.to(weight.dtype), weight[stop:]])


class _LearnedRows(nn.Module):
    """Takes some rows of a frozen weight from a parameter."""

    def __init__(self, weight: Tensor, ids: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.ids: Tensor = ids
        self.rows = nn.Parameter(weight[ids].float())

    def forward(self, weight: Tensor) -> Tensor:
        """[V, H] -> [V, H]."""
        return weight.index_copy(0, self.ids, self.rows.to(weight.dtype))


def learn_rows(model: Decoder, ids: Sequence[int]) -> None:
    """Let the rows `ids` of a frozen model's embedding and head learn, in place."""
    chosen = torch.tensor(sorted(ids))
    for part in (model.tokens, model.head):
        if part is not None:
            weight = part.weight
            parametrize.register_parametrization(part, "weight", _LearnedRows(weight, chosen))


def settle_rows(model: Decoder) -> None:
    """Put the rows of `learn_rows` into the weights; the model's state has its usual names."""
    for part in (model.tokens, model.head):
        if part is not None and parametrize.is_parametrized(part):
            parametrize.remove_parametrizations(part, "weight")
