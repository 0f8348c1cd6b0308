"""The one decoder definition: a causal language model built from a `DecoderSpec`.

Ids go in as [B, S] rows, padded on the right; a mask [B, S] of 1 and 0 says which tokens are real.
Logits at padding are meaningless. With a cache, every call continues the rows where they end:

    cache = model.new_cache(batch=2)
    logits = model.prefill(ids, mask, cache)      # of each row's last token, [B, V]
    logits = model.step(logits.argmax(-1), cache)

`blocks` are the blocks that differ: layers that share one (`DecoderSpec.layer_blocks`) share its
parameters, and each has its own place in the cache.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketglm.contracts import Floats
from pocketglm.errors import UsageError
from pocketglm.model.cache import KVCache, RoundedKV
from pocketglm.model.layers import Block, Passage, Past, rotation
from pocketglm.model.spec import DecoderSpec

_CHUNK = 1 << 22  # random values made at a time


class Decoder(nn.Module):
    """Token ids in, logits of the next token out.

    cache_scales: float32 [layers, 2, kv heads, 1, head_dim] or [layers, 2, 1, 1, 1], of keys and of
    values (`model.inputs.cache_scales` reads them): then every call computes with int8 ones, with a
    cache or without. None: they stay float.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.blocks = nn.ModuleList(Block(spec.block(i)) for i in spec.first_layers())
        self.ends = nn.ModuleList(Passage(spec.hidden_size) for _ in range(spec.num_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.cache_scales: Tensor | None = None
        self.head = None if spec.tied else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """ids int64 [B, S], mask [B, S] (None: all real) -> logits float32 [B, S, V].

        Raises:
            UsageError: padding that is not on the right, or rows longer than the model's positions
                or the cache.
        """
        return self.logits(self.hidden(ids, mask, cache))

    def prefill(self, ids: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """Take rows of tokens into the cache; logits float32 [B, V] after each row's last one.

        Raises:
            UsageError: as `forward`, or a row without a token.
        """
        counts = _counts(ids, mask)
        if not counts.all():
            raise UsageError("a row has no token", "give every row at least one token")
        hidden = self.hidden(ids, mask, cache)
        rows = torch.arange(len(ids), device=ids.device)
        return self.logits(hidden[rows, counts - 1])

    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """One more token a row, int64 [B] -> logits float32 [B, V]."""
        return self.prefill(ids[:, None], None, cache)

    def logits(self, hidden: Tensor, choices: Tensor | None = None) -> Tensor:
        """Last hidden states [..., H] -> logits float32 [..., V]; only of the token ids `choices`
        [C], if given: [..., C]."""
        weight = self.tokens.weight if self.head is None else self.head.weight
        return F.linear(hidden, weight if choices is None else weight[choices]).float()

    def hidden(
        self, ids: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """What the head sees, [B, S, H]; arguments as in `forward`."""
        counts, width = _counts(ids, mask), ids.shape[1]
        if cache is None:
            self._check_length(width)
            positions = torch.arange(width, device=ids.device)[None]
        else:
            positions = cache.reserve(counts, width)
        x: Tensor = self.tokens(ids)
        turn = rotation(self.spec.rope, positions, x.dtype)
        attend = _attend(positions, cache)
        for index, (number, end) in enumerate(zip(self.spec.blocks(), self.ends, strict=True)):
            past = self._past(index, positions, cache)
            x = end(self.blocks[number](x, attend, turn, past))
        if cache is not None:
            cache.advance(counts)
        result: Tensor = self.norm(x)
        return result

    def new_cache(self, batch: int, limit: int | None = None) -> KVCache:
        """An empty cache for `batch` rows of at most `limit` tokens (default: all positions)."""
        weight = self.tokens.weight
        return KVCache(
            self.spec,
            batch,
            limit,
            dtype=weight.dtype,
            device=weight.device,
            scales=self.cache_scales,
        )

    def _past(self, index: int, positions: Tensor, cache: KVCache | None) -> Past | None:
        if cache is not None:
            return cache.layer(index, positions)
        return None if self.cache_scales is None else RoundedKV(self.cache_scales[index])

    def _check_length(self, width: int) -> None:
        limit = self.spec.max_position_embeddings
        if width > limit:
            raise UsageError(
                f"{width} tokens in a row, the model has {limit} positions",
                f"cut the text: --max-length {limit} or less",
            )


def _counts(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Real tokens by row, int64 [B]."""
    if mask is None:
        return torch.full((len(ids),), ids.shape[1], device=ids.device)
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise UsageError("padding stands before a token", "pad the rows on the right")
    return mask.sum(1)


def _attend(positions: Tensor, cache: KVCache | None) -> Tensor | None:
    """bool [B, 1, S, T] over the slots of a cache that holds something; None: plainly causal.

    Padding stands behind a row's tokens, so looking back from them never meets it.
    """
    if cache is None or not bool(cache.lengths.any()):
        return None
    slots = torch.arange(int(positions.max()) + 1, device=positions.device)
    return (slots <= positions[..., None])[:, None]


def initial_values(
    name: str, shape: tuple[int, ...], seed: int = 0, std: float = 0.02
) -> Iterator[Floats]:
    """A new tensor's values, float32, in chunks of rows: norms 1, biases 0, weights normal(0, std).

    They depend on `name`, `shape`, `seed` and `std` alone; memory is that of a chunk.
    """
    random = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    step = max(_CHUNK // int(np.prod(shape[1:])), 1)
    for start in range(0, shape[0], step):
        rows = (min(step, shape[0] - start), *shape[1:])
        if len(shape) == 1:
            yield np.full(rows, float(name.endswith("norm.weight")), np.float32)
        else:
            yield random.standard_normal(rows, np.float32) * np.float32(std)


def init_decoder(spec: DecoderSpec, seed: int = 0, std: float = 0.02) -> Decoder:
    """A new decoder with `initial_values`; in eval mode. Leaves the global random state alone."""
    with torch.device("meta"):
        model = Decoder(spec)
    state = {
        name: torch.from_numpy(
            np.concatenate(list(initial_values(name, tuple(tensor.shape), seed, std)))
        )
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()
