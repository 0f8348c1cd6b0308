"""Top-k attention, shared blocks and unified blocks: computed, trained, stored, opened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from oracles import tiny_decoder as oracle
from tiny_encoder import quantize_weights
from tiny_structure import FAMILIES, STRUCTURES, save_structure

import pocketglm.model.auto
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.cli.inspect import show
from pocketglm.errors import CheckpointError
from pocketglm.model.decoder import Decoder
from pocketglm.model.hf import check_tensors, decoder_spec_of, load_decoder, save_decoder
from pocketglm.model.sizes import spec_of_size
from pocketglm.model.sparse import sparse_attention
from pocketglm.model.spec import DecoderSpec
from pocketglm.model.surgery import cut, everything
from pocketglm.ops.stored import as_tensor
from pocketglm.stages.inspect import inspect_path
from pocketglm.train._student import decoder_student_spec, make_student

IDS = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0))
LENGTHS = (9, 4, 6)
MASK = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def heads(count: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(
        2, count, tokens, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def model_of(folder: Path, structure: str, name: str = "glm-wide") -> Decoder:
    return load_decoder(Checkpoint.open(save_structure(folder, name, **STRUCTURES[structure])))


# --- top-k attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 3, 9])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_the_oracles(top_k: int, kv_heads: int) -> None:
    q, k, v = heads(4, 10, 0), heads(kv_heads, 10, 1), heads(kv_heads, 10, 2)
    found = sparse_attention(q, k, v, None, top_k)
    for row in range(2):
        row_q, row_k, row_v = (part[row].numpy() for part in (q, k, v))
        wanted = oracle.attention(row_q, row_k, row_v, top_k)
        assert np.abs(found[row].numpy() - wanted).max() < 1e-6  # scores are float32
        planted = oracle.attention(row_q, row_k, row_v, top_k + 1)
        assert top_k == 9 or np.abs(found[row].numpy() - planted).max() > 1e-3


def test_keys_of_equal_scores_stay_together() -> None:
    """Whatever the order: two keys tie for the last of two places, both stay."""
    q = torch.ones(1, 1, 1, 2)
    k = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[None, None]
    v = torch.eye(4)[None, None]
    shares = sparse_attention(q, k, v, torch.ones(1, 1, 1, 1).bool(), 2)[0, 0, 0]
    assert shares[0] == 0
    assert shares[1] == shares[2]
    assert shares[3] > shares[1] > 0
    order = [2, 0, 3, 1]
    again = sparse_attention(q, k[:, :, order], v[:, :, order], torch.ones(1, 1, 1, 1).bool(), 2)
    assert torch.equal(again[0, 0, 0], shares)


def test_a_gradient_reaches_the_kept_scores_alone() -> None:
    q, k, v = (heads(2, 6, seed).requires_grad_() for seed in range(3))
    weight = heads(2, 6, 3)
    loss = (sparse_attention(q, k, v, None, 2)[:, :, -1] * weight[:, :, -1]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    scores = (q[:, :, -1:] @ k.transpose(-1, -2))[:, :, 0]
    kept = scores >= scores.topk(2).values[..., -1:]
    for part in (k, v):
        assert part.grad is not None
        moved = part.grad.abs().sum(-1) > 0
        assert torch.equal(moved, kept)
    mask = kept[:, :, None]
    plain = torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v, attn_mask=mask)
    wanted = torch.autograd.grad((plain * weight[:, :, -1:]).sum(), (q, k, v))
    for part, gradient in zip((q, k, v), wanted, strict=True):
        assert part.grad is not None
        assert torch.allclose(part.grad, gradient, atol=1e-6)


@torch.inference_mode()
def test_it_is_exact_up_to_k_tokens(tmp_path: Path) -> None:
    sparse = model_of(tmp_path / "a", "top-k")
    dense = Decoder(replace(sparse.spec, top_k=None)).eval()
    dense.load_state_dict(sparse.state_dict())
    assert torch.equal(sparse(IDS[:, :3]), dense(IDS[:, :3]))
    assert not torch.allclose(sparse(IDS[:, :4])[:, 3], dense(IDS[:, :4])[:, 3], atol=1e-3)


# --- the whole model -----------------------------------------------------------------------------


def settings(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "eps": spec.rms_norm_eps,
        "dims": spec.rope.dims,
        "theta": spec.rope.theta,
        "interleaved": spec.rope.interleaved,
        "qk_norm": spec.qk_norm,
        "unified": spec.unified,
        "top_k": spec.top_k,
    }


@every_structure
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_logits_are_the_oracles(name: str, structure: str, tmp_path: Path) -> None:
    folder = save_structure(tmp_path / "a", name, **STRUCTURES[structure])
    ckpt = Checkpoint.open(folder)
    spec = decoder_spec_of(ckpt)
    tensors = {n: as_tensor(ckpt.read(n)).double().numpy() for n in ckpt.tensors}
    found = load_decoder(ckpt)(IDS[:1])[0].numpy()
    wanted = oracle.logits(IDS[0].tolist(), tensors, spec.blocks(), settings(spec))
    assert wanted.std() > 0.3
    assert np.abs(found - wanted).max() < 1e-3
    changed = settings(spec) | {"top_k": 2 if spec.top_k else 5}
    planted = oracle.logits(IDS[0].tolist(), tensors, spec.blocks(), changed)
    assert np.abs(found - planted).max() > 1e-2


@every_structure
@torch.inference_mode()
def test_the_cache_changes_nothing(structure: str, tmp_path: Path) -> None:
    """Rows of different lengths, padded, then one token more at a time."""
    model = model_of(tmp_path / "a", structure)
    cache = model.new_cache(3)
    found = [model.prefill(IDS[:, :9] * MASK, MASK, cache)]
    found += [model.step(IDS[:, 9 + step], cache) for step in range(3)]
    for row, length in enumerate(LENGTHS):
        text = torch.cat([IDS[row, :length], IDS[row, 9:]])
        whole = model(text[None])[0]
        for step, logits in enumerate(found):
            assert torch.allclose(logits[row], whole[length - 1 + step], atol=1e-5)


def test_shared_weights_learn_from_every_layer(tmp_path: Path) -> None:
    """One parameter, whose gradient is the sum of those of copies that are not shared."""
    shared = model_of(tmp_path / "a", "all").train()
    spec = shared.spec
    twin = Decoder(replace(spec, layer_blocks=())).train()
    base = shared.state_dict()
    twin.load_state_dict(
        {
            name: base[f"blocks.{spec.blocks()[int(name.split('.')[1])]}.{name.split('.', 2)[2]}"]
            if name.startswith("blocks.")
            else base[name]
            for name in twin.state_dict()
        }
    )
    for model in (shared, twin):
        model(IDS).square().mean().backward()
    for name, parameter in shared.named_parameters():
        if not name.startswith("blocks."):
            continue
        number, rest = name.split(".", 2)[1:]
        layers = [i for i, block in enumerate(spec.blocks()) if block == int(number)]
        copies = [twin.get_parameter(f"blocks.{i}.{rest}").grad for i in layers]
        assert parameter.grad is not None
        total = torch.stack([copy for copy in copies if copy is not None]).sum(0)
        assert torch.allclose(parameter.grad, total, rtol=1e-4, atol=1e-7), name


# --- the spec and the folder ---------------------------------------------------------------------


def test_one_form_for_each_meaning() -> None:
    plain = spec_of_size("autoglm-nano")
    assert plain.regular
    assert replace(plain, layer_blocks=(0, 1, 2, 3)) == plain
    shared = replace(plain, layer_blocks=(4, 4, 7, 9))
    assert (shared.layer_blocks, shared.first_layers()) == ((0, 0, 1, 2), (0, 2, 3))
    for own in ({"layer_blocks": (0, 0, 1, 1)}, {"unified": True}, {"top_k": 8}):
        assert not replace(plain, **own).regular


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"layer_blocks": (0, 0)}, "a number for each of the 4 layers"),
        ({"layer_blocks": (0, 1, 0, 1)}, "should be neighbours"),
        ({"layer_blocks": (0, 0, 1, 2), "layer_ffn": (64, 32, 64, 64)}, "the same channels"),
        ({"unified": True, "four_norms": True}, "one norm"),
        ({"top_k": 0}, "one key at least"),
    ],
)
def test_a_structure_that_cannot_be(own: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(spec_of_size("autoglm-nano"), **own)


@every_structure
@torch.inference_mode()
def test_saved_opened_and_shown(
    structure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = STRUCTURES[structure]
    folder = save_structure(tmp_path / "a", "glm-half-bias", **own)
    ckpt = Checkpoint.open(folder)
    check_tensors(ckpt)
    model = load_decoder(ckpt)
    assert {name: getattr(model.spec, name) for name in own} == own
    assert (ckpt.config["model_type"], ckpt.config["family"]) == ("pocketglm", "glm")
    save_decoder(model, tmp_path / "b", source=ckpt, manifest=ckpt.manifest)
    auto: Any = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(folder)
    assert isinstance(theirs, pocketglm.model.auto.PocketGLMForCausalLM)
    assert torch.equal(theirs(IDS).logits, model(IDS))
    theirs.save_pretrained(tmp_path / "c")
    for again in ("b", "c"):
        file = tmp_path / again / "model.safetensors"
        assert file.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "b" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    result = inspect_path(folder)
    assert result.layers == 4
    assert result.layer_blocks == list(own.get("layer_blocks", ()))
    assert (result.unified, result.top_k) == (own.get("unified", False), own.get("top_k"))
    show(result)
    shown = capsys.readouterr().out
    assert ("2, by layer 0, 0, 1, 1" in shown) == (structure == "shared")
    assert ("side by side" in shown) == bool(own.get("unified"))
    assert ("keys of the largest scores" in shown) == bool(own.get("top_k"))


def test_a_shared_block_is_stored_once(tmp_path: Path) -> None:
    """Three layers in one block: the file has a third of the dense one's blocks."""
    dense = save_structure(tmp_path / "a", num_layers=3)
    shared = save_structure(tmp_path / "b", num_layers=3, layer_blocks=(0, 0, 0))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (dense, shared)]
    ckpt = Checkpoint.open(dense)
    body = sum(t.nbytes for n, t in ckpt.tensors.items() if ".layers." in n)
    assert abs(sizes[0] - sizes[1] - body * 2 // 3) < 2048  # and the header
    assert not [n for n in Checkpoint.open(shared).tensors if ".layers.1." in n]
    assert Checkpoint.open(shared).config["layer_blocks"] == [0, 0, 0]
    cache = load_decoder(Checkpoint.open(shared)).new_cache(1)
    assert cache._storage.shape[0] == 3


def test_quantized_it_opens_too(tmp_path: Path) -> None:
    folder = save_structure(tmp_path / "a", **STRUCTURES["all"])
    quantize_weights(folder, {"_proj.weight": TensorScheme(bits=4, group_size=32)})
    ckpt = Checkpoint.open(folder)
    check_tensors(ckpt)
    assert len(ckpt.manifest.schemes) == 6
    assert load_decoder(ckpt)(IDS).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_top_k": 0}, "'attention_top_k' should be a positive whole number, it is 0"),
        ({"unified_blocks": "yes"}, "'unified_blocks' should be true or false"),
        ({"layer_blocks": 2}, "'layer_blocks' should be a list of whole numbers"),
        ({"layer_blocks": [0, 1]}, "a number for each of the 4 layers"),
        ({"layer_blocks": [0, 0, 0, 1]}, "stores 3 layers.*num_hidden_layers 4 and.* 2 blocks"),
        ({"layer_blocks": None}, r"no tensor 'model.layers.3.*'"),
        ({"unified_blocks": False}, "no tensor .*self_attn.q_proj"),
    ],
)
def test_a_config_that_disagrees(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    folder = save_structure(tmp_path / "a", **STRUCTURES["all"])
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(CheckpointError, match=words):
        load_decoder(Checkpoint.open(folder))


def test_students_of_shared_models(tmp_path: Path) -> None:
    """Some layers keep their blocks; other sizes make a plain model."""
    base = model_of(tmp_path / "a", "all")
    spec = decoder_student_spec(base.spec, [0, 2, 3], None)
    assert spec.layer_blocks == ()
    student = make_student(base, spec, (0, 2, 3), "teacher", 0)
    assert torch.equal(
        student.get_parameter("blocks.1.unified.input.weight"),
        base.get_parameter("blocks.1.unified.input.weight"),
    )
    spec = decoder_student_spec(base.spec, [1, 2, 3], None)
    assert spec.layer_blocks == (0, 0, 1)
    student = make_student(base, spec, (1, 2, 3), "teacher", 0)
    assert torch.equal(
        student.get_parameter("blocks.1.unified.input.weight"),
        base.get_parameter("blocks.2.unified.input.weight"),
    )
    assert decoder_student_spec(base.spec, None, {"num_layers": 3}).regular
    with pytest.raises(ValueError, match="are not cut"):
        cut(base, everything(base.spec))
