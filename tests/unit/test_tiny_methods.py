"""Other methods on shared and unified blocks and top-k attention: at work, or refused before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_decoder import edit, save_chat_decoder
from oracles import gptq as oracle
from text_data import save_texts

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import BlockResult, BlockWork, DataOptions
from pocketglm.errors import UnsupportedError
from pocketglm.methods import quantize_gptq
from pocketglm.methods._gptq import GptqOptions, gptq_block
from pocketglm.model.decoder import Decoder
from pocketglm.model.hf import decoder_spec_of, load_decoder, stored_name
from pocketglm.ops.affine import limits
from pocketglm.ops.stored import read_quantized, read_weight
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan

TOKENS = 256
KINDS: dict[str, dict[str, Any]] = {
    "top-k": {"share": 1, "unify": False, "top_k": 8},
    "shared": {"share": 2, "unify": False, "top_k": None},
    "unified": {"share": 1, "top_k": None},
    "all": {"share": 2, "top_k": 8},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    return DataOptions(save_texts(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny GLM of four layers in each structure, not healed."""
    folder = tmp_path_factory.mktemp("models")
    dense = save_chat_decoder(folder / "dense", "glm-wide", eos_token_id=5, num_hidden_layers=4)
    edit(dense / "pocketglm.json", task="lm")
    for name, settings in KINDS.items():
        plan = Plan.single("tiny", {**settings, "epochs": 0})
        compress(dense, plan, folder / name, cache=folder / "cache")
    return {name: folder / name for name in KINDS}


def run(
    source: Path, out: Path, data: DataOptions, method: str, **settings: Any
) -> tuple[Checkpoint, dict[str, float]]:
    result = compress(source, Plan.single(method, settings), out, data=data, cache=out.parent / "c")
    return Checkpoint.open(out), dict(result.steps[-1].effect)


def refused(source: Path, data: DataOptions, method: str, **settings: Any) -> str:
    out = source.parent / "refused"
    with pytest.raises(UnsupportedError) as error:
        compress(source, Plan.single(method, settings), out, data=data, dry_run=True)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("quantize_rtn", {"bits": 4, "embeddings": 8}),
        ("quantize_gptq", {"tokens": TOKENS, "embeddings": 8}),
        ("quantize_awq", {"tokens": TOKENS, "steps": 2}),
        ("mixed_precision", {"tokens": TOKENS}),
        ("distill", {"epochs": 0.2, "precision": "fp32"}),
        ("qat", {"preset": "qad", "epochs": 0.2, "precision": "fp32", "scales": "learned"}),
        ("qat", {"lora": 2, "epochs": 0.2, "precision": "fp32", "activation": "dynamic_block"}),
        ("factorize", {"tokens": TOKENS, "ratio": 0.9}),
        ("prune_unstructured", {"sparsity": 0.3}),
        ("prune_depth", {}),
        ("prune_width", {"importance": "l2"}),
        ("trim_vocabulary", {}),
    ],
)
def test_every_method_works_or_refuses(
    kind: str,
    method: str,
    settings: dict[str, Any],
    models: dict[str, Path],
    data: DataOptions,
    tmp_path: Path,
) -> None:
    cut = {"factorize": "factorize a model", "prune_depth": "are not cut", "prune_width": "not cut"}
    words = cut.get(method) if kind != "top-k" else None
    if method == "quantize_awq" and kind in ("unified", "all"):
        words = "use quantize_gptq"
    if words:
        assert words in refused(models[kind], data, method, **settings)
        return
    before = decoder_spec_of(Checkpoint.open(models[kind]))
    after, effect = run(models[kind], tmp_path / "out", data, method, **settings)
    spec = decoder_spec_of(after)
    assert (spec.unified, spec.top_k) == (before.unified, before.top_k)
    assert spec.layer_blocks == before.layer_blocks
    assert np.isfinite(effect["validation_nll"])
    (exported,) = export(after.path, ["onnx"], tmp_path / "onnx").targets
    assert exported.ok, exported.error


@pytest.mark.parametrize("kind", ["shared", "all"])
def test_gptq_loses_less_than_rounding(
    kind: str, models: dict[str, Path], data: DataOptions, tmp_path: Path
) -> None:
    _, effect = run(models[kind], tmp_path / "a", data, "quantize_gptq", tokens=TOKENS)
    assert effect["error"] < 0.9 * effect["rtn_error"]


def entering(model: Decoder, row: torch.Tensor) -> list[torch.Tensor]:
    """What enters each layer of a model, and what leaves the last."""
    found = [model.tokens(row)]
    hooks = [end.register_forward_hook(lambda _, __, out: found.append(out)) for end in model.ends]
    with torch.inference_mode():
        model(row)
    for hook in hooks:
        hook.remove()
    return found


def test_a_shared_block_sees_what_enters_each_of_its_layers(
    models: dict[str, Path], data: DataOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []

    def spy(options: GptqOptions, work: BlockWork) -> BlockResult:
        seen.append([batch.clone() for batch in work.hidden])
        return gptq_block(options, work)

    monkeypatch.setattr(quantize_gptq, "gptq_block", spy)
    after, _ = run(models["all"], tmp_path / "a", data, "quantize_gptq", tokens=TOKENS)
    before, quantized = load_decoder(Checkpoint.open(models["all"])), load_decoder(after)
    assert len(seen) == 2
    table = before.tokens.weight
    half = len(seen[0]) // 2
    for place in range(half):
        states = seen[0][place]
        ids = torch.cdist(states, table[None].expand(len(states), -1, -1)).argmin(-1)
        wanted = entering(before, ids)
        assert torch.allclose(states, wanted[0], atol=1e-5)
        assert torch.allclose(seen[0][half + place], wanted[1], atol=1e-4)
        # The next block gets what the quantized one gives after both of its layers.
        assert torch.allclose(seen[1][place], entering(quantized, ids)[2], atol=1e-3)
        assert not torch.allclose(seen[1][place], wanted[2], atol=1e-2)


def test_gptq_of_a_unified_block_is_the_oracles(
    models: dict[str, Path], data: DataOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output projection's inputs are those of the input projection in integers."""
    caught: list[np.ndarray[Any, Any]] = []

    def spy(options: GptqOptions, work: BlockWork) -> BlockResult:
        result = gptq_block(options, work)
        layer = work.block.get_submodule("unified.output")
        hook = layer.register_forward_pre_hook(
            lambda _, args: caught.append(args[0].flatten(0, -2).double().numpy())
        )
        with torch.inference_mode():
            for batch in work.hidden:
                work.call(batch)
        hook.remove()
        return result

    monkeypatch.setattr(quantize_gptq, "gptq_block", spy)
    after, _ = run(models["unified"], tmp_path / "a", data, "quantize_gptq", tokens=TOKENS)
    before = Checkpoint.open(models["unified"])
    stored = stored_name(before, "blocks.0.unified.output.weight")
    weight, found = read_weight(before, stored).double().numpy(), read_quantized(after, stored)
    x = np.concatenate(caught[: len(caught) // 4])
    scales = found.scales.double().numpy()
    zeros = np.zeros_like(scales)
    hessian = oracle.hessian(x, 0.01)
    q = oracle.gptq(weight, hessian, scales, zeros, 32, *limits(found.scheme))
    wanted = oracle.error(x, weight, oracle.dequantize(q, scales, zeros, 32))
    assert oracle.error(x, weight, found.dequantized().double().numpy()) == pytest.approx(
        wanted, rel=0.01
    )


def test_qat_without_steps_is_rounding(
    models: dict[str, Path], data: DataOptions, tmp_path: Path
) -> None:
    ours, _ = run(models["all"], tmp_path / "a", data, "qat", epochs=0, embeddings=8)
    theirs, _ = run(models["all"], tmp_path / "b", data, "quantize_rtn", bits=4, embeddings=8)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(np.array_equal(ours.read(name), theirs.read(name)) for name in ours.tensors)
