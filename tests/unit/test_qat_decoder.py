"""methods/qat on decoders: without steps the bytes of quantize_rtn; what is trained is stored."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from chat_decoder import edit, save_chat_decoder
from killed_distill import KILLED
from text_data import save_texts
from tiny_encoder import quantize_weights, save_tiny
from torch.nn.utils import parametrize

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import MANIFEST
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import DataOptions, Silent, StepContext
from pocketglm.errors import UnsupportedError
from pocketglm.methods._qat import QatConfig, rounding_by_weight, train_rounded
from pocketglm.methods.qat import SPEC
from pocketglm.model.decoder import Decoder
from pocketglm.model.hf import load_decoder, stored_name
from pocketglm.ops.affine import canonical, to_integers
from pocketglm.ops.fake_quant import quantized_inputs
from pocketglm.ops.stored import read_quantized, read_weight
from pocketglm.runtimes import open_decoder
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train.finetune import finetune, task_config

QUICK: dict[str, Any] = {
    "epochs": 3, "batch_size": 8, "learning_rate": 5e-4, "precision": "fp32", "patience": 9,
    "max_length": 16,
}  # fmt: skip


class Words(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    return DataOptions(save_texts(tmp_path_factory.mktemp("texts"), count=120))


def save(folder: Path, name: str = "glm-wide", dtype: str = "float32", **over: Any) -> Path:
    sizes = {} if name == "glm-wide" else {"head_dim": 32}
    save_chat_decoder(folder, name, **(sizes | over))
    edit(folder / "config.json", eos_token_id=5)
    edit(folder / MANIFEST, task="lm")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def trained(source: Path, texts: DataOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has learned the texts."""
    out = tmp_path_factory.mktemp("trained") / "tiny"
    settings = {**QUICK, "epochs": 6, "learning_rate": 5e-3}
    finetune(source, task_config("lm", texts, **settings), out)
    return out


def run(
    source: Path, out: Path, data: DataOptions, method: str = "qat", **settings: Any
) -> Checkpoint:
    """As `compress`, and its size is as a dry run said; `words`: the reporter."""
    words = settings.pop("words", None)
    plan = Plan.single(method, settings)
    claim = compress(source, plan, out, data=data, cache=out.parent / "cache", dry_run=True)
    done = compress(source, plan, out, data=data, cache=out.parent / "cache", reporter=words)
    assert claim.bytes_after == done.bytes_after
    return Checkpoint.open(out)


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        np.array_equal(a.read(name), b.read(name)) for name in a.tensors
    )


def effect(ckpt: Checkpoint) -> dict[str, float]:
    return dict(ckpt.manifest.lineage[-1].effect)


# --- without steps -------------------------------------------------------------------------------

PLAIN: list[dict[str, Any]] = [
    {},
    {"embeddings": 8, "activation": "dynamic_block"},
    {"symmetric": False, "search": False, "skip": ["*.layers.0.*"]},
    {"bits": 8, "group_size": 32, "embeddings": 4},
    {"bits": 8, "embeddings": 8},
]


@pytest.mark.parametrize("settings", PLAIN, ids=str)
def test_no_steps_give_the_bytes_of_quantize_rtn(
    settings: dict[str, Any], source: Path, texts: DataOptions, tmp_path: Path
) -> None:
    ours = run(source, tmp_path / "q", texts, epochs=0, lora=2, scales="learned", **settings)
    theirs = run(source, tmp_path / "r", texts, "quantize_rtn", **({"bits": 4} | settings))
    assert same(ours, theirs)
    assert ours.manifest.schemes == theirs.manifest.schemes
    assert (tmp_path / "q/config.json").read_bytes() == (tmp_path / "r/config.json").read_bytes()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_own_heads_and_other_types(name: str, texts: DataOptions, tmp_path: Path) -> None:
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(save(tmp_path / "m", name))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    settings: dict[str, Any] = {"head": 8, "embeddings": 8}
    ours = run(tmp_path / "m", tmp_path / "q", texts, epochs=0, lora=2, **settings)
    rtn = run(tmp_path / "m", tmp_path / "r", texts, "quantize_rtn", bits=4, **settings)
    assert same(ours, rtn)
    after = run(tmp_path / "m", tmp_path / "l", texts, **QUICK, lora=2, **settings)
    kept = [n for n in rtn.tensors if "norm" in n or "lm_head" in n or "embed" in n]
    assert all(np.array_equal(after.read(name), rtn.read(name)) for name in kept)
    assert not same(after, rtn)


# --- what is trained is what is stored -----------------------------------------------------------

HOW: list[dict[str, Any]] = [
    {},
    {"scales": "learned"},
    {"lora": 4},
    {"lora": 4, "scales": "learned", "symmetric": False},
]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_stored_weights_are_those_that_were_trained(
    how: dict[str, Any], trained: Path, texts: DataOptions, tmp_path: Path
) -> None:
    ckpt = Checkpoint.open(trained)
    model, config = load_decoder(ckpt), QatConfig(embeddings=8, **how)
    seen: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    learning: list[str] = []

    def learn() -> dict[str, float]:
        learning.extend(name for name, p in model.named_parameters() if p.requires_grad)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        ids = torch.randint(6, 90, (4, 12), generator=torch.Generator().manual_seed(0))
        for _ in range(5):
            model(ids).log_softmax(-1)[..., 3].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, part in model.named_modules():
            if parametrize.is_parametrized(part, "weight"):
                seen[f"{name}.weight"] = cast(Any, part).weight.detach().clone()
        return {}

    context = StepContext(ckpt, 0, Silent(), tmp_path, "lm", texts)
    rounding = rounding_by_weight(config, ckpt, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tmp_path.mkdir(exist_ok=True)
    train_rounded(config, ckpt, tmp_path, model, rounding, learn, context)
    after = Checkpoint.open(tmp_path)
    floats.update(model.named_parameters())
    assert len(seen) == 13
    for name, value in seen.items():
        stored = read_quantized(after, stored_name(ckpt, name))
        assert torch.equal(stored.dequantized(), value), name
        assert torch.equal(stored.scales, canonical(stored.scales)), name
    query = "blocks.0.attention.query.weight"
    assert torch.equal(before[query], floats[query]) == ("lora" in how)
    if "lora" not in how:
        found = read_quantized(after, stored_name(ckpt, query))
        q = to_integers(floats[query].detach(), found.scales, found.zero_points, found.scheme)
        assert torch.equal(q, found.q)
    ends = {name.rpartition(".")[2] for name in learning}
    wanted = {"down", "up"} if "lora" in how else {"original", "weight"}
    assert ends == wanted | ({"log_factor"} if "scales" in how else set())


@pytest.mark.parametrize("how", HOW[:3], ids=str)
def test_the_score_in_training_is_that_of_the_files(
    how: dict[str, Any], trained: Path, texts: DataOptions, tmp_path: Path
) -> None:
    """And better than round to nearest; fixed scales stay, learned ones move."""
    words = Words()
    own: dict[str, Any] = {"embeddings": 4, "group_size": 32}
    rounded = run(trained, tmp_path / "r", texts, epochs=0, **own)
    settings = {**QUICK, "preset": "qad", "max_length": None, **own, **how}
    after = run(trained, tmp_path / "q", texts, words=words, **settings)
    assert effect(after)["validation_nll"] < effect(rounded)["validation_nll"]
    best = max(float(m[1]) for w in words.said if (m := re.search(r"validation (-[\d.]+)", w)))
    assert effect(after)["validation_nll"] == pytest.approx(-best, abs=2e-4)
    assert any("INT4 by groups of 32; their inputs stay float (none)" in w for w in words.said)
    names = [name for name in after.tensors if name.endswith("_scale")]
    moved = [n for n in names if not np.array_equal(after.read(n), rounded.read(n))]
    assert moved == (names if "scales" in how else [])


def test_the_teacher_is_followed(trained: Path, texts: DataOptions, tmp_path: Path) -> None:
    """KL from the float model, the only teacher here, on held-out text: less than that of round to
    nearest by far.
    """
    row = Tokenizer.load(trained).encode_prompt("the light of a door in my room was on at noon")
    ids = torch.tensor(row)[None]

    def distance(ckpt: Checkpoint) -> float:
        with torch.inference_mode():
            p = load_decoder(Checkpoint.open(trained))(ids).log_softmax(-1)
            q = load_decoder(ckpt)(ids).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    own: dict[str, Any] = {"embeddings": 4, "search": False}
    settings = {**QUICK, "preset": "qad", "alpha": 1.0, "epochs": 6, **own}
    before = run(trained, tmp_path / "r", texts, epochs=0, **own)
    after = run(trained, tmp_path / "q", texts, **settings)
    assert distance(after) < 0.8 * distance(before)


# --- deployed ------------------------------------------------------------------------------------

Logits = Callable[[list[int]], Any]


def last(model: Decoder) -> Logits:
    def logits(ids: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor(ids)[None])[0, -1].numpy()

    return logits


@pytest.mark.parametrize("activation", ["none", "dynamic_block"])
def test_it_exports_and_runs(
    activation: Any, trained: Path, texts: DataOptions, tmp_path: Path
) -> None:
    """onnxruntime gives the logits of the stored values; by block, those of training."""
    settings = {**QUICK, "preset": "qad", "embeddings": 8, "activation": activation, "epochs": 1}
    after = run(trained, tmp_path / "q", texts, **settings)
    assert {s.activation for s in after.manifest.schemes.values()} == {activation}
    (result,) = export(tmp_path / "q", ["onnx"], tmp_path / "x").targets
    assert result.ok, result.error
    session, ids = open_decoder(tmp_path / "x" / "onnx"), [7, 40, 100, 260, 9]
    found, model = session.prefill(ids), load_decoder(after)
    plain = last(model)(ids)
    size = np.abs(plain).max()
    if activation == "none":
        assert np.abs(found - plain).max() < 2e-3 * size
        return
    config = QatConfig(embeddings=8, activation=activation)
    rounding = rounding_by_weight(config, Checkpoint.open(trained), model)
    assert rounding.outputs == {"norm": 128}
    with quantized_inputs(model, rounding.inputs, rounding.outputs):
        rounded = last(model)(ids)
    assert np.abs(found - rounded).max() < 0.3 * np.abs(found - plain).max()
    assert np.abs(found - plain).max() > 1e-3 * size


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    folder = tmp_path_factory.mktemp("commands")
    rows: list[dict[str, Any]] = [
        {"text": f"turn the {thing} on in the {place}", "intent": "on",
         "slots": {"thing": thing, "place": place}}
        for place in ("kitchen", "hall", "bath") for thing in ("lamp", "fan", "heater")
    ]  # fmt: skip
    rows.append({"text": "never mind", "slots": {}, "intent": "oos"})
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataOptions(folder)


def test_commands(source: Path, commands: DataOptions, tmp_path: Path) -> None:
    settings = {**QUICK, "max_length": None, "epochs": 2}
    edit(save(tmp_path / "plain") / MANIFEST, task="command")
    with pytest.raises(UnsupportedError, match="not trained for the rows' commands: it lacks"):
        run(tmp_path / "plain", tmp_path / "no", commands, **settings)
    parser = tmp_path / "parser"
    finetune(source, task_config("command", commands, **settings), parser)
    before = Checkpoint.open(parser)
    more: dict[str, Any] = {"preset": "qad", "slot_swap": 0.5, "embeddings": 8, "lora": 2}
    after = run(parser, tmp_path / "q", commands, **settings, **more)
    assert after.manifest.command == before.manifest.command
    assert effect(after)["validation_exact_match"] >= 0
    assert after.read("model.norm.weight").shape == before.read("model.norm.weight").shape
    tokenizer = "tokenizer.json"
    assert (tmp_path / "q" / tokenizer).read_bytes() == (parser / tokenizer).read_bytes()


# --- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"scales": "learned"}, {"lora": 2}], ids=str)
def test_kill_9_and_the_same_command_give_the_same_bytes(
    how: dict[str, Any], trained: Path, texts: DataOptions, tmp_path: Path
) -> None:
    settings = {**QUICK, "preset": "qad", "embeddings": 8, "dropout": 0.1, **how}
    arguments = [trained, tmp_path / "a", texts.path, json.dumps(settings), "train", "qat"]
    environment = os.environ | {"POCKETGLM_CACHE": str(tmp_path / "cache-a")}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    killed = subprocess.run(command, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "cache-a").rglob("training.pt")), "nothing to go on from"
    for out in "ab":
        cache = tmp_path / f"cache-{out}"
        compress(trained, Plan.single("qat", settings), tmp_path / out, data=texts, cache=cache)
    a, b = (Checkpoint.open(tmp_path / out) for out in "ab")
    assert a.digest() == b.digest()


# --- refusals ------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"group_size": 64}, "K = 96 is not a multiple of group_size 64"),
    ({"activation": "static"}, "static inputs are for encoders in INT8 by row"),
    ({"activation": "dynamic_tensor"}, "goes with whole rows, not with groups of 32"),
    ({"smoothquant": 0.5}, "smoothquant and float_layers need inputs that are looked at"),
    ({"head": 8}, "the head is the token embedding"),
    ({"skip": ["*"]}, "no tensor to quantize"),
    ({"skip": ["*.layers.*"], "embeddings": 8, "lora": 2}, "no layer of the blocks is quantized"),
    ({"lora": 65}, r"lora=65 is more than the rank of a layer: .* is \[64, 96\]"),
    ({"lora": 2, "keep_zeros": True}, "adapters would fill what was pruned"),
    ({"features": "relations"}, "relations are for encoders"),
    ({"slot_swap": 0.5}, "slot_swap and made_up are for commands"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED)
def test_refused_before_any_work(
    settings: dict[str, Any], reason: str, source: Path, texts: DataOptions, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        run(source, tmp_path / "out", texts, **settings)
    assert list(tmp_path.iterdir()) == []


def test_packed_models_and_other_tasks_are_refused(
    source: Path, texts: DataOptions, tmp_path: Path
) -> None:
    packed = save(tmp_path / "packed")
    quantize_weights(packed, {"q_proj.weight": TensorScheme(bits=4, group_size=32)})
    with pytest.raises(UnsupportedError, match="already quantized"):
        run(packed, tmp_path / "out", texts)
    ckpt = Checkpoint.open(source)
    context = StepContext(ckpt, 0, Silent(), tmp_path, "intent", texts)
    (reason,) = SPEC.check(QatConfig(), ckpt, context)
    assert "decoders for lm or command, the task is intent" in reason
    encoder = Checkpoint.open(save_tiny(tmp_path / "encoder"))
    (reason,) = SPEC.check(QatConfig(lora=2), encoder, context)
    assert "lora is for decoders" in reason


def test_adapters_ask_for_less_memory(source: Path, texts: DataOptions, tmp_path: Path) -> None:
    assert SPEC.memory is not None
    ckpt = Checkpoint.open(source)
    context = StepContext(ckpt, 0, Silent(), tmp_path, "lm", texts)
    whole, adapters = (SPEC.memory(QatConfig(lora=n), ckpt, context) for n in (None, 4))
    assert adapters < whole


def test_weights_are_finite_in_the_end(trained: Path, texts: DataOptions, tmp_path: Path) -> None:
    settings = {**QUICK, "epochs": 1, "scales": "learned", "symmetric": False}
    ckpt = run(trained, tmp_path / "q", texts, **settings)
    assert all(read_weight(ckpt, n).isfinite().all() for n in ckpt.manifest.schemes)
