"""Opening a model folder: sharded, linked, broken, pickled, or not a folder at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pocketglm.artifacts.checkpoint import Checkpoint, model_folder, read_json, remote_code_hint
from pocketglm.artifacts.export import EXPORT, ExportManifest, Parity
from pocketglm.artifacts.manifest import Manifest, write_json
from pocketglm.artifacts.safetensors import write_file
from pocketglm.errors import CheckpointError, UsageError

WEIGHTS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    "b.weight": np.arange(4, dtype=np.float32),
}


def save(folder: Path, tensors: Mapping[str, Any], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / name, tensors.items())
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    save(model, WEIGHTS)
    (model / "config.json").write_text('{"model_type": "bert"}')
    return model


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = tmp_path / "sharded"
    shards = {name: f"model-{i}-of-2.safetensors" for i, name in enumerate(WEIGHTS, 1)}
    for name, file in shards.items():
        save(model, {name: WEIGHTS[name]}, file)
    (model / "config.json").write_text('{"model_type": "bert"}')
    index = {"metadata": {"total_size": 40}, "weight_map": shards}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return model


def refused(path: Path, *words: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    for word in words:
        assert word in caught.value.message
    return caught.value


# --- what opens ---------------------------------------------------------------------------------


def test_open_lists_config_manifest_and_tensors(folder: Path) -> None:
    write_json(folder / "pocketglm.json", Manifest(task="intent"))
    opened = Checkpoint.open(str(folder))
    assert opened.config == {"model_type": "bert"}
    assert opened.manifest.task == "intent"
    assert {name: info.shape for name, info in opened.tensors.items()} == {
        "a.weight": (3, 2),
        "b.weight": (4,),
    }
    assert opened.read("a.weight", 1, 2).tolist() == [[2.0, 3.0]]
    assert opened.read("b.weight").tolist() == [0.0, 1.0, 2.0, 3.0]


def test_open_reads_headers_only(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    assert opened.tensors["a.weight"].nbytes == 24
    with pytest.raises(FileNotFoundError):
        opened.read("a.weight")


def test_unknown_tensor(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor 'c\.weight'"):
        Checkpoint.open(folder).read("c.weight")


def test_shards_are_one_checkpoint(sharded: Path) -> None:
    opened = Checkpoint.open(sharded)
    for name, array in WEIGHTS.items():
        assert np.array_equal(opened.read(name), array)
    assert [f.name for f in opened.files] == [
        "config.json",
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_hub_cache_of_links(folder: Path, tmp_path: Path) -> None:
    """huggingface_hub keeps blobs named by digest and a folder of links to them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(blobs / f"{number:064x}")
    opened = Checkpoint.open(snapshot)
    assert np.array_equal(opened.read("a.weight"), WEIGHTS["a.weight"])
    assert opened.digest() == Checkpoint.open(folder).digest()
    assert opened.nbytes == Checkpoint.open(folder).nbytes


def test_files_that_belong_to_other_formats_do_not_count(folder: Path) -> None:
    before = Checkpoint.open(folder)
    (folder / "picture.png").write_bytes(b"png")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    save(folder, {"lora": WEIGHTS["a.weight"]}, "adapter_model.safetensors")
    after = Checkpoint.open(folder)
    assert after.tensors.keys() == before.tensors.keys()
    assert (after.digest(), after.nbytes) == (before.digest(), before.nbytes)


def test_digest_covers_weights_config_tokenizer_and_pooling(folder: Path) -> None:
    seen = {Checkpoint.open(folder).digest()}
    (folder / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "1_Pooling/config.json", "config.json", "pocketglm.json"):
        (folder / name).write_text("{}")
        seen.add(Checkpoint.open(folder).digest())
    save(folder, {**WEIGHTS, "b.weight": WEIGHTS["b.weight"] + 1})
    seen.add(Checkpoint.open(folder).digest())
    assert len(seen) == 6


def test_size_is_that_of_the_files(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    assert opened.nbytes == sum(f.stat().st_size for f in folder.iterdir())


def test_the_real_minilm(minilm: Path) -> None:
    opened = Checkpoint.open(minilm)
    with safetensors.safe_open(minilm / "model.safetensors", "np") as theirs:
        assert set(theirs.keys()) == set(opened.tensors)
        name = "encoder.layer.5.attention.self.query.weight"
        assert np.array_equal(opened.read(name, 7, 19), theirs.get_tensor(name)[7:19])
    # The package carries the repository's tensors in float32: 22.7 million parameters.
    assert sum(info.size for info in opened.tensors.values()) == pytest.approx(22.7e6, rel=0.01)


# --- what does not ------------------------------------------------------------------------------


def test_missing_folder_and_file(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        model_folder(tmp_path / "none")
    with pytest.raises(UsageError, match="is a file, not a model folder"):
        Checkpoint.open(folder / "config.json")


def test_a_hub_id_is_answered_with_the_download_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="PocketGLM does not download") as caught:
        Checkpoint.open("THUDM/glm-edge-1.5b-chat")
    assert caught.value.hint.startswith(
        "hf download THUDM/glm-edge-1.5b-chat --local-dir glm-edge-1.5b-chat "
    )


@pytest.mark.parametrize("path", ["./runs/m", "~/m", "m", "/a/b", "a/b/c", "../m"])
def test_a_wrong_path_is_not_taken_for_a_hub_id(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        model_folder(path)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json does not exist")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[" * 100_000, b""])
def test_config_that_is_not_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    error = refused(folder, "config.json is not valid JSON")
    assert error.hint == "download it again"


def test_config_that_is_not_an_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    refused(folder, "should hold a JSON object, not list")


def test_read_json_takes_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(folder, str(file), "truncated").hint


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "m.ckpt", "m.pkl"])
def test_pickles_are_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n")
    error = refused(folder, "pickled weights only", name, "can run code")
    assert "save_pretrained" in error.hint


@pytest.mark.parametrize("how", ["auto_map", "file"])
def test_remote_code_is_refused(folder: Path, how: str) -> None:
    (folder / "model.safetensors").unlink()
    if how == "auto_map":
        (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.X"}}')
    else:
        (folder / "modeling_x.py").write_text("raise SystemExit('it ran')")
    refused(folder, "remote code", "does not run")


def test_remote_code_is_named_before_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "chatglm"}')
    error = refused(folder, "no *.safetensors", "remote code", "does not run")
    assert "zai-org/glm-4-9b-chat-hf" in error.hint


def test_the_repository_to_use_instead_of_remote_code() -> None:
    twin = "use zai-org/glm-4-9b-chat-1m-hf, the same model in the Hugging Face format"
    assert remote_code_hint(Path("x/GLM-4-9b-chat-1m"), {}) == twin
    named = {"_name_or_path": "THUDM/glm-4-9b-chat-1m"}
    assert remote_code_hint(Path("x"), named) == twin
    for config in ({"model_type": "chatglm"}, {"architectures": ["GLMModel"]}):
        assert "zai-org/GLM-4-9B-0414" in remote_code_hint(Path("x"), config)
    other = remote_code_hint(Path("x"), {"model_type": "frobnet"})
    assert "Hugging Face format" in other
    assert "zai-org" not in other


def test_a_folder_of_models(folder: Path) -> None:
    with pytest.raises(UsageError, match=rf"no model folder itself; it holds {folder.name}$") as e:
        Checkpoint.open(folder.parent)
    assert e.value.hint == f"use {folder}"


def test_an_export_names_its_checkpoint(tmp_path: Path) -> None:
    parity = Parity(scope="whole", n=1, output_max_abs=0, output_std=1, tolerance=1, agreement=1)
    manifest = ExportManifest(
        target="onnx", runtime="onnx", kind="encoder", output="logits", precision="fp32",
        model_file="m.onnx", inputs=[], outputs=[], max_length=8, tokenizer_sha256="", operators={},
        checkpoint="c" * 64, origin={"base_model": "org/base"}, parity=parity, files={},
    )  # fmt: skip
    folder = tmp_path / "out" / "onnx"
    folder.mkdir(parents=True)
    write_json(folder / EXPORT, manifest)
    for config in (False, True):  # an encoder's has a config.json
        if config:
            (folder / "config.json").write_text('{"model_type": "bert"}')
        error = refused(folder, "is an export, not a checkpoint")
        assert f"its sha256, {'c' * 64}, of org/base" in error.hint
        with pytest.raises(UsageError, match=r"out is no model folder itself; it holds onnx$") as e:
            Checkpoint.open(tmp_path / "out")
        assert e.value.hint == f"use {folder}; {error.hint}"


def test_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "m-q4.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"m-q4.gguf is GGUF: an export") as error:
        model_folder(file)
    assert "safetensors" in error.value.hint
    refused(tmp_path, "holds GGUF only (m-q4.gguf)")


def test_a_missing_folder_beside_others_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a", *(f"m{n}" for n in range(20))):
        (tmp_path / "runs" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="runs/c does not exist") as error:
        model_folder("runs/c")
    assert "runs holds a, b, m0" in error.value.hint
    assert len(error.value.hint) < 120
    with pytest.raises(UsageError, match="does not download"):
        model_folder("walks/c")


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "has no *.safetensors file")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-2-of-2.safetensors").unlink()
    refused(sharded, "model-2-of-2.safetensors is missing")


def test_shard_without_its_tensor(sharded: Path) -> None:
    save(sharded, {"other": WEIGHTS["b.weight"]}, "model-2-of-2.safetensors")
    refused(sharded, "names 1 tensors that no shard holds", "'b.weight'")


def test_tensor_in_two_shards(sharded: Path) -> None:
    save(sharded, WEIGHTS, "model-2-of-2.safetensors")
    refused(sharded, "tensor 'a.weight' is stored in two files")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_index_without_a_map(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded, "has no weight_map")


@pytest.mark.parametrize("name", ["../model/model.safetensors", "sub/model.safetensors", "/etc/x"])
def test_index_may_not_point_elsewhere(sharded: Path, folder: Path, name: str) -> None:
    index = {"weight_map": {"a.weight": name}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, "names a shard outside of the folder")
