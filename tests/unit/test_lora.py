"""Low-rank adapters: what they compute, what they leave alone, and what merging makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import lora as oracle
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.errors import UsageError
from pocketglm.model.decoder import Decoder, init_decoder
from pocketglm.model.encoder import init_encoder
from pocketglm.model.hf import load_decoder, save_decoder
from pocketglm.model.spec import DecoderSpec, EncoderSpec, RopeSpec
from pocketglm.train.lora import LoraLinear, add_adapters, merge_adapters

SPEC = DecoderSpec(
    family="qwen2",
    vocab_size=50,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=48,
    rope=RopeSpec(8),
    tied=True,
    attention_bias=True,
    eos_ids=(1,),
)
IDS = torch.arange(24).reshape(2, 12)


def randomize(model: nn.Module, seed: int = 3) -> None:
    """Put adapters far from zero."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, LoraLinear):
            assert part.up is not None
            nn.init.normal_(part.up, 0.0, 0.05, generator=generator)


def adapted(rank: int = 4, alpha: float | None = None) -> Decoder:
    model = init_decoder(SPEC, seed=1, std=0.2)
    add_adapters(model, rank, alpha, seed=5)
    return model


@pytest.mark.parametrize("alpha", [8.0, 3.0])
def test_a_layer_computes_what_the_paper_says(alpha: float) -> None:
    rng = np.random.default_rng(0)
    base = nn.Linear(7, 5)
    x, weight = rng.standard_normal((6, 7)), rng.standard_normal((6, 5))
    b = rng.standard_normal((5, 2))
    layer = LoraLinear(base, 2, alpha / 2, [0])
    assert layer.down is not None
    assert layer.up is not None
    with torch.no_grad():
        layer.up.copy_(torch.from_numpy(b))
    w, bias = (t.detach().double().numpy() for t in (base.weight, base.bias))
    a = layer.down.detach().double().numpy()
    given = torch.from_numpy(x).float().requires_grad_()
    result = layer(given)
    (result * torch.from_numpy(weight).float()).sum().backward()
    expected = oracle.forward(x, w, bias, a, b, alpha)
    grads = oracle.gradients(x, w, a, b, alpha, weight)
    assert np.abs(result.detach().numpy() - expected).max() < 1e-5
    for found, right in (
        (given.grad, grads.x),
        (layer.down.grad, grads.a),
        (layer.up.grad, grads.b),
    ):
        assert found is not None
        assert np.abs(found.numpy() - right).max() < 1e-4
    assert layer.weight.grad is None
    # A forgotten scale, or A and B in the other order, would be seen.
    assert np.abs(expected - oracle.forward(x, w, bias, a, b, 2.0)).max() > 1e-2
    layer.merge()
    assert np.abs(layer.weight.numpy() - oracle.merged(w, a, b, alpha)).max() < 1e-6


def test_training_begins_with_the_model_itself() -> None:
    with torch.inference_mode():
        assert torch.equal(adapted()(IDS), init_decoder(SPEC, seed=1, std=0.2)(IDS))


def test_only_adapters_learn() -> None:
    model = adapted(rank=4)
    learned = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert len(learned) == 2 * 2 * 7  # two for each of seven linear layers in two blocks
    assert learned["blocks.1.attention.key.up"] == (8, 4)
    assert learned["blocks.1.ffn.down.down"] == (4, 48)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) < 7000
    downs = [p for n, p in model.named_parameters() if n.endswith(".down") and p.requires_grad]
    assert not torch.equal(downs[0], downs[1])  # each has its own random numbers
    again = dict(adapted(rank=4).named_parameters())
    assert all(torch.equal(p, again[n]) for n, p in model.named_parameters())


def test_merging_changes_nothing_but_the_form() -> None:
    model = adapted(alpha=6.0)
    randomize(model)
    with torch.inference_mode():
        before = model(IDS)
        base = init_decoder(SPEC, seed=1, std=0.2)(IDS)
        merge_adapters(model)
        after = model(IDS)
    assert (before - base).abs().max() > 0.1
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    plain = Decoder(SPEC)
    plain.load_state_dict(model.state_dict())  # the original's names
    with torch.inference_mode():
        assert torch.allclose(plain.eval()(IDS), after, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_step_the_file_is_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    save_decoder(init_decoder(SPEC), tmp_path / "a", source=None, manifest=Manifest(), dtype=dtype)
    ckpt = Checkpoint.open(tmp_path / "a")
    model = load_decoder(ckpt, body=dtype)
    add_adapters(model, 2, None, seed=0)
    assert model.get_parameter("blocks.0.ffn.up.weight").dtype == dtype
    assert model.tokens.weight.dtype == torch.float32
    merge_adapters(model)
    save_decoder(model, tmp_path / "b", source=ckpt, manifest=Manifest(), dtype=dtype)
    a, b = (tmp_path / name / "model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("mixed", [False, True])
def test_a_frozen_bf16_body_computes_in_the_type_of_the_rest(tmp_path: Path, mixed: bool) -> None:
    """Logits and gradients are those of the same weights in float32, to bf16's error if mixed."""
    save_decoder(
        init_decoder(SPEC, std=0.2),
        tmp_path,
        source=None,
        manifest=Manifest(),
        dtype=torch.bfloat16,
    )
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = load_decoder(Checkpoint.open(tmp_path), body=dtype)
        add_adapters(model, 2, None, seed=0)
        randomize(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
        torch.autograd.backward(loss)
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert len(grads) == 28
        found.append((loss.detach(), torch.cat(grads)))
    ours, right = found
    tolerance = 3e-2 if mixed else 1e-5
    assert abs(ours[0] - right[0]) < tolerance * right[0]
    assert (ours[1] - right[1]).norm() < tolerance * right[1].norm()


def test_a_rank_that_is_too_large() -> None:
    with pytest.raises(UsageError, match=r"--lora 9 is more than the rank of a layer") as caught:
        adapted(rank=9)
    assert "[8, 32]" in caught.value.message
    assert "use 8 at most" in caught.value.hint
    adapted(rank=8)


def test_encoders_take_adapters() -> None:
    model = init_encoder(EncoderSpec(50, 16, 2, 4, 24, max_position_embeddings=32), 1)
    mask = torch.ones_like(IDS)
    with torch.inference_mode():
        before = model(IDS, mask)
    add_adapters(model, 4, None, seed=0)
    with torch.inference_mode():
        assert torch.equal(model(IDS, mask), before)
    assert len([p for p in model.parameters() if p.requires_grad]) == 2 * 2 * 6
