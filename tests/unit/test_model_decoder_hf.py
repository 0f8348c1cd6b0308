"""Decoder folders in and out, what is refused, and compressing them for transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoder import VARIANTS, save_tiny_decoder
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest, write_json
from pocketglm.errors import CheckpointError, UnsupportedError
from pocketglm.model import hf
from pocketglm.model.families import FAMILIES
from pocketglm.stages._upstream import WITH_DEQUANTIZE, YES, opens_in_transformers
from pocketglm.stages.compress import compress
from pocketglm.stages.inspect import inspect_path
from pocketglm.stages.plan import Plan

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


def out(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = hf.load_decoder(Checkpoint.open(path))(IDS)
    return result


def upstream(path: Path, **kwargs: Any) -> torch.Tensor:
    auto: Any = AutoModelForCausalLM
    with torch.inference_mode():
        logits: torch.Tensor = auto.from_pretrained(path, **kwargs).eval()(IDS).logits
    return logits


def edit_config(path: Path, **fields: Any) -> None:
    """Set config fields; None removes one."""
    config = json.loads((path / "config.json").read_text()) | fields
    write_json(path / "config.json", {k: v for k, v in config.items() if v is not None})


def contents(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir() if f.is_file()}


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_save_load_save_gives_the_same_bytes_and_opens_upstream(tmp_path: Path, name: str) -> None:
    save_tiny_decoder(tmp_path / "a", name)
    for source, target in (("a", "b"), ("b", "c")):
        ckpt = Checkpoint.open(tmp_path / source)
        hf.save_decoder(
            hf.load_decoder(ckpt), tmp_path / target, source=ckpt, manifest=ckpt.manifest
        )
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    assert "generation_config.json" in contents(tmp_path / "b")
    assert torch.equal(out(tmp_path / "a"), out(tmp_path / "b"))
    assert (upstream(tmp_path / "b") - out(tmp_path / "a")).abs().max() < 1e-4
    first, second = Checkpoint.open(tmp_path / "a"), Checkpoint.open(tmp_path / "b")
    assert hf.decoder_spec_of(first) == hf.decoder_spec_of(second)
    # nothing but the config is needed
    hf.save_decoder(hf.load_decoder(second), tmp_path / "d", source=None, manifest=Manifest())
    assert (upstream(tmp_path / "d") - out(tmp_path / "a")).abs().max() < 1e-4
    assert hf.decoder_spec_of(Checkpoint.open(tmp_path / "d")) == hf.decoder_spec_of(first)


def test_half_precision_storage(tmp_path: Path) -> None:
    save_tiny_decoder(tmp_path / "a")
    ckpt = Checkpoint.open(tmp_path / "a")
    hf.save_decoder(
        hf.load_decoder(ckpt),
        tmp_path / "b",
        source=ckpt,
        manifest=ckpt.manifest,
        dtype=torch.bfloat16,
    )
    saved = Checkpoint.open(tmp_path / "b")
    assert {info.dtype for info in saved.tensors.values()} == {"BF16"}
    assert saved.config["dtype"] == "bfloat16"
    assert 0 < (out(tmp_path / "a") - out(tmp_path / "b")).abs().max() < 1


def test_sharded_safetensors(tmp_path: Path) -> None:
    save_tiny_decoder(tmp_path / "one")
    auto: Any = AutoModelForCausalLM
    auto.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert torch.equal(out(tmp_path / "one"), out(tmp_path / "many"))


def test_rotary_settings_of_older_configs(tmp_path: Path) -> None:
    save_tiny_decoder(tmp_path, "glm-half-bias")
    expected = hf.decoder_spec_of(Checkpoint.open(tmp_path))
    assert expected.rope.dims == 8
    edit_config(tmp_path, rope_parameters=None)
    assert hf.decoder_spec_of(Checkpoint.open(tmp_path)) == expected  # upstream's default is 0.5
    edit_config(tmp_path, rope_theta=500, partial_rotary_factor=1.0)
    rope = hf.decoder_spec_of(Checkpoint.open(tmp_path)).rope
    assert (rope.dims, rope.theta, rope.interleaved) == (16, 500.0, True)
    scaling = {
        "type": "llama3",
        "factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 16,
    }
    edit_config(tmp_path, rope_scaling=scaling)
    found = hf.decoder_spec_of(Checkpoint.open(tmp_path)).rope.scaling
    assert found is not None
    assert (found.factor, found.original_positions) == (8.0, 16)


def test_a_stored_head_counts_whatever_the_config_says(tmp_path: Path) -> None:
    save_tiny_decoder(tmp_path, "llama")
    expected = out(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    assert not hf.decoder_spec_of(Checkpoint.open(tmp_path)).tied
    assert torch.equal(out(tmp_path), expected)


def test_end_of_text_ids(tmp_path: Path) -> None:
    save_tiny_decoder(tmp_path)
    assert hf.eos_ids_of(Checkpoint.open(tmp_path)) == (2, 5)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 7})
    assert hf.eos_ids_of(Checkpoint.open(tmp_path)) == (7,)
    (tmp_path / "generation_config.json").unlink()
    edit_config(tmp_path, eos_token_id=3)
    assert hf.eos_ids_of(Checkpoint.open(tmp_path)) == (3,)


def test_parts_by_name() -> None:
    layer = "model.layers.0."
    roles = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight_packed": "head",
        "model.norm.weight": "other",
        f"{layer}input_layernorm.weight": "other",
        f"{layer}self_attn.q_norm.weight": "other",
        f"{layer}self_attn.q_proj.bias": "attention",
        f"{layer}mlp.gate_up_proj.weight": "ffn",
    }
    assert {name: hf.role_of(name) for name in roles} == roles
    assert hf.is_linear(f"{layer}self_attn.o_proj.weight", (4, 4))
    assert hf.is_linear(f"{layer}mlp.gate_up_proj.weight", (4, 4))
    assert not hf.is_linear("lm_head.weight", (4, 4))
    assert not hf.is_linear(f"{layer}self_attn.q_norm.weight", (4,))
    assert hf.is_head("lm_head.weight")
    assert hf.is_embedding("model.embed_tokens.weight")
    assert not hf.is_embedding("lm_head.weight")


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt2"}, "unknown architecture 'gpt2'.*" + ", ".join(sorted(FAMILIES))),
        ({"model_type": "qwen"}, "did you mean 'qwen"),
        (
            {"model_type": "chatglm", "auto_map": {"AutoModel": "modeling_chatglm.X"}},
            r"Python code \(remote code\) is not run.*ends in -hf \(zai-org/glm-4-9b-chat-hf\)",
        ),
        (
            {"architectures": ["GlmForSequenceClassification"]},
            "'GlmForSequenceClassification'.*known: GlmForCausalLM",
        ),
        ({"model_type": "pocketglm", "family": "glm5"}, "unknown family 'glm5'.*glm4"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu' is not supported.*silu"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
        ({"num_hidden_layers": 1}, "stores 2 layers, its config.json says num_hidden_layers 1"),
        ({"num_hidden_layers": 3}, r"has no tensor 'model.layers.2.*and lacks 7 more"),
        ({"intermediate_size": 32}, r"gate_up_proj.weight' has shape \[192, 64\].*\[64, 64\]"),
        ({"tie_word_embeddings": False}, r"has no tensor 'lm_head.weight' \[96, 64\]"),
        ({"tie_word_embeddings": "no"}, "should be true or false, it is 'no'"),
        ({"vocab_size": "96"}, "'vocab_size' should be a positive whole number, it is '96'"),
        ({"rms_norm_eps": -1}, "'rms_norm_eps' should be a positive number, it is -1"),
        ({"eos_token_id": ["2"]}, "'eos_token_id' should be a token id or a list"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "sliding-window attention"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'.*known: default, llama3"),
        ({"rope_parameters": [1]}, "'rope_parameters' should be a mapping"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'factor' should be .*it is None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, "3 rotary dims: should be even"),
    ],
)
def test_a_config_that_we_cannot_follow(tmp_path: Path, fields: Any, words: str) -> None:
    save_tiny_decoder(tmp_path)
    edit_config(tmp_path, **fields)
    refused(tmp_path, words)


def refused(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        hf.load_decoder(Checkpoint.open(path))
    error = caught.value
    assert error.hint
    with pytest.raises(CheckpointError, match="(?s)" + words):
        raise CheckpointError(f"{error.message}\n{error.hint}")


def test_partial_rotation_is_glms_alone(tmp_path: Path) -> None:
    save_tiny_decoder(tmp_path, "llama")
    edit_config(tmp_path, partial_rotary_factor=0.5)
    refused(tmp_path, "partial_rotary_factor 0.5 is not supported in this family")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_that_another_tool_quantized(tmp_path: Path, method: str) -> None:
    save_tiny_decoder(tmp_path, "llama")
    edit_config(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    file = tmp_path / "model.safetensors"
    tensors = {n: safetensors.read(i) for n, i in safetensors.read_header(file).items()}
    tensors["model.layers.0.self_attn.q_proj.qweight"] = np.ones((8, 64), np.int32)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    safetensors.write_file(file, tensors.items())
    refused(tmp_path, f"qweight' is stored as I32.*quantized by {method}.*float weights")


def test_gguf_is_refused_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "ggml-model-Q4_K_M.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "holds GGUF only .ggml-model-Q4_K_M.gguf.*original repository")


def test_encoders_and_decoders_are_not_mixed_up(tmp_path: Path, minilm: Path) -> None:
    save_tiny_decoder(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a decoder \(glm\)"):
        hf.load_encoder(Checkpoint.open(tmp_path))
    with pytest.raises(CheckpointError, match=r"is an encoder \(bert\)"):
        hf.load_decoder(Checkpoint.open(minilm))
    assert hf.labels_of(Checkpoint.open(tmp_path)) == []


# --- inspect and compress ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A tied GLM and an untied Llama whose widths every group size divides, by `tied`."""
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    root = tmp_path_factory.mktemp("wide")
    return {
        True: save_tiny_decoder(root / "tied", "glm-wide", **sizes),
        False: save_tiny_decoder(root / "untied", "llama", **sizes),
    }


def test_inspect_describes_a_decoder(wide: dict[bool, Path]) -> None:
    found = inspect_path(wide[True])
    assert found.architecture == "GlmForCausalLM"
    assert found.parameters == 307_840
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (2, 4, 2, 32)
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 2 * 32
    assert (found.head, found.pooling, found.eos_ids) == ("tied lm", "", [2, 5])
    assert (found.max_length, found.vocab_size, found.precision) == (64, 96, "fp32")
    assert found.opens_in["transformers"] == YES
    assert inspect_path(wide[False]).head == "lm"
    assert set(found.parts) == {"embedding", "attention", "ffn", "other"}


EXACT: dict[str, tuple[dict[str, Any], str]] = {
    "int8": ({"activation": "none"}, YES),
    "int8 throughout": ({"activation": "none", "embeddings": 8, "head": 8}, YES),
    "int8 asymmetric": ({"activation": "none", "symmetric": False, "embeddings": 8}, YES),
    "int4, int8 embedding": ({"bits": 4, "embeddings": 8}, YES),
    "int4 asymmetric": ({"bits": 4, "symmetric": False}, WITH_DEQUANTIZE),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", EXACT)
def test_compressed_decoders_open_upstream(
    tmp_path: Path, wide: dict[bool, Path], case: str, tied: bool
) -> None:
    settings, opens = EXACT[case]
    compress(wide[tied], Plan.single("quantize_rtn", settings), tmp_path / "q")
    ckpt = Checkpoint.open(tmp_path / "q")
    assert opens_in_transformers(ckpt) == opens
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = upstream(tmp_path / "q", **(options if opens == WITH_DEQUANTIZE else {}))
    ours = out(tmp_path / "q")
    assert (theirs - ours).abs().max() < 1e-5
    assert (ours - out(wide[tied])).abs().max() > 1e-3, "nothing was quantized"
    assert inspect_path(tmp_path / "q").parameters == inspect_path(wide[tied]).parameters
    quantized = "model.embed_tokens.weight" in ckpt.manifest.schemes
    assert quantized == ("embeddings" in settings)
    assert ("lm_head.weight_scale" in ckpt.tensors) == (quantized if tied else "head" in settings)


def test_a_tied_head_follows_the_embedding(tmp_path: Path, wide: dict[bool, Path]) -> None:
    with pytest.raises(UnsupportedError, match=r"the token embedding \(tied\)"):
        compress(wide[True], Plan.single("quantize_rtn", {"head": 8}), tmp_path / "q")
    plan = Plan.single("quantize_rtn", {"embeddings": 8})
    claim = compress(wide[True], plan, tmp_path / "q", dry_run=True)
    assert compress(wide[True], plan, tmp_path / "q").bytes_after == claim.bytes_after


def test_what_upstream_cannot_express_is_pocketglms(tmp_path: Path, wide: dict[bool, Path]) -> None:
    plan = Plan.single("quantize_rtn", {"bits": 4, "embeddings": 4})
    compress(wide[True], plan, tmp_path / "q")
    ckpt = Checkpoint.open(tmp_path / "q")
    assert (ckpt.config["model_type"], ckpt.config["family"]) == ("pocketglm", "glm")
    assert "quantization_config" not in ckpt.config
    assert opens_in_transformers(ckpt).startswith("no, because an INT4 embedding is packed")
    assert out(tmp_path / "q").isfinite().all()
    # dequantized and saved again, it is a plain GLM
    hf.save_decoder(hf.load_decoder(ckpt), tmp_path / "plain", source=ckpt, manifest=ckpt.manifest)
    saved = Checkpoint.open(tmp_path / "plain")
    assert saved.config["model_type"] == "glm"
    assert "family" not in saved.config
    assert (upstream(tmp_path / "plain") - out(tmp_path / "q")).abs().max() < 1e-4
    shutil.rmtree(tmp_path / "plain")
