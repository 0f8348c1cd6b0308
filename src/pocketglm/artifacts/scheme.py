"""How weights and a decoder's cache are stored: all that compress and export agree on."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pocketglm.contracts import Config

Activation = Literal["none", "dynamic_tensor", "dynamic_token", "dynamic_block", "static"]


class CacheScheme(Config):
    """INT8 keys and values, symmetric, with calibrated scales (see `ops/kv_cache.py`).

    per: what shares a scale: a layer's whole tensor of keys, or of values; or one feature of one
    key/value head.
    """

    bits: Literal[8] = 8
    per: Literal["tensor", "channel"] = "channel"


class TensorScheme(Config):
    """Integers and scales of one weight [rows, columns], quantized along `columns` (K).

    bits: 4 or 8. group_size: columns that share a scale, None = the whole row (per channel).
    activation: the form in which a runtime may quantize this layer's input; static: on the grid
    that is stored beside the weight.
    """

    bits: Literal[4, 8]
    group_size: int | None = None
    symmetric: bool = True
    activation: Activation = "none"

    @model_validator(mode="after")
    def _group(self) -> TensorScheme:
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive, got {self.group_size}")
        return self

    def groups(self, columns: int) -> int:
        """How many scales one row of `columns` values has."""
        return 1 if self.group_size is None else columns // self.group_size

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of the stored integers, scales and zero points of one weight.

        The layout is that of `ops/stored.py`: asymmetric INT4 has float32 scales, else bf16.
        """
        groups, grid = self.groups(columns), 5 if self.activation == "static" else 0
        if self.bits == 8:
            return rows * columns + rows * groups * (2 if self.symmetric else 3) + grid
        integers = rows * -(-columns // 8) * 4 + grid
        if self.symmetric:
            return integers + 2 * rows * groups
        return integers + 4 * rows * groups + 4 * -(-rows // 8) * groups
