"""Hugging Face folders in and out: layouts, round trips, side files and names."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest, read_manifest, write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.errors import CheckpointError
from pocketglm.model import hf
from pocketglm.model.encoder import Encoder, init_encoder, with_classifier
from pocketglm.model.spec import EncoderSpec
from pocketglm.ops.affine import quantize
from pocketglm.ops.stored import store

SMALL = EncoderSpec(50, 16, 2, 4, 24, max_position_embeddings=32)
LABELS = ["play", "stop", "停"]
IDS = torch.arange(12).reshape(2, 6)
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def folder_of(path: Path, labels: list[str] | None = None, pooling: Any = "mean") -> Encoder:
    """A saved random model; with labels, a classifier."""
    model = init_encoder(SMALL, 1)
    if labels:
        model = with_classifier(model, len(labels), pooling, seed=2)
    hf.save_encoder(model, path, source=None, labels=labels or [], manifest=Manifest())
    return model


def out(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = hf.load_encoder(Checkpoint.open(path))(IDS, MASK)
    return result


def edit_config(path: Path, **fields: Any) -> None:
    """Set config fields; None removes one."""
    config = json.loads((path / "config.json").read_text()) | fields
    write_json(path / "config.json", {k: v for k, v in config.items() if v is not None})


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = path / "model.safetensors"
    tensors = {name: safetensors.read(i) for name, i in safetensors.read_header(file).items()}
    tensors = change(tensors) or tensors
    safetensors.write_file(file, tensors.items())


def contents(path: Path) -> dict[str, bytes]:
    files = (f for f in path.rglob("*") if f.is_file())
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in files}


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("labels", "pooling"), [(None, "mean"), (LABELS, "mean"), (LABELS, "cls")])
def test_save_load_save_gives_the_same_bytes(
    tmp_path: Path, labels: list[str] | None, pooling: Any
) -> None:
    model = folder_of(tmp_path / "a", labels, pooling)
    first = Checkpoint.open(tmp_path / "a")
    hf.save_encoder(
        hf.load_encoder(first),
        tmp_path / "b",
        source=first,
        labels=hf.labels_of(first),
        manifest=first.manifest,
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with torch.inference_mode():
        assert torch.equal(out(tmp_path / "b"), model(IDS, MASK))


def test_minilm_save_load_save_gives_the_same_bytes(tmp_path: Path, minilm: Path) -> None:
    paths = [minilm, tmp_path / "a", tmp_path / "b"]
    for source, target in itertools.pairwise(paths):
        ckpt = Checkpoint.open(source)
        model = hf.load_encoder(ckpt)
        hf.save_encoder(model, target, source=ckpt, labels=[], manifest=ckpt.manifest)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    texts = ["set a timer", "what is the weather like in Beijing tomorrow morning?"]
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "a"), device="cpu")
    original = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    assert np.abs(theirs.encode(texts) - original.encode(texts)).max() < 1e-6
    assert theirs.max_seq_length == 256


@pytest.mark.parametrize(
    ("dtype", "stored", "tolerance"), [(torch.float16, "F16", 2e-3), (torch.bfloat16, "BF16", 2e-2)]
)
def test_half_precision_storage(
    tmp_path: Path, dtype: torch.dtype, stored: str, tolerance: float
) -> None:
    model = folder_of(tmp_path / "a", LABELS)
    source = Checkpoint.open(tmp_path / "a")
    for target in ("b", "c"):
        hf.save_encoder(
            model, tmp_path / target, source=source, labels=LABELS, manifest=Manifest(), dtype=dtype
        )
        source = Checkpoint.open(tmp_path / target)
        model = hf.load_encoder(source)
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    assert {i.dtype for i in source.tensors.values()} == {stored}
    assert source.config["dtype"] == str(dtype).removeprefix("torch.")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert 0 < (out(tmp_path / "c") - out(tmp_path / "a")).abs().max() < tolerance


def test_transformers_opens_what_we_save(tmp_path: Path) -> None:
    model = folder_of(tmp_path / "cls", LABELS, "cls")
    auto: Any = transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(tmp_path / "cls").eval()
    assert type(theirs).__name__ == "BertForSequenceClassification"
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert theirs.config.label2id == {label: i for i, label in enumerate(LABELS)}
    with torch.inference_mode():
        logits = theirs(IDS, attention_mask=MASK).logits
        assert (logits - model(IDS, MASK)).abs().max() < 1e-5


def test_a_config_we_do_not_know_everything_of_is_carried(tmp_path: Path) -> None:
    folder_of(tmp_path / "a")
    edit_config(
        tmp_path / "a",
        gradient_checkpointing=False,
        _name_or_path="/home/someone/secret",
        classifier_dropout=0.25,
        quantization_config={"quant_method": "other"},
    )
    source = Checkpoint.open(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    model = with_classifier(hf.load_encoder(source), 3)
    assert model.dropout.p == 0.25
    hf.save_encoder(
        model,
        tmp_path / "b",
        source=source,
        labels=LABELS,
        manifest=Manifest(task="intent", schemes={"x.weight": TensorScheme(bits=8)}),
    )
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["gradient_checkpointing"] is False
    assert (config["classifier_dropout"], config["pooling"]) == (0.25, "mean")
    assert config["model_type"] == "pocketglm"
    assert not {"_name_or_path", "quantization_config"} & set(config)
    assert read_manifest(tmp_path / "b") == Manifest(task="intent")
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "b" / "modules.json").exists()


def test_labels_must_match_the_head(tmp_path: Path) -> None:
    model = with_classifier(init_encoder(SMALL), 3)
    with pytest.raises(ValueError, match="2 labels for a head of 3"):
        hf.save_encoder(model, tmp_path, source=None, labels=["a", "b"], manifest=Manifest())


# --- layouts that are met in the wild ------------------------------------------------------------


def test_sharded_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
    )
    model: Any = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert torch.equal(out(tmp_path / "one"), out(tmp_path / "many"))


def test_hub_cache_of_symlinks(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", LABELS)
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "a").iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert torch.equal(out(snapshot), out(tmp_path / "a"))
    ckpt = Checkpoint.open(snapshot)
    model = hf.load_encoder(ckpt)
    hf.save_encoder(model, tmp_path / "b", source=ckpt, labels=LABELS, manifest=Manifest())
    assert not any(f.is_symlink() for f in (tmp_path / "b").iterdir())
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_pretraining_checkpoint_is_its_body(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
    )
    model: Any = getattr(transformers, kind)(config).eval()
    model.save_pretrained(tmp_path / "a")
    ckpt = Checkpoint.open(tmp_path / "a")
    assert any(name.startswith("cls.predictions") for name in ckpt.tensors)
    assert hf.spec_of(ckpt).pooler == (kind == "BertForPreTraining")
    with torch.inference_mode():
        hidden = model.bert(IDS, attention_mask=MASK).last_hidden_state
        ours = hf.load_encoder(ckpt).hidden(IDS, MASK)
    assert (hidden - ours)[MASK.bool()].abs().max() < 1e-5


def test_old_names_and_leftovers_are_understood(tmp_path: Path) -> None:
    folder_of(tmp_path / "a")
    expected = out(tmp_path / "a")

    def age(tensors: dict[str, Any]) -> dict[str, Any]:
        rename = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        old = {
            "embeddings.position_ids": np.arange(32)[None],
            "cls.seq_relationship.bias": np.ones(2),
        }
        for name, value in tensors.items():
            for new, was in rename.items():
                name = name.replace(new, was)
            old[f"bert.{name}"] = value
        return old

    edit_tensors(tmp_path / "a", age)
    assert any("gamma" in name for name in Checkpoint.open(tmp_path / "a").tensors)
    assert torch.equal(out(tmp_path / "a"), expected)


def test_a_bfloat16_array_survives(tmp_path: Path) -> None:
    folder_of(tmp_path)
    expected = out(tmp_path)
    edit_tensors(
        tmp_path, lambda t: {name: value.astype(ml_dtypes.bfloat16) for name, value in t.items()}
    )
    assert (out(tmp_path) - expected).abs().max() < 0.02


def test_a_classifier_without_architectures_is_known_by_its_tensors(tmp_path: Path) -> None:
    folder_of(tmp_path, LABELS, "cls")
    expected = out(tmp_path)
    edit_config(tmp_path, architectures=None)
    assert torch.equal(out(tmp_path), expected)


def test_pocketglm_config_without_pooling_means_what_upstream_means(tmp_path: Path) -> None:
    folder_of(tmp_path / "c", LABELS, "cls")
    folder_of(tmp_path / "e")
    for path in (tmp_path / "c", tmp_path / "e"):
        expected = hf.spec_of(Checkpoint.open(path))
        edit_config(path, model_type="pocketglm")
        assert hf.spec_of(Checkpoint.open(path)) == expected
        edit_config(path, **hf.pocketglm_fields(expected))
        assert hf.spec_of(Checkpoint.open(path)) == expected


def test_labels_default_to_transformers_own(tmp_path: Path) -> None:
    folder_of(tmp_path, ["a", "b"])
    edit_config(tmp_path, id2label=None)
    assert hf.labels_of(Checkpoint.open(tmp_path)) == ["LABEL_0", "LABEL_1"]


def test_more_than_ten_labels_keep_their_order(tmp_path: Path) -> None:
    labels = [f"intent {n}" for n in range(23)]
    folder_of(tmp_path, labels)
    assert hf.labels_of(Checkpoint.open(tmp_path)) == labels


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, True), (4, False)])
def test_quantized_weights_are_dequantized(tmp_path: Path, bits: Any, symmetric: bool) -> None:
    folder_of(tmp_path, LABELS)
    expected = out(tmp_path)
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    scheme = TensorScheme(bits=bits, group_size=8 if bits == 4 else None, symmetric=symmetric)

    def shrink(tensors: dict[str, Any]) -> dict[str, Any]:
        weight = torch.from_numpy(tensors.pop(name))
        return tensors | store(name, *quantize(weight, scheme, search=False), scheme)

    edit_tensors(tmp_path, shrink)
    with pytest.raises(CheckpointError, match="without a scheme"):
        hf.check_tensors(Checkpoint.open(tmp_path))
    write_json(tmp_path / "pocketglm.json", Manifest(schemes={name: scheme}))
    assert 0 < (out(tmp_path) - expected).abs().max() < 0.02
    ckpt = Checkpoint.open(tmp_path)
    model = hf.load_encoder(ckpt)
    hf.save_encoder(model, tmp_path / "b", source=ckpt, labels=LABELS, manifest=ckpt.manifest)
    assert torch.equal(out(tmp_path / "b"), out(tmp_path))


# --- what the side files say ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_pooling_of_old_and_new_sentence_transformers(
    tmp_path: Path, config: dict[str, Any], expected: str
) -> None:
    folder_of(tmp_path)
    write_json(tmp_path / "1_Pooling" / "config.json", config)
    assert hf.spec_of(Checkpoint.open(tmp_path)).pooling == expected


def test_pooling_is_mean_without_sentence_transformers_files(tmp_path: Path) -> None:
    folder_of(tmp_path)
    shutil.rmtree(tmp_path / "1_Pooling")
    (tmp_path / "modules.json").unlink()
    assert hf.spec_of(Checkpoint.open(tmp_path)).pooling == "mean"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("1_Pooling/config.json", '{"pooling_mode": "max"}', "pooling max is not supported"),
        ("1_Pooling/config.json", "{}", "pooling none is not supported"),
        (
            "1_Pooling/config.json",
            '{"pooling_mode_cls_token": true, "pooling_mode_max_tokens": true}',
            r"pooling cls \+ pooling_mode_max_tokens is not supported",
        ),
        ("modules.json", '[{"type": "sentence_transformers.models.Dense"}]', "module 'Dense'"),
        ("modules.json", "[", "is not valid JSON"),
        ("modules.json", "{}", "should hold a list"),
    ],
)
def test_other_sentence_modules_are_refused(
    tmp_path: Path, file: str, text: str, words: str
) -> None:
    folder_of(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        hf.spec_of(Checkpoint.open(tmp_path))


def test_max_length(tmp_path: Path, minilm: Path) -> None:
    assert hf.max_length_of(Checkpoint.open(minilm)) == 256
    folder_of(tmp_path)  # 32 positions

    def length(name: str, **value: Any) -> int:
        write_json(tmp_path / name, value)
        return hf.max_length_of(Checkpoint.open(tmp_path))

    (tmp_path / "sentence_bert_config.json").unlink()
    assert hf.max_length_of(Checkpoint.open(tmp_path)) == 32
    assert length("tokenizer_config.json", model_max_length=int(1e30)) == 32
    assert length("tokenizer_config.json", model_max_length=20) == 20
    assert length("sentence_bert_config.json", max_seq_length=None) == 20
    assert length("sentence_bert_config.json", max_seq_length=12) == 12
    assert length("pocketglm.json", max_length=10) == 10
    assert length("pocketglm.json", max_length=99) == 32


# --- names ---------------------------------------------------------------------------------------


def test_roles_cover_every_tensor(minilm: Path) -> None:
    tensors = Checkpoint.open(minilm).tensors
    roles = {name: hf.role_of(name) for name in tensors}
    assert {name for name, role in roles.items() if role == "other"} == {
        name for name in tensors if "LayerNorm" in name
    }
    count = {role: sum(r == role for r in roles.values()) for role in set(roles.values())}
    layers = 6
    assert count["attention"] == layers * 8
    assert count["ffn"] == layers * 4
    assert (count["head"], count["other"]) == (2, 2 + layers * 4)
    linear = [name for name, info in tensors.items() if hf.is_linear(name, info.shape)]
    assert len(linear) == layers * 6
    assert sum(map(hf.is_embedding, tensors)) == 3
    assert [name for name in tensors if hf.is_head(name)] == ["pooler.dense.weight"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("bert.encoder.layer.11.attention.self.key.bias", "attention"),
        ("encoder.layer.0.attention.output.dense.weight_packed", "attention"),
        ("bert.encoder.layer.0.output.dense.weight_scale", "ffn"),
        ("encoder.layer.0.output.LayerNorm.gamma", "other"),
        ("bert.embeddings.word_embeddings.weight_scale", "embedding"),
        ("classifier.weight", "head"),
        ("bert.pooler.dense.bias", "head"),
        ("cls.predictions.decoder.weight", "head"),
        ("something.else", "other"),
    ],
)
def test_role_of(name: str, role: str) -> None:
    assert hf.role_of(name) == role


def test_only_body_weights_are_linear() -> None:
    assert hf.is_linear("bert.encoder.layer.0.attention.self.query.weight", (4, 4))
    assert not hf.is_linear("bert.encoder.layer.0.attention.self.query.bias", (4,))
    assert not hf.is_linear("classifier.weight", (3, 4))
    assert not hf.is_linear("bert.encoder.layer.0.output.dense.weight_scale", (4, 1))
    assert hf.is_head("classifier.weight")
    assert not hf.is_head("classifier.bias")


def test_stored_name_follows_the_file(tmp_path: Path) -> None:
    folder_of(tmp_path / "a")
    folder_of(tmp_path / "b", LABELS)
    ours = "blocks.1.ffn.down.weight"
    plain = "encoder.layer.1.output.dense.weight"
    assert hf.stored_name(Checkpoint.open(tmp_path / "a"), ours) == plain
    assert hf.stored_name(Checkpoint.open(tmp_path / "b"), ours) == f"bert.{plain}"
