"""Writes an ONNX file's external data a chunk at a time: one file, one tensor after the other.

Format: ONNX specification, "External Data" (https://onnx.ai/onnx/repo-docs/ExternalData.html).
Large tensors begin at a multiple of the page size, so that a runtime can map them. Another thread
writes, and takes the file's sha256, while the next chunk is read.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

_PAGE = 4096
_LARGE = 1 << 20  # bytes; smaller tensors begin at a multiple of _SMALL
_SMALL = 64
_BEHIND = 2  # chunks that are not written yet, and so are held


class ExternalData:
    """One external data file; a context manager. The bytes depend on the tensors alone."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stream = file.open("wb", buffering=0)
        self._end = 0
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    @property
    def digest(self) -> str:
        """sha256 of what has been written, as hex."""
        self._drain()
        return self._sha256.hexdigest()

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stream, self._pool:
            if error is None:
                self._drain()
                os.fsync(self._stream.fileno())

    def write(
        self,
        name: str,
        dtype: npt.DTypeLike,
        shape: tuple[int, ...],
        chunks: Iterable[npt.NDArray[Any]],
    ) -> TensorProto:
        """Append a tensor, whose rows come in `chunks`; returns the initializer that points to it.

        Raises:
            ValueError: a chunk has another dtype, or the chunks are not `shape` together.
        """
        wanted = np.dtype(dtype)
        length = math.prod(shape) * wanted.itemsize
        self._pad(_PAGE if length >= _LARGE else _SMALL)
        start = self._end
        for chunk in chunks:  # each is an array of its own, which nobody changes
            if chunk.dtype != wanted:
                raise ValueError(f"'{name}' is declared {wanted}, got {chunk.dtype}")
            self._append(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
        if self._end - start != length:
            raise ValueError(f"'{name}' should have {length} bytes, got {self._end - start}")
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(wanted),
            dims=shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", self.file.name), ("offset", start), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def _pad(self, multiple: int) -> None:
        self._append(memoryview(bytes(-self._end % multiple)))

    def _append(self, data: memoryview) -> None:
        self._end += len(data)
        self._waiting.append(self._pool.submit(self._take, data))
        self._drain(_BEHIND)

    def _take(self, data: memoryview) -> None:
        self._sha256.update(data)
        while data:
            data = data[self._stream.write(data) :]

    def _drain(self, left: int = 0) -> None:
        """Wait until no more than `left` chunks are behind; raises what went wrong with them."""
        while len(self._waiting) > left:
            self._waiting.popleft().result()
