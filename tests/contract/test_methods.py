"""What every registered method promises; a new method is tested by being there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_encoder import save_tiny

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import DataOptions, Method, ModelMethod
from pocketglm.errors import UsageError
from pocketglm.model.hf import load_encoder
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan

METHODS = registry.names("methods")
every_method = pytest.mark.parametrize("name", METHODS)
# Settings that keep a method quick on a tiny model; others run with their defaults.
QUICK: dict[str, dict[str, Any]] = {
    "qat": {"epochs": 2, "rows": 16, "learning_rate": 1e-3},
    "distill": {"layers": 1, "features": "hidden", "epochs": 2, "augment": 1},
}
WORDS = ["abc", "bcd", "cab", "dab", "fig", "hij"]


def spec_of(name: str) -> Method:
    spec: Method = registry.load("methods", name)
    return spec


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("contract") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    """48 training and 12 validation rows with the tiny model's labels."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("validation", 12)):
        rows = [
            {"text": " ".join(rng.choice(WORDS, 4)), "label": f"label {number % 3}"}
            for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return DataOptions(folder)


def test_there_are_methods() -> None:
    assert "quantize_rtn" in METHODS
    assert set(METHODS) >= set(QUICK)


@every_method
def test_the_config_survives_json_and_refuses_unknown_keys(name: str) -> None:
    spec = spec_of(name)
    assert spec.summary
    config = spec.config(**QUICK.get(name, {}))
    assert spec.config.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError):
        spec.config.model_validate({"no_such_setting": 1})
    assert all(field.description for field in spec.config.model_fields.values())


@every_method
def test_compress_keeps_the_contract(
    name: str, source: Path, data: DataOptions, tmp_path: Path
) -> None:
    before = Checkpoint.open(source)
    digest, plan = before.digest(), Plan.single(name, QUICK.get(name))
    claim = compress(source, plan, tmp_path / "none", data=data, dry_run=True)
    assert not (tmp_path / "none").exists()
    first = compress(source, plan, tmp_path / "a", data=data, cache=tmp_path / "cache-a")
    compress(source, plan, tmp_path / "b", data=data, cache=tmp_path / "cache-b")
    assert Checkpoint.open(source).digest() == digest, "the input was changed"

    after = Checkpoint.open(tmp_path / "a")
    assert after.digest() == Checkpoint.open(tmp_path / "b").digest(), "not the same bytes twice"
    stored = sum(info.nbytes for info in after.tensors.values())
    assert claim.bytes_after == first.bytes_after == stored, "the claimed size does not hold"

    step = after.manifest.lineage[-1]
    assert (step.method, step.parent) == (name, digest)
    assert step.settings == plan.steps[0].settings
    assert step.effect["validation_accuracy"] >= 0
    assert step.effect["parameters"] > 0
    assert not list((tmp_path / "cache-a").rglob("work")), "scratch files stayed"
    model = load_encoder(after)
    ids = torch.arange(8)[None]
    assert model(ids, torch.ones_like(ids)).isfinite().all()


@every_method
def test_the_identity_case_is_exact(
    name: str, source: Path, data: DataOptions, tmp_path: Path
) -> None:
    spec = spec_of(name)
    if not isinstance(spec, ModelMethod) or spec.identity is None:
        pytest.skip("every setting of this method changes weights")
    compress(source, Plan.single(name, dict(spec.identity)), tmp_path / "out", data=data)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert set(before.tensors) == set(after.tensors)
    for tensor in before.tensors:
        assert np.array_equal(before.read(tensor), after.read(tensor)), tensor


@every_method
def test_rows_are_asked_for_before_any_work(name: str, source: Path, tmp_path: Path) -> None:
    spec, plan = spec_of(name), Plan.single(name, QUICK.get(name))
    if not isinstance(spec, ModelMethod) or not spec.needs_rows(plan.steps[0].config):
        pytest.skip("works without rows")
    with pytest.raises(UsageError, match=f"{name} needs rows"):
        compress(source, plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
