"""Reads a GGUF file back with the format's own package, `gguf`: no writer of ours takes part.

Only the header is kept; rows of tensors are read when they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import Floats
from pocketglm.errors import CheckpointError, require

_CHUNK = 1 << 20  # values that are dequantized at a time


class GgufFile:
    """An open file: metadata by key, tensors by name.

    Raises:
        MissingExtraError: the package gguf is not installed.
        CheckpointError: it is no GGUF file.
    """

    def __init__(self, file: Path) -> None:
        self._gguf = require("gguf", extra="gguf")
        self._path = file
        try:
            self._reader = self._gguf.GGUFReader(str(file))
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"{file} is no GGUF file: {error}", "export it again") from error

    def value(self, key: str) -> Any:
        """A value of the metadata; None: there is no such key."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    @cached_property
    def architecture(self) -> str:
        return str(self.value("general.architecture"))

    def number(self, key: str) -> Any:
        """A value of the architecture's own keys, e.g. `block_count`."""
        return self.value(f"{self.architecture}.{key}")

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def type(self, name: str) -> str:
        """The tensor's type, e.g. Q8_0."""
        return str(self._tensors[name].tensor_type.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first."""
        return tuple(int(n) for n in self._tensors[name].shape[::-1])

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """The bytes of rows `start:stop`, uint8 [rows, bytes]; of a vector, its own one row."""
        tensor = self._tensors[name]
        rows = self.shape(name)[0] if len(tensor.shape) > 1 else 1
        size = int(tensor.n_bytes) // rows
        stop = rows if stop is None else min(stop, rows)
        offset = int(tensor.data_offset) + start * size
        data = np.fromfile(self._path, np.uint8, (stop - start) * size, offset=offset)
        return data.reshape(stop - start, size)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """Rows `start:stop` as float32, by the package's own dequantization."""
        raw = self.raw(name, start, stop)
        values: Floats = self._gguf.quants.dequantize(raw, self._tensors[name].tensor_type)
        return values

    def vector(self, name: str) -> Floats:
        """A tensor of one dimension."""
        found: Floats = self.rows(name)[0]
        return found

    def chunks(self, name: str) -> Iterator[tuple[int, Floats]]:
        """All rows, a chunk at a time, with the number of the first."""
        rows, columns = self.shape(name)
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            yield start, self.rows(name, start, start + step)
