"""Our safetensors reader and writer against the `safetensors` library, and against bad files."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketglm.artifacts.safetensors import (
    DTYPES,
    NAMES,
    Writer,
    read,
    read_header,
    write_file,
)
from pocketglm.errors import CheckpointError

Array = npt.NDArray[Any]


def sample(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int = 0) -> Array:
    """Random values of any dtype; each byte pattern that is a number can occur."""
    values = np.random.default_rng(seed).integers(0, 100, shape)
    return np.asarray(values, dtype) if dtype != np.bool_ else np.asarray(values % 2, dtype)


def every_dtype() -> dict[str, Array]:
    shapes = [(3, 5), (), (0, 4), (7,), (2, 3, 2)]
    return {
        f"{name}.{i}": sample(dtype, shape, i)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate(shapes)
    }


def same(got: Array, expected: Array) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


def raw(file: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- both directions against the library --------------------------------------------------------


def test_what_we_write_the_library_reads(tmp_path: Path) -> None:
    file, arrays = tmp_path / "a.safetensors", every_dtype()
    write_file(file, arrays.items())
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses a file without it
        assert set(opened.keys()) == set(arrays)
        for name, array in arrays.items():
            same(opened.get_tensor(name), array)
    tensors = safetensors.torch.load_file(file)
    assert tensors["BF16.0"].dtype == torch.bfloat16
    assert torch.equal(
        tensors["BF16.0"].float(), torch.from_numpy(arrays["BF16.0"].astype(np.float32))
    )


def test_what_the_library_writes_we_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {
        "bf16": torch.randn(4, 3).bfloat16(),
        "half": torch.randn(5).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3, dtype=torch.int8),
        "flags": torch.tensor([True, False]),
        "ids": torch.arange(6).reshape(2, 3),
    }
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt", "note": "ünïcode"})
    infos = read_header(file)
    assert set(infos) == set(tensors)
    for name, tensor in tensors.items():
        got = read(infos[name])
        assert infos[name].shape == tuple(tensor.shape)
        assert infos[name].nbytes == tensor.numel() * tensor.element_size()
        assert infos[name].size == tensor.numel()
        assert np.array_equal(got.astype(np.float64), tensor.double().numpy()), name


def test_round_trip_of_every_dtype_keeps_order_and_bits(tmp_path: Path) -> None:
    file, arrays = tmp_path / "a.safetensors", every_dtype()
    write_file(file, arrays.items())
    infos = read_header(file)
    assert list(infos) == list(arrays)
    for name, array in arrays.items():
        same(read(infos[name]), array)


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    arrays = {"zp": sample(DTYPES["I8"], (3,)), "w": sample(DTYPES["F32"], (2,))}
    arrays["scale"] = sample(DTYPES["BF16"], (1,))
    write_file(file, arrays.items())
    for info in read_header(file).values():
        assert info.offset % DTYPES[info.dtype].itemsize == 0, info


@settings(max_examples=25, deadline=None)
@given(
    layout=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    ),
    start=st.integers(-6, 6),
    stop=st.none() | st.integers(-6, 6),
)
def test_any_layout_and_any_row_range(
    layout: list[tuple[str, list[int]]], start: int, stop: int | None
) -> None:
    arrays = {
        f"t{i}": sample(DTYPES[dtype], tuple(shape), i) for i, (dtype, shape) in enumerate(layout)
    }
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.safetensors"), Path(folder, "theirs.safetensors")
        write_file(ours, arrays.items())
        safetensors.numpy.save_file(arrays, theirs)
        for file in (ours, theirs):
            infos = read_header(file)
            for name, array in arrays.items():
                rows = array[start:stop] if array.ndim else array
                same(read(infos[name], start, stop), np.ascontiguousarray(rows).reshape(rows.shape))
        loaded = safetensors.numpy.load_file(ours)
        for name, array in arrays.items():
            same(loaded[name], array)


def test_read_is_a_fresh_writable_array(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_file(file, [("w", np.arange(6, dtype=np.float32).reshape(3, 2))])
    info = read_header(file)["w"]
    read(info)[:] = -1
    assert read(info, 1, 2).tolist() == [[2.0, 3.0]]


# --- the writer ---------------------------------------------------------------------------------


def test_chunks_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    a = np.arange(12, dtype=np.float32).reshape(4, 3)
    b = np.arange(5, dtype=np.int16)
    whole, chunked = tmp_path / "whole", tmp_path / "chunked"
    write_file(whole, [("b", b), ("a", a)])
    writer = Writer(chunked, {"b": ("I16", (5,)), "a": ("F32", (4, 3))})
    writer.write("a", a[:1])
    writer.write("b", b[:2])
    writer.write("a", np.asfortranarray(a[1:]))  # not contiguous
    writer.write("b", np.repeat(b[2:], 2)[::2])  # strided
    writer.close()
    assert whole.read_bytes() == chunked.read_bytes()


def test_writer_refuses_a_wrong_dtype_too_much_and_too_little(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "x", {"a": ("F32", (2,)), "b": ("I8", (1,))})
    with pytest.raises(ValueError, match="'a' is declared float32, got float64"):
        writer.write("a", np.zeros(2))
    with pytest.raises(ValueError, match="'a' overflows its 8 bytes"):
        writer.write("a", np.zeros(3, np.float32))
    writer.write("a", np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="incomplete tensors: a, b"):
        writer.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_writer_closes_its_file_when_the_disk_is_full() -> None:
    writer = Writer(Path("/dev/full"), {"a": ("F32", (0,))})
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert writer._file.closed


def test_names_and_dtypes_are_inverse() -> None:
    assert {NAMES[dtype]: dtype for dtype in DTYPES.values()} == DTYPES
    assert np.dtype(ml_dtypes.bfloat16) in NAMES


# --- bad files ----------------------------------------------------------------------------------

BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "no json": (b"{nonsense", b"", "is corrupt: its header is not JSON"),
    "no text": (b"\xff\xfe\x00\xd8", b"", "is corrupt: its header is not JSON"),
    "too deep": (b"[" * 200_000, b"", "is corrupt: its header is not JSON"),
    "empty": (b"", b"", "is corrupt: its header is not JSON"),
    "a list": ([1], b"", "is corrupt: its header is not a JSON object"),
    "entry is no object": ({"w": 3}, b"", "bad header entry for 'w'"),
    "no shape": ({"w": {"dtype": "U8", "data_offsets": [0, 4]}}, b"", "bad header entry for 'w'"),
    "three offsets": (
        {"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}},
        b"1234",
        "bad header entry for 'w'",
    ),
    "negative shape": ({"w": entry([-2, -2], 0, 4)}, b"1234", "bad header entry for 'w'"),
    "negative offset": ({"w": entry([4], -4, 0)}, b"", "bad header entry for 'w'"),
    "shape of text": ({"w": entry(["4"], 0, 4)}, b"1234", "bad header entry for 'w'"),
    "fractional shape": ({"w": entry([4.5], 0, 4)}, b"1234", "bad header entry for 'w'"),
    "shape of bool": ({"w": entry([True], 0, 1)}, b"1", "bad header entry for 'w'"),
    "product overflows": ({"w": entry([2**32, 2**32], 0, 0)}, b"", "header gives 0"),
    "offsets disagree": (
        {"w": entry([2, 3], 0, 20, "F32")},
        b"0" * 20,
        "'w' of shape [2, 3] and dtype F32 needs 24 bytes, the header gives 20",
    ),
    "unknown dtype": ({"w": entry([4], 0, 4, "Q9")}, b"1234", "has dtype Q9"),
    "data cut": ({"w": entry([4], 0, 4)}, b"123", "is truncated: tensor 'w' ends at byte"),
    "overlap": ({"a": entry([4], 0, 4), "b": entry([4], 2, 6)}, b"123456", "'b' starts at byte"),
    "hole": ({"a": entry([2], 0, 2), "b": entry([2], 4, 6)}, b"123456", "'b' starts at byte"),
    "late start": ({"a": entry([2], 2, 4)}, b"1234", "'a' starts at byte"),
    "data left over": ({"a": entry([2], 0, 2)}, b"1234", "the file has"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_corrupt_header(tmp_path: Path, case: str) -> None:
    header, data, words = BAD_HEADERS[case]
    file = raw(tmp_path / "w.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert words in caught.value.message
    assert str(file) in caught.value.message
    assert caught.value.hint
    with pytest.raises(safetensors.SafetensorError):  # the library refuses what we refuse
        safetensors.numpy.load_file(file)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    write_file(file, [("a", np.arange(4, dtype=np.float32)), ("b", np.array(1, np.int8))])
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            read_header(file)


@settings(max_examples=50, deadline=None)
@given(junk=st.binary(max_size=64), at=st.integers(0, 120))
def test_junk_never_ends_in_another_exception(junk: bytes, at: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "w.safetensors")
        write_file(file, [("a", np.arange(4, dtype=np.float32))])
        whole = file.read_bytes()
        file.write_bytes(whole[:at] + junk + whole[at + len(junk) :])
        try:
            infos = read_header(file)
        except CheckpointError:
            return
        for info in infos.values():
            assert read(info).nbytes == info.nbytes


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for file in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            read_header(file)


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    write_file(file, [("a", np.arange(4, dtype=np.float32))])
    info = read_header(file)["a"]
    os.truncate(file, info.offset + 5)
    with pytest.raises(CheckpointError, match="truncated inside 'a'"):
        read(info)


def test_reading_rows_needs_the_memory_of_rows(tmp_path: Path) -> None:
    """A sparse 8 GB tensor: only a reader that goes by row range can do this."""
    file = tmp_path / "huge.safetensors"
    rows, columns = 2_000_000, 1024
    size = rows * columns * 4
    raw(file, {"w": entry([rows, columns], 0, size, "F32")})
    os.truncate(file, file.stat().st_size + size)
    info = read_header(file)["w"]
    assert read(info, rows - 2).shape == (2, columns)
