"""What every registered method promises; a new method is tested by being there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny_bert import save_tiny_bert

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import TensorMethod
from pocketglm.model.hf import load_encoder
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan

METHODS = registry.names("methods")
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("contract") / "tiny")


def test_there_are_methods() -> None:
    assert "quantize_rtn" in METHODS


@every_method
def test_the_config_survives_json_and_refuses_unknown_keys(name: str) -> None:
    spec: TensorMethod = registry.load("methods", name)
    assert spec.summary
    config = spec.config()
    assert spec.config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError):
        spec.config.model_validate({"no_such_setting": 1})


@every_method
def test_compress_keeps_the_contract(name: str, source: Path, tmp_path: Path) -> None:
    before = Checkpoint.open(source)
    digest, plan = before.digest(), Plan.single(name)
    claim = compress(source, plan, tmp_path / "none", dry_run=True)
    assert not (tmp_path / "none").exists()
    first = compress(source, plan, tmp_path / "a", cache=tmp_path / "cache-a")
    compress(source, plan, tmp_path / "b", cache=tmp_path / "cache-b")
    assert Checkpoint.open(source).digest() == digest, "the input was changed"

    after = Checkpoint.open(tmp_path / "a")
    assert after.digest() == Checkpoint.open(tmp_path / "b").digest(), "not the same bytes twice"
    stored = sum(info.nbytes for info in after.tensors.values())
    assert claim.bytes_after == first.bytes_after == stored, "the claimed size does not hold"

    step = after.manifest.lineage[-1]
    assert (step.method, step.parent) == (name, digest)
    assert step.settings == plan.steps[0].settings
    model = load_encoder(after)
    ids = torch.arange(8)[None]
    assert model(ids, torch.ones_like(ids)).isfinite().all()
