"""The integers that a written file keeps of keys and values, against those of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketglm.contracts import Floats, Ids
from pocketglm.errors import ParityError
from pocketglm.ops.kv_cache import restore_kv, round_kv

_SHARE = 0.01  # of integers that may be off by one: values near the middle between two


@dataclass(frozen=True, slots=True)
class FileCache:
    """Takes the place of one layer's cache: checks the file's integers, and goes on with them.

    integers: float32 [2, B, kv heads, S, head_dim]; mask bool [B, 1, S, 1] of real tokens; scales:
    of keys and of values. More rows than B are rounded, but not compared.
    """

    name: str
    integers: Tensor
    mask: Tensor
    scales: list[Tensor]

    @classmethod
    def of(cls, name: str, integers: Floats, mask: Ids, scales: list[Tensor]) -> FileCache:
        """mask: int64 [B, S]."""
        real = torch.from_numpy(mask.astype(bool))[:, None, :, None]
        return cls(name, torch.from_numpy(integers), real, scales)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What the integers of keys and values [B or more, kv heads, S, head_dim] stand for.

        Raises:
            ParityError: the file's are other ones.
        """
        new_key = self._taken("keys", key, self.integers[0], self.scales[0])
        return new_key, self._taken("values", value, self.integers[1], self.scales[1])

    def _taken(self, what: str, x: Tensor, found: Tensor, scale: Tensor) -> Tensor:
        q = round_kv(x, scale)
        rows = len(found)
        off = torch.where(self.mask, (found - q[:rows]).abs(), 0.0)
        share = float((off > 0).sum() / (self.mask.sum() * off[0, :, 0].numel()))
        if off.max() > 1 or share > _SHARE:
            raise ParityError(
                f"'{self.name}': the {what} that the written file keeps differ from the "
                f"checkpoint's by up to {off.max():.0f} steps, {share:.2%} of them by one or more",
                "this is a defect of the export: please report it with this checkpoint's config",
            )
        q[:rows] = torch.where(self.mask, found.to(torch.int8), q[:rows])
        return restore_kv(q, scale, x.dtype)
