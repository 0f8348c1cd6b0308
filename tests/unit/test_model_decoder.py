"""The decoder against transformers: every family, with and without a cache, padded rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoder import BASE, VARIANTS, save_tiny_decoder, tiny

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.errors import UsageError
from pocketglm.model.decoder import Decoder, init_decoder, initial_values
from pocketglm.model.hf import load_decoder
from pocketglm.model.layers import frequencies
from pocketglm.model.spec import DecoderSpec, RopeSpec

LENGTHS = (11, 4, 7)
IDS = torch.randint(3, 96, (3, 16), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(11) < torch.tensor(LENGTHS)[:, None]).long()
every_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, Any]:
    """Our model and transformers' model of the same folder."""
    theirs = tiny(request.param)
    folder = tmp_path_factory.mktemp("decoder")
    theirs.save_pretrained(folder)
    return load_decoder(Checkpoint.open(folder)), theirs


def reference(theirs: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = theirs(ids, use_cache=False).logits
    return logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@torch.inference_mode()
def test_logits_without_a_cache(pair: tuple[Decoder, Any]) -> None:
    ours, theirs = pair
    logits = ours(IDS)
    expected = reference(theirs, IDS)
    assert logits.dtype == torch.float32
    assert expected.std() > 0.5, "the weights should matter"
    assert difference(logits, expected) < 1e-4
    # padding on the right does not change what stands before it
    padded = ours(IDS[:, :11] * MASK, MASK)
    for row, length in enumerate(LENGTHS):
        assert difference(padded[row, :length], logits[row, :length]) < 1e-5


@torch.inference_mode()
def test_padded_rows_go_on_from_their_own_ends(pair: tuple[Decoder, Any]) -> None:
    ours, theirs = pair
    expected = reference(theirs, IDS)
    cache = ours.new_cache(3)
    rows = torch.arange(3)
    ends = torch.tensor(LENGTHS)
    got = ours.prefill(IDS[:, :11] * MASK, MASK, cache)
    assert difference(got, expected[rows, ends - 1]) < 1e-4
    for _ in range(5):
        got = ours.step(IDS[rows, ends], cache)
        assert difference(got, expected[rows, ends]) < 1e-4
        ends = ends + 1
    assert cache.lengths.tolist() == ends.tolist()


@torch.inference_mode()
def test_prefill_in_pieces_rewind_and_fork(pair: tuple[Decoder, Any]) -> None:
    ours, theirs = pair
    expected = reference(theirs, IDS)
    cache = ours.new_cache(3)
    first = ours(IDS[:, :5], None, cache)
    other = cache.fork()
    ours(96 - IDS[:, 5:9], None, cache)  # a wrong turn
    cache.rewind(4)
    rest = ours(IDS[:, 5:], None, cache)
    assert difference(torch.cat((first, rest), 1), expected) < 1e-4
    # the fork did not see what came after it; its next piece is padded
    assert difference(ours.prefill(IDS[:, 5:16] * MASK, MASK, other)[0], expected[0, 15]) < 1e-4
    assert other.lengths.tolist() == [16, 9, 12]
    assert difference(ours.step(IDS[:, 9], other)[1], expected[1, 9]) < 1e-4


@torch.inference_mode()
def test_generation_agrees_with_transformers(tmp_path: Path) -> None:
    folder = save_tiny_decoder(tmp_path, "glm-half-bias")
    ours, theirs = load_decoder(Checkpoint.open(folder)), tiny("glm-half-bias")
    prompt = IDS[:1, :5]
    expected = theirs.generate(
        prompt, do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
    )[0, 5:].tolist()
    cache = ours.new_cache(1)
    logits, tokens = ours.prefill(prompt, None, cache), []
    for _ in range(40):
        tokens.append(int(logits.argmax()))
        logits = ours.step(logits.argmax(-1), cache)
    assert tokens == expected
    assert len(set(tokens)) > 5


SMALL = DecoderSpec("glm", 50, 32, 2, 4, 2, 8, 48, RopeSpec(8), max_position_embeddings=12)


def test_what_it_refuses() -> None:
    model = init_decoder(SMALL)
    ids = torch.ones(2, 5, dtype=torch.int64)
    left = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    with pytest.raises(UsageError, match="padding stands before"):
        model(ids, left)
    with pytest.raises(UsageError, match="13 tokens in a row, the model has 12 positions"):
        model(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(UsageError, match="a row has no token"):
        model.prefill(ids, torch.tensor([[1] * 5, [0] * 5]), model.new_cache(2))
    cache = model.new_cache(2, limit=6)
    model.prefill(ids, None, cache)
    with pytest.raises(UsageError, match="cannot rewind 6"):
        cache.rewind(6)
    model.step(ids[:, 0], cache)
    with pytest.raises(UsageError, match="7 tokens in a row, the cache holds 6"):
        model.step(ids[:, 0], cache)
    assert model.new_cache(1, limit=99).limit == 12  # never more than the model has


@torch.inference_mode()
def test_padding_may_pass_the_limit_that_tokens_may_not() -> None:
    model = init_decoder(SMALL, std=0.2)
    ids = torch.arange(16).reshape(2, 8)
    cache = model.new_cache(2, limit=10)
    model.prefill(ids, None, cache)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    got = model.prefill(ids[:, :4], mask, cache)
    assert difference(got[:1], model(torch.cat((ids[:1], ids[:1, :2]), 1))[:, -1]) < 1e-5
    assert cache.lengths.tolist() == [10, 9]


@torch.inference_mode()
def test_half_precision_stays_close() -> None:
    model = init_decoder(SMALL, std=0.2)
    ids = torch.arange(20).reshape(2, 10)
    expected = model(ids)
    model.to(torch.bfloat16)
    cache = model.new_cache(2)
    got = torch.stack([model.step(column, cache) for column in ids.T], 1)
    assert got.dtype == torch.float32
    assert 0 < difference(got, expected) < 0.1 * float(expected.abs().max())


def test_training_reaches_every_parameter() -> None:
    model = init_decoder(SMALL, std=0.2).train()
    model(torch.arange(20).reshape(2, 10)).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_initial_values_depend_on_name_and_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = init_decoder(SMALL, 3), init_decoder(SMALL, 3)
    state = b.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in a.state_dict().items())
    weight = a.blocks[0].get_parameter("attention.query.weight")
    assert abs(float(weight.detach().std()) - 0.02) < 0.001
    assert not torch.equal(weight, init_decoder(SMALL, 4).blocks[0].attention.query.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(weight, a.blocks[1].attention.query.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(a.norm.weight, torch.ones(32))
    whole = list(initial_values("x.weight", (40, 7), 1))
    monkeypatch.setattr("pocketglm.model.decoder._CHUNK", 21)
    parts = list(initial_values("x.weight", (40, 7), 1))
    assert (len(whole), len(parts)) == (1, 14)
    assert torch.equal(torch.from_numpy(whole[0]), torch.cat([torch.from_numpy(p) for p in parts]))


def test_frequencies_of_plain_rope() -> None:
    found = frequencies(RopeSpec(8, theta=100.0))
    assert found.tolist() == pytest.approx([100.0 ** (-i / 4) for i in range(4)])


def test_a_spec_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="4 attention heads are not a multiple of 3"):
        DecoderSpec("glm", 50, 32, 2, 4, 3, 8, 48, RopeSpec(8))
    for dims in (7, 10, 0):
        with pytest.raises(ValueError, match=f"{dims} rotary dims"):
            DecoderSpec("glm", 50, 32, 2, 4, 2, 8, 48, RopeSpec(dims))


def test_the_variants_differ_in_what_they_should() -> None:
    assert BASE["initializer_range"] == 0.2
    assert {kind for kind, _ in VARIANTS.values()} == {"glm", "glm4", "llama", "qwen2", "qwen3"}
