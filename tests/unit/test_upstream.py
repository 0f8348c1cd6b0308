"""What transformers opens, by trying: every answer of `opens_in_transformers` is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bert import save_tiny_bert
from transformers import AutoModel, AutoModelForSequenceClassification, CompressedTensorsConfig

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.model.hf import load_encoder
from pocketglm.ops.stored import read_weight
from pocketglm.stages._upstream import WITH_DEQUANTIZE, YES, opens_in_transformers
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan

ASYM = {"symmetric": False}
YES_CASES: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8 asymmetric": ASYM,
    "int8 in groups": {"group_size": 64},
    "int8, activations per token": {"activation": "dynamic_token"},
    "int8, float activations": {"activation": "none"},
    "int8, embedding and head": {"embeddings": 8, "head": 8},
    "int8 asymmetric, embedding and head": {**ASYM, "embeddings": 8, "head": 8},
    "int8, some layers": {"skip": ["*.layer.1.*", "*query*"]},
    "int4 g32": {"bits": 4},
    "int4 g64": {"bits": 4, "group_size": 64},
    "int4 g128": {"bits": 4, "group_size": 128},
    "int4, int8 embedding and head": {"bits": 4, "embeddings": 8, "head": 8},
    "int4, int4 head": {"bits": 4, "head": 4},
}
DEQUANTIZE_CASES: dict[str, dict[str, Any]] = {
    "int4 asymmetric": {"bits": 4, **ASYM},
    "int4 asymmetric throughout": {"bits": 4, **ASYM, "embeddings": 4, "head": 4},
}
NO_CASES: dict[str, dict[str, Any]] = {
    "int4 embedding": {"bits": 4, "embeddings": 4},
    "int8, int4 embedding": {"embeddings": 4},
    "int4 asymmetric, int8 embedding": {"bits": 4, **ASYM, "embeddings": 8},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("upstream") / "tiny")


def make(source: Path, folder: Path, settings: dict[str, Any]) -> Checkpoint:
    compress(source, Plan.single("quantize_rtn", settings), folder)
    return Checkpoint.open(folder)


def same_weights(ckpt: Checkpoint, auto: Any, *, dequantize: bool, body: bool = False) -> bool:
    """Whether transformers' model holds exactly our dequantized weights after a forward pass."""
    config = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = auto.from_pretrained(ckpt.path, **config).eval()
    with torch.no_grad():
        model(torch.arange(4)[None])  # decompresses
    state = model.state_dict()
    names = {
        *ckpt.manifest.schemes,
        *(n for n in ckpt.tensors if n.endswith((".bias", "m.weight"))),
    }
    if body:
        names = {name for name in names if name.startswith("bert.")}
    return all(
        torch.equal(state[name.removeprefix("bert.") if body else name], read_weight(ckpt, name))
        for name in names
    )


@pytest.mark.parametrize("case", YES_CASES)
def test_opens_as_it_is(case: str, source: Path, tmp_path: Path) -> None:
    ckpt = make(source, tmp_path / "out", YES_CASES[case])
    assert opens_in_transformers(ckpt) == YES
    assert ckpt.config["model_type"] == "bert"
    assert same_weights(ckpt, AutoModelForSequenceClassification, dequantize=False)


def test_the_body_alone_opens_too(source: Path, tmp_path: Path) -> None:
    settings = YES_CASES["int4, int8 embedding and head"] | {"skip": ["*.layer.1.*"]}
    ckpt = make(source, tmp_path / "out", settings)  # names lose their prefix, patterns must not
    assert same_weights(ckpt, AutoModel, dequantize=False, body=True)


@pytest.mark.parametrize("case", DEQUANTIZE_CASES)
def test_opens_with_dequantize(case: str, source: Path, tmp_path: Path) -> None:
    ckpt = make(source, tmp_path / "out", DEQUANTIZE_CASES[case])
    assert opens_in_transformers(ckpt) == WITH_DEQUANTIZE
    assert same_weights(ckpt, AutoModelForSequenceClassification, dequantize=True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        same_weights(ckpt, AutoModelForSequenceClassification, dequantize=False)


@pytest.mark.parametrize("case", NO_CASES)
def test_does_not_open(case: str, source: Path, tmp_path: Path) -> None:
    ckpt = make(source, tmp_path / "out", NO_CASES[case])
    assert opens_in_transformers(ckpt).startswith("no, because ")
    assert ckpt.config["model_type"] == "pocketglm"
    assert "quantization_config" not in ckpt.config
    assert load_encoder(ckpt)


def test_a_float_checkpoint_opens(source: Path) -> None:
    assert opens_in_transformers(Checkpoint.open(source)) == YES


def test_a_mean_pooled_classifier_stays_pocketglm(source: Path, tmp_path: Path) -> None:
    mean = tmp_path / "mean"
    shutil.copytree(source, mean)
    config = json.loads((mean / "config.json").read_text())
    config |= {"model_type": "pocketglm", "pooling": "mean", "head": "classification"}
    config["architectures"] = ["PocketGLMForSequenceClassification"]
    (mean / "config.json").write_text(json.dumps(config))
    assert "model_type pocketglm" in opens_in_transformers(Checkpoint.open(mean))
    ckpt = make(mean, tmp_path / "out", {"embeddings": 8})
    assert "model_type pocketglm" in opens_in_transformers(ckpt)
    assert "quantization_config" not in ckpt.config
    assert ckpt.config["pooling"] == "mean"
    ids = torch.arange(6)[None]
    logits = [load_encoder(c)(ids, torch.ones_like(ids)) for c in (Checkpoint.open(mean), ckpt)]
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()
