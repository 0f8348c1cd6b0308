"""A model's parts by themselves, from a checkpoint: what enters the first block, and each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import Ids
from pocketglm.model.encoder import Embeddings
from pocketglm.model.hf import decoder_spec_of, model_spec_of, stored_name
from pocketglm.model.layers import Block, Past, bare_modules, rotation
from pocketglm.model.spec import DecoderSpec
from pocketglm.ops.stored import check_finite, read_weight

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
        spec = model_spec_of(self.ckpt)
        found = torch.empty(len(tokens), spec.hidden_size)
        order = np.argsort(tokens, kind="stable")
        for start, stop in _spans(spec.vocab_size, spec.hidden_size):
            first, last = np.searchsorted(tokens[order], [start, stop])
            places = order[first:last]
            if len(places):
                used, where = np.unique(tokens[places] - start, return_inverse=True)
                values = self.read("tokens.weight", start, stop)[torch.from_numpy(used)]
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

    def call(self, block: Block, x: Tensor, past: Past | None = None) -> Tensor:
        """x [B, S, H], rows without padding, each from position 0 -> [B, S, H]."""
        rope = block.spec.rope
        turn = rotation(rope, torch.arange(x.shape[1])[None], x.dtype) if rope else None
        causal = isinstance(model_spec_of(self.ckpt), DecoderSpec)
        attend = None if causal else torch.ones(1, 1, 1, 1).bool()
        result: Tensor = block(x, attend, turn, past)
        return result

    def logits(self, x: Tensor) -> Tensor:
        """What a decoder makes of the last block's outputs [N, H]: [N, V]."""
        spec = decoder_spec_of(self.ckpt)
        norm = nn.RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        norm.load_state_dict({"weight": self.read("norm.weight")})
        x, found = norm(x), torch.empty(len(x), spec.vocab_size)
        name = "tokens.weight" if spec.tied else "head.weight"
        for start, stop in _spans(spec.vocab_size, spec.hidden_size):
            found[:, start:stop] = F.linear(x, self.read(name, start, stop))
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of a parameter by our name; `start` is a multiple of 8.

        Raises:
            CheckpointError: they hold NaN or infinity.
        """
        stored = stored_name(self.ckpt, name)
        values = read_weight(self.ckpt, stored, start, stop)
        check_finite(self.ckpt, stored, values, start)
        return values


def _spans(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(_CHUNK // columns // 8 * 8, 8)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
