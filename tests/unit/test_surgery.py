"""A cut model computes what the whole one does with those parts switched off, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import gated_encoder as oracle
from tiny_decoder import VARIANTS, save_tiny_decoder
from tiny_encoder import save_tiny, spec

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.methods._scores import (
    Batch,
    activation_scores,
    layer_influence,
    taylor_scores,
    weight_scores,
)
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import load_decoder, load_encoder, save_encoder
from pocketglm.model.surgery import Kept, axes, cut, cut_spec, everything

IDS = torch.tensor([[2, 9, 30, 41, 3], [2, 7, 3, 0, 0]])
MASK = (IDS > 0).long()
LABELS = torch.tensor([2, 0])
BATCH = Batch(IDS, MASK, LABELS)
HALF = Kept(
    layers=(0, 1),
    groups=((0, 3), (2,)),
    ffn=(tuple(range(0, 256, 2)), tuple(range(32, 96))),
    hidden=tuple(range(128)),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """Float64, so that the oracle's digits count; 4 heads of 32, 256 channels, 2 layers."""
    folder = save_tiny(tmp_path_factory.mktemp("surgery"))
    return load_encoder(Checkpoint.open(folder)).double()


def blocks(model: Any) -> list[Any]:
    return list(model.blocks)


def weights(model: Encoder) -> dict[str, Any]:
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


def gates_of(kept: Kept) -> oracle.Gates:
    gates = oracle.open_gates([4, 4], [256, 256], 128)
    for layer in range(2):
        gates.heads[layer][[h for h in range(4) if h not in kept.groups[layer]]] = 0
        gates.ffn[layer][[c for c in range(256) if c not in kept.ffn[layer]]] = 0
    gates.hidden[[d for d in range(128) if d not in kept.hidden]] = 0
    return replace(gates, layers=list(kept.layers))


def expected(model: Encoder, gates: oracle.Gates) -> Any:
    return oracle.logits(weights(model), IDS.numpy(), MASK.numpy(), 32, 1e-12, gates)


@torch.inference_mode()
def difference(model: Encoder, kept: Kept, wanted: Kept | None = None) -> float:
    """Between the cut model and the whole one with the gates of `wanted`."""
    pooled = cut(model, kept)
    found = pooled.classifier(pooled.pool(pooled.hidden(IDS, MASK), MASK))  # type: ignore[misc]
    return float(np.abs(found.numpy() - expected(model, gates_of(wanted or kept))).max())


# --- surgery -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kept",
    [
        everything(spec()),
        HALF,
        replace(HALF, layers=(1,)),
        replace(HALF, hidden=tuple(range(3, 128, 4))),
        replace(everything(spec()), layers=(0,)),
    ],
    ids=["all", "heads and ffn", "one layer", "hidden", "depth"],
)
def test_equals_the_gated_model(model: Encoder, kept: Kept) -> None:
    assert difference(model, kept) < 1e-11


def test_the_oracle_catches_a_wrong_cut(model: Encoder) -> None:
    """One head, one channel or one dimension mistaken for its neighbour."""
    for wrong in (
        replace(HALF, groups=((0, 2), (2,))),
        replace(HALF, ffn=(HALF.ffn[0], tuple(range(33, 97)))),
        replace(HALF, hidden=tuple(range(127))),
        replace(HALF, layers=(0,)),
    ):
        assert difference(model, wrong, HALF) > 1e-3


@torch.inference_mode()
def test_nothing_cut_is_the_same_bytes(tmp_path: Path) -> None:
    ckpt = Checkpoint.open(save_tiny(tmp_path / "a"))
    same = cut(load_encoder(ckpt), everything(spec()))
    labels = [f"label {i}" for i in range(3)]
    save_encoder(same, tmp_path / "b", source=ckpt, labels=labels, manifest=ckpt.manifest)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (ckpt.path / name).read_bytes()


@torch.no_grad()
def test_dead_heads_and_channels_change_nothing(model: Encoder) -> None:
    """Their outgoing weights are 0, so removing them changes at most the order of sums."""
    dead = cut(model, everything(spec()))
    for layer, block in enumerate(blocks(dead)):
        heads = [h for h in range(4) if h not in HALF.groups[layer]]
        channels = [c for c in range(256) if c not in HALF.ffn[layer]]
        block.attention.output.weight.unflatten(1, (4, 32))[:, heads] = 0
        block.ffn.down.weight[:, channels] = 0
    whole, small = (m.hidden(IDS, MASK) for m in (dead, cut(dead, HALF)))
    assert float((whole - small).abs().max()) < 1e-12
    scores = taylor_scores(dead.requires_grad_(True), [BATCH])
    assert float(scores.groups[0][[1, 2]].max()) == 0
    assert float(scores.groups[0][[0, 3]].min()) > 0


def test_the_new_spec() -> None:
    assert cut_spec(spec(), everything(spec())) == spec()
    small = cut_spec(spec(), replace(HALF, hidden=tuple(range(96))))
    assert small == spec(hidden_size=96, head_dim=32, layer_heads=(2, 1), layer_ffn=(128, 64))
    one = cut_spec(spec(), replace(HALF, layers=(1,)))
    assert one == spec(num_layers=1, num_heads=1, head_dim=32, intermediate_size=64)


def test_cutting_twice_is_cutting_once(model: Encoder) -> None:
    once = cut(model, replace(HALF, groups=((3,), (2,))))
    first = cut(model, HALF)
    twice = cut(first, replace(everything(first.spec), groups=((1,), (0,))))
    assert once.spec == twice.spec
    for name, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name])


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ()},
        {"layers": (1, 0)},
        {"groups": ((0, 4), (0,))},
        {"groups": ((0,),)},
        {"ffn": ((), (1,))},
        {"hidden": (3, 3)},
    ],
)
def test_indices_that_make_no_sense(model: Encoder, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"kept|indices for"):
        cut(model, replace(HALF, **wrong))


def test_every_parameter_has_axes(model: Encoder) -> None:
    sizes = {"": None, "hidden": 128, "heads": 128, "groups": 128, "ffn": 256}
    for name, value in model.named_parameters():
        for axis, size in zip(axes(name), value.shape, strict=True):
            assert sizes[axis] in (None, size), name


# --- decoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_a_decoder_without_dead_parts_says_the_same(name: str, tmp_path: Path) -> None:
    """Dead groups and channels removed, in every family: grouped, gated, fused, four norms."""
    model = load_decoder(Checkpoint.open(save_tiny_decoder(tmp_path, name))).double()
    whole = everything(model.spec)
    groups = model.spec.num_kv_heads
    dims, channels = model.spec.head_dim, model.spec.intermediate_size
    kept = replace(
        whole,
        groups=((0,),) * 2,
        ffn=(tuple(range(0, channels, 3)), tuple(range(2, channels, 3))),
    )
    for layer, block in enumerate(blocks(model)):
        heads = block.attention.output.weight.unflatten(1, (groups, -1, dims))
        heads[:, [g for g in range(groups) if g not in kept.groups[layer]]] = 0
        block.ffn.down.weight[:, [c for c in range(channels) if c not in kept.ffn[layer]]] = 0
    small = cut(model, kept)
    assert small.spec.num_kv_heads == 1
    assert small.spec.intermediate_size == channels // 3
    assert torch.allclose(small.hidden(IDS, MASK), model.hidden(IDS, MASK), atol=1e-12)
    narrow = cut(model, replace(whole, layers=(1,), hidden=tuple(range(32))))
    assert narrow(IDS, MASK).isfinite().all()
    assert cut(model, replace(whole, ffn=(whole.ffn[0], (1,)))).spec.ffn() == (channels, 1)
    if groups > 1:
        with pytest.raises(ValueError, match="same number of groups"):
            cut(model, replace(whole, groups=(whole.groups[0], (0,))))


# --- importance ----------------------------------------------------------------------------------


def test_taylor_is_the_slope_of_the_loss(model: Encoder) -> None:
    scores = taylor_scores(model.requires_grad_(True), [BATCH])
    frozen = weights(model.requires_grad_(False))
    gates = oracle.open_gates([4, 4], [256, 256], 128)

    def loss(changed: oracle.Gates) -> float:
        z = oracle.logits(frozen, IDS.numpy(), MASK.numpy(), 32, 1e-12, changed)
        return oracle.cross_entropy(z, LABELS.numpy())

    for kind, layer, unit, found in (
        *(("heads", i, h, scores.groups[i][h]) for i in range(2) for h in range(4)),
        *(("ffn", 1, c, scores.ffn[1][c]) for c in (0, 100, 255)),
        *(("norms", 0, d, scores.hidden[d]) for d in (0, 64, 127)),
    ):
        wanted = abs(oracle.slope(loss, gates, kind, layer, unit))
        assert float(found) == pytest.approx(wanted, rel=1e-6, abs=1e-9), (kind, layer, unit)


def test_taylor_is_the_mean_over_batches(model: Encoder) -> None:
    model.requires_grad_(True)
    rows = [Batch(IDS[i : i + 1], MASK[i : i + 1], LABELS[i : i + 1]) for i in range(2)]
    both = taylor_scores(model, rows).groups[0]
    single = [taylor_scores(model, [row]).groups[0] for row in rows]
    model.requires_grad_(False)
    assert torch.allclose(both, (single[0] + single[1]) / 2)


def test_weight_scores(model: Encoder) -> None:
    w = weights(model)
    for power, norm in ((1, 1), (2, 2)):
        scores = weight_scores(model, power)
        rows = slice(64, 96)  # of head 2
        parts = [
            w[f"blocks.1.attention.{n}.{p}"][rows]
            for n in ("query", "key", "value")
            for p in ("weight", "bias")
        ]
        parts.append(w["blocks.1.attention.output.weight"][:, rows])
        whole = np.concatenate([part.ravel() for part in parts])
        assert float(scores.groups[1][2]) == pytest.approx(np.linalg.norm(whole, norm))
        up, down = w["blocks.0.ffn.up.weight"][7], w["blocks.0.ffn.down.weight"][:, 7]
        whole = np.concatenate([up, [w["blocks.0.ffn.up.bias"][7]], down])
        assert float(scores.ffn[0][7]) == pytest.approx(np.linalg.norm(whole, norm))
        tables = [
            (w[n] if axis else w[n].T)
            for n in w
            if w[n].ndim == 2
            for axis in range(2)
            if axes(n)[axis] == "hidden"
        ]
        shares = [(abs(t) ** norm).sum(0) / (abs(t) ** norm).sum(0).mean() for t in tables]
        wanted = np.sum(shares, 0) ** (1 / norm)
        assert np.allclose(scores.hidden.numpy(), wanted)


@torch.inference_mode()
def test_activation_scores_see_real_tokens_only(model: Encoder) -> None:
    seen = activation_scores(model, [BATCH])
    split = activation_scores(model, [Batch(IDS[:1], MASK[:1]), Batch(IDS[1:, :3], MASK[1:, :3])])
    for a, b in zip(
        (*seen.groups, *seen.ffn, seen.hidden),
        (*split.groups, *split.ffn, split.hidden),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)
    x = model.embeddings(IDS)
    block = blocks(model)[0]
    attend = MASK.bool()[:, None, None, :]
    y = block.attention_norm(x + block.attention(x, attend))
    inner = torch.nn.functional.gelu(block.ffn.up(y))[MASK.bool()]
    assert torch.allclose(seen.ffn[0], inner.abs().mean(0))
    with pytest.raises(ValueError, match="no token"):
        activation_scores(model, [])


@torch.inference_mode()
def test_influence_of_a_layer_that_does_nothing(model: Encoder) -> None:
    idle = cut(model, everything(spec()))
    first_block, block = blocks(idle)
    for part in (block.attention.output, block.ffn.down):
        part.weight.zero_()
        part.bias.zero_()
    # A norm of what is already normalized changes nothing.
    for norm in (first_block.ffn_norm, block.attention_norm, block.ffn_norm):
        norm.bias.zero_()
    first, second = layer_influence(idle, [BATCH])
    assert second == pytest.approx(0, abs=1e-9)
    x = idle.embeddings(IDS)
    y = first_block(x, MASK.bool()[:, None, None, :])
    a, b = x[MASK.bool()].numpy(), y[MASK.bool()].numpy()
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert first == pytest.approx(1 - cosines.mean())
