"""What every registered method promises; a new method is tested by being there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_decoder import edit, save_chat_decoder
from pydantic import ValidationError
from text_data import save_texts
from tiny_encoder import save_tiny

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import MANIFEST
from pocketglm.contracts import (
    DataOptions,
    Method,
    ModelMethod,
    Silent,
    StepContext,
    TensorMethod,
)
from pocketglm.errors import UsageError
from pocketglm.model.hf import load_decoder, load_encoder
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan
from pocketglm.train.finetune import read_task

METHODS = registry.names("methods")
every_method = pytest.mark.parametrize("name", METHODS)
KINDS = ("encoder", "decoder")
every_kind = pytest.mark.parametrize("kind", KINDS)
# Settings that keep a method quick on a tiny model; others run with their defaults.
QUICK: dict[str, dict[str, Any]] = {
    "qat": {"epochs": 2, "rows": 16, "learning_rate": 1e-3},
    "distill": {"layers": 1, "features": "hidden", "epochs": 2},
    "tiny": {"share": 2, "top_k": 4, "epochs": 2},
}
BY_KIND: dict[tuple[str, str], dict[str, Any]] = {
    ("distill", "encoder"): {"augment": 1},
    ("qat", "decoder"): {"preset": "qad", "lora": 2, "scales": "learned", "embeddings": 8},
}
# Methods whose result's size only the work itself can tell; what they claim before is the most.
MEASURED = {"mixed_precision"}
WORDS = ["abc", "bcd", "cab", "dab", "fig", "hij"]
Source = tuple[Path, DataOptions]


def spec_of(name: str) -> Method:
    spec: Method = registry.load("methods", name)
    return spec


def settings_of(name: str, kind: str) -> dict[str, Any]:
    return QUICK.get(name, {}) | BY_KIND.get((name, kind), {})


def reasons(name: str, path: Path, data: DataOptions, settings: dict[str, Any]) -> list[str]:
    """Why a method does not take a checkpoint."""
    spec, ckpt = spec_of(name), Checkpoint.open(path)
    config = spec.config(**settings)
    if isinstance(spec, TensorMethod):
        return spec.check(config, ckpt)
    task = ckpt.manifest.task
    assert task is not None
    rows = read_task(task, data)
    return spec.check(config, ckpt, StepContext(ckpt, 0, Silent(), Path(), task, data, rows))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """48 training and 12 validation rows with the tiny model's labels."""
    folder = tmp_path_factory.mktemp("encoder")
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("validation", 12)):
        rows = [
            {"text": " ".join(rng.choice(WORDS, 4)), "label": f"label {number % 3}"}
            for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return save_tiny(folder / "tiny"), DataOptions(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A tiny GLM, and texts."""
    folder = tmp_path_factory.mktemp("decoder")
    path = save_chat_decoder(folder / "tiny")
    edit(path / "config.json", eos_token_id=5)
    edit(path / MANIFEST, task="lm")
    return path, DataOptions(save_texts(folder))


@pytest.fixture
def source(kind: str, name: str, request: pytest.FixtureRequest) -> Source:
    """A checkpoint and rows, of a kind that the method takes."""
    found: Source = request.getfixturevalue(kind)
    if why := reasons(name, *found, settings_of(name, kind)):
        pytest.skip(f"not for this {kind}: {why[0]}")
    return found


def test_there_are_methods() -> None:
    assert "quantize_rtn" in METHODS
    assert set(METHODS) >= set(QUICK)


@every_method
def test_a_method_takes_encoders_or_decoders(name: str, encoder: Source, decoder: Source) -> None:
    whys = [
        reasons(name, *found, settings_of(name, kind))
        for kind, found in zip(KINDS, (encoder, decoder), strict=True)
    ]
    assert not all(whys), whys


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
@every_kind
def test_compress_keeps_the_contract(name: str, kind: str, source: Source, tmp_path: Path) -> None:
    path, data = source
    before = Checkpoint.open(path)
    digest, plan = before.digest(), Plan.single(name, settings_of(name, kind))
    claim = compress(path, plan, tmp_path / "none", data=data, dry_run=True)
    assert not (tmp_path / "none").exists()
    first = compress(path, plan, tmp_path / "a", data=data, cache=tmp_path / "cache-a")
    compress(path, plan, tmp_path / "b", data=data, cache=tmp_path / "cache-b")
    assert Checkpoint.open(path).digest() == digest, "the input was changed"

    after = Checkpoint.open(tmp_path / "a")
    assert after.digest() == Checkpoint.open(tmp_path / "b").digest(), "not the same bytes twice"
    stored = sum(info.nbytes for info in after.tensors.values())
    assert first.bytes_after == stored
    claimed = claim.bytes_after
    holds = claimed >= stored if name in MEASURED else claimed == stored
    assert holds, "the claimed size does not hold"

    step = after.manifest.lineage[-1]
    assert (step.method, step.parent) == (name, digest)
    assert step.settings == plan.steps[0].settings
    scored = {"encoder": "validation_accuracy", "decoder": "validation_nll"}
    assert step.effect[scored[kind]] >= 0
    assert step.effect["parameters"] > 0
    assert not list((tmp_path / "cache-a").rglob("work")), "scratch files stayed"
    model: Any = load_encoder(after) if kind == "encoder" else load_decoder(after)
    ids = torch.arange(8)[None]
    assert model(ids, torch.ones_like(ids)).isfinite().all()


@every_method
@every_kind
def test_the_identity_case_is_exact(name: str, kind: str, source: Source, tmp_path: Path) -> None:
    spec, (path, data) = spec_of(name), source
    if not isinstance(spec, ModelMethod) or spec.identity is None:
        pytest.skip("every setting of this method changes weights")
    compress(path, Plan.single(name, dict(spec.identity)), tmp_path / "out", data=data)
    before, after = Checkpoint.open(path), Checkpoint.open(tmp_path / "out")
    assert set(before.tensors) == set(after.tensors)
    for tensor in before.tensors:
        assert np.array_equal(before.read(tensor), after.read(tensor)), tensor


@every_method
@every_kind
def test_rows_are_asked_for_before_any_work(
    name: str, kind: str, source: Source, tmp_path: Path
) -> None:
    spec, plan = spec_of(name), Plan.single(name, settings_of(name, kind))
    if isinstance(spec, TensorMethod) or (
        isinstance(spec, ModelMethod) and not spec.needs_rows(plan.steps[0].config)
    ):
        pytest.skip("works without rows")
    with pytest.raises(UsageError, match=f"{name} needs rows"):
        compress(source[0], plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
