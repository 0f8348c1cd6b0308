"""Folders that `model.hf` refuses: what the error says, and that it is the user's to mend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest, write_json
from pocketglm.errors import CheckpointError, PocketError, UsageError
from pocketglm.model import hf
from pocketglm.model.encoder import init_encoder, with_classifier
from pocketglm.model.spec import EncoderSpec


def classifier(path: Path) -> None:
    """A saved random mean-pooled classifier."""
    body = init_encoder(EncoderSpec(50, 16, 2, 4, 24, max_position_embeddings=32))
    model, labels = with_classifier(body, 3), ["play", "stop", "停"]
    hf.save_encoder(model, path, source=None, labels=labels, manifest=Manifest())


def edit_config(path: Path, **fields: Any) -> None:
    """Set config fields; None removes one."""
    config = json.loads((path / "config.json").read_text()) | fields
    write_json(path / "config.json", {k: v for k, v in config.items() if v is not None})


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = path / "model.safetensors"
    tensors = {name: safetensors.read(i) for name, i in safetensors.read_header(file).items()}
    tensors = change(tensors) or tensors
    safetensors.write_file(file, tensors.items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"model_type": "roberta"},
            r"unknown architecture 'roberta'.*known: bert, glm, .*qwen3",
        ),
        ({"model_type": "bart"}, r"did you mean 'bert'"),
        (
            {"model_type": "chatglm", "auto_map": {"AutoModel": "modeling.py"}},
            r"'chatglm'.*Python code \(remote code\) is not run",
        ),
        (
            {"architectures": ["BertForTokenClassification"]},
            "unknown architecture 'BertForTokenClassification'.*known: .*BertModel",
        ),
        ({"hidden_act": "silu"}, "hidden_act 'silu' is not supported.*known: gelu, gelu_new, relu"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' should be a positive.*it is None"),
        ({"hidden_size": "16"}, "'hidden_size' should be .*it is '16'"),
        ({"hidden_dropout_prob": 1.5}, "'hidden_dropout_prob' should be .*it is 1.5"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_heads 3"),
        ({"pooling": "max"}, "pooling 'max' is not supported"),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label should number the classes"),
        ({"id2label": ["a"]}, "id2label should number the classes"),
        ({"id2label": {}}, "cannot have 0 labels"),
        (
            {"id2label": {"0": "a"}},
            r"'classifier.weight' has shape \[3, 16\], its config.json asks for \[1, 16\]",
        ),
        (
            {"intermediate_size": 32},
            r"intermediate.dense.weight' has shape \[24, 16\].*asks for \[32, 16\]",
        ),
        ({"vocab_size": 51}, r"word_embeddings.weight' has shape \[50, 16\].*\[51, 16\]"),
        ({"num_hidden_layers": 3}, r"has no tensor 'bert.encoder.layer.2.*and lacks 15 more"),
        ({"num_hidden_layers": 1}, "stores 2 layers, its config.json says num_hidden_layers 1"),
        ({"pooling": "cls"}, r"has no tensor 'bert.pooler.dense.weight' \[16, 16\]"),
    ],
)
def test_a_config_that_disagrees_is_refused(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    classifier(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(CheckpointError) as error:
        hf.load_encoder(Checkpoint.open(tmp_path))
    check_words(error.value, words)


def check_words(error: PocketError, words: str) -> None:
    with pytest.raises(PocketError, match="(?s)" + words):
        raise PocketError(f"{error.message}\n{error.hint}")
    assert error.exit_code == 2
    assert error.hint


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _corrupt(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:20] = b"not a header"
    file.write_bytes(data)


def _delete(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _pickle(path: Path) -> None:
    _delete(path)
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _remote_code(path: Path) -> None:
    _delete(path)
    edit_config(path, auto_map={"AutoModel": "modeling_own.OwnModel"})


def _shard_missing(path: Path) -> None:
    shards = {"weight_map": {"classifier.weight": "model-00002-of-00002.safetensors"}}
    write_json(path / "model.safetensors.index.json", shards)


def _no_config(path: Path) -> None:
    (path / "config.json").unlink()


def _integers(path: Path) -> None:
    edit_tensors(path, lambda t: t | {"classifier.weight": np.ones((3, 16), np.int8)})


def _packed_by_another_tool(path: Path) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"

    def pack(tensors: dict[str, Any]) -> None:
        tensors[f"{name}_packed"] = np.ones((16, 3), np.int32)
        del tensors[name]

    edit_tensors(path, pack)


def _tensor_missing(path: Path) -> None:
    edit_tensors(path, lambda t: t.pop("classifier.bias") is None)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, "model.safetensors is truncated"),
        (_corrupt, "model.safetensors is corrupt"),
        (_delete, r"has no \*.safetensors file"),
        (_pickle, r"pickled weights only \(pytorch_model.bin\).*save it as safetensors"),
        (_remote_code, "its own Python code"),
        (_shard_missing, "model-00002-of-00002.safetensors is missing"),
        (_no_config, "config.json does not exist"),
        (_integers, "'classifier.weight' is stored as I8 without a scheme.*another tool"),
        (_packed_by_another_tool, "weight_packed' is stored as I32 without a scheme"),
        (_tensor_missing, r"has no tensor 'classifier.bias' \[3\]"),
    ],
)
def test_a_damaged_folder_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    classifier(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        hf.load_encoder(Checkpoint.open(tmp_path))
    check_words(error.value, words)


def test_a_hub_id_is_answered_with_the_download_command() -> None:
    with pytest.raises(UsageError, match="does not download") as error:
        Checkpoint.open("sentence-transformers/all-MiniLM-L6-v2")
    check_words(error.value, "hf download sentence-transformers/all-MiniLM-L6-v2 --local-dir")
