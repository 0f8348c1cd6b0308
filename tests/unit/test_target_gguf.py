"""targets/gguf: an independent evaluator of the file gives PyTorch's logits; no silent loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import IDS, save_bpe_decoder
from oracles import gguf_model
from tiny_decoder import VARIANTS
from tiny_encoder import quantize_weights, save_tiny
from tiny_structure import save_structure

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import read_export
from pocketglm.artifacts.manifest import MANIFEST, write_json
from pocketglm.artifacts.scheme import CacheScheme, TensorScheme
from pocketglm.contracts import ExportOptions, Target
from pocketglm.errors import CheckpointError, ParityError
from pocketglm.model.hf import decoder_spec_of, load_decoder, load_encoder
from pocketglm.ops.stored import Quantized
from pocketglm.stages.export import export
from pocketglm.targets import _gguf_readback as readback
from pocketglm.targets import _gguf_tensors as tensors
from pocketglm.targets._gguf_decoder import sources
from pocketglm.targets._gguf_file import F32, Entry, Tensor, Writer
from pocketglm.targets._gguf_read import GgufFile

TARGET: Target = registry.load("targets", "gguf")
INT4 = TensorScheme(bits=4, group_size=32)
INT8 = TensorScheme(bits=8)
FORMS: dict[str, dict[str, TensorScheme]] = {
    "float": {},
    "q8_0": {"_proj.weight": INT8, "embed_tokens.weight": INT8, "lm_head.weight": INT8},
    "q4_0": {"_proj.weight": INT4, "embed_tokens.weight": INT8},
}


def exported(folder: Path, **options: Any) -> Path:
    """The exported file of a checkpoint."""
    out = folder.with_name(f"{folder.name}-out")
    (result,) = export(folder, ["gguf"], out, options=ExportOptions(**options)).targets
    assert result.ok, result.error
    assert result.parity
    assert max(result.parity.blocks.values()) < 1e-4
    return out / "gguf" / "model.gguf"


def torch_logits(folder: Path) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        values = load_decoder(Checkpoint.open(folder))(torch.tensor([IDS]))[0]
    array: np.ndarray[Any, Any] = values.numpy()
    return array


def reasons(folder: Path, **options: Any) -> str:
    """Why a checkpoint is refused, in one text."""
    return "\n".join(TARGET.supports(Checkpoint.open(folder), ExportOptions(**options)))


# --- decoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", VARIANTS)
def test_an_independent_evaluator_gives_pytorchs_logits(
    name: str, form: str, tmp_path: Path
) -> None:
    folder = save_bpe_decoder(tmp_path / "m", name)
    quantize_weights(folder, FORMS[form])
    file = gguf_model.File.read(exported(folder))
    found, wanted = gguf_model.logits(file, IDS), torch_logits(folder)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_a_wrong_order_of_rows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_bpe_decoder(tmp_path / "m", "llama")
    monkeypatch.setattr(tensors, "interleaved", lambda rows, heads: np.arange(rows))
    monkeypatch.setattr(readback, "_turned", lambda rows, source: rows)
    (result,) = export(folder, ["gguf"], tmp_path / "out").targets
    assert (result.ok, result.exit_code) == (False, 1)
    assert "'block.0' of the written file differs" in (result.error or "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_become_f16(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m", "qwen3", dtype=dtype)
    file = exported(folder)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(file)).tensors}
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "F16"
    assert {kind for name, kind in types.items() if "norm" in name} == {"F32"}
    manifest = read_export(file.parent)
    assert manifest.activation == "float16"
    assert manifest.operators == {"F16": 16, "F32": 9}
    wanted = torch_logits(folder)
    found = gguf_model.logits(gguf_model.File.read(file), IDS)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_what_is_too_large_for_f16_is_named(tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m", "qwen2", dtype=torch.bfloat16)
    ckpt = Checkpoint.open(folder)
    info = ckpt.tensors["model.layers.0.mlp.up_proj.weight"]
    with info.file.open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(b"\x00\x48")  # 131072 as bf16
    (result,) = export(folder, ["gguf"], tmp_path / "out").targets
    assert "holds 1.31e+05, more than F16 can" in (result.error or "")
    assert result.exit_code == 2


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    first = exported(save_bpe_decoder(tmp_path / "a")).read_bytes()
    assert exported(save_bpe_decoder(tmp_path / "b")).read_bytes() == first


def test_scales_that_many_columns_share_are_repeated(tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m", "llama", intermediate_size=128)
    schemes = {
        "q_proj.weight": TensorScheme(bits=4, group_size=64),
        "k_proj.weight": TensorScheme(bits=4),
        "down_proj.weight": TensorScheme(bits=8, group_size=128, activation="dynamic_block"),
    }
    file = exported(quantize_weights(folder, schemes))
    wanted = torch_logits(folder)
    found = gguf_model.logits(gguf_model.File.read(file), IDS)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    assert read_export(file.parent).activation == "dynamic_block"


def test_layers_that_share_a_block_each_get_it(tmp_path: Path) -> None:
    folder = save_structure(tmp_path / "m", "qwen2", layer_blocks=(0, 0, 1, 1), **_WIDE)
    save_bpe_decoder(tmp_path / "tokens")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "tokens" / name).read_bytes())
    read = GgufFile(exported(folder))
    assert read.number("block_count") == 4
    for name in ("attn_q.weight", "ffn_down.weight"):
        first, second, third = (read.raw(f"blk.{i}.{name}") for i in range(3))
        assert np.array_equal(first, second)
        assert not np.array_equal(second, third)


_WIDE: dict[str, Any] = {"vocab_size": 426, "eos_ids": (1,)}


def test_the_metadata_is_the_models(tmp_path: Path) -> None:
    file = exported(save_bpe_decoder(tmp_path / "m", "glm-half-bias"), max_length=40)
    read = GgufFile(file)
    assert read.architecture == "chatglm"
    numbers = ("context_length", "rope.dimension_count", "attention.head_count_kv", "vocab_size")
    assert [read.number(name) for name in numbers] == [40, 16, 2, 426]
    assert read.value("general.file_type") == 0
    assert read.number("attention.layer_norm_rms_epsilon") == pytest.approx(1.5625e-7)
    assert "output.weight" in read
    manifest = read_export(file.parent)
    assert manifest.max_length == 40
    assert sum(manifest.parameters.values()) < file.stat().st_size
    assert sorted(manifest.files) == [
        "chat_template.jinja",
        "model.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (TensorScheme(bits=8, symmetric=False), r"zero points.* symmetric: true"),
        (TensorScheme(bits=4, group_size=16), "group_size 16: a block has 32 columns"),
        (TensorScheme(bits=8, activation="static"), "activation static"),
    ],
)
def test_a_scheme_without_a_place_is_refused(
    scheme: TensorScheme, words: str, tmp_path: Path
) -> None:
    folder = quantize_weights(save_bpe_decoder(tmp_path / "m"), {"_proj.weight": scheme})
    (result,) = export(folder, ["gguf"], tmp_path / "out").targets
    assert result.exit_code == 2
    assert (result.error or "").count("  - ") == 1
    assert re.search(words, result.error or "")


def test_rows_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m", "qwen3", intermediate_size=72)
    quantize_weights(folder, {"down_proj.weight": TensorScheme(bits=8)})
    assert "K = 72 is not a multiple of 32: keep it float with skip" in reasons(folder)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"top_k": 3}, "top-k attention (3 keys)"),
        ({"unified": True}, "unified blocks: chatglm has attention and FFN one after the other"),
        ({"layer_ffn": (96, 64, 64, 64)}, "layers with 64 to 96 FFN channels"),
        ({"layer_ranks": ((("ffn.down", 8),),) * 4}, "factorized layers"),
        ({}, "4 heads of 32 are 128 features, chatglm wants as many as the hidden size, 64"),
    ],
)
def test_a_structure_that_llama_cpp_lacks_is_refused(
    own: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = save_structure(tmp_path / "m", "glm-wide", **own)
    assert words in reasons(folder)


def test_top_k_beyond_the_context_is_no_top_k(tmp_path: Path) -> None:
    folder = save_structure(tmp_path / "m", "qwen2", top_k=8)
    assert "top-k" in reasons(folder)
    assert "top-k" not in reasons(folder, max_length=8)


def test_other_refusals(tmp_path: Path) -> None:
    stretched = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    over: dict[str, Any] = {
        "rope_parameters": stretched,
        "attention_bias": True,
        "hidden_act": "gelu",
    }
    folder = save_bpe_decoder(tmp_path / "m", "qwen3", **over)
    ckpt = Checkpoint.open(folder)
    manifest = ckpt.manifest.model_copy(update={"cache": CacheScheme()})
    write_json(folder / MANIFEST, manifest)
    found = reasons(folder, opset=17)
    for words in (
        "opset 17: that is ONNX's",
        "stretched rotary positions",
        "qwen3 has no biases",
        "hidden_act gelu",
        "INT8 cache with fixed scales",
    ):
        assert words in found


# --- encoders ------------------------------------------------------------------------------------

ENCODERS: dict[str, dict[str, Any]] = {
    "classes": {"pooling": "cls", "pooler": True, "activation": "gelu_new"},
    "mean": {"head": "embedding", "num_labels": 0, "activation": "gelu_new"},
    "first": {"head": "embedding", "num_labels": 0, "pooling": "cls", "activation": "gelu_new"},
}


@pytest.mark.parametrize("form", ["float", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ENCODERS)
def test_bert_by_the_independent_evaluator(name: str, form: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", **ENCODERS[name])
    scheme = {"float": {}, "q8_0": {"dense.weight": INT8}, "q4_0": {"dense.weight": INT4}}[form]
    quantize_weights(folder, scheme)
    file = exported(folder, max_length=20)
    ids = [2, 10, 9, 31, 40, 3]
    found = gguf_model.pooled(gguf_model.File.read(file), ids)
    if name != "classes":
        found = found / np.linalg.norm(found)
    with torch.inference_mode():
        rows = torch.tensor([ids])
        wanted = load_encoder(Checkpoint.open(folder))(rows, torch.ones_like(rows))[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert GgufFile(file).shape("position_embd.weight") == (20, 128)
    assert read_export(file.parent).activation == (
        "float16" if form == "float" else "dynamic_block"
    )


def test_the_labels_are_in_the_file(tmp_path: Path) -> None:
    read = GgufFile(exported(save_tiny(tmp_path / "m", **ENCODERS["classes"])))
    assert read.number("classifier.output_labels") == ["label 0", "label 1", "label 2"]
    assert read.number("pooling_type") == 4


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({}, "a mean-pooled classifier"),
        ({"activation": "relu"}, "hidden_act relu: bert computes gelu"),
        ({"head_dim": 16}, "4 heads of 16 are 64 features"),
        ({"layer_ffn": (256, 128)}, "layers of different sizes"),
        ({"layer_ranks": ((("ffn.up", 8),), ())}, "factorized layers"),
    ],
)
def test_an_encoder_that_llama_cpp_lacks_is_refused(
    over: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in reasons(save_tiny(tmp_path / "m", **over))


def test_a_quantized_position_table_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", **ENCODERS["mean"])
    quantize_weights(folder, {"position_embeddings.weight": INT8})
    assert "llama.cpp reads this table as float" in reasons(folder)


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float", "q8_0", "q4_0"])
def test_one_changed_value_is_found(form: str, tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m", "llama")
    quantize_weights(folder, FORMS[form])
    file = exported(folder)
    weights = tensors.Weights(Checkpoint.open(folder))
    everything = list(sources(decoder_spec_of(Checkpoint.open(folder))))
    name = "blk.1.attn_q.weight"
    tensor = next(t for t in gguf.GGUFReader(str(file)).tensors if t.name == name)
    raw = bytearray(file.read_bytes())
    raw[int(tensor.data_offset) + 34 * 18 + 5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ParityError, match="holds other tensors than planned"):
        readback.check_values(file, weights, everything[1:])
    with pytest.raises(ParityError, match=r"'blk.1.attn_q.weight' is not model.layers.1"):
        readback.check_values(file, weights, everything)


def test_a_scale_that_is_no_fp16_number_is_refused() -> None:
    part = Quantized(torch.zeros(1, 32, dtype=torch.int8), torch.tensor([[0.1]]), None, INT8)
    with pytest.raises(CheckpointError, match=r"the scale 0.100000001 is no fp16 number"):
        tensors.packed_rows(part)


def test_the_writer_keeps_its_order(tmp_path: Path) -> None:
    plan = [Tensor("a", F32, (2,)), Tensor("b", F32, (3, 1))]
    meta = {"general.architecture": Entry("str", "llama"), "x": Entry("i32[]", [1, -2])}
    with Writer(tmp_path / "f", meta, plan) as writer:
        with pytest.raises(ValueError, match="'b' is written, the next tensor is 'a'"):
            writer.write("b", np.zeros(3, np.float32))
        writer.write("a", np.array([1, 2], np.float32))
        with pytest.raises(ValueError, match="'b' overflows its 12 bytes"):
            writer.write("b", np.zeros(4, np.float32))
        writer.write("b", np.zeros(1, np.float32))
        writer.write("b", np.ones((2, 1), np.float32))
        with pytest.raises(ValueError, match="the next tensor is 'none'"):
            writer.write("b", np.zeros(1, np.float32))
    read = GgufFile(tmp_path / "f")
    assert read.rows("b").tolist() == [[0], [1], [1]]
    assert read.value("x") == [1, -2]
    assert read.value("y") is None
    incomplete = Writer(tmp_path / "g", meta, plan)
    with pytest.raises(ValueError, match="incomplete tensors, first 'a'"):
        incomplete.close()


def test_no_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"nothing of the kind, but long enough to be read")
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        GgufFile(tmp_path / "f")
