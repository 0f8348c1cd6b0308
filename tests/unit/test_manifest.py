"""`pocketglm.json`, the scheme of a weight, and digests."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pocketglm import __version__
from pocketglm.artifacts import digests
from pocketglm.artifacts.manifest import (
    MANIFEST,
    Manifest,
    Step,
    digest_file,
    digest_files,
    digest_value,
    read_manifest,
    tool_versions,
    write_json,
)
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.errors import CheckpointError


def full() -> Manifest:
    return Manifest(
        request="r" * 64,
        task="intent",
        max_length=64,
        lineage=[
            Step(method="train", settings={"epochs": 2}, seed=7, effect={"accuracy": 0.954}),
            Step(method="quantize_rtn", parent="d" * 64, versions=tool_versions("numpy")),
        ],
        schemes={
            "encoder.layer.0.attention.self.query.weight": TensorScheme(bits=4, group_size=32)
        },
    )


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    file = tmp_path / MANIFEST
    write_json(file, full())
    first = file.read_bytes()
    assert read_manifest(tmp_path) == full()
    write_json(file, read_manifest(tmp_path))
    assert file.read_bytes() == first
    assert first.endswith(b"}\n")


def test_a_plain_folder_has_an_empty_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == Manifest()


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{", "top level"),
        ("[]", "top level"),
        ('{"format": 2}', "format"),
        ('{"surprise": 1}', "surprise"),
        ('{"schemes": {"a.weight": {"bits": 3}}}', "schemes.a.weight.bits"),
        ('{"lineage": [{"settings": {}}]}', "lineage.0.method"),
    ],
)
def test_a_manifest_of_another_version_says_where(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is not a manifest") as caught:
        read_manifest(tmp_path)
    assert f": {where}: " in caught.value.message
    assert "pip install -U pocketglm" in caught.value.hint


def test_write_json_takes_mappings_and_keeps_chinese_readable(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"text": "打开地图"})
    assert "打开地图" in file.read_text(encoding="utf-8")
    assert json.loads(file.read_bytes()) == {"text": "打开地图"}


def test_tool_versions_are_the_installed_ones() -> None:
    found = tool_versions("numpy")
    assert found["pocketglm"] == __version__
    assert found["numpy"] == numpy.__version__
    assert found["python"].startswith("3.")


# --- digests ------------------------------------------------------------------------------------


def test_digest_of_a_value_ignores_key_order_only() -> None:
    assert digest_value({"a": 1, "b": [1, 2]}) == digest_value({"b": [1, 2], "a": 1})
    assert digest_value({"b": [1, 2]}) != digest_value({"b": [2, 1]})
    assert digest_value({"p": Path("x")}) == digest_value({"p": "x"})
    assert digest_value([1, 2]) == hashlib.sha256(b"[1,2]").hexdigest()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(json_values, json_values)
def test_digests_differ_where_values_do(a: object, b: object) -> None:
    equal = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (digest_value(a) == digest_value(b)) == equal


def test_a_long_file_is_digested_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_PIECE", 10)
    monkeypatch.setattr(digests, "_BUFFER", 4)
    data = bytes(range(25))
    (tmp_path / "long").write_bytes(data)
    (tmp_path / "empty").write_bytes(b"")
    pieces = [hashlib.sha256(data[start : start + 10]).hexdigest() for start in (0, 10, 20)]
    expected = digest_value({"long": pieces, "empty": [hashlib.sha256(b"").hexdigest()]})
    assert digest_files(tmp_path, [tmp_path / "long", tmp_path / "empty"]) == expected


@pytest.mark.parametrize("begun", [0, 1, 2])
def test_a_digest_that_was_begun_is_taken_and_a_changed_file_is_not(
    begun: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`begun` of its two pieces are done when they are asked for; the thread gets to no more."""
    monkeypatch.setattr(digests, "_PIECE", 10)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(15))
    expected = digest_files(tmp_path, [file])
    pieces: list[int] = []
    whole = digests._digest_piece

    def slow(place: digests.Place, size: int) -> str:
        pieces.append(place[1])
        return whole(place, size)

    monkeypatch.setattr(digests, "_digest_piece", slow)
    work = digests._work
    monkeypatch.setattr(digests, "_work", lambda places: work(dict([*places.items()][:begun])))
    digests.begin(tmp_path).join()
    assert digest_files(tmp_path, [file]) == expected
    assert sorted(pieces) == [0, 10]  # none twice
    digests.begin(tmp_path).join()
    file.write_bytes(bytes(16))
    assert digest_files(tmp_path, [file]) != expected
    digests.begin(tmp_path / "none").join()


def test_a_file_that_goes_before_its_digest_is_an_error_where_it_is_asked_for(
    tmp_path: Path,
) -> None:
    place = (tmp_path / "gone", 0, 1, 1)
    begun: Future[str] = Future()
    digests._work({place: begun})
    with pytest.raises(FileNotFoundError, match="gone"):
        begun.result(0)


def test_digest_of_files_covers_names_contents_and_follows_links(tmp_path: Path) -> None:
    blob, folder = tmp_path / "blob", tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    blob.write_bytes(b"weights")
    (folder / "model").symlink_to(blob)
    (folder / "sub" / "config").write_bytes(b"{}")
    files = [folder / "model", folder / "sub" / "config"]
    before = digest_files(folder, files)
    assert digest_file(folder / "model") == hashlib.sha256(b"weights").hexdigest()
    assert digest_files(folder, reversed(files)) == before

    (folder / "model").unlink()
    (folder / "model").write_bytes(b"weights")  # as a file instead of a link: the same content
    assert digest_files(folder, files) == before
    (folder / "model").write_bytes(b"weightz")
    assert digest_files(folder, files) != before
    (folder / "model").write_bytes(b"weights")
    renamed = (folder / "model").rename(folder / "model2")
    assert digest_files(folder, [renamed, files[1]]) != before


# --- scheme -------------------------------------------------------------------------------------


def test_scheme_counts_groups_and_bytes() -> None:
    channel = TensorScheme(bits=8)
    grouped = TensorScheme(bits=4, group_size=32, symmetric=False)
    assert channel.groups(384) == 1
    assert channel.nbytes(10, 384) == 10 * 384 + 10 * 2
    assert grouped.groups(384) == 12
    # Asymmetric INT4: float32 scales, and zero points packed 8 rows to a word.
    assert grouped.nbytes(10, 384) == 10 * 192 + 10 * 12 * 4 + 2 * 12 * 4


@pytest.mark.parametrize("group", [0, -32])
def test_scheme_refuses_a_group_without_columns(group: int) -> None:
    with pytest.raises(ValidationError, match=f"group_size must be positive, got {group}"):
        TensorScheme(bits=4, group_size=group)
