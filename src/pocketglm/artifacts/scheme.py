"""How one weight is stored: the only thing that compress and export agree on."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pocketglm.contracts import Config

Activation = Literal["none", "dynamic_tensor", "dynamic_token", "dynamic_block", "static"]


class TensorScheme(Config):
    """Integers and scales of one weight [rows, columns], quantized along `columns` (K).

    bits: 4 or 8. group_size: columns that share a scale, None = the whole row (per channel).
    activation: the form in which a runtime may quantize this layer's input.
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
        """Bytes of the packed integers, bf16 scales and int8 zero points of one weight."""
        integers = rows * columns * self.bits // 8
        scales = rows * self.groups(columns)
        return integers + 2 * scales + (0 if self.symmetric else scales)
