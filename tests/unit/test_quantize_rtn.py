"""methods/quantize_rtn: which tensors it takes, in which scheme, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bert import save_tiny_bert
from tiny_decoder import save_tiny_decoder

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.methods.quantize_rtn import SPEC, RtnConfig
from pocketglm.model.hf import load_decoder
from pocketglm.ops.affine import quantize
from pocketglm.stages._upstream import opens_in_transformers
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan

WORDS = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(save_tiny_bert(tmp_path_factory.mktemp("rtn") / "tiny"))


def chosen(ckpt: Checkpoint, **settings: Any) -> dict[str, TensorScheme]:
    config = RtnConfig(**settings)
    pairs = ((n, SPEC.select(config, ckpt, info)) for n, info in ckpt.tensors.items())
    return {name: scheme for name, scheme in pairs if scheme}


def test_the_default_is_int8_per_channel_of_the_body(ckpt: Checkpoint) -> None:
    found = chosen(ckpt)
    assert len(found) == 12  # six linear layers in each of two blocks
    assert all(".encoder.layer." in name and name.endswith(".weight") for name in found)
    assert set(found.values()) == {TensorScheme(bits=8, activation="dynamic_tensor")}


def test_int4_has_groups_of_32_and_float_activations(ckpt: Checkpoint) -> None:
    assert set(chosen(ckpt, bits=4).values()) == {TensorScheme(bits=4, group_size=32)}
    wide = chosen(ckpt, bits=4, group_size=128, symmetric=False, activation="dynamic_block")
    assert set(wide.values()) == {
        TensorScheme(bits=4, group_size=128, symmetric=False, activation="dynamic_block")
    }


def test_int8_in_groups_has_an_activation_form_that_targets_take(ckpt: Checkpoint) -> None:
    found = chosen(ckpt, group_size=32, head=8)
    assert set(found.values()) == {TensorScheme(bits=8, group_size=32, activation="dynamic_block")}
    for settings in ({"bits": 8, "group_size": 32}, {"bits": 4}, {"bits": 4, "head": 8}):
        config = RtnConfig(**settings, activation="dynamic_tensor")
        (reason,) = SPEC.check(config, ckpt)
        assert "dynamic_tensor goes with whole rows, not with groups of 32" in reason
        assert "dynamic_block" in reason
        assert SPEC.check(RtnConfig(**settings), ckpt) == []
    assert SPEC.check(RtnConfig(activation="dynamic_tensor"), ckpt) == []


def test_embedding_and_head_are_options(ckpt: Checkpoint) -> None:
    found = chosen(ckpt, bits=4, group_size=64, embeddings=8, head=8)
    extra = {name: scheme for name, scheme in found.items() if ".encoder." not in name}
    assert extra == {
        WORDS: TensorScheme(bits=8),
        "bert.pooler.dense.weight": TensorScheme(bits=8, activation="dynamic_tensor"),
        "classifier.weight": TensorScheme(bits=8, activation="dynamic_tensor"),
    }
    assert chosen(ckpt, embeddings=4)[WORDS] == TensorScheme(bits=4, group_size=32)


@pytest.mark.parametrize("activation", ["dynamic_block", "dynamic_token", None])
def test_a_tied_embedding_is_also_a_head(activation: str | None, tmp_path: Path) -> None:
    """One tensor in one scheme, with the activation form of a linear layer where that is safe."""
    tied = Checkpoint.open(save_tiny_decoder(tmp_path / "tied", "glm-wide"))
    found = chosen(tied, bits=4, group_size=64, embeddings=4, activation=activation)
    assert "lm_head.weight" not in found
    expected = "dynamic_block" if activation == "dynamic_block" else "none"
    assert found["model.embed_tokens.weight"] == TensorScheme(
        bits=4, group_size=64, activation=expected
    )
    assert "set embeddings=4" in SPEC.check(RtnConfig(bits=4, head=4), tied)[0]


def test_an_untied_head_is_quantized_by_itself(tmp_path: Path) -> None:
    untied = Checkpoint.open(save_tiny_decoder(tmp_path / "untied", "llama"))
    found = chosen(untied, bits=4, embeddings=8, head=4, activation="dynamic_block")
    assert found["model.embed_tokens.weight"] == TensorScheme(bits=8)
    assert found["lm_head.weight"] == TensorScheme(
        bits=4, group_size=32, activation="dynamic_block"
    )
    assert SPEC.check(RtnConfig(bits=4, embeddings=8, head=4), untied) == []


@pytest.mark.parametrize(
    ("name", "settings", "opens"),
    [
        ("glm-wide", {"embeddings": 4}, "no, because an INT4 embedding is packed"),
        ("glm-wide", {"embeddings": 8}, "yes"),
        ("llama", {"embeddings": 8, "head": 4, "activation": "dynamic_block"}, "yes"),
        ("llama", {"head": 8, "activation": "dynamic_block"}, "yes"),
    ],
)
def test_decoders_are_compressed_and_read_back(
    name: str, settings: dict[str, Any], opens: str, tmp_path: Path
) -> None:
    source = save_tiny_decoder(tmp_path / "source", name)
    compress(source, Plan.single("quantize_rtn", {"bits": 4, **settings}), tmp_path / "out")
    after = Checkpoint.open(tmp_path / "out")
    assert opens_in_transformers(after) == opens
    model, before = load_decoder(after), load_decoder(Checkpoint.open(source))
    for ours, weight in before.state_dict().items():
        found = model.state_dict()[ours]
        assert (found - weight).norm() < 0.2 * weight.norm()


def test_skip_leaves_tensors_float(ckpt: Checkpoint) -> None:
    found = chosen(ckpt, skip=["*.layer.0.*", "*.output.dense.weight"])
    assert len(found) == 4
    assert QUERY not in found


def test_a_good_request_has_no_reasons(ckpt: Checkpoint) -> None:
    assert SPEC.check(RtnConfig(), ckpt) == []


def test_a_group_that_does_not_divide_names_tensor_k_and_sizes(tmp_path: Path) -> None:
    odd = Checkpoint.open(save_tiny_bert(tmp_path / "odd", hidden_size=96, num_attention_heads=2))
    reasons = SPEC.check(RtnConfig(bits=4, group_size=64), odd)
    assert any(
        reason.startswith(f"{QUERY}: K = 96 is not a multiple of group_size 64")
        and "sizes that divide: 32" in reason
        for reason in reasons
    )
    assert SPEC.check(RtnConfig(bits=4, group_size=32), odd) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"skip": ["*.nothing"]}, "skip: '*.nothing' matches no tensor"),
        ({"skip": ["*"]}, "it has no tensor to quantize with these settings"),
        ({"activation": "static"}, "activation: static needs calibration data"),
    ],
)
def test_other_refusals(ckpt: Checkpoint, settings: dict[str, Any], reason: str) -> None:
    assert reason in SPEC.check(RtnConfig(**settings), ckpt)[0]


def test_search_can_be_turned_off(ckpt: Checkpoint) -> None:
    w, scheme = torch.randn(4, 64), TensorScheme(bits=4, group_size=32)
    plain = SPEC.quantize(RtnConfig(bits=4, search=False), w, scheme)
    assert torch.equal(plain[1], quantize(w, scheme, search=False)[1])
    assert not torch.equal(plain[1], SPEC.quantize(RtnConfig(bits=4), w, scheme)[1])
