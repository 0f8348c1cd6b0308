"""Reads and writes safetensors by row range, without torch and without mapping whole files.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes.
Spec: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pocketglm.errors import CheckpointError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000
_HINT = "copy or download the file again; its size should match the original's"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `dtype` is the safetensors name, e.g. BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int  # absolute, in bytes

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, checked against the file's size.

    Raises:
        CheckpointError: missing, truncated or corrupt file; the message says which.
    """
    try:
        total = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file} is truncated: {total} bytes, no header", _HINT)
            length = struct.unpack("<Q", prefix)[0]
            if length > min(_HEADER_LIMIT, total - 8):
                raise CheckpointError(
                    f"{file} is truncated or not safetensors: its header should have {length} "
                    f"bytes, the file has {total}",
                    _HINT,
                )
            header = json.loads(stream.read(length))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"{file} does not exist", "check the model folder") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is corrupt: its header is not JSON ({error})", _HINT) from (
            error
        )
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is corrupt: its header is not a JSON object", _HINT)
    header.pop("__metadata__", None)
    infos = {
        name: _entry(file, name, entry, 8 + length, total - 8 - length)
        for name, entry in header.items()
    }
    _check_cover(file, infos, 8 + length, total)
    return infos


def _check_cover(file: Path, infos: dict[str, TensorInfo], start: int, total: int) -> None:
    """The format allows no overlaps, no holes and nothing behind the last tensor."""
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != start:
            raise CheckpointError(
                f"{file} is corrupt: tensor '{info.name}' starts at byte {info.offset} and the "
                f"one before it ends at {start}",
                _HINT,
            )
        start += info.nbytes
    if start != total:
        raise CheckpointError(
            f"{file} is corrupt: its tensors end at byte {start}, the file has {total}", _HINT
        )


def _entry(file: Path, name: str, entry: Any, start: int, available: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(_count(n) for n in entry["shape"])
        begin, end = (_count(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is corrupt: bad header entry for '{name}'", _HINT) from error
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor '{name}' has dtype {dtype}, which is not supported",
            f"convert it to one of {', '.join(DTYPES)}",
        )
    info = TensorInfo(name, dtype, shape, file, start + begin)
    if end - begin != info.nbytes:
        raise CheckpointError(
            f"{file} is corrupt: tensor '{name}' of shape {list(shape)} and dtype {dtype} needs "
            f"{info.nbytes} bytes, the header gives {end - begin}",
            _HINT,
        )
    if end > available:
        raise CheckpointError(
            f"{file} is truncated: tensor '{name}' ends at byte {start + end}, the file has "
            f"{start + available}",
            _HINT,
        )
    return info


def _count(value: Any) -> int:
    """A size or offset of the header; int() would also take "3" and 2.7."""
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def read(info: TensorInfo, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
    """Rows `start:stop` of the first axis (all of a scalar) as a fresh array.

    Uses pread, so memory is that of the rows and nothing stays mapped.
    """
    dtype = DTYPES[info.dtype]
    if not info.shape:
        shape, offset = info.shape, info.offset
    else:
        start, stop, _ = slice(start, stop).indices(info.shape[0])
        shape = (max(stop - start, 0), *info.shape[1:])
        offset = info.offset + start * math.prod(info.shape[1:]) * dtype.itemsize
    out = np.empty(shape, dtype)
    view = out.reshape(-1).view(np.uint8).data if out.size else memoryview(b"")
    with info.file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise CheckpointError(f"{info.file} is truncated inside '{info.name}'", _HINT)
            done += count
    return out


class Writer:
    """Writes one file a chunk at a time; the header lists the tensors in the order of `layout`.

    The bytes depend on the layout and the data alone, so the same model gives the same file.
    Wide dtypes lie first, so that every tensor is aligned and readers can map it as it is.
    """

    def __init__(
        self, file: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], format: str = "pt"
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": format}}
        position = 0
        header.update({name: {} for name in layout})
        for name in sorted(layout, key=lambda name: -DTYPES[layout[name][0]].itemsize):
            dtype, shape = layout[name]
            nbytes = math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [position, position + nbytes],
            }
            position += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._spans = {name: header[name]["data_offsets"] for name in layout}
        self._start = 8 + len(text)
        self._layout = dict(layout)
        self._at = dict.fromkeys(layout, 0)
        self._file = file.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, chunk: npt.NDArray[Any]) -> None:
        """Append rows to tensor `name`."""
        expected = DTYPES[self._layout[name][0]]
        if chunk.dtype != expected:
            raise ValueError(f"'{name}' is declared {expected}, got {chunk.dtype}")
        begin, end = self._spans[name]
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        if begin + self._at[name] + data.size > end:
            raise ValueError(f"'{name}' overflows its {end - begin} bytes")
        self._file.seek(self._start + begin + self._at[name])
        self._file.write(data.data)
        self._at[name] += data.size

    def close(self) -> None:
        """Flush to disk; every tensor must be complete."""
        missing = [n for n, (b, e) in self._spans.items() if self._at[n] != e - b]
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if missing:
            raise ValueError(f"incomplete tensors: {', '.join(missing)}")


def write_file(file: Path, tensors: Iterable[tuple[str, npt.NDArray[Any]]]) -> None:
    """Write whole arrays, in the order given."""
    items = list(tensors)
    writer = Writer(file, {name: (NAMES[array.dtype], array.shape) for name, array in items})
    for name, array in items:
        writer.write(name, array)
    writer.close()
