"""Encoders whose layers differ, as pruning makes them: stored, read, opened, exported and run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_encoder import quantize_weights, save_tiny, spec
from tiny_export import save_wide

import pocketglm.model.auto
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.cli.inspect import show
from pocketglm.contracts import ExportOptions, RunOptions
from pocketglm.errors import CheckpointError
from pocketglm.model.encoder import init_encoder
from pocketglm.model.hf import (
    decoder_spec_of,
    labels_of,
    load_decoder,
    load_encoder,
    save_decoder,
    save_encoder,
    spec_of,
)
from pocketglm.model.surgery import cut, everything
from pocketglm.runtimes import open_decoder, open_encoder
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.inspect import inspect_path
from pocketglm.stages.plan import Plan

# name -> fields of the spec: 4 heads of 32 fill a hidden size of 128, an FFN has 256 channels
SHAPES: dict[str, dict[str, Any]] = {
    "unequal": {"head_dim": 32, "layer_heads": (3, 1), "layer_ffn": (64, 256)},
    "few heads": {"head_dim": 32, "num_heads": 1},
    "heads of 24": {"head_dim": 24, "layer_heads": (1, 3), "layer_ffn": (32, 96)},
    "narrow": {"hidden_size": 96, "head_dim": 32, "layer_heads": (4, 2), "layer_ffn": (224, 160)},
    "ffn": {"layer_ffn": (64, 192)},
}
EMBEDS: dict[str, Any] = {"head": "embedding", "num_labels": 0, "pooling": "cls"}
CLASSIFIES: dict[str, Any] = {"pooling": "cls", "pooler": True}
IDS = torch.tensor([[2, 9, 30, 41, 3], [2, 7, 3, 0, 0]])
MASK = (IDS > 0).long()


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = load_encoder(Checkpoint.open(folder))(IDS, MASK)
    return result


def edit(folder: Path, **fields: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


# --- the spec ------------------------------------------------------------------------------------


def test_one_form_for_each_meaning() -> None:
    plain = spec()
    assert plain.regular
    assert spec(head_dim=32, layer_heads=(4, 4), layer_ffn=(256, 256)) == plain
    assert spec(num_heads=8, head_dim=32, layer_heads=(2, 2)) == spec(num_heads=2, head_dim=32)
    unequal = spec(layer_heads=(3, 1), layer_ffn=(64, 96))
    assert (unequal.num_heads, unequal.head_dim, unequal.intermediate_size) == (3, 32, 96)
    assert not unequal.regular
    assert replace(unequal) == unequal
    assert unequal.heads() == (3, 1)
    assert plain.ffn() == (256, 256)
    first, second = unequal.block(0), unequal.block(1)
    assert (first.num_heads, first.num_kv_heads, first.intermediate_size) == (3, 3, 64)
    assert (second.num_heads, second.num_kv_heads, second.intermediate_size) == (1, 1, 96)
    with pytest.raises(IndexError):
        plain.block(2)


@pytest.mark.parametrize("wrong", [{"layer_heads": (2,)}, {"layer_ffn": (64, 0)}])
def test_sizes_that_do_not_fit_the_layers(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive number for each of the 2 layers"):
        spec(**wrong)


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_and_loaded(shape: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a", **SHAPES[shape])
    ckpt = Checkpoint.open(folder)
    assert spec_of(ckpt) == spec(**SHAPES[shape])
    assert ckpt.config["model_type"] == "pocketglm"
    for again, source in (("b", ckpt), ("c", None)):
        model = load_encoder(ckpt)
        labels, target = labels_of(ckpt), tmp_path / again
        save_encoder(model, target, source=source, labels=labels, manifest=ckpt.manifest)
        for name in ("config.json", "model.safetensors", "pocketglm.json"):
            assert (target / name).read_bytes() == (folder / name).read_bytes()


def test_config_has_clear_keys(tmp_path: Path) -> None:
    config = Checkpoint.open(save_tiny(tmp_path, **SHAPES["unequal"])).config
    assert config["head_dim"] == 32
    assert config["layer_num_attention_heads"] == [3, 1]
    assert config["layer_intermediate_size"] == [64, 256]
    assert config["architectures"] == ["PocketGLMForSequenceClassification"]


def test_equal_layers_stay_bert(tmp_path: Path) -> None:
    """Also when the config that it is saved over had unequal ones."""
    ckpt = Checkpoint.open(save_tiny(tmp_path / "a", **SHAPES["unequal"], **CLASSIFIES))
    assert ckpt.config["model_type"] == "pocketglm"
    model = init_encoder(spec(**CLASSIFIES))
    save_encoder(model, tmp_path / "b", source=ckpt, labels=labels_of(ckpt), manifest=ckpt.manifest)
    config = Checkpoint.open(tmp_path / "b").config
    assert config["model_type"] == "bert"
    assert not {"head_dim", "layer_num_attention_heads", "layer_intermediate_size"} & set(config)
    assert type(opened("AutoModelForSequenceClassification", tmp_path / "b")).__name__ == (
        "BertForSequenceClassification"
    )


def test_upstream_ignores_our_keys(tmp_path: Path) -> None:
    """A plain BERT config that happens to have `head_dim` means what it means upstream."""
    folder = edit(save_tiny(tmp_path, **EMBEDS), head_dim=7, layer_intermediate_size="?")
    assert spec_of(Checkpoint.open(folder)) == spec(**EMBEDS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_dim": "32"}, r"'head_dim' should be a positive whole number, it is '32'"),
        ({"head_dim": 0}, r"'head_dim' should be .*it is 0"),
        (
            {"layer_num_attention_heads": 3},
            r"'layer_num_attention_heads' should be a list of 2.* 3",
        ),
        ({"layer_num_attention_heads": [3]}, r"list of 2 positive whole numbers.*it is \[3\]"),
        ({"layer_num_attention_heads": []}, r"it is \[\]"),
        ({"layer_num_attention_heads": [3, True]}, r"it is \[3, True\]"),
        ({"layer_intermediate_size": [64, -1]}, r"'layer_intermediate_size' .*it is \[64, -1\]"),
        ({"layer_intermediate_size": [64, 256.0]}, r"it is \[64, 256.0\]"),
        (
            {"layer_num_attention_heads": [1, 3]},
            r"query.weight' has shape \[96, 128\].*\[32, 128\]",
        ),
        ({"layer_intermediate_size": [64, 64]}, r"has shape \[256, 128\].*asks for \[64, 128\]"),
        ({"head_dim": 24}, r"has shape \[96, 128\].*asks for \[72, 128\]"),
    ],
)
def test_a_config_that_disagrees_is_refused(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    folder = edit(save_tiny(tmp_path, **SHAPES["unequal"]), **fields)
    with pytest.raises(CheckpointError, match=words):
        load_encoder(Checkpoint.open(folder))


def test_inspect_shows_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = inspect_path(save_tiny(tmp_path / "a", **SHAPES["unequal"]))
    assert (result.heads, result.layer_heads, result.layer_ffn) == (3, [3, 1], [64, 256])
    assert result.head_dim == 32
    assert result.opens_in["transformers"].startswith("no, because model_type pocketglm")
    show(result)
    shown = capsys.readouterr().out
    assert "2 x 128 x 3 of 32" in shown
    assert "heads by layer" in shown
    assert "64, 256" in shown
    plain = inspect_path(save_tiny(tmp_path / "b"))
    assert (plain.head_dim, plain.layer_heads) == (None, [])


# --- what opens and runs them --------------------------------------------------------------------


def opened(auto: str, folder: Path) -> Any:
    return getattr(transformers, auto).from_pretrained(folder)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_transformers_opens_it(shape: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a", **SHAPES[shape])
    theirs = opened("AutoModelForSequenceClassification", folder)
    assert isinstance(theirs, pocketglm.model.auto.PocketGLMForSequenceClassification)
    assert torch.equal(theirs(IDS, MASK).logits, logits(folder))
    theirs.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()


@torch.inference_mode()
def test_transformers_opens_an_embedding(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, **SHAPES["unequal"], **EMBEDS)
    pooled = opened("AutoModel", folder)(IDS, MASK).pooler_output
    assert torch.equal(torch.nn.functional.normalize(pooled, dim=-1), logits(folder))


def test_an_embedding_remembers_its_pooling(tmp_path: Path) -> None:
    ckpt = Checkpoint.open(save_tiny(tmp_path, **SHAPES["ffn"], **EMBEDS))
    assert ckpt.config["architectures"] == ["PocketGLMModel"]
    assert spec_of(ckpt).pooling == "cls"


FORMS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int8 exact": {"bits": 8, "activation": "none"},
    "int8 words": {"bits": 8, "embeddings": 8, "symmetric": False},
}


def exported(folder: Path, out: Path, opset: int | None = None) -> torch.Tensor:
    """Through parity, block by block and whole; then what the file answers."""
    (done,) = export(folder, ["onnx"], out, options=ExportOptions(opset=opset)).targets
    assert done.ok, done.error
    assert done.parity is not None
    assert {"embeddings", "block.0", "block.1", "head"} == set(done.parity.blocks)
    return run(out / "onnx")


def run(folder: Path) -> torch.Tensor:
    """The answers to IDS of a checkpoint (in PyTorch) or an export."""
    session = open_encoder(folder, RunOptions())
    try:
        return torch.from_numpy(session.logits(IDS.numpy(), MASK.numpy()))
    finally:
        session.close()


@pytest.mark.parametrize("opset", [None, 13])
@pytest.mark.parametrize("shape", SHAPES)
def test_float_export(shape: str, opset: int | None, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a", **SHAPES[shape])
    assert torch.allclose(exported(folder, tmp_path / "b", opset), logits(folder), atol=1e-5)
    assert torch.equal(run(folder), logits(folder))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_export(shape: str, form: str, tmp_path: Path) -> None:
    """The quantizer takes its sizes from the tensors; the file computes what its integers say."""
    source = save_tiny(tmp_path / "a", **SHAPES[shape])
    compress(source, Plan.single("quantize_rtn", FORMS[form]), tmp_path / "b")
    ckpt = Checkpoint.open(tmp_path / "b")
    assert spec_of(ckpt) == spec(**SHAPES[shape])
    found, wanted = exported(ckpt.path, tmp_path / "c"), logits(ckpt.path)
    limit = 1e-4 if form == "int8 exact" else 0.2 * float(wanted.std())
    assert float((found - wanted).abs().max()) < limit


def test_int4_in_groups_export(tmp_path: Path) -> None:
    """By group along attention's output too, whose columns are the layer's heads."""
    folder = save_tiny(tmp_path / "a", **SHAPES["unequal"], **EMBEDS)
    scheme = TensorScheme(bits=4, group_size=32)
    quantize_weights(folder, {"dense.weight": scheme, "query.weight": scheme})
    assert torch.allclose(exported(folder, tmp_path / "b"), logits(folder), atol=1e-4)


# --- decoders: only their FFNs may differ --------------------------------------------------------


def unequal_decoder(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny decoder whose second layer has lost two thirds of its channels."""
    source = Checkpoint.open(save_wide(folder.with_name("source"), name))
    model = load_decoder(source)
    whole = everything(model.spec)
    small = cut(model, replace(whole, ffn=(whole.ffn[0], tuple(range(0, 96, 3)))))
    save_decoder(small, folder, source=source, manifest=source.manifest, dtype=dtype)
    return folder


@pytest.mark.parametrize("name", ["glm-wide", "glm-half-bias", "llama", "qwen3"])
@torch.inference_mode()
def test_decoder(name: str, tmp_path: Path) -> None:
    """Fused and gated FFNs: stored, loaded, opened, quantized, exported with parity, and run."""
    folder = unequal_decoder(tmp_path / "a", name)
    ckpt = Checkpoint.open(folder)
    spec = decoder_spec_of(ckpt)
    assert (spec.layer_ffn, spec.intermediate_size) == ((96, 32), 96)
    assert (ckpt.config["model_type"], ckpt.config["family"]) == ("pocketglm", spec.family)
    assert ckpt.config["layer_intermediate_size"] == [96, 32]
    wanted = load_decoder(ckpt)(IDS, MASK)
    assert torch.equal(opened("AutoModelForCausalLM", folder)(IDS, MASK).logits, wanted)
    assert inspect_path(folder).layer_ffn == [96, 32]
    save_decoder(load_decoder(ckpt), tmp_path / "b", source=ckpt, manifest=ckpt.manifest)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (folder / file).read_bytes()
    plan = Plan.single("quantize_rtn", {"bits": 8, "group_size": 32, "activation": "none"})
    compress(folder, plan, tmp_path / "c")
    for number, source in enumerate((folder, tmp_path / "c")):
        (done,) = export(source, ["onnx"], tmp_path / f"onnx{number}").targets
        assert done.ok, done.error
        session = open_decoder(tmp_path / f"onnx{number}" / "onnx", RunOptions())
        found = session.prefill(IDS[0].tolist())
        session.close()
        last = load_decoder(Checkpoint.open(source))(IDS[:1])[0, -1]
        assert torch.allclose(torch.from_numpy(found), last, atol=1e-3)


def test_a_decoder_of_equal_layers_is_upstreams_again(tmp_path: Path) -> None:
    ckpt = Checkpoint.open(unequal_decoder(tmp_path / "a", "llama"))
    model = load_decoder(ckpt)
    whole = everything(model.spec)
    small = cut(model, replace(whole, ffn=(whole.ffn[1], whole.ffn[1])))
    save_decoder(small, tmp_path / "b", source=ckpt, manifest=ckpt.manifest)
    config = Checkpoint.open(tmp_path / "b").config
    assert (config["model_type"], config["intermediate_size"]) == ("llama", 32)
    assert not {"family", "layer_intermediate_size"} & set(config)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer_intermediate_size": [96]}, r"'layer_intermediate_size' should be a list of 2"),
        ({"layer_num_attention_heads": [4, 2]}, "not supported in a decoder: its cache"),
        ({"layer_intermediate_size": None}, r"has shape \[32, 64\].*asks for \[96, 64\]"),
    ],
)
def test_a_decoders_config_that_disagrees(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    folder = edit(unequal_decoder(tmp_path / "a", "llama"), **fields)
    with pytest.raises(CheckpointError, match=words):
        load_decoder(Checkpoint.open(folder))
