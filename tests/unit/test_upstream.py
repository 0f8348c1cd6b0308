"""What transformers opens, by trying: every answer of `opens_in_transformers` is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bert import save_tiny_bert
from tiny_encoder import save_tiny
from transformers import AutoModel, AutoModelForSequenceClassification, CompressedTensorsConfig

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import DataOptions, RunOptions
from pocketglm.model.hf import load_encoder
from pocketglm.ops.stored import read_grid, read_weight
from pocketglm.runtimes.torch import TorchSession
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


@pytest.mark.parametrize("weights", [{}, ASYM], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("symmetric_inputs", [True, False])
def test_static_inputs_open_as_they_are(
    weights: dict[str, Any], symmetric_inputs: bool, tmp_path: Path
) -> None:
    """Weights without any difference, and inputs rounded by the same grids."""
    source = save_tiny(tmp_path / "tiny", pooling="cls", pooler=True)
    rows = [{"text": " ".join("abcd"[: 1 + n % 4]), "label": f"label {n % 3}"} for n in range(30)]
    lines = "\n".join(json.dumps(row) for row in rows)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(lines)
    settings = {"embeddings": 8, "head": 8, "symmetric_inputs": symmetric_inputs, **weights}
    plan = Plan.single("quantize_static", settings)
    compress(source, plan, tmp_path / "out", data=DataOptions(tmp_path))
    ckpt = Checkpoint.open(tmp_path / "out")
    assert opens_in_transformers(ckpt) == YES
    groups = ckpt.config["quantization_config"]["config_groups"].values()
    inputs = [group["input_activations"] for group in groups if group["input_activations"]]
    assert [(i["strategy"], i["dynamic"], i["num_bits"]) for i in inputs] == [("tensor", False, 8)]
    assert same_weights(ckpt, AutoModelForSequenceClassification, dequantize=False)

    model = AutoModelForSequenceClassification.from_pretrained(ckpt.path).eval()
    query = model.bert.encoder.layer[0].attention.self.query
    grid = read_grid(ckpt, "bert.encoder.layer.0.attention.self.query.weight")
    assert grid is not None
    assert (grid.zero_point == 0) == symmetric_inputs
    assert query.input_scale.dtype == torch.float32
    assert (query.input_scale.item(), query.input_zero_point.item()) == (
        grid.scale,
        grid.zero_point,
    )
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 30, 8, 3]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask).logits
        plain = load_encoder(ckpt)(ids, mask)
    ours = TorchSession(ckpt, RunOptions()).logits(ids.numpy(), mask.numpy())
    assert (theirs - torch.from_numpy(ours)).abs().max() < 0.3 * (theirs - plain).abs().max()


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
