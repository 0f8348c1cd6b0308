"""methods/quantize_awq: folding changes nothing in float; the search against the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from chat_decoder import edit, save_chat_decoder
from oracles import awq as oracle
from text_data import save_texts
from tiny_encoder import save_tiny

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import BlockWork, DataOptions, Silent, StepContext
from pocketglm.errors import UnsupportedError
from pocketglm.methods import _awq
from pocketglm.methods._awq import Fold, Search, channel_scale, fold, folds_of, shared, spread
from pocketglm.methods._gptq import inputs_of, layer_of
from pocketglm.model.hf import load_decoder
from pocketglm.model.layers import Block
from pocketglm.model.parts import Parts
from pocketglm.runtimes import open_decoder
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan
from pocketglm.train._calibration import calibration_rows
from pocketglm.train.finetune import read_task

DECODERS = ("glm-half-bias", "glm-wide", "glm4", "llama", "llama-tied-biased", "qwen2", "qwen3")
CASES = [
    *((name, "nearest", torch.float32) for name in DECODERS),
    *((name, "gptq", torch.float32) for name in ("glm-wide", "glm4", "qwen2")),
    *((name, "nearest", torch.bfloat16) for name in ("llama-tied-biased", "qwen3")),
]
INT4 = TensorScheme(bits=4, group_size=32)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    return DataOptions(save_texts(tmp_path_factory.mktemp("awq-texts")))


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, **over: Any) -> Path:
    """A tiny decoder some of whose channels are loud, as those of large models are."""
    sizes = {} if name == "glm-wide" else {"head_dim": 32}
    save_chat_decoder(folder, name, **(sizes | over))
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    with torch.no_grad():
        for part, value in model.named_parameters():
            if part.endswith("layernorm.weight"):
                value[::16] *= 12
    model.to(dtype).save_pretrained(folder)
    edit(folder / "config.json", eos_token_id=5)
    return folder


def block_of(path: Path, index: int = 0) -> tuple[Block, Callable[[torch.Tensor], torch.Tensor]]:
    parts = Parts(Checkpoint.open(path))
    block = parts.block(index)
    return block, partial(parts.call, block)


def work_of(
    path: Path, schemes: dict[str, TensorScheme], dtype: str = "F32", tokens: int = 240
) -> BlockWork:
    block, call = block_of(path)
    width = block.attention.spec.hidden_size
    hidden = torch.randn(tokens // 24, 24, width, generator=torch.Generator().manual_seed(3))
    stored = dict.fromkeys(block.state_dict(), dtype)
    return BlockWork(0, block, schemes, [hidden[:4], hidden[4:]], call, stored)


def moved(path: Path, seed: int = 0) -> float:
    """How far all folds by random factors move a block's output, as a share of its size."""
    block, call = block_of(path)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 20, block.attention.spec.hidden_size, generator=generator)
    with torch.inference_mode():
        before = call(x)
        for which in folds_of(block):
            columns = layer_of(block, which.targets[0]).weight.shape[1]
            size = len(shared(block, which, torch.zeros(columns)))
            fold(block, which, torch.exp(torch.randn(size, generator=generator)))
        return float((call(x) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", DECODERS)
def test_folding_changes_nothing_in_float(name: str, tmp_path: Path) -> None:
    assert moved(save(tmp_path / "m", name)) < 1e-5


@pytest.mark.parametrize("name", ["glm-wide", "llama", "qwen2"])
def test_heads_in_the_wrong_order_are_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiled(block: Block, which: Fold, values: torch.Tensor) -> torch.Tensor:
        right = spread(block, which, values)
        return values.repeat(len(right) // len(values))

    monkeypatch.setattr(_awq, "spread", tiled)
    assert moved(save(tmp_path / "m", name)) > 1e-2


@pytest.mark.parametrize("name", ["glm-wide", "llama-tied-biased"])
def test_the_search_is_that_of_the_reference(name: str, tmp_path: Path) -> None:
    """Of the layer down, whose error is the block's: every alpha's, and the best one."""
    work = work_of(save(tmp_path / "m", name), {"ffn.down": INT4})
    search = Search.of(work, 10, True)
    which = folds_of(search.block)[3]
    found = search.alphas(which)
    seen = torch.cat(list(inputs_of(work.block, "ffn.down", work.call, work.hidden)))
    x, weight = seen.double().numpy(), search.block.ffn.down.weight.double().numpy()
    wanted = {alpha: oracle.error(x, weight, alpha, 4, 32) for alpha in found}
    for alpha, error in wanted.items():
        assert found[alpha] == pytest.approx(error, rel=0.01), alpha
    best = min(wanted, key=lambda a: wanted[a])
    assert best > 0
    assert min(found, key=lambda a: found[a]) == best
    for bug in oracle.BUGS:
        wrong = [oracle.error(x, weight, alpha, 4, 32, bug) for alpha in found]
        off = [abs(w / found[alpha] - 1) for alpha, w in zip(found, wrong, strict=True)]
        assert max(off) > 0.02, bug


def test_a_silent_channel_keeps_its_weight() -> None:
    means = torch.tensor([0.0, 1.0, 4.0])
    assert torch.equal(channel_scale(means, 0.5), torch.tensor([1.0, 0.5**0.5, 2.0**0.5]))
    assert torch.equal(channel_scale(means, 0.0), torch.ones(3))
    assert torch.equal(channel_scale(torch.zeros(2), 0.5), torch.ones(2))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", ["llama-tied-biased", "qwen2"])
def test_what_is_stored_in_16_bits_is_exact(name: str, dtype: str, tmp_path: Path) -> None:
    """Folded parameters that stay float are values of their type; the block computes what it did.

    value and up stay float, so their rows and biases are divided by powers of two.
    """
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    kind = kinds[dtype]
    schemes = dict.fromkeys(("attention.query", "attention.output", "ffn.down"), INT4)
    work = work_of(save(tmp_path / "m", name, kind), schemes, dtype)
    search = Search.of(work, 4, True)
    alphas = search.fold_all()
    assert any(alphas.values())
    for part, value in work.block.state_dict().items():
        if part.removesuffix(".weight") not in schemes:
            assert torch.equal(value.to(kind).float(), value), part
    assert search.error() < 1e-9 * search.total()


@pytest.mark.parametrize(("name", "rounding", "dtype"), CASES)
def test_the_step(
    name: str, rounding: str, dtype: torch.dtype, texts: DataOptions, tmp_path: Path
) -> None:
    """Better than round to nearest; what is stored has the error that was measured."""
    source = save(tmp_path / "m", name, dtype, num_hidden_layers=1)
    settings = {"tokens": 256, "steps": 5, "rounding": rounding, "embeddings": 8}
    plan = Plan.single("quantize_awq", settings)
    compress(source, plan, tmp_path / "out", task="lm", data=texts, cache=tmp_path / "cache")
    after = Checkpoint.open(tmp_path / "out")
    effect = after.manifest.lineage[-1].effect
    assert effect["error"] < (0.9 if rounding == "nearest" else 0.7) * effect["rtn_error"]
    assert any(value for key, value in effect.items() if key.startswith("alpha."))
    compress(source, Plan.single("quantize_rtn", {"bits": 4, "embeddings": 8}), tmp_path / "rtn",
             cache=tmp_path / "cache")  # fmt: skip
    other = Checkpoint.open(tmp_path / "rtn")
    assert {n: (i.dtype, i.shape) for n, i in after.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in other.tensors.items()
    }
    assert after.manifest.schemes == other.manifest.schemes
    before = Checkpoint.open(source)
    context = StepContext(before, 0, Silent(), Path(), "lm", texts, read_task("lm", texts))
    tokens, error = load_decoder(after).tokens, {"error": 0.0, "rtn_error": 0.0, "total": 0.0}
    calls = {"error": block_of(tmp_path / "out")[1], "rtn_error": block_of(tmp_path / "rtn")[1]}
    with torch.inference_mode():
        for row in calibration_rows(before, context, 256):
            x = tokens(torch.from_numpy(row.astype(np.int64))[None])
            wanted = block_of(source)[1](x)
            error["total"] += float((wanted - x).square().double().sum())
            for key, call in calls.items():
                error[key] += float((call(x) - wanted).square().double().sum())
    for key in calls:
        assert (error[key] / error["total"]) ** 0.5 == pytest.approx(effect[key], rel=1e-3)


@pytest.mark.parametrize("name", ["glm-half-bias", "llama"])
def test_it_exports_and_runs(name: str, texts: DataOptions, tmp_path: Path) -> None:
    source = save(tmp_path / "m", name)
    plan = Plan.single("quantize_awq", {"tokens": 256, "steps": 2})
    compress(source, plan, tmp_path / "out", task="lm", data=texts, cache=tmp_path / "cache")
    (result,) = export(tmp_path / "out", ["onnx"], tmp_path / "exported").targets
    assert result.ok, result.error
    session = open_decoder(tmp_path / "exported" / "onnx")
    ids = [7, 40, 100, 260, 9]
    with torch.inference_mode():
        model = load_decoder(Checkpoint.open(tmp_path / "out"))
        wanted = model(torch.tensor(ids)[None])[0, -1].numpy()
        auto: Any = transformers.AutoModelForCausalLM
        theirs = auto.from_pretrained(tmp_path / "out")(torch.tensor(ids)[None]).logits[0, -1]
    assert np.abs(session.prefill(ids) - wanted).max() < 2e-3 * np.abs(wanted).max()
    assert np.abs(theirs.numpy() - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_encoders_are_refused(tmp_path: Path) -> None:
    source, data = save_tiny(tmp_path / "m"), tmp_path / "rows.jsonl"
    rows = [{"text": f"abc {n}", "label": f"label {n % 2}"} for n in range(40)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    plan, options = Plan.single("quantize_awq"), DataOptions(data)
    with pytest.raises(UnsupportedError, match="use quantize_gptq"):
        compress(source, plan, tmp_path / "o", task="intent", data=options)
