"""methods/quantize_gptq on tiny models of every family, layer by layer against the oracle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from chat_decoder import edit, save_chat_decoder
from killed_distill import KILLED
from oracles import gptq as oracle
from text_data import save_texts
from tiny_encoder import save_tiny

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.contracts import DataOptions, Silent, StepContext
from pocketglm.errors import MemoryCeilingError, UnsupportedError
from pocketglm.methods.quantize_gptq import SPEC, GptqConfig
from pocketglm.model.hf import decoder_config, load_decoder, stored_name
from pocketglm.model.sizes import SIZES
from pocketglm.ops.affine import limits
from pocketglm.ops.stored import read_quantized, read_weight
from pocketglm.runtimes import open_decoder
from pocketglm.stages._block_step import block_parameters, block_step_bytes
from pocketglm.stages._memory import resident
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._calibration import calibration_rows
from pocketglm.train.finetune import read_task

DECODERS = ("glm-half-bias", "glm-wide", "glm4", "llama", "llama-tied-biased", "qwen2", "qwen3")
TOKENS = 1024


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    return DataOptions(save_texts(tmp_path_factory.mktemp("texts")))


def save(folder: Path, name: str, **over: Any) -> Path:
    sizes = {} if name == "glm-wide" else {"head_dim": 32}
    save_chat_decoder(folder, name, **(sizes | over))
    edit(folder / "config.json", eos_token_id=5)
    return folder


def run(source: Path, out: Path, data: DataOptions, **settings: Any) -> Checkpoint:
    plan = Plan.single("quantize_gptq", {"tokens": TOKENS, **settings})
    compress(source, plan, out, task="lm", data=data, cache=out.parent / "cache")
    return Checkpoint.open(out)


def context_of(ckpt: Checkpoint, data: DataOptions) -> StepContext:
    rows = read_task("lm", data)
    return StepContext(ckpt, 0, Silent(), Path(), "lm", data, rows)


def inputs(folder: Path, rows: Any, layer: str) -> Any:
    """What enters a layer of a checkpoint's model, float64 [T, K], row after row."""
    model, found = load_decoder(Checkpoint.open(folder)), []
    module = model.get_submodule(layer)
    module.register_forward_pre_hook(lambda _, args: found.append(args[0][0].double().numpy()))
    with torch.inference_mode():
        for row in rows:
            model(torch.from_numpy(row.astype(np.int64))[None])
    return np.concatenate(found)


@pytest.mark.parametrize("name", DECODERS)
def test_every_layer_is_gptq_of_what_enters_it(
    name: str, texts: DataOptions, tmp_path: Path
) -> None:
    """The inputs of a layer depend on the layers before it alone, so the finished checkpoint gives
    those that it was quantized with; the oracle makes integers from them and the original weight.
    """
    source = save(tmp_path / "m", name)
    before, after = Checkpoint.open(source), run(source, tmp_path / "out", texts, embeddings=8)
    rows = calibration_rows(before, context_of(before, texts), TOKENS)
    assert sum(map(len, rows)) == TOKENS
    layers = [n for n, m in load_decoder(before).named_modules() if isinstance(m, torch.nn.Linear)]
    body = [layer for layer in layers if layer.startswith("blocks.")]
    assert len(body) == (10 if name.startswith("glm") else 14) + 2 * (name[:3] == "glm")
    for layer in body:
        stored = stored_name(before, f"{layer}.weight")
        weight, found = read_weight(before, stored).double().numpy(), read_quantized(after, stored)
        x, scales = inputs(tmp_path / "out", rows, layer), found.scales.double().numpy()
        zeros, h = np.zeros_like(scales), oracle.hessian(x, 0.01)
        q = oracle.gptq(weight, h, scales, zeros, 32, *limits(found.scheme))
        wanted = oracle.error(x, weight, oracle.dequantize(q, scales, zeros, 32))
        ours = oracle.error(x, weight, found.dequantized().double().numpy())
        assert ours == pytest.approx(wanted, rel=0.01), layer
        nothing = oracle.gptq(
            weight, h, scales, zeros, 32, *limits(found.scheme), bug="no_feedback"
        )
        worse = oracle.error(x, weight, oracle.dequantize(nothing, scales, zeros, 32))
        assert ours < 0.8 * worse, layer
    effect = after.manifest.lineage[-1].effect
    assert effect["error"] < 0.8 * effect["rtn_error"]
    assert effect["validation_nll"] > 0


def test_it_is_stored_as_round_to_nearest_is(texts: DataOptions, tmp_path: Path) -> None:
    """Same tensors, schemes and config; embedding and head are the very same."""
    source = save(tmp_path / "m", "llama")
    for settings in ({}, {"bits": 8, "embeddings": 8, "head": 8}, {"symmetric": False}):
        out = tmp_path / f"out{len(str(settings))}"
        after = run(source, out / "gptq", texts, **settings)
        plan = Plan.single("quantize_rtn", {"bits": 4, **settings})
        compress(source, plan, out / "rtn", cache=tmp_path / "cache")
        other = Checkpoint.open(out / "rtn")
        assert {n: (i.dtype, i.shape) for n, i in after.tensors.items()} == {
            n: (i.dtype, i.shape) for n, i in other.tensors.items()
        }
        assert after.manifest.schemes == other.manifest.schemes
        assert after.config == other.config
        for tensor in after.tensors:
            if ".layers." not in tensor or "norm" in tensor:
                assert np.array_equal(after.read(tensor), other.read(tensor)), tensor


def test_transformers_opens_it(texts: DataOptions, tmp_path: Path) -> None:
    source = save(tmp_path / "m", "glm-wide")
    run(source, tmp_path / "out", texts, embeddings=8)
    ids = torch.arange(20)[None]
    auto: Any = transformers.AutoModelForCausalLM
    with torch.inference_mode():
        theirs = auto.from_pretrained(tmp_path / "out")(ids).logits
        ours = load_decoder(Checkpoint.open(tmp_path / "out"))(ids)
    assert (theirs - ours).abs().max() < 1e-3 * ours.abs().max()


@pytest.mark.parametrize("name", ["glm-wide", "llama"])
def test_it_exports_and_runs(name: str, texts: DataOptions, tmp_path: Path) -> None:
    """onnxruntime gives the logits of the checkpoint's own model."""
    source = save(tmp_path / "m", name)
    after = run(source, tmp_path / "out", texts, embeddings=8)
    (result,) = export(tmp_path / "out", ["onnx"], tmp_path / "exported").targets
    assert result.ok, result.error
    session = open_decoder(tmp_path / "exported" / "onnx")
    ids = [7, 40, 100, 260, 9]
    with torch.inference_mode():
        wanted = load_decoder(after)(torch.tensor(ids)[None])[0, -1].numpy()
    assert np.abs(session.prefill(ids) - wanted).max() < 2e-3 * np.abs(wanted).max()


def test_what_is_on_its_grid_stays(texts: DataOptions, tmp_path: Path) -> None:
    """A model whose weights INT4 can hold comes out with the very same values."""
    source = save(tmp_path / "m", "llama")
    plan = Plan.single("quantize_rtn", {"bits": 4})
    compress(source, plan, tmp_path / "rtn", cache=tmp_path / "cache")
    rounded = Checkpoint.open(tmp_path / "rtn")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    state = {n: read_weight(rounded, n) for n in model.state_dict() if n != "lm_head.weight"}
    model.load_state_dict(state, strict=False)
    model.save_pretrained(source)
    after = run(source, tmp_path / "out", texts)
    for name in after.manifest.schemes:
        assert torch.equal(read_weight(after, name), state[name]), name
    assert after.manifest.lineage[-1].effect["error"] == 0


def test_act_order_and_plain_scales(texts: DataOptions, tmp_path: Path) -> None:
    """Each setting gives other integers, and all are better than round to nearest."""
    source = save(tmp_path / "m", "llama", num_hidden_layers=1)
    found = {}
    for number, settings in enumerate(({}, {"act_order": True}, {"weighted": False})):
        after = run(source, tmp_path / f"out{number}", texts, **settings)
        effect = after.manifest.lineage[-1].effect
        assert effect["error"] < 0.8 * effect["rtn_error"]
        found[number] = after.read("model.layers.0.mlp.down_proj.weight_packed")
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_a_killed_step_goes_on(texts: DataOptions, tmp_path: Path) -> None:
    """Killed after the second of four blocks: the same bytes as without, and no block anew."""
    source = save(tmp_path / "m", "qwen2", num_hidden_layers=4)
    edit(source / "pocketglm.json", task="lm")
    settings = {"tokens": 256}
    run(source, tmp_path / "whole", texts, **settings)
    script = [KILLED, str(source), str(tmp_path / "out"), str(texts.path), json.dumps(settings)]
    call = [sys.executable, "-c", *script, "quantize_gptq", "quantize_gptq"]
    env = os.environ | {"POCKETGLM_CACHE": str(tmp_path / "steps")}
    killed = subprocess.run(call, capture_output=True, env=env, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    (work,) = (tmp_path / "steps").rglob("work")
    names = {file.name for file in work.iterdir()}
    assert names == {"block-0.safetensors", "block-1.safetensors", "hidden-2.safetensors"}

    class Told(Silent):
        blocks: list[int] = []

        def progress(self, label: str, done: int, total: int, note: str = "") -> None:
            self.blocks.append(done)

    told = Told()
    plan = Plan.single("quantize_gptq", settings)
    out, cache = tmp_path / "out", tmp_path / "steps"
    compress(source, plan, out, data=texts, cache=cache, reporter=told)
    assert told.blocks == [3, 4]
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    whole = Checkpoint.open(tmp_path / "whole").manifest.lineage[-1].effect
    assert Checkpoint.open(out).manifest.lineage[-1].effect == whole
    assert not list(cache.rglob("work"))


def test_memory_is_told_and_refused(texts: DataOptions, tmp_path: Path) -> None:
    """What it will hold is said before the work, and refused before it."""
    source, said = save(tmp_path / "m", "llama"), []

    class Told(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    plan, limit = Plan.single("quantize_gptq", {"tokens": TOKENS}), resident() + 70_000_000
    with pytest.raises(MemoryCeilingError, match="for one block of the model"):
        compress(source, plan, tmp_path / "o", task="lm", data=texts, max_memory=limit,
                 cache=tmp_path / "cache", reporter=Told())  # fmt: skip
    assert any("holds up to" in line for line in said)
    assert not (tmp_path / "o").exists()


CHILD = """
import json, re, sys
from pathlib import Path
from pocketglm.contracts import DataOptions, Silent
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan

def peak(which):
    status = Path("/proc/self/status").read_text()
    return int(re.search(which + r":\\s+(\\d+) kB", status)[1]) * 1024

class Told(Silent):
    def say(self, text):
        if "holds up to" in text:
            said = int(text.split(" MB")[0].split()[-1])
            print(json.dumps({"before": peak("VmRSS"), "said": said}))
    def progress(self, label, done, total, note=""):
        if done == total:
            print(json.dumps({"peak": peak("VmHWM")}))

source, out, data = map(Path, sys.argv[1:])
plan = Plan.single("quantize_gptq", {"tokens": 512})
data, cache = DataOptions(data), Path(f"{out}-cache")
compress(source, plan, out, task="lm", data=data, cache=cache, reporter=Told())
"""


def test_the_memory_that_is_told_is_enough(texts: DataOptions, tmp_path: Path) -> None:
    """A child process whose blocks are most of its weights, as the kernel counted it."""
    sizes = {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 2, "head_dim": 64}
    source = save(tmp_path / "m", "glm-half-bias", num_attention_heads=8, **sizes)
    call = [sys.executable, "-c", CHILD, str(source), str(tmp_path / "out"), str(texts.path)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    assert 0.4 < (found["peak"] - found["before"]) / found["said"] / 1e6 < 1, found


@pytest.mark.parametrize("size", ["autoglm-mini", "autoglm-base", "glm-edge-1.5b"])
def test_memory_is_that_of_a_block_and_the_embedding(size: str) -> None:
    """At most 2.5 times the block and the embedding in float32, from 200 M parameters on."""
    spec, dtype = SIZES[size], torch.float32
    ckpt = Checkpoint(Path(), decoder_config(spec, None, dtype), Manifest(), {})
    whole = 4 * (block_parameters(ckpt, 0) + spec.vocab_size * spec.hidden_size)
    config = GptqConfig()
    assert block_step_bytes(SPEC, config, ckpt) <= 2.5 * whole


def test_encoders_too(texts: DataOptions, tmp_path: Path) -> None:
    """A BERT classifier, rows of its own labels."""
    source, data = save_tiny(tmp_path / "m"), tmp_path / "labelled"
    data.mkdir()
    for split in ("train", "validation"):
        rows = [{"text": "abc bcd cab dab"[n % 5 :], "label": f"label {n % 3}"} for n in range(40)]
        (data / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    plan = Plan.single("quantize_gptq", {"bits": 8, "embeddings": 8})
    compress(source, plan, tmp_path / "out", task="intent", data=DataOptions(data),
             cache=tmp_path / "cache")  # fmt: skip
    effect = Checkpoint.open(tmp_path / "out").manifest.lineage[-1].effect
    assert effect["error"] < 0.8 * effect["rtn_error"]


def test_refusals(texts: DataOptions, tmp_path: Path) -> None:
    source = save(tmp_path / "m", "llama")
    data = tmp_path / "labelled.jsonl"
    rows = [{"text": f"abc {n}", "label": f"label {n % 2}"} for n in range(40)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    plan, options = Plan.single("quantize_gptq"), DataOptions(data)
    with pytest.raises(UnsupportedError, match="the task is intent"):
        compress(source, plan, tmp_path / "o", task="intent", data=options)
    with pytest.raises(UnsupportedError, match="K = 64 is not a multiple of group_size 128"):
        run(source, tmp_path / "o", texts, group_size=128)
    run(source, tmp_path / "once", texts)
    with pytest.raises(UnsupportedError, match="already quantized"):
        run(tmp_path / "once", tmp_path / "o", texts)


def test_commands(tmp_path: Path) -> None:
    """Rows are the prompts and answers of training; the marks must be there when it runs."""
    source, data = save(tmp_path / "m", "llama"), tmp_path / "commands"
    data.mkdir()
    for split in ("train", "validation"):
        rows = [{"text": f"lamp {n} on", "intent": "on", "slots": {"n": str(n)}} for n in range(9)]
        (data / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    steps = "steps:\n- distill: {alpha: 0, epochs: 1}\n- quantize_gptq: {tokens: 300}\n"
    options, cache = DataOptions(data), tmp_path / "cache"
    with pytest.raises(UnsupportedError, match="no token for 4 marks"):
        compress(source, Plan.single("quantize_gptq"), tmp_path / "o", task="command", data=options)
    result = compress(
        source, Plan.from_text(steps), tmp_path / "out", task="command", data=options, cache=cache
    )
    effect = result.steps[1].effect
    assert effect["error"] < 0.8 * effect["rtn_error"]
    assert 0 <= effect["validation_exact_match"] <= 1
    ckpt = Checkpoint.open(tmp_path / "out")
    learned = read_task("command", options)
    context = StepContext(ckpt, 0, Silent(), Path(), "command", options, learned)
    tokenizer = Tokenizer.load(ckpt.path)
    found = [tokenizer.inner.decode(row.tolist()) for row in calibration_rows(ckpt, context, 999)]
    assert len(found) == 9
    assert all("lamp" in text for text in found)


def test_windows_of_texts_are_those_of_training(texts: DataOptions, tmp_path: Path) -> None:
    """Every calibration row stands in the joined training texts; the seed draws others."""
    ckpt = Checkpoint.open(save(tmp_path / "m", "llama"))
    context = context_of(ckpt, texts)
    found = calibration_rows(ckpt, context, 200)
    assert sum(map(len, found)) == 200
    tokenizer = Tokenizer.load(ckpt.path)
    assert context.rows is not None
    joined = [t for r in context.rows.train for t in [*tokenizer.encode_prompt(r.text), 5]]
    text = " ".join(map(str, joined)) + " "
    for row in found:
        assert " ".join(map(str, row.tolist())) + " " in text
        assert len(row) <= 64
    other = StepContext(ckpt, 1, Silent(), Path(), "lm", texts, context.rows)
    assert calibration_rows(ckpt, other, 200)[0].tolist() != found[0].tolist()
