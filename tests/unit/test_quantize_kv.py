"""methods/quantize_kv on tiny models of every family: scales, what computes with them, exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from chat_decoder import edit, save_chat_decoder
from oracles import kv_cache as oracle
from text_data import save_texts
from tiny_encoder import save_tiny

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import read_export
from pocketglm.artifacts.manifest import MANIFEST
from pocketglm.artifacts.scheme import CacheScheme
from pocketglm.contracts import DataOptions, ExportOptions, Floats, RunOptions, Silent, StepContext
from pocketglm.errors import (
    CheckpointError,
    MemoryCeilingError,
    ParityError,
    UnsupportedError,
    UsageError,
)
from pocketglm.methods.quantize_kv import SPEC, KvConfig
from pocketglm.model.causal import cache_scale_names
from pocketglm.model.hf import check_tensors, load_decoder
from pocketglm.model.inputs import cache_scales
from pocketglm.registry import load
from pocketglm.stages._memory import resident
from pocketglm.stages._parity_decoder import check_decoder_parity
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.inspect import inspect_path
from pocketglm.stages.plan import Plan
from pocketglm.stages.prove import prove
from pocketglm.train._calibration import calibration_rows
from pocketglm.train.finetune import FinetuneConfig, finetune, read_task

DECODERS = ("glm-half-bias", "glm-wide", "glm4", "llama", "llama-tied-biased", "qwen2", "qwen3")
every_family = pytest.mark.parametrize("name", DECODERS)
INT4 = {"bits": 4, "group_size": 32, "embeddings": 4, "head": 4}
IDS = np.random.default_rng(0).integers(6, 90, 20).tolist()
TOKENS = 12  # that are made after it


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    return DataOptions(save_texts(tmp_path_factory.mktemp("texts")))


def save(folder: Path, name: str = "glm-half-bias", **over: Any) -> Path:
    sizes = {} if name == "glm-wide" else {"head_dim": 32}
    save_chat_decoder(folder, name, **(sizes | over))
    edit(folder / "config.json", eos_token_id=5)
    edit(folder / MANIFEST, task="lm")
    return folder


def run(source: Path, out: Path, data: DataOptions, *before: Any, **settings: Any) -> Checkpoint:
    """Other steps, then quantize_kv."""
    steps = [*before, {"quantize_kv": {"tokens": 512, **settings}}]
    plan = Plan.from_text(json.dumps({"steps": steps}))
    compress(source, plan, out, data=data, cache=out.parent / "cache")
    return Checkpoint.open(out)


def then(source: Path, out: Path, data: DataOptions, method: str, **settings: Any) -> Checkpoint:
    compress(source, Plan.single(method, settings), out, data=data, cache=out.parent / "cache")
    return Checkpoint.open(out)


def context_of(ckpt: Checkpoint, data: DataOptions) -> StepContext:
    return StepContext(ckpt, 0, Silent(), Path(), "lm", data, read_task("lm", data))


def written(path: Path, runtime: str) -> tuple[list[int], Floats]:
    """The likeliest tokens after IDS, and all logits they were chosen by."""
    session = load("runtimes", runtime).open(path, RunOptions(threads=1))
    logits, ids = [session.prefill(IDS)], []
    for _ in range(TOKENS):
        ids.append(int(logits[-1].argmax()))
        logits.append(session.step(ids[-1]))
    session.close()
    return ids, np.stack(logits)


# --- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["channel", "tensor"])
@every_family
def test_scales_are_of_upstreams_own_keys_and_values(
    name: str, per: str, texts: DataOptions, tmp_path: Path
) -> None:
    folder = save(tmp_path / "ckpt", name)
    ckpt = Checkpoint.open(folder)
    after = run(folder, tmp_path / "out", texts, per=per, calibrator="minmax")
    auto: Any = transformers.AutoModelForCausalLM
    model, found = auto.from_pretrained(folder, dtype=torch.float64).eval(), []
    with torch.inference_mode():
        for row in calibration_rows(ckpt, context_of(ckpt, texts), 512):
            ids = torch.from_numpy(row.astype(np.int64))[None]
            found.append(model(ids, use_cache=True).past_key_values)
    rope = load_decoder(ckpt).spec.rope
    for index in range(2):
        for tensor, part in zip(cache_scale_names(index), ("keys", "values"), strict=True):
            rows = [getattr(past.layers[index], part)[0].transpose(0, 1) for past in found]
            dims = rope.dims if part == "keys" else 0
            wanted = oracle.scales(torch.cat(rows).numpy(), per, dims, rope.interleaved)
            np.testing.assert_allclose(after.read(tensor), wanted, rtol=1e-4)
    assert after.manifest.cache == CacheScheme(per=per)


def test_all_other_bytes_stay(texts: DataOptions, tmp_path: Path) -> None:
    before = Checkpoint.open(save(tmp_path / "ckpt", "qwen3"))
    after = run(before.path, tmp_path / "out", texts)
    scales = {name for index in range(2) for name in cache_scale_names(index)}
    assert set(after.tensors) - set(before.tensors) == scales
    for name in before.tensors:
        assert after.read(name).tobytes() == before.read(name).tobytes(), name
    effect = after.manifest.lineage[-1].effect
    assert effect["tokens"] == 512
    assert 0 < effect["kl"] < 0.01
    assert 0 < effect["value_error"] < effect["key_error"] < 0.02
    assert effect["parameters"] == sum(info.size for info in before.tensors.values())
    again = run(after.path, tmp_path / "again", texts, per="tensor")  # takes the place of the first
    assert set(again.tensors) == set(after.tensors)
    assert again.tensors[cache_scale_names(0)[0]].shape == (1,)
    inspected = inspect_path(after.path)
    assert inspected.kv_cache == "int8 per channel"
    assert inspect_path(before.path).kv_bytes_per_token == 2 * (inspected.kv_bytes_per_token or 0)


def test_upstream_opens_it_as_before(texts: DataOptions, tmp_path: Path) -> None:
    """transformers leaves the scales out, and keeps its cache in float."""
    folder = save(tmp_path / "ckpt", "llama")
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    run(folder, plain, texts)
    run(folder, packed, texts, {"quantize_rtn": {"bits": 4, "group_size": 32}})
    auto: Any = transformers.AutoModelForCausalLM
    for path in (plain, packed):
        assert inspect_path(path).opens_in["transformers"] == "yes"
        ids = torch.tensor([IDS])
        with torch.inference_mode():
            found = auto.from_pretrained(path, dtype=torch.float32).eval()(ids).logits
            wanted = load_decoder(Checkpoint.open(path))(ids)  # whoever reads scales sets them
        assert (found - wanted).abs().max() < 1e-4


# --- computing with them -------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["channel", "tensor"])
@every_family
def test_every_runtime_computes_the_same(
    name: str, per: str, texts: DataOptions, tmp_path: Path
) -> None:
    folder = save(tmp_path / "ckpt", name)
    run(folder, tmp_path / "kv", texts, per=per)
    (target,) = export(tmp_path / "kv", ["onnx"], tmp_path / "x").targets
    assert target.ok, target.error
    file = tmp_path / "x" / "onnx"
    ids, logits = written(tmp_path / "kv", "torch")
    for runtime in ("onnx", "genai"):
        found = written(file, runtime)
        assert found[0] == ids
        off = np.abs(found[1] - logits).max(1) / logits.std()
        # A value in the middle between two integers may become either, and stays in the cache:
        # rare, and a step at most.
        assert off.min() < 1e-5
        assert off.max() < 0.05
    lost = np.abs(written(folder, "torch")[1][0] - logits[0]).max() / logits.std()
    assert lost > 10 * off.min(), "the cache was not rounded"
    manifest = read_export(file)
    assert manifest.cache is not None
    assert (manifest.cache.dtype, manifest.minimum["onnxruntime"]) == ("int8", "1.27")
    assert manifest.cache.bytes_per_token == inspect_path(file).kv_bytes_per_token
    assert inspect_path(folder).kv_bytes_per_token == 2 * manifest.cache.bytes_per_token


@torch.inference_mode()
def test_with_a_cache_or_without_torch_gives_the_same(texts: DataOptions, tmp_path: Path) -> None:
    ckpt = run(save(tmp_path / "ckpt"), tmp_path / "kv", texts)
    model = load_decoder(ckpt)
    plain = model(torch.tensor([IDS]))
    model.cache_scales = cache_scales(ckpt)
    whole = model(torch.tensor([IDS]))
    assert (whole - plain).abs().max() > 1e-3
    cache, float_cache = model.new_cache(1), load_decoder(ckpt).new_cache(1)
    steps = [model.step(torch.tensor([token]), cache)[0] for token in IDS]
    assert (torch.stack(steps) - whole[0]).abs().max() < 1e-4
    float_cache.reserve(torch.tensor([20]), 20)
    assert 4 * cache.nbytes == float_cache.nbytes
    # Two rows, padded; one goes on alone.
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    both = model.new_cache(2)
    model.prefill(torch.tensor([IDS[:8], IDS[:8]]), mask, both)
    twin = both.fork()
    found = model.step(torch.tensor([IDS[8], IDS[5]]), both)
    assert (found[0] - whole[0, 8]).abs().max() < 1e-4
    assert (found[1] - whole[0, 5]).abs().max() < 1e-4
    both.rewind(1)
    assert torch.equal(model.step(torch.tensor([IDS[8], IDS[5]]), twin), found)


@pytest.mark.parametrize("bug", ["", *oracle.BUGS[1:]])
@torch.inference_mode()
def test_a_layer_is_the_oracles(bug: str, texts: DataOptions, tmp_path: Path) -> None:
    ckpt = run(
        save(tmp_path / "ckpt"), tmp_path / "kv", texts, calibrator="percentile", percentile=90
    )
    model, seen = load_decoder(ckpt), dict[str, Any]()
    model.cache_scales = scales = cache_scales(ckpt)
    assert scales is not None
    attention: Any = torch.nn.functional.scaled_dot_product_attention

    def watch(q: Any, k: Any, v: Any, **more: Any) -> Any:
        out = attention(q, k, v, **more)
        seen.setdefault("first", [x[0].transpose(0, 1).double().numpy() for x in (q, k, v, out)])
        return out

    torch.nn.functional.scaled_dot_product_attention = watch  # type: ignore[assignment]
    try:
        model(torch.tensor([IDS]))
        rounded = seen.pop("first")
        model.cache_scales = None
        model(torch.tensor([IDS]))
    finally:
        torch.nn.functional.scaled_dot_product_attention = attention
    q, k, v, _ = seen["first"]
    k_scale, v_scale = (scale[:, 0].double().numpy() for scale in scales[0])
    wanted = oracle.attention(q, k, v, k_scale, v_scale, bug)
    error = np.abs(rounded[3] - wanted).max() / wanted.std()
    assert error < 1e-4 if not bug else error > 1e-2


def test_scores_see_the_loss(texts: DataOptions, tmp_path: Path) -> None:
    folder = save(tmp_path / "ckpt")
    plain = then(folder, tmp_path / "plain", texts, "prune_unstructured", sparsity=0.0)
    ckpt = run(folder, tmp_path / "kv", texts, calibrator="percentile", percentile=50)
    before, after = (c.manifest.lineage[-1].effect["validation_nll"] for c in (plain, ckpt))
    assert abs(after - before) > 1e-3


# --- with other steps ----------------------------------------------------------------------------


def test_before_or_after_the_weights_quantization(texts: DataOptions, tmp_path: Path) -> None:
    folder = save(tmp_path / "ckpt")
    after = run(folder, tmp_path / "after", texts, {"quantize_rtn": INT4})
    first = run(folder, tmp_path / "first", texts)
    for method in ("quantize_rtn", "quantize_gptq"):
        ckpt = then(first.path, tmp_path / method, texts, method, **INT4)
        assert ckpt.manifest.cache
        assert ckpt.manifest.schemes == after.manifest.schemes
        for name in ckpt.tensors:
            if name in first.tensors and name.endswith("_scale") and "weight" not in name:
                assert np.array_equal(ckpt.read(name), first.read(name))
    for path in (after.path, tmp_path / "quantize_rtn"):
        (target,) = export(path, ["onnx"], tmp_path / f"x-{path.name}").targets
        assert target.ok, target.error
        wanted, found = written(path, "torch"), written(tmp_path / f"x-{path.name}/onnx", "onnx")
        assert wanted[0] == found[0]
    kept = then(first.path, tmp_path / "trimmed", texts, "quantize_rtn", bits=8)
    assert cache_scales(kept) is not None


def test_steps_that_change_keys_and_values(texts: DataOptions, tmp_path: Path) -> None:
    ckpt = run(save(tmp_path / "ckpt"), tmp_path / "kv", texts)
    with pytest.raises(UnsupportedError, match="put quantize_kv after it"):
        then(ckpt.path, tmp_path / "awq", texts, "quantize_awq")
    pruned = then(ckpt.path, tmp_path / "pruned", texts, "prune_width", ffn=0.5)
    assert pruned.manifest.cache is None
    assert not any(name.endswith(".k_scale") for name in pruned.tensors)
    finetune(ckpt.path, FinetuneConfig(task="lm", data=texts.path, epochs=1), tmp_path / "trained")
    assert Checkpoint.open(tmp_path / "trained").manifest.cache is None


# --- refusals ------------------------------------------------------------------------------------


def test_refusals(texts: DataOptions, tmp_path: Path) -> None:
    encoder = save_tiny(tmp_path / "encoder")
    with pytest.raises(UnsupportedError, match="it has no cache of keys and values"):
        compress(encoder, Plan.single("quantize_kv", {}), tmp_path / "a", task="lm", data=texts)
    folder = save(tmp_path / "ckpt")
    with pytest.raises(UsageError, match="quantize_kv needs rows"):
        compress(folder, Plan.single("quantize_kv", {}), tmp_path / "a")
    plan = Plan.single("quantize_kv", {})
    with pytest.raises(MemoryCeilingError, match="quantize_kv's own work"):
        compress(folder, plan, tmp_path / "a", data=texts, max_memory=resident() + (60 << 20))
    empty = tmp_path / "empty"
    empty.mkdir()
    for split, text in (("train", " "), ("validation", "the lamp is on")):
        (empty / f"{split}.jsonl").write_text(json.dumps({"text": text}))
    with pytest.raises(UnsupportedError, match="there are no training rows"):
        run(folder, tmp_path / "a", DataOptions(empty))
    run(folder, tmp_path / "kv", texts)
    export(folder, ["onnx"], tmp_path / "x")
    with pytest.raises(UsageError, match="is itself quantized"):
        prove(tmp_path / "x/onnx", tmp_path / "kv", "lm", texts, tmp_path / "proof")


def change(folder: Path, name: str, edit: Callable[[Any], None]) -> None:
    """One tensor of a checkpoint, in place."""
    ckpt = Checkpoint.open(folder)
    arrays = {tensor: ckpt.read(tensor) for tensor in ckpt.tensors}
    edit(arrays[name])
    safetensors.write_file(folder / "model.safetensors", arrays.items())


def test_bad_numbers_are_named(texts: DataOptions, tmp_path: Path) -> None:
    layer = "model.layers.1.self_attn.k_proj.weight"
    folder = save(tmp_path / "nan")
    change(folder, layer, lambda weight: weight.__setitem__((3, 2), np.nan))
    with pytest.raises(CheckpointError, match=rf"'{layer}' holds NaN or infinity, first in row 3"):
        run(folder, tmp_path / "a", texts)
    folder = save(tmp_path / "great", "llama")
    change(folder, layer, lambda weight: weight.__setitem__((3, 2), 3e38))
    with pytest.raises(CheckpointError, match=r"the keys of layer 1 \(model.layers.1.self_attn.k_"):
        run(folder, tmp_path / "b", texts)


def test_damaged_scales_are_refused(texts: DataOptions, tmp_path: Path) -> None:
    ckpt = run(save(tmp_path / "ckpt"), tmp_path / "kv", texts)
    name = cache_scale_names(1)[1]
    change(ckpt.path, name, lambda scale: scale.__setitem__((0, 0), 0))
    with pytest.raises(CheckpointError, match=f"'{name}' holds 0.0, a scale is positive"):
        written(ckpt.path, "torch")
    edit(ckpt.path / MANIFEST, cache={"bits": 8, "per": "tensor"})
    with pytest.raises(CheckpointError, match=r"should be F32 \[1\]; it is F32 \[2, 32\]"):
        check_tensors(Checkpoint.open(ckpt.path))


# --- parity --------------------------------------------------------------------------------------


def scale_of_one_feature(graph: onnx.GraphProto, data: bytearray, at: dict[str, int]) -> None:
    start = at["model.layers.1.self_attn.v_scale"]
    value = np.frombuffer(data[start : start + 4], np.float32) * np.float32(1.1)
    data[start : start + 4] = value.tobytes()


def exchanged_scales(graph: onnx.GraphProto, data: bytearray, at: dict[str, int]) -> None:
    node = [n for n in graph.node if n.op_type == "GroupQueryAttention"][1]
    node.input[12], node.input[13] = node.input[13], node.input[12]


def scales_of_another_layer(graph: onnx.GraphProto, data: bytearray, at: dict[str, int]) -> None:
    first, second = [n for n in graph.node if n.op_type == "GroupQueryAttention"]
    second.input[12] = first.input[12]


DEFECTS = (scale_of_one_feature, exchanged_scales, scales_of_another_layer)


@pytest.mark.parametrize("defect", [None, *DEFECTS])
def test_a_wrong_scale_in_the_file_is_seen(defect: Any, texts: DataOptions, tmp_path: Path) -> None:
    ckpt = run(save(tmp_path / "ckpt"), tmp_path / "kv", texts)
    options = ExportOptions(threads=1)
    (target,) = export(ckpt.path, ["onnx"], tmp_path / "x", options=options).targets
    assert target.ok, target.error
    folder = tmp_path / "x" / "onnx"
    if defect:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        places = {
            t.name: int(next(e.value for e in t.external_data if e.key == "offset"))
            for t in model.graph.initializer
            if t.external_data
        }
        data = bytearray((folder / "model.onnx.data").read_bytes())
        defect(model.graph, data, places)
        (folder / "model.onnx.data").write_bytes(data)
        onnx.save(model, folder / "model.onnx")
    onnx_target = load("targets", "onnx")
    check = (ckpt, folder, read_export(folder), onnx_target, options, Silent())
    if not defect:
        check_decoder_parity(*check)
        return
    with pytest.raises(ParityError, match=r"'cache\.1': the"):
        check_decoder_parity(*check)


def test_what_it_will_hold_is_told(tmp_path: Path, texts: DataOptions) -> None:
    ckpt = Checkpoint.open(save(tmp_path / "ckpt"))
    context = context_of(ckpt, texts)
    assert SPEC.memory is not None
    few, many = (SPEC.memory(KvConfig(tokens=n), ckpt, context) for n in (1, 1_000_001))
    assert many - few >= 4 * 1_000_000 * (2 * 64 + 2 * 2 * 32)
