"""The pruning methods through `compress`: what they keep, what they refuse, and what runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_encoder import quantize_weights, save_tiny
from tiny_export import save_wide

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.schemas import CompressResult
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import DataOptions, RunOptions, Silent, StepContext
from pocketglm.errors import CheckpointError, DataError, PocketError, UnsupportedError
from pocketglm.methods import _prune
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import load_decoder, load_encoder, model_spec_of, spec_of
from pocketglm.ops.stored import as_tensor
from pocketglm.runtimes import open_encoder
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan

IDS = torch.tensor([[2, 9, 30, 41, 3], [2, 7, 3, 0, 0]])
MASK = (IDS > 0).long()
WORDS = ["abc", "bcd", "cab", "dab", "fig", "hij"]


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
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("prune") / "tiny", num_layers=4)


def blocks(model: Any) -> list[Any]:
    return list(model.blocks)


def prune(
    source: Path, out: Path, method: str, data: DataOptions | None = None, **settings: Any
) -> CompressResult:
    plan, cache = Plan.single(method, settings), out.parent / "cache"
    claim = compress(source, plan, out, data=data, cache=cache, dry_run=True)
    result = compress(source, plan, out, data=data, cache=cache)
    assert result.bytes_after <= claim.bytes_after
    return result


def effect(result: CompressResult) -> dict[str, float]:
    return dict(result.steps[-1].effect)


def refused(source: Path, method: str, data: DataOptions | None = None, **settings: Any) -> str:
    with pytest.raises(UnsupportedError) as error:
        compress(source, Plan.single(method, settings), source.parent / "out", data=data)
    assert not (source.parent / "out").exists()
    return str(error.value)


# --- width ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor", "activation"])
@pytest.mark.parametrize("per_layer", ["uniform", "global"])
def test_width_keeps_what_it_says(
    importance: str, per_layer: str, tiny: Path, data: DataOptions, tmp_path: Path
) -> None:
    settings = {"heads": 0.5, "ffn": 0.5, "hidden": 0.25, "importance": importance}
    result = prune(tiny, tmp_path / "a", "prune_width", data, per_layer=per_layer, **settings)
    spec = spec_of(Checkpoint.open(tmp_path / "a"))
    assert (spec.hidden_size, spec.head_dim, spec.num_layers) == (96, 32, 4)
    assert (sum(spec.heads()), sum(spec.ffn())) == (8, 512)
    assert all(n % 32 == 0 and n >= 32 for n in spec.ffn())
    if per_layer == "uniform":
        assert (spec.heads(), spec.ffn()) == ((2,) * 4, (128,) * 4)
    found = effect(result)
    assert (found["heads_before"], found["heads_after"]) == (16, 8)
    assert (found["ffn_before"], found["ffn_after"]) == (1024, 512)
    assert (found["hidden_before"], found["hidden_after"]) == (128, 96)


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor", "activation"])
def test_width_removes_what_is_dead(importance: str, data: DataOptions, tmp_path: Path) -> None:
    """Dead heads and channels go first, by every measure, and nothing changes."""

    def kill(model: Encoder) -> None:
        for block in blocks(model):
            attention, ffn = block.attention, block.ffn
            for part in (attention.query, attention.key, attention.value):
                part.weight[32:96], part.bias[32:96] = 0, 0
            attention.output.weight[:, 32:96] = 0
            ffn.up.weight[::2], ffn.up.bias[::2] = 0, 0
            ffn.down.weight[:, ::2] = 0

    source = save_tiny(tmp_path / "a", change=kill)
    settings = {"heads": 0.5, "ffn": 0.5, "importance": importance}
    prune(source, tmp_path / "b", "prune_width", data, **settings)
    before, after = (load_encoder(Checkpoint.open(tmp_path / n)) for n in "ab")
    with torch.inference_mode():
        assert torch.allclose(after(IDS, MASK), before(IDS, MASK), atol=1e-5)
    assert after.spec.num_heads == 2


def test_global_gives_more_to_layers_that_need_it(data: DataOptions, tmp_path: Path) -> None:
    """A layer whose FFN does nothing keeps a quarter of an equal share."""

    def quiet(model: Encoder) -> None:
        blocks(model)[0].ffn.down.weight[:] *= 1e-6

    source = save_tiny(tmp_path / "a", change=quiet)
    prune(source, tmp_path / "b", "prune_width", data, ffn=0.5, per_layer="global")
    assert spec_of(Checkpoint.open(tmp_path / "b")).ffn() == (32, 224)


def test_equal_narrower_layers_of_a_bert(data: DataOptions, tmp_path: Path) -> None:
    """Fewer channels alone is still BERT, as upstream knows it; fewer heads is not."""
    source = save_tiny(tmp_path / "a", pooling="cls", pooler=True)
    prune(source, tmp_path / "b", "prune_width", importance="l2")
    assert Checkpoint.open(tmp_path / "b").config["model_type"] == "bert"
    prune(source, tmp_path / "c", "prune_width", importance="l2", ffn=0, heads=0.5)
    assert Checkpoint.open(tmp_path / "c").config["model_type"] == "pocketglm"


def test_rows_and_seed_decide(tiny: Path, data: DataOptions, tmp_path: Path) -> None:
    digests = []
    for name, rows, seed in (("a", 8, 0), ("b", 8, 0), ("c", 8, 5)):
        text = f"seed: {seed}\nsteps:\n  - prune_width: {{importance: taylor, rows: {rows}}}\n"
        plan = Plan.from_text(text)
        compress(tiny, plan, tmp_path / name, data=data, cache=tmp_path / f"x{name}")
        digests.append((tmp_path / name / "model.safetensors").read_bytes())
    assert digests[0] == digests[1] != digests[2]


def test_pruned_exported_and_run(tiny: Path, data: DataOptions, tmp_path: Path) -> None:
    """Width, then INT8, then ONNX: one plan, parity block by block, the same answers."""
    plan = Plan.from_text(
        "steps:\n"
        "  - prune_depth: {keep: 3}\n"
        "  - prune_width: {heads: 0.5, ffn: 0.5, hidden: 0.25, per_layer: global}\n"
        "  - quantize_rtn: {bits: 8, activation: none}\n"
    )
    compress(tiny, plan, tmp_path / "a", data=data, cache=tmp_path / "cache")
    ckpt = Checkpoint.open(tmp_path / "a")
    assert [step.method for step in ckpt.manifest.lineage] == [
        "prune_depth",
        "prune_width",
        "quantize_rtn",
    ]
    (done,) = export(ckpt.path, ["onnx"], tmp_path / "b").targets
    assert done.ok, done.error
    session = open_encoder(tmp_path / "b" / "onnx", RunOptions())
    found = session.logits(IDS.numpy(), MASK.numpy())
    session.close()
    with torch.inference_mode():
        wanted = load_encoder(ckpt)(IDS, MASK).numpy()
    assert np.abs(found - wanted).max() < 1e-4


# --- depth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, (0, 3)),
        ({"keep": 3}, (0, 2, 3)),
        ({"keep": 1}, (0,)),
        ({"keep": [3, 1]}, (1, 3)),
        ({"ratio": 0.25, "importance": "last"}, (0, 1, 2)),
        ({"keep": 4}, (0, 1, 2, 3)),
    ],
)
def test_depth_keeps_these(
    settings: dict[str, Any], layers: tuple[int, ...], tiny: Path, tmp_path: Path
) -> None:
    found = effect(prune(tiny, tmp_path / "a", "prune_depth", **settings))
    assert (found["layers_before"], found["layers_after"]) == (4, len(layers))
    before, after = (load_encoder(Checkpoint.open(p)) for p in (tiny, tmp_path / "a"))
    state = before.state_dict()
    for new, old in enumerate(layers):
        for name, value in after.blocks[new].state_dict().items():
            assert torch.equal(value, state[f"blocks.{old}.{name}"])


def test_depth_by_influence(data: DataOptions, tmp_path: Path) -> None:
    """Two layers that barely change anything go."""

    def idle(model: Encoder) -> None:
        for norm in model.modules():
            if isinstance(norm, torch.nn.LayerNorm):
                norm.bias.zero_()
        for index in (1, 2):
            block = blocks(model)[index]
            block.attention.output.weight *= 0.01
            block.attention.output.bias *= 0.01
            block.ffn.down.weight *= 0.01
            block.ffn.down.bias *= 0.01

    source = save_tiny(tmp_path / "a", change=idle, num_layers=4)
    found = effect(prune(source, tmp_path / "b", "prune_depth", data, importance="cosine"))
    assert found["influence_1"] < 0.01 < found["influence_0"]
    after, state = (load_encoder(Checkpoint.open(tmp_path / n)).state_dict() for n in "ba")
    name = "attention.query.weight"
    assert torch.equal(after[f"blocks.1.{name}"], state[f"blocks.3.{name}"])


# --- unstructured --------------------------------------------------------------------------------


def zeros(folder: Path, end: str = ".weight") -> dict[str, float]:
    """The share of zeros in each linear layer of the body."""
    ckpt = Checkpoint.open(folder)
    linear = [n for n in ckpt.tensors if ".layer." in n and n.endswith(end) and "Norm" not in n]
    return {n: float((as_tensor(ckpt.read(n)) == 0).float().mean()) for n in linear}


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_sparsity_in_every_matrix(sparsity: float, tiny: Path, tmp_path: Path) -> None:
    result = prune(tiny, tmp_path / "a", "prune_unstructured", sparsity=sparsity)
    assert result.bytes_after == result.bytes_before
    found = zeros(tmp_path / "a")
    assert len(found) == 24
    assert all(share == pytest.approx(sparsity, abs=1e-4) for share in found.values())
    measured = effect(result)
    assert measured["zeros"] == pytest.approx(sparsity, abs=1e-4)
    assert measured["gzip_bytes_after"] < 0.95 * measured["gzip_bytes_before"]
    a, b = Checkpoint.open(tiny), Checkpoint.open(tmp_path / "a")
    lost = total = 0.0
    for name in a.tensors:
        old, new = (as_tensor(c.read(name)).double() for c in (a, b))
        changed = old != new
        assert not changed.any() or name in found
        if name in found:
            assert (new[changed] == 0).all()
            assert old[changed].abs().max() <= new[new != 0].abs().min()
            lost, total = (
                lost + float((old - new).square().sum()),
                total + float(old.square().sum()),
            )
    assert measured["weight_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-5)


def test_sparsity_over_all_matrices(tmp_path: Path) -> None:
    def quiet(model: Encoder) -> None:
        blocks(model)[0].ffn.down.weight[:] *= 0.01

    source = save_tiny(tmp_path / "a", change=quiet)
    settings: dict[str, Any] = {"sparsity": 0.5, "scope": "global", "skip": ["*.query.*"]}
    measured = effect(prune(source, tmp_path / "b", "prune_unstructured", **settings))
    assert measured["zeros"] == pytest.approx(0.5, abs=1e-5)
    found = zeros(tmp_path / "b")
    assert found["bert.encoder.layer.0.output.dense.weight"] > 0.99
    assert found["bert.encoder.layer.0.attention.self.query.weight"] == 0
    assert 0.3 < found["bert.encoder.layer.1.output.dense.weight"] < 0.5


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_n_of_m(pattern: str, tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "a", "prune_unstructured", pattern=pattern)
    n, m = map(int, pattern.split(":"))
    ckpt = Checkpoint.open(tmp_path / "a")
    for name in zeros(tmp_path / "a"):
        kept = as_tensor(ckpt.read(name)).reshape(-1, m) != 0
        assert (kept.sum(1) == n).all()


def test_zeros_stay_zero_in_int8(tiny: Path, tmp_path: Path) -> None:
    plan = Plan.from_text(
        "steps:\n  - prune_unstructured: {pattern: 2:4}\n  - quantize_rtn: {bits: 8}\n"
    )
    compress(tiny, plan, tmp_path / "a", cache=tmp_path / "cache")
    assert all(share >= 0.5 for share in zeros(tmp_path / "a").values())


# --- decoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glm-half-bias", "glm4", "llama-tied-biased", "qwen2", "qwen3"])
def test_decoders(name: str, tmp_path: Path) -> None:
    """Whole key/value groups, fused and gated channels, hidden size, layers; bf16 stays bf16."""
    wide: dict[str, Any] = {"head_dim": 32, "intermediate_size": 96}
    wide |= {"num_key_value_heads": 2, "num_attention_heads": 4, "eos_token_id": 3}
    source = save_wide(tmp_path / "a", name, **wide, dtype=torch.bfloat16)
    (tmp_path / "d").mkdir()
    for split in ("train", "validation"):
        rows = [json.dumps({"text": f"row {i} says {split} {i * i}"}) for i in range(40)]
        (tmp_path / "d" / f"{split}.jsonl").write_text("\n".join(rows))
    plan = Plan.from_text(
        "steps:\n"
        "  - prune_depth: {importance: cosine}\n"
        "  - prune_width: {heads: 0.5, ffn: 0.4, hidden: 0.5, importance: taylor}\n"
        "  - prune_width: {ffn: 0.5, importance: activation}\n"
        "  - prune_unstructured: {pattern: 2:4}\n"
    )
    data = DataOptions(tmp_path / "d")
    before = model_spec_of(Checkpoint.open(source))
    result = compress(source, plan, tmp_path / "b", task="lm", data=data, cache=tmp_path / "cache")
    ckpt = Checkpoint.open(tmp_path / "b")
    spec: Any = model_spec_of(ckpt)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (1, 2, 1, 32)
    assert (spec.hidden_size, spec.intermediate_size) == (before.hidden_size // 2, 32)
    assert {info.dtype for info in ckpt.tensors.values()} == {"BF16"}
    assert result.steps[-1].effect["validation_perplexity"] > 1
    with torch.inference_mode():
        assert load_decoder(ckpt)(IDS, MASK).isfinite().all()
    assert "same key/value heads in every layer" in refused(
        source, "prune_width", per_layer="global", importance="l1", heads=0.5
    )


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("prune_width", {"heads": 1.0}),
        ("prune_width", {"ffn": -0.1}),
        ("prune_width", {"importance": "random"}),
        ("prune_width", {"rows": 0}),
        ("prune_depth", {"ratio": 1}),
        ("prune_unstructured", {"sparsity": 1.5}),
        ("prune_unstructured", {"pattern": "3:4"}),
    ],
)
def test_settings_out_of_range(method: str, settings: dict[str, Any]) -> None:
    with pytest.raises((PocketError, ValidationError)) as error:
        Plan.single(method, settings)
    assert next(iter(settings)) in str(error.value)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("prune_width", {"heads": 0.05}, "heads: 0.05 of 4 removes none"),
        ("prune_width", {"hidden": 0.1}, "hidden: 0.1 of 128 removes none (dimensions in steps of"),
        ("prune_depth", {"keep": 5}, "keep=5: the model has 4 layers"),
        ("prune_depth", {"keep": 0}, "keep=0"),
        ("prune_depth", {"keep": []}, "keep=[]"),
        ("prune_depth", {"keep": [4]}, "no layer 4, they are 0 to 3"),
        ("prune_depth", {"keep": [1, 1]}, "names a layer twice"),
        ("prune_depth", {"keep": 2, "ratio": 0.5}, "keep=2 and ratio=0.5: set one"),
        ("prune_depth", {"ratio": 0.1}, "0.1 of 4 layers removes none"),
        ("prune_unstructured", {"pattern": "2:4", "sparsity": 0.5}, "leave sparsity out"),
        ("prune_unstructured", {"pattern": "2:4", "scope": "global"}, "leave scope out"),
        ("prune_unstructured", {"skip": ["?"]}, "'?' matches no tensor"),
        ("prune_unstructured", {"skip": ["*"]}, "no weight of a linear layer"),
    ],
)
def test_what_cannot_be_done(method: str, settings: dict[str, Any], words: str, tiny: Path) -> None:
    more: dict[str, Any] = {"importance": "l2"} if method == "prune_width" else {}
    assert words in refused(tiny, method, **settings, **more)


@pytest.mark.parametrize("method", ["prune_width", "prune_depth", "prune_unstructured"])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_not_pruned(method: str, bits: Any, tmp_path: Path) -> None:
    source = quantize_weights(save_tiny(tmp_path / "a"), {".query.weight": TensorScheme(bits=bits)})
    more: dict[str, Any] = {"importance": "l2"} if method == "prune_width" else {}
    words = refused(source, method, **more)
    assert f"it is quantized (INT{bits}): pruning cannot follow quantization" in words
    plan = Plan.from_text(
        f"steps:\n  - quantize_rtn: {{bits: {bits}}}\n  - {method}: {json.dumps(more)}\n"
    )
    with pytest.raises(UnsupportedError, match=f"step 2, {method}, cannot"):
        compress(save_tiny(tmp_path / "b"), plan, tmp_path / "out")


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    """Two heads of 24 features are no multiple of 32, and all four are needed for one."""
    source = save_tiny(tmp_path / "a", hidden_size=96)
    words = refused(source, "prune_width", heads=0.5, importance="l2")
    assert "heads: 0.5 of 4 removes none (heads in steps of 4, and one stays)" in words


def test_columns_that_do_not_divide(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "a", intermediate_size=250)
    words = refused(source, "prune_unstructured", pattern="2:4")
    assert "output.dense.weight has 250 columns, no multiple of 4" in words


def test_taylor_needs_a_trained_classifier(data: DataOptions, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "a", head="embedding", num_labels=0)
    assert "taylor needs a classifier, this is an embedding model" in refused(
        source, "prune_width", data
    )
    other = save_tiny(tmp_path / "b", num_labels=2)
    assert "'label 2' is none of them" in refused(other, "prune_width", data)
    prune(source, tmp_path / "c", "prune_width", data, importance="activation")
    assert spec_of(Checkpoint.open(tmp_path / "c")).intermediate_size == 128


def poison(name: str, value: float) -> Callable[[Encoder], None]:
    def change(model: Encoder) -> None:
        dict(model.named_parameters())[name].flatten()[5] = value

    return change


@pytest.mark.parametrize("method", ["prune_width", "prune_depth", "prune_unstructured"])
def test_nan_names_the_tensor(method: str, data: DataOptions, tmp_path: Path) -> None:
    name = "blocks.1.ffn.up.weight"
    source = save_tiny(tmp_path / "a", change=poison(name, float("nan")))
    with pytest.raises(CheckpointError, match=r"layer\.1\.intermediate\.dense\.weight' holds NaN"):
        compress(source, Plan.single(method), tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_overflow_names_the_layer(data: DataOptions, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "a", change=poison("blocks.1.ffn.up.bias", 3e38))
    for importance in ("taylor", "activation"):
        plan = Plan.single("prune_width", {"importance": importance})
        with pytest.raises(CheckpointError, match=r"(layer|hidden).* NaN or infinite"):
            compress(source, plan, tmp_path / "out", data=data)


# --- rows ----------------------------------------------------------------------------------------


def rows_of(texts: list[str]) -> Any:
    train = [SimpleNamespace(text=text) for text in texts]
    return SimpleNamespace(train=train, validation=train, contents=texts)


def test_calibration_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn without repetition, by length; as many at a time as their logits have room for."""
    ckpt = Checkpoint.open(save_wide(tmp_path / "a", "llama"))
    model = load_decoder(ckpt)
    texts = ["a" * n for n in (1, 2, 3, 5, 8, 9, 12)]
    context = StepContext(ckpt, 0, Silent(), tmp_path, "lm", None, rows_of(texts))
    monkeypatch.setattr(_prune, "_LOGITS", 3 * 96 * 12)
    batches = _prune.calibration(ckpt, context, 7, model)
    lengths = [batch.mask.sum(1).tolist() for batch in batches]
    assert lengths == [[2, 3, 5], [8, 9, 12]]  # one token alone has nothing after it
    assert all(batch.ids.shape == batch.mask.shape for batch in batches)
    few = _prune.calibration(ckpt, context, 3, model)
    again = _prune.calibration(ckpt, replace(context, seed=3), 3, model)
    assert [b.ids.tolist() for b in few] != [b.ids.tolist() for b in again]
    empty = replace(context, rows=rows_of(["a", "b"]))
    with pytest.raises(DataError, match="none of 2 training rows has a token"):
        _prune.calibration(ckpt, empty, 7, model)
