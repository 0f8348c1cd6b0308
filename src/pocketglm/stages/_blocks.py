"""A model's parts by themselves, from a checkpoint: what enters the first block, and each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import Ids
from pocketglm.model.encoder import Embeddings
from pocketglm.model.hf import model_spec_of, stored_name
from pocketglm.model.layers import Block, bare_modules, rotation
from pocketglm.model.spec import DecoderSpec
from pocketglm.ops.stored import as_tensor, check_finite, read_weight
from pocketglm.stages._step import row_ranges

_CHUNK = 1 << 20  # elements of a table that are read at a time

TableRows = Callable[[Tensor], Tensor]  # what a table's rows [N, K] will be, once it is quantized


def cut(hidden: Tensor, batches: Sequence[Ids]) -> list[Tensor]:
    """Views [B, S, H] of the batches' tokens in hidden [T, H]."""
    parts = torch.split(hidden, [batch.size for batch in batches])
    return [part.view(*ids.shape, -1) for part, ids in zip(parts, batches, strict=True)]


@dataclass(frozen=True, slots=True)
class Parts:
    """The checkpoint's parts in float32; quantized weights are dequantized."""

    ckpt: Checkpoint

    @property
    def table(self) -> str:
        """The stored name of the table of token embeddings."""
        causal = isinstance(model_spec_of(self.ckpt), DecoderSpec)
        return stored_name(self.ckpt, "tokens.weight" if causal else "embeddings.tokens.weight")

    def embedded(self, batches: Sequence[Ids], rows: TableRows) -> Tensor:
        """What enters the first block: float32 [T, H], the tokens of all batches one after another.

        rows: makes rows of the token table what they will be.
        """
        spec = model_spec_of(self.ckpt)
        if isinstance(spec, DecoderSpec):
            tokens = np.concatenate([batch.reshape(-1) for batch in batches])
            return self._rows(tokens, rows)
        with bare_modules():
            model = Embeddings(spec)
        state = {n: self.read(f"embeddings.{n}") for n in model.state_dict()}
        state["tokens.weight"] = rows(state["tokens.weight"])
        model.load_state_dict(state, assign=True)
        with torch.inference_mode():
            found = [model.eval()(torch.from_numpy(batch)).flatten(0, 1) for batch in batches]
        return torch.cat(found).clone()

    def _rows(self, tokens: Ids, rows: TableRows) -> Tensor:
        """Rows `tokens` [T] of the token table, of which a chunk at a time is in memory."""
        stored = self.table
        info = self.ckpt.tensors[stored]
        found = torch.empty(len(tokens), info.shape[1])
        order = np.argsort(tokens, kind="stable")
        for start, stop in row_ranges(info, _CHUNK):
            first, last = np.searchsorted(tokens[order], [start, stop or info.shape[0]])
            places = order[first:last]
            if len(places):
                chunk = as_tensor(self.ckpt.read(stored, start, stop)).float()
                used, where = np.unique(tokens[places] - start, return_inverse=True)
                values = chunk[torch.from_numpy(used)]
                check_finite(self.ckpt, stored, values, start)
                found[torch.from_numpy(places)] = rows(values)[torch.from_numpy(where)]
        return found

    def block(self, index: int) -> Block:
        """One block, in eval mode; layers may share it.

        Raises:
            CheckpointError: a weight of it holds NaN or infinity.
        """
        spec = model_spec_of(self.ckpt)
        with bare_modules():
            block = Block(spec.block(spec.first_layers()[index])).eval()
        names = list(block.state_dict())
        block.load_state_dict({n: self.read(f"blocks.{index}.{n}") for n in names}, assign=True)
        return block.requires_grad_(False)

    def call(self, block: Block, x: Tensor) -> Tensor:
        """x [B, S, H], rows without padding, each from position 0 -> [B, S, H]."""
        rope = block.spec.rope
        turn = rotation(rope, torch.arange(x.shape[1])[None], x.dtype) if rope else None
        causal = isinstance(model_spec_of(self.ckpt), DecoderSpec)
        result: Tensor = block(x, None if causal else torch.ones(1, 1, 1, 1).bool(), turn)
        return result

    def read(self, name: str) -> Tensor:
        """A parameter by our name."""
        stored = stored_name(self.ckpt, name)
        values = read_weight(self.ckpt, stored)
        check_finite(self.ckpt, stored, values)
        return values
