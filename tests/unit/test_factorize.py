"""Models with factorized layers: how they are made, stored, opened, quantized, exported and run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from oracles import factorize as oracle
from pydantic import ValidationError
from text_data import save_texts
from tiny_decoder import VARIANTS
from tiny_encoder import save_tiny, spec
from tiny_export import WIDE, save_wide

import pocketglm.model.auto
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import MANIFEST
from pocketglm.artifacts.schemas import CompressResult
from pocketglm.cli.inspect import show
from pocketglm.contracts import DataOptions, ExportOptions, RunOptions, Silent, StepContext
from pocketglm.errors import CheckpointError, UnsupportedError
from pocketglm.methods import factorize as method
from pocketglm.methods._walk import answers, block_of, calibration_batches, call, embedded
from pocketglm.model.hf import (
    decoder_spec_of,
    load_decoder,
    load_encoder,
    model_spec_of,
    save_decoder,
    spec_of,
)
from pocketglm.model.layers import Factored
from pocketglm.model.surgery import cut, everything
from pocketglm.runtimes import open_decoder, open_encoder
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.inspect import inspect_path
from pocketglm.stages.plan import Plan
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train.finetune import read_task

IDS = torch.tensor([[2, 9, 30, 41, 3], [2, 7, 3, 0, 0]])
MASK = (IDS > 0).long()
WORDS = ["abc", "bcd", "cab", "dab", "fig", "hij"]
RANKS: Any = (
    (("attention.query", 32), ("ffn.up", 64), ("ffn.down", 64)),
    (("attention.key", 32), ("attention.value", 32), ("attention.output", 64)),
)
RELU: dict[str, Any] = {"activation": "relu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 70), ("validation", 6)):
        rows = [
            {"text": " ".join(rng.choice(WORDS, 4)), "label": f"label {number % 3}"}
            for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return DataOptions(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    return DataOptions(save_texts(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "a")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny: Path, data: DataOptions) -> Path:
    """`tiny` after the method with its defaults."""
    out = tmp_path_factory.mktemp("small") / "a"
    run(tiny, out, data)
    return out


def run(
    source: Path, out: Path, data: DataOptions | None = None, **settings: Any
) -> CompressResult:
    plan, cache = Plan.single("factorize", settings), out.parent / "cache"
    claim = compress(source, plan, out, data=data, cache=cache, dry_run=True)
    result = compress(source, plan, out, data=data, cache=cache)
    assert result.bytes_after <= claim.bytes_after <= result.bytes_before
    if "energy" not in settings:
        assert result.bytes_after == claim.bytes_after
    return result


def effect(result: CompressResult) -> dict[str, float]:
    return dict(result.steps[-1].effect)


def ranks_of(folder: Path) -> list[dict[str, int]]:
    return [dict(ranks) for ranks in model_spec_of(Checkpoint.open(folder)).layer_ranks]


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = load_encoder(Checkpoint.open(folder))(IDS, MASK)
    return result


def sample(ckpt: Checkpoint, data: DataOptions) -> list[torch.Tensor]:
    """600 tokens of training rows, as the method draws them."""
    context = StepContext(ckpt, 0, Silent(), Path(), "intent", data, read_task("intent", data))
    return calibration_batches(ckpt, context, 600)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(source: Path, method: str, data: DataOptions | None = None, **settings: Any) -> str:
    with pytest.raises(UnsupportedError) as error:
        compress(source, Plan.single(method, settings), source.parent / "out", data=data)
    assert not (source.parent / "out").exists()
    return str(error.value)


# --- the form ------------------------------------------------------------------------------------


def test_one_form_for_each_meaning() -> None:
    assert spec(layer_ranks=((), ())) == spec()
    backwards = tuple(tuple(reversed(ranks)) for ranks in RANKS)
    assert spec(layer_ranks=backwards) == spec(layer_ranks=RANKS)
    assert not spec(layer_ranks=RANKS).regular
    assert spec(layer_ranks=RANKS).block(1).ranks == RANKS[1]
    for wrong, words in (
        (((), (), (("ffn.up", 3),)), "of 3 layers, the model has 2"),
        (((("ffn.gate", 3),), ()), "no 'ffn.gate', only attention.query"),
        (((("ffn.up", 0),), ()), "rank of 'ffn.up' is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            spec(layer_ranks=wrong)


def test_a_factored_layer_is_the_product() -> None:
    layer = Factored(6, 4, 3, bias=True)
    weight = layer.factor_out.weight @ layer.factor_in.weight
    x = torch.randn(2, 5, 6)
    wanted = torch.nn.functional.linear(x, weight, layer.factor_out.bias)
    assert torch.allclose(layer(x), wanted, atol=1e-6)


def test_clear_names_and_keys(tmp_path: Path) -> None:
    ckpt = Checkpoint.open(save_tiny(tmp_path, layer_ranks=RANKS))
    assert spec_of(ckpt) == spec(layer_ranks=RANKS)
    assert ckpt.config["layer_ranks"][1] == {
        "attention.key": 32,
        "attention.value": 32,
        "attention.output": 64,
    }
    assert ckpt.config["model_type"] == "pocketglm"
    at = "encoder.layer.0.attention.self.query."
    names = {name.partition(at)[2] for name in ckpt.tensors if at in name}
    assert names == {"factor_in.weight", "factor_out.weight", "factor_out.bias"}


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([{}], r"'layer_ranks' should be a list of 2 mappings"),
        ([{}, {"ffn.up": True}], r"positive whole numbers, it is .*True"),
        ([{}, {"ffn.up": 0}], r"it is .*0"),
        ([{}, ["ffn.up"]], r"should be a list of 2 mappings"),
        ([{}, {"ffn.gate": 32}], r"config.json: layer_ranks: there is no 'ffn.gate'"),
        ([{}, {"ffn.up": 32}], r"has no tensor"),
        ([{"attention.query": 32, "ffn.up": 32, "ffn.down": 64}, dict(RANKS[1])], r"\[32, 128\]"),
    ],
)
def test_a_config_that_disagrees_is_refused(tmp_path: Path, ranks: Any, words: str) -> None:
    folder = save_tiny(tmp_path / "a", layer_ranks=RANKS)
    edit(folder / "config.json", layer_ranks=ranks)
    with pytest.raises(CheckpointError, match=words):
        load_encoder(Checkpoint.open(folder))
    wide = save_wide(tmp_path / "b", "llama")
    edit(wide / "config.json", layer_ranks=ranks, model_type="pocketglm", family="llama")
    if words != r"config.json: layer_ranks: there is no 'ffn.gate'" and "128" not in words:
        with pytest.raises(CheckpointError, match=words):
            load_decoder(Checkpoint.open(wide))


def test_inspect_and_transformers(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = inspect_path(small)
    assert result.layer_ranks == ranks_of(small)
    assert result.opens_in["transformers"].startswith("no, because model_type pocketglm")
    show(result)
    assert "12 linear layers, rank 32 to 64" in capsys.readouterr().out
    auto: Any = transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(small)
    assert isinstance(theirs, pocketglm.model.auto.PocketGLMForSequenceClassification)
    with torch.inference_mode():
        assert torch.equal(theirs(IDS, MASK).logits, logits(small))


def test_layers_of_a_factorized_model_can_go(tmp_path: Path) -> None:
    model = load_encoder(Checkpoint.open(save_tiny(tmp_path / "a", layer_ranks=RANKS)))
    small = cut(model, replace(everything(model.spec), layers=(1,)))
    assert small.spec.layer_ranks == RANKS[1:]
    assert small(IDS, MASK).isfinite().all()
    heads = cut(model, replace(everything(model.spec), groups=((0, 2), (1, 3)), hidden=(0, 1, 5)))
    query = block_of(heads, 0).attention.query
    assert query.factor_out.weight.shape == (64, 32)
    assert query.factor_in.weight.shape == (32, 3)
    assert heads(IDS, MASK).isfinite().all()


# --- the method ----------------------------------------------------------------------------------


def test_ranks_by_bytes(tiny: Path, small: Path) -> None:
    ranks = ranks_of(small)
    assert ranks[0] == ranks[1] == {n: 64 if n[0] == "f" else 32 for n in ranks[0]}
    before, after = (
        sum(
            info.nbytes for name, info in Checkpoint.open(path).tensors.items() if ".layer." in name
        )
        for path in (tiny, small)
    )
    assert 0.5 < after / before < 0.75
    cost = method.Cost(4, 32, 4)
    for rows, columns in ((128, 128), (256, 128), (96, 512)):
        for ratio in (0.4, 0.9, 1.0):
            rank, whole = cost.largest_rank(rows, columns, ratio), cost.whole(rows, columns)
            assert rank % 32 == 0
            assert rank == 0 or cost.factored(rows, columns, rank) <= ratio * whole
            assert cost.factored(rows, columns, rank) < whole
            more = cost.factored(rows, columns, rank + 32)
            assert more > ratio * whole or more >= whole


def test_what_saves_nothing_after_quantization_stays() -> None:
    """INT8 has a scale for each row of either factor: the 64 bytes that rank 32 saves here."""
    plain, int8, int4 = (method.Cost(bits, 32, 4) for bits in (None, 8, 4))
    shape = (66, 64)
    assert plain.whole(*shape) - plain.factored(*shape, 32) == 4 * 64
    assert int8.whole(*shape) == int8.factored(*shape, 32) == 66 * 64 + 2 * 66
    assert [cost.largest_rank(*shape, 1.0) for cost in (plain, int8, int4)] == [32, 0, 32]
    assert [cost.largest_rank(64, 64, 1.0) for cost in (plain, int8, int4)] == [0, 0, 0]


def test_the_factors_are_the_oracles(tiny: Path, tmp_path: Path, data: DataOptions) -> None:
    """The first layer whitened by its inputs on the rows, others by those of the smaller model."""
    run(tiny, tmp_path / "a", data, damping=0.0, tokens=600)
    before, after = (load_encoder(Checkpoint.open(path)) for path in (tiny, tmp_path / "a"))
    batches = sample(Checkpoint.open(tiny), data)
    assert sum(batch.numel() for batch in batches) == 600
    hidden = embedded(after, batches)
    inputs: dict[str, list[torch.Tensor]] = {"ffn.up": [], "attention.query": []}
    for name in inputs:
        block_of(after, 1).get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].flatten(0, 1))
        )
    for batch in hidden:
        call(after, block_of(after, 1), call(after, block_of(after, 0), batch))
    for name, found in inputs.items():
        x = torch.cat(found).double().numpy()
        layer: Any = block_of(after, 1).get_submodule(name)
        ours = (layer.factor_out.weight.double() @ layer.factor_in.weight.double()).detach().numpy()
        weight = before.get_parameter(f"blocks.1.{name}.weight").detach().double().numpy()
        rank = layer.factor_in.weight.shape[0]
        least = oracle.energies(weight, x.T @ x + 1e-9 * np.eye(x.shape[1]))[rank:].sum()
        lost = np.square(x @ (weight - ours).T).sum()
        assert lost == pytest.approx(least, rel=1e-3)
        assert lost < 0.9 * np.square(x @ (weight - oracle.plain(weight, rank)).T).sum()


def test_the_walk_is_the_model(tiny: Path, data: DataOptions, texts: DataOptions) -> None:
    model = load_encoder(Checkpoint.open(tiny))
    batch = IDS[:1]
    (x,) = embedded(model, [batch])
    for index in range(2):
        x = call(model, block_of(model, index), x)
    with torch.inference_mode():
        assert torch.allclose(x, model.hidden(batch, torch.ones_like(batch)), atol=1e-5)
        assert torch.equal(answers(model, batch), model(batch, torch.ones_like(batch)))


def test_plain_needs_no_rows(tiny: Path, tmp_path: Path) -> None:
    found = effect(run(tiny, tmp_path / "a", whitened=False))
    before, after = (load_encoder(Checkpoint.open(path)) for path in (tiny, tmp_path / "a"))
    lost = []
    for name, layer in after.named_modules():
        if isinstance(layer, Factored):
            weight = before.get_parameter(f"{name}.weight").detach().double().numpy()
            ours = (layer.factor_out.weight @ layer.factor_in.weight).detach().double().numpy()
            rank = layer.factor_in.weight.shape[0]
            np.testing.assert_allclose(ours, oracle.plain(weight, rank), atol=1e-5)
            lost.append(np.square(weight - ours).sum() / np.square(weight).sum())
    assert found["error"] == pytest.approx(np.mean(lost) ** 0.5, rel=1e-4)
    assert (found["layers"], found["layers_whole"], found["tokens"]) == (12, 0, 0)


def test_whitening_loses_less(tiny: Path, small: Path, tmp_path: Path, data: DataOptions) -> None:
    run(tiny, tmp_path / "a", whitened=False)
    whole = logits(tiny)
    plain, ours = (float((logits(path) - whole).norm()) for path in (tmp_path / "a", small))
    assert ours < plain


def test_energy(tiny: Path, tmp_path: Path, data: DataOptions) -> None:
    """A layer whose spectrum falls is cut; the others stay whole, to the last bit."""

    def flatten(model: Any) -> None:
        low = torch.randn(256, 20) @ torch.randn(20, 128)
        model.blocks[0].ffn.up.weight.copy_(0.05 * low)

    source = save_tiny(tmp_path / "source", change=flatten)
    found = effect(run(source, tmp_path / "a", data, energy=0.9999))
    assert ranks_of(tmp_path / "a") == [{"ffn.up": 32}, {}]
    assert (found["layers"], found["layers_whole"]) == (1, 11)
    assert found["error"] < 1e-3
    assert torch.allclose(logits(tmp_path / "a"), logits(source), atol=1e-3)
    before, after = (Checkpoint.open(path) for path in (source, tmp_path / "a"))
    for name in set(before.tensors) & set(after.tensors):
        assert np.array_equal(before.read(name), after.read(name))


def test_nothing_cut_is_upstreams_model_again(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "a", pooling="cls", pooler=True)
    run(source, tmp_path / "b", whitened=False, energy=1.0)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()


def test_refusals(tiny: Path, small: Path, tmp_path: Path, data: DataOptions) -> None:
    assert "it is factorized already" in refused(small, "factorize", data)
    assert "no layer becomes smaller: with ranks in steps of 128" in refused(
        tiny, "factorize", data, group_size=128
    )
    assert "skip: 'nothing' matches no tensor" in refused(tiny, "factorize", data, skip=["nothing"])
    assert "it is factorized: prune it before" in refused(small, "prune_width", data)
    compress(tiny, Plan.single("quantize_rtn", {}), tmp_path / "q")
    assert "it is quantized: factorize the float model" in refused(
        tmp_path / "q", "factorize", data
    )
    with pytest.raises(ValidationError, match="set one of them"):
        method.FactorizeConfig(ratio=0.5, energy=0.5)


def test_skip(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "a", whitened=False, skip=["*.layer.0.*", "*attention*"])
    assert ranks_of(tmp_path / "a") == [{}, {"ffn.up": 64, "ffn.down": 64}]


# --- what comes after it -------------------------------------------------------------------------

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("quantize_rtn", {}),
    "int8 words": ("quantize_rtn", {"embeddings": 8, "symmetric": False, "head": 8}),
    "int8 exact": ("quantize_rtn", {"activation": "none"}),
    "int4": ("quantize_rtn", {"bits": 4}),
    "static": ("quantize_static", {"rows": 64}),
    "static kept": ("quantize_static", {"rows": 64, "float_layers": 3}),
    "gptq": ("quantize_gptq", {"tokens": 400}),
    "qat": ("qat", {"epochs": 1, "rows": 64}),
}


def exported(folder: Path, out: Path, opset: int | None = None) -> torch.Tensor:
    """Through parity, block by block and whole; then what the file answers."""
    (done,) = export(folder, ["onnx"], out, options=ExportOptions(opset=opset)).targets
    assert done.ok, done.error
    session = open_encoder(out / "onnx", RunOptions())
    try:
        return torch.from_numpy(session.logits(IDS.numpy(), MASK.numpy()))
    finally:
        session.close()


@pytest.mark.parametrize("opset", [None, 13])
def test_float_export(small: Path, opset: int | None, tmp_path: Path) -> None:
    assert torch.allclose(exported(small, tmp_path / "b", opset), logits(small), atol=1e-5)


def test_some_layers_factorized(tmp_path: Path) -> None:
    """Query alone, then key and value: whole ones beside factorized ones."""
    folder = save_tiny(tmp_path / "a", layer_ranks=RANKS)
    assert torch.allclose(exported(folder, tmp_path / "b"), logits(folder), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_quantized_export(form: str, small: Path, tmp_path: Path, data: DataOptions) -> None:
    name, settings = FORMS[form]
    compress(small, Plan.single(name, settings), tmp_path / "b", data=data, cache=tmp_path / "c")
    ckpt = Checkpoint.open(tmp_path / "b")
    assert spec_of(ckpt) == spec_of(Checkpoint.open(small))
    factors = {name for name in ckpt.manifest.schemes if "factor_" in name}
    assert len(factors) >= 18
    found, wanted = exported(ckpt.path, tmp_path / "d"), logits(ckpt.path)
    exact = form in ("int8 exact", "int4", "gptq")
    limit = 1e-4 if exact else 0.3 * float(wanted.std())
    assert float((found - wanted).abs().max()) < limit


def test_smoothquant(tmp_path: Path, data: DataOptions) -> None:
    """Its scales move between the factors that make and read an input; the model stays itself."""
    source = save_tiny(tmp_path / "a", layer_ranks=RANKS, **RELU)
    plan = Plan.single("quantize_static", {"rows": 64, "smoothquant": 0.5})
    compress(source, plan, tmp_path / "b", data=data, cache=tmp_path / "c")
    difference = logits(tmp_path / "b") - logits(source)
    assert float(difference.abs().max()) < 0.2 * float(logits(source).std())


def test_distill_heals(tmp_path: Path) -> None:
    """The whole model teaches the factorized one, which then answers as it does."""
    source = save_tiny(tmp_path / "whole", dropout=0.0, attention_dropout=0.0)
    rng, teacher = np.random.default_rng(1), Checkpoint.open(source)
    texts = [" ".join(rng.choice(WORDS, 4)) for _ in range(860)]
    tokens = Tokenizer.load(source).encode(texts, 48)
    ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
    with torch.inference_mode():
        whole = load_encoder(teacher)(ids, mask).log_softmax(1)
    rows = [
        json.dumps({"text": text, "label": f"label {int(label)}"})
        for text, label in zip(texts, whole.argmax(1), strict=True)
    ]
    for split, part in (("train", slice(800)), ("validation", slice(800, None))):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows[part]))
    teaching = {"epochs": 6, "batch_size": 16, "learning_rate": 5e-4, "alpha": 1, "temperature": 1}
    steps = (
        *Plan.single("factorize", {"ratio": 0.55}).steps,
        *Plan.single("distill", teaching).steps,
    )
    far, right = [], []
    for count in (1, 2):
        out, data = tmp_path / f"{count}", DataOptions(tmp_path)
        result = compress(source, Plan(steps[:count]), out, data=data, cache=tmp_path / "c")
        right.append(effect(result)["validation_accuracy"])
        assert [len(ranks) for ranks in ranks_of(out)] == [6, 6]
        with torch.inference_mode():
            found = load_encoder(Checkpoint.open(out))(ids, mask).log_softmax(1)
        far.append(float((found - whole)[800:].norm()))
    assert far[1] < 0.75 * far[0]
    assert right[0] < right[1]


# --- decoders ------------------------------------------------------------------------------------


def decoder(folder: Path, name: str) -> Path:
    source = save_wide(folder, name)
    edit(source / MANIFEST, task="lm") if (source / MANIFEST).is_file() else None
    return source


@pytest.mark.parametrize("name", sorted(WIDE))
@torch.inference_mode()
def test_decoders(name: str, tmp_path: Path) -> None:
    """Every family: made, stored, opened, quantized, exported with parity, and run."""
    source = decoder(tmp_path / "source", name)
    run(source, tmp_path / "a", whitened=False, ratio=0.99)
    folder = tmp_path / "a"
    ckpt = Checkpoint.open(folder)
    assert ckpt.config["model_type"] == "pocketglm"
    assert decoder_spec_of(ckpt).family == VARIANTS[name][0]
    assert sum(map(len, ranks_of(folder))) >= 4
    wanted = load_decoder(ckpt)(IDS, MASK)
    auto: Any = transformers.AutoModelForCausalLM
    assert torch.equal(auto.from_pretrained(folder)(IDS, MASK).logits, wanted)
    save_decoder(load_decoder(ckpt), tmp_path / "b", source=ckpt, manifest=ckpt.manifest)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (folder / file).read_bytes()
    plan = Plan.single("quantize_rtn", {"bits": 4, "embeddings": 8})
    compress(folder, plan, tmp_path / "c", cache=tmp_path / "cache")
    for number, path in enumerate((folder, tmp_path / "c")):
        (done,) = export(path, ["onnx"], tmp_path / f"onnx{number}").targets
        assert done.ok, done.error
        session = open_decoder(tmp_path / f"onnx{number}" / "onnx", RunOptions())
        found = session.prefill(IDS[0].tolist())
        session.close()
        last = load_decoder(Checkpoint.open(path))(IDS[:1])[0, -1]
        assert torch.allclose(torch.from_numpy(found), last, atol=1e-3)
