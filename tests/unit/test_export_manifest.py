"""`export.json` and the files that it vouches for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from pocketglm.artifacts.export import (
    EXPORT,
    ExportManifest,
    FileEntry,
    Parity,
    check_files,
    is_export,
    list_files,
    read_export,
)
from pocketglm.artifacts.manifest import write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"graph")
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / ".request").write_bytes(b"ours")
    write_json(tmp_path / EXPORT, manifest(list_files(tmp_path)))
    return tmp_path


def manifest(files: dict[str, FileEntry]) -> ExportManifest:
    return ExportManifest(
        request="r",
        target="onnx",
        runtime="onnx",
        kind="encoder",
        output="logits",
        precision="int8",
        model_file="onnx/model.onnx",
        inputs=[{"name": "input_ids", "dtype": "int64", "shape": ["batch", "tokens"]}],
        outputs=[{"name": "logits", "dtype": "float32", "shape": ["batch", 3]}],
        labels=["a", "b", "c"],
        max_length=64,
        schemes={"w.weight": TensorScheme(bits=8)},
        tokenizer_sha256="0" * 64,
        operators={"MatMul": 2},
        checkpoint="c" * 64,
        parity=Parity(
            scope="whole", n=4, output_max_abs=0.0, output_std=1.0, tolerance=0.1, agreement=1.0
        ),
        files=files,
    )


def test_round_trip(folder: Path) -> None:
    opened = read_export(folder)
    assert opened == manifest(list_files(folder))
    assert is_export(folder)
    check_files(folder, opened)


def test_files_are_listed_with_size_and_digest(folder: Path) -> None:
    assert list_files(folder) == {
        "config.json": FileEntry(sha256=hashlib.sha256(b"{}").hexdigest(), bytes=2),
        "onnx/model.onnx": FileEntry(sha256=hashlib.sha256(b"graph").hexdigest(), bytes=5),
    }


def test_a_folder_without_a_manifest_is_no_export(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not is_export(tmp_path)
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="is not an export") as caught:
            read_export(folder)
        assert "pocketglm export" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"format": 2}, "format"),
        ({"kind": "painter"}, "kind"),
        ({"parity": {"scope": "whole"}}, "parity.n"),
        (None, "top level"),
    ],
)
def test_a_manifest_of_another_version_says_where(
    folder: Path, change: dict[str, Any] | None, where: str
) -> None:
    if change is None:
        (folder / EXPORT).write_text("{")
    else:
        write_json(folder / EXPORT, {**manifest({}).model_dump(), **change})
    with pytest.raises(CheckpointError, match=f"of this version: {where}: "):
        read_export(folder)


@pytest.mark.parametrize("content", [b"grapf", b"graph and more", b""])
def test_a_changed_file_is_named(folder: Path, content: bytes) -> None:
    opened = read_export(folder)
    (folder / "onnx" / "model.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.onnx is not the file that was exported"):
        check_files(folder, opened)


def test_a_missing_file_is_named(folder: Path) -> None:
    opened = read_export(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        check_files(folder, opened)


def test_the_folder_above_an_export_names_it(folder: Path) -> None:
    (folder / "out" / "onnx").mkdir(parents=True)
    (folder / EXPORT).rename(folder / "out" / "onnx" / EXPORT)
    with pytest.raises(CheckpointError, match="is not an export") as caught:
        read_export(folder / "out")
    assert caught.value.hint == f"use {folder / 'out' / 'onnx'}"
