"""methods/tiny: weights against a float64 oracle, sizes, healing, refusals, identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_decoder import edit, save_chat_decoder
from oracles import merging as oracle
from text_data import save_texts
from tiny_encoder import quantize_weights, save_tiny
from tiny_export import save_wide
from tiny_structure import FAMILIES, save_structure

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.schemas import CompressResult
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import DataOptions
from pocketglm.errors import PlanError, UnsupportedError
from pocketglm.methods._tiny import evenly, parameters, structure_of, tiny_model, tiny_spec
from pocketglm.methods.tiny import TinyConfig, _structure
from pocketglm.model.decoder import init_decoder
from pocketglm.model.hf import decoder_spec_of, load_decoder
from pocketglm.model.sizes import spec_of_size
from pocketglm.ops.stored import as_tensor
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan

IDS = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0))
DENSE: dict[str, Any] = {"share": 1, "unify": False, "top_k": None, "epochs": 0}
PLAN = Path(__file__).parents[2] / "plans" / "tiny.yaml"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, to heal on texts."""
    folder = save_chat_decoder(
        tmp_path_factory.mktemp("chat") / "a",
        "glm-wide",
        eos_token_id=5,
        num_hidden_layers=4,
        initializer_range=0.1,
    )
    edit(folder / "pocketglm.json", task="lm")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    return DataOptions(save_texts(tmp_path_factory.mktemp("texts")))


def tiny(
    dense: Path, out: Path, data: DataOptions | None = None, **settings: Any
) -> CompressResult:
    cache = out.parent / f"cache-{out.name}"
    plan = Plan.single("tiny", settings)
    claim = compress(dense, plan, out, data=data, cache=cache, dry_run=True)
    result = compress(dense, plan, out, data=data, cache=cache)
    assert result.bytes_after == claim.bytes_after
    return result


def refused(dense: Path, data: DataOptions | None = None, **settings: Any) -> str:
    with pytest.raises(UnsupportedError) as error:
        compress(dense, Plan.single("tiny", settings), dense.parent / "no", data=data)
    assert not (dense.parent / "no").exists()
    return str(error.value)


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "blocks"), [("autoglm-nano", 1), ("autoglm-tiny", 7), ("autoglm-15m", 1)]
)
def test_the_default_removes_40_percent(size: str, blocks: int) -> None:
    """The embedding counts, and one block more would not be enough."""
    dense = spec_of_size(size)
    spec = tiny_spec(dense, _structure(TinyConfig(), dense))
    assert (len(spec.first_layers()), spec.num_layers) == (blocks, dense.num_layers)
    assert (spec.unified, spec.top_k) == (True, 64)
    assert 1 - parameters(spec) / parameters(dense) >= 0.4
    more = structure_of(dense.num_layers, 1, blocks + 1, True, 64)
    assert 1 - parameters(tiny_spec(dense, more)) / parameters(dense) < 0.4


def test_groups_of_neighbours() -> None:
    assert evenly(5, 2) == (0, 0, 0, 1, 1)
    assert evenly(4, 4) == (0, 1, 2, 3)
    wanted = structure_of(7, 2, 2, False, None)
    assert wanted.fused == ((0, 1), (2, 3), (4, 5), (6,))
    assert (wanted.blocks, wanted.members()) == ((0, 0, 1, 1), [(0, 1, 2, 3), (4, 5, 6)])


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["average", "first", "last"])
@pytest.mark.parametrize("unify", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, "glm4"])
def test_weights_are_the_oracles(name: str, unify: bool, source: str, tmp_path: Path) -> None:
    if unify and name == "glm4":
        pytest.skip("four norms")
    dense = save_wide(tmp_path / "a", name, num_hidden_layers=5)
    tiny(dense, tmp_path / "b", share=3, source=source, unify=unify, top_k=None, epochs=0)
    before, after = Checkpoint.open(dense), Checkpoint.open(tmp_path / "b")
    assert decoder_spec_of(after).layer_blocks == (0, 0, 0, 1, 1)
    old = {n: as_tensor(before.read(n)).double().numpy() for n in before.tensors}
    new = {n: as_tensor(after.read(n)).double().numpy() for n in after.tensors}
    wanted = {n: t for n, t in old.items() if ".layers." not in n}
    for block, layers in enumerate([(0, 1, 2), (3, 4)]):
        found = oracle.one_block(old, layers, source, unify)
        wanted |= {f"model.layers.{block}.{n}": t for n, t in found.items()}
    assert new.keys() == wanted.keys()
    for tensor, value in wanted.items():
        assert np.abs(new[tensor] - value).max() < 1e-6, tensor
    planted = oracle.one_block(old, (0, 1), source, unify)  # a layer is forgotten
    worst = max(np.abs(new[f"model.layers.0.{n}"] - t).max() for n, t in planted.items())
    assert (worst > 1e-2) == (source != "first")


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_unified_block_is_the_dense_parts_side_by_side(name: str, tmp_path: Path) -> None:
    model = load_decoder(Checkpoint.open(save_wide(tmp_path / "a", name)))
    after = tiny_model(model, structure_of(2, 1, None, True, None), "first")
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    for old, new in zip(model.blocks, after.blocks, strict=True):
        parts: Any = old
        attended = parts.attention(parts.attention_norm(x), None)
        wanted = x + attended + parts.ffn(parts.ffn_norm(x))
        assert torch.allclose(new(x, None), wanted, atol=1e-4)
        assert not torch.allclose(new(x, None), parts(x, None), atol=1e-2)


@torch.inference_mode()
def test_layers_that_are_alike_may_share(tmp_path: Path) -> None:
    """Nothing is lost where neighbours have the same weights; fused, there are fewer of them."""
    shared = load_decoder(
        Checkpoint.open(save_structure(tmp_path / "a", layer_blocks=(0, 0, 1, 1)))
    )
    twin = init_decoder(replace(shared.spec, layer_blocks=()))
    base = shared.state_dict()
    twin.load_state_dict(
        {
            n: base[f"blocks.{int(n.split('.')[1]) // 2}.{n.split('.', 2)[2]}"]
            if n.startswith("blocks.")
            else base[n]
            for n in twin.state_dict()
        }
    )
    for source in ("average", "first", "last"):
        again = tiny_model(twin, structure_of(4, 1, 2, False, None), source)
        assert torch.equal(again(IDS), twin(IDS))
        fused = tiny_model(twin, structure_of(4, 2, None, False, None), source)
        assert (fused.spec.num_layers, fused.spec.regular) == (2, True)
        for name, value in fused.state_dict().items():
            assert torch.equal(value, base[name])


def test_identity_changes_no_byte(tmp_path: Path) -> None:
    dense = save_wide(tmp_path / "a", "glm-wide", num_hidden_layers=3)
    tiny(dense, tmp_path / "b", **DENSE)
    before, after = Checkpoint.open(dense), Checkpoint.open(tmp_path / "b")
    assert after.config["model_type"] == "glm"
    assert all(np.array_equal(before.read(n), after.read(n)) for n in before.tensors)


# --- healing -------------------------------------------------------------------------------------


def test_it_heals(chat: Path, texts: DataOptions, tmp_path: Path) -> None:
    own: dict[str, Any] = {"share": 2, "top_k": 8, "precision": "fp32"}
    raw = tiny(chat, tmp_path / "a", texts, **own, epochs=0).steps[-1].effect
    more = own | {"epochs": 3, "learning_rate": 3e-3, "batch_size": 8, "features": "hidden"}
    healed = tiny(chat, tmp_path / "b", texts, **more).steps[-1].effect
    assert (healed["layers"], healed["blocks"]) == (4, 2)
    assert healed["validation_nll"] < 0.9 * raw["validation_nll"]
    spec = decoder_spec_of(Checkpoint.open(tmp_path / "b"))
    assert (spec.layer_blocks, spec.unified, spec.top_k) == ((0, 0, 1, 1), True, 8)
    tiny(chat, tmp_path / "c", texts, **more)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "bc"]
    assert files[0] == files[1]
    plan = Plan.single("distill", {"epochs": 1, "precision": "fp32", "batch_size": 8})
    compress(tmp_path / "b", plan, tmp_path / "d", data=texts, cache=tmp_path / "cache-d")
    assert decoder_spec_of(Checkpoint.open(tmp_path / "d")) == spec


def test_the_plan_file_runs(chat: Path, texts: DataOptions, tmp_path: Path) -> None:
    result = compress(chat, Plan.from_file(PLAN), tmp_path / "out", data=texts)
    assert result.bytes_after < 0.45 * result.bytes_before
    assert load_decoder(Checkpoint.open(tmp_path / "out"))(IDS).isfinite().all()
    (exported,) = export(tmp_path / "out", ["onnx"], tmp_path / "exported").targets
    assert exported.ok, exported.error


# --- refusals ------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path: Path, chat: Path, texts: DataOptions) -> None:
    dense = save_wide(tmp_path / "a", "glm4")
    assert "four norms" in refused(dense, epochs=0)
    assert "one block for all layers removes" in refused(dense, unify=False, removes=0.9, epochs=0)
    assert "for decoders" in refused(save_tiny(tmp_path / "enc"), epochs=0)
    for name, own in (("u", {"unified": True}), ("s", {"layer_blocks": (0, 0, 1, 1)})):
        assert "already: heal it" in refused(save_structure(tmp_path / name, **own), epochs=0)
    ranks: dict[str, Any] = {"layer_ranks": ((("ffn.down", 32),),) * 4}
    assert "factorized" in refused(save_structure(tmp_path / "f", **ranks), epochs=0)
    mixed = save_structure(tmp_path / "m", layer_ffn=(32, 64, 64, 64))
    assert r"layers [0, 1] have [32, 64] FFN channels" in refused(mixed, share=2, epochs=0)
    tiny(mixed, tmp_path / "n", share=1, epochs=0)
    assert decoder_spec_of(Checkpoint.open(tmp_path / "n")).layer_ffn == (32, 64, 64, 64)
    assert "relations are for encoders" in refused(chat, texts, share=2, features="relations")
    quantize_weights(dense, {"_proj.weight": TensorScheme(bits=8)})
    assert "quantized" in refused(dense, epochs=0)


@pytest.mark.parametrize(
    "settings", [{"share": 2, "removes": 0.4}, {"shares": 2}, {"share": 0}, {"source": "median"}]
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        Plan.single("tiny", settings)
