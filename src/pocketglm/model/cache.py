"""Keys and values of the tokens that a decoder has seen; rows may have different lengths.

Row b's token at position p lies in slot p, so padding on the right is simply overwritten by the
row's next tokens. The storage grows with the text, up to `limit`. With scales (`ops/kv_cache.py`)
it is int8, and every token looks at what the integers stand for, also at itself and at others of
the same call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketglm.errors import UsageError
from pocketglm.model.spec import DecoderSpec
from pocketglm.ops.kv_cache import restore_kv, round_kv

_FIRST = 64  # slots that the storage begins with


class KVCache:
    """`lengths` int64 [B]: tokens seen, by row."""

    def __init__(
        self,
        spec: DecoderSpec,
        batch: int,
        limit: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scales: Tensor | None = None,
    ) -> None:
        """limit: tokens per row, at most (default: as many as the model has positions). scales: of
        an int8 cache, see `Decoder.cache_scales`.
        """
        self.limit = min(limit or spec.max_position_embeddings, spec.max_position_embeddings)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        shape = (spec.num_layers, 2, batch, spec.num_kv_heads, 0, spec.head_dim)
        stored = dtype if scales is None else torch.int8
        self._storage = torch.empty(shape, dtype=stored, device=device)
        self._scales = None if scales is None else scales.to(device)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage as it is now."""
        return self._storage.nbytes

    def reserve(self, counts: Tensor, width: int) -> Tensor:
        """Slots [B, width] for `width` more tokens a row, of which `counts` [B] are real.

        Raises:
            UsageError: a row would be longer than the limit.
        """
        longest = int((self.lengths + counts).max())
        if longest > self.limit:
            raise UsageError(
                f"{longest} tokens in a row, the cache holds {self.limit}",
                "shorten the text or ask for fewer new tokens",
            )
        end, size = int(self.lengths.max()) + width, self._storage.shape[-2]
        if end > size:
            grown = max(end, min(2 * size, self.limit), min(_FIRST, self.limit))
            self._storage = F.pad(self._storage, (0, 0, 0, grown - size))
        return self.lengths[:, None] + torch.arange(width, device=self.lengths.device)

    def layer(self, index: int, slots: Tensor) -> LayerCache:
        """Layer `index`, ready to take new tokens into `slots` [B, S]."""
        scales = None if self._scales is None else self._scales[index]
        return LayerCache(self._storage[index], slots, not bool(self.lengths.any()), scales)

    def advance(self, counts: Tensor) -> None:
        """The `counts` [B] first new tokens of each row now belong to it."""
        self.lengths = self.lengths + counts

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens of every row.

        Raises:
            UsageError: a row has fewer.
        """
        if not 0 <= count <= int(self.lengths.min()):
            raise UsageError(
                f"cannot rewind {count} tokens, the shortest row has {int(self.lengths.min())}"
            )
        self.lengths = self.lengths - count

    def fork(self) -> KVCache:
        """A copy that goes its own way."""
        copy = object.__new__(KVCache)
        copy.limit, copy.lengths = self.limit, self.lengths.clone()
        copy._storage, copy._scales = self._storage.clone(), self._scales
        return copy


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, [2, B, kv heads, T, head_dim]; `first`: nothing is in it.

    scales: of int8 ones, [2, kv heads, 1, head_dim] or [2, 1, 1, 1].
    """

    storage: Tensor
    slots: Tensor
    first: bool
    scales: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new ones [B, kv heads, S, head_dim]; return those of slots 0 to the last new one.

        In an empty cache these are the new ones themselves.
        """
        if self.scales is not None:
            return self._rounded(key, value, self.scales)
        self._keep(key, value)
        if self.first:
            return key, value
        end = int(self.slots.max()) + 1
        return self.storage[0, :, :, :end], self.storage[1, :, :, :end]

    def _rounded(self, key: Tensor, value: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        self._keep(round_kv(key, scales[0]), round_kv(value, scales[1]))
        kept = self.storage[:, :, :, : int(self.slots.max()) + 1]
        return restore_kv(kept[0], scales[0], key.dtype), restore_kv(kept[1], scales[1], key.dtype)

    def _keep(self, key: Tensor, value: Tensor) -> None:
        rows = torch.arange(len(self.slots), device=self.slots.device)[:, None]
        for index, new in enumerate((key, value)):
            kept = self.storage[index]
            kept[rows, :, self.slots] = new.detach().transpose(1, 2).to(kept.dtype)


@dataclass(frozen=True, slots=True)
class RoundedKV:
    """Stands for an int8 cache where none is kept: new keys and values, rounded. `scales`: of one
    layer, as in `LayerCache`.
    """

    scales: Tensor

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the integers of new ones [B, kv heads, S, head_dim] stand for."""
        parts = zip((key, value), self.scales, strict=True)
        new_key, new_value = (restore_kv(round_kv(x, s), s, x.dtype) for x, s in parts)
        return new_key, new_value
