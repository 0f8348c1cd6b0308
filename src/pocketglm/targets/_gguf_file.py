"""Writes a GGUF file, version 3: typed metadata, then tensors, a chunk at a time.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Everything is
little-endian; a tensor's data begins at a multiple of 32 bytes. The bytes depend on the metadata
and the tensors alone, in the order in which they are given.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

VERSION = 3
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?")}


@dataclass(frozen=True, slots=True)
class TensorType:
    """How ggml stores a row: blocks of `block` values in `nbytes` bytes. `code`: in the file."""

    name: str
    code: int
    block: int
    nbytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; `block` divides its columns."""
        return columns // self.block * self.nbytes


F32 = TensorType("F32", 0, 1, 4)
F16 = TensorType("F16", 1, 1, 2)
Q4_0 = TensorType("Q4_0", 2, 32, 18)
Q8_0 = TensorType("Q8_0", 8, 32, 34)


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of the metadata. kind: u32, i32, f32, bool or str; with `[]` behind it, a list."""

    kind: str
    value: Any

    def encoded(self) -> bytes:
        """Type and value."""
        kind, many = self.kind.removesuffix("[]"), self.kind.endswith("[]")
        code = _STRING if kind == "str" else _SCALARS[kind][0]
        if not many:
            return struct.pack("<I", code) + _value(kind, self.value)
        head = struct.pack("<IIQ", _ARRAY, code, len(self.value))
        return head + b"".join(_value(kind, item) for item in self.value)


def _value(kind: str, value: Any) -> bytes:
    return _string(value) if kind == "str" else struct.pack(_SCALARS[kind][1], value)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


@dataclass(frozen=True, slots=True)
class Tensor:
    """What the header says of a tensor; `shape` as numpy has it, rows first."""

    name: str
    type: TensorType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        rows = math.prod(self.shape[:-1])
        return rows * self.type.row_bytes(self.shape[-1])


class Writer:
    """Writes `file`; the tensors' bytes come in the order of the list.

    `digest`, after `close`: the file's sha256, taken while writing.
    """

    def __init__(
        self, file: Path, metadata: Mapping[str, Entry], tensors: Sequence[Tensor]
    ) -> None:
        self.digest = ""
        self._sizes = [tensor.nbytes for tensor in tensors]
        self._names = [tensor.name for tensor in tensors]
        self._index, self._done = 0, 0
        self._hash = hashlib.sha256()
        self._file = file.open("wb")
        self._put(_header(metadata, tensors))

    def write(self, name: str, data: npt.NDArray[Any]) -> None:
        """Append bytes to tensor `name`; it becomes the current one when its predecessor is full.

        Raises:
            ValueError: it is another one's turn, or the tensor has fewer bytes.
        """
        if self._index >= len(self._names) or name != self._names[self._index]:
            due = self._names[self._index] if self._index < len(self._names) else "none"
            raise ValueError(f"'{name}' is written, the next tensor is '{due}'")
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        size = self._sizes[self._index]
        if self._done + view.size > size:
            raise ValueError(f"'{name}' overflows its {size} bytes")
        self._put(view.data)
        self._done += view.size
        if self._done == size:
            self._put(bytes(-size % _ALIGNMENT))
            self._index, self._done = self._index + 1, 0

    def close(self) -> None:
        """Flush to disk.

        Raises:
            ValueError: a tensor is missing or incomplete.
        """
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._index < len(self._names):
            raise ValueError(f"incomplete tensors, first '{self._names[self._index]}'")
        self.digest = self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)


def _header(metadata: Mapping[str, Entry], tensors: Sequence[Tensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + entry.encoded() for key, entry in metadata.items()]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]  # the file has the fastest first
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        parts.append(struct.pack("<IQ", tensor.type.code, offset))
        offset += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    data = b"".join(parts)
    return data + bytes(-len(data) % _ALIGNMENT)
