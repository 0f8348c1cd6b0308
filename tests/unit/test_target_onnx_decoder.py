"""Decoders as ONNX files: every form computes what the checkpoint does, and holds its integers."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx_file import (
    ALL,
    IDS,
    LAST,
    MASK,
    TARGET,
    attribute,
    empty_past,
    lower,
    nodes,
    open_file,
    run_file,
    run_torch,
    worst,
)
from tiny_export import WIDE, body, quantized, save_wide

from pocketglm.artifacts.checkpoint import Checkpoint, read_json
from pocketglm.artifacts.export import check_files, read_export
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Ids
from pocketglm.errors import CheckpointError
from pocketglm.model.hf import load_decoder
from pocketglm.ops.packing import pack_blocks
from pocketglm.ops.stored import read_quantized
from pocketglm.stages.export import export
from pocketglm.targets._onnx_external import ExternalData
from pocketglm.targets._onnx_rows import Rows

WORDS = "embed_tokens.weight"
HEAD = "lm_head.weight"


def forms() -> dict[str, dict[str, TensorScheme]]:
    int4 = {"bits": 4, "group_size": 32}
    return {
        "fp32": {},
        "int4": body(**int4) | {WORDS: TensorScheme(**int4), HEAD: TensorScheme(**int4)},
        "int8": body(bits=8) | {WORDS: TensorScheme(bits=8), HEAD: TensorScheme(bits=8)},
        "int4 asymmetric": body(bits=4, group_size=16, symmetric=False)
        | {WORDS: TensorScheme(bits=4, group_size=32, symmetric=False)},
    }


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("variant", WIDE)
def test_padded_rows_and_steps_equal_the_checkpoint(
    variant: str, form: str, tmp_path: Path
) -> None:
    folder = quantized(save_wide(tmp_path / "ckpt", variant), forms()[form])
    lowered, file = lower(folder, tmp_path / "out")
    wanted = run_torch(folder)
    assert min(float(logits.std()) for logits in wanted) > 0.5
    assert worst(run_file(file, 0), wanted) < 1e-4
    assert worst(run_file(file, 20), wanted) < 1e-4  # one buffer for past and present
    assert lowered.activation == "none"
    assert lowered.operators["com.microsoft.GroupQueryAttention"] == 2
    assert lowered.minimum["onnxruntime"] == ("1.19" if form == "fp32" else "1.23")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128, None])
def test_every_group_size(group: int | None, bits: int, symmetric: bool, tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    scheme = {"bits": bits, "group_size": group, "symmetric": symmetric}
    folder = save_wide(tmp_path / "ckpt", "glm-wide", **wide)
    quantized(folder, body(**scheme) | {WORDS: TensorScheme(**scheme)})
    _, file = lower(folder, tmp_path / "out")
    assert worst(run_file(file, 0), run_torch(folder)) < 1e-4


def test_layers_of_different_schemes_are_not_packed(tmp_path: Path) -> None:
    mixed = {
        "q_proj.weight": TensorScheme(bits=8),
        "up_proj.weight": TensorScheme(bits=4, group_size=32),
    }
    folder = quantized(save_wide(tmp_path / "ckpt", "qwen2"), mixed)
    lowered, file = lower(folder, tmp_path / "out")
    assert lowered.operators["com.microsoft.MatMulNBits"] == 4
    assert worst(run_file(file, 0), run_torch(folder)) < 1e-4


@pytest.mark.parametrize("activation", ["dynamic_block", "dynamic_token", "dynamic_tensor"])
def test_dynamic_activations_are_int8_by_block(activation: str, tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "ckpt", "glm-half-bias")
    quantized(folder, body(bits=8, activation=activation))
    lowered, file = lower(folder, tmp_path / "out")
    assert lowered.activation == "dynamic_block"
    levels = [attribute(n, "accuracy_level") for n in nodes(file, "MatMulNBits")]
    assert levels == [4] * 8
    assert lowered.minimum["onnxruntime"] == "1.22"
    difference = worst(run_file(file, 0), run_torch(folder))
    assert 1e-4 < difference < 0.5


@pytest.mark.parametrize(("activation", "level"), [("dynamic_block", 4), ("none", 1)])
def test_a_tied_heads_activations_are_as_the_bodys(
    activation: str, level: int, tmp_path: Path
) -> None:
    folder = save_wide(tmp_path / "ckpt", "qwen2")
    words = {WORDS: TensorScheme(bits=4, group_size=32)}
    quantized(folder, words | body(bits=4, group_size=32, activation=activation))
    _, file = lower(folder, tmp_path / "out")
    (head,) = (n for n in nodes(file, "MatMulNBits") if n.output[0] == "logits")
    assert attribute(head, "accuracy_level") == level


def test_the_activation_is_mixed_where_the_schemes_are(tmp_path: Path) -> None:
    mixed = {"q_proj.weight": TensorScheme(bits=8, activation="dynamic_token")}
    mixed |= {"up_proj.weight": TensorScheme(bits=8), WORDS: TensorScheme(bits=8)}
    folder = quantized(save_wide(tmp_path / "ckpt", "llama"), mixed)
    assert lower(folder, tmp_path / "out")[0].activation == "mixed"


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_other_activations(activation: str, tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "ckpt", "llama", hidden_act=activation)
    _, file = lower(folder, tmp_path / "out")
    assert worst(run_file(file, 0), run_torch(folder)) < 1e-4


# --- the graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "interleaved", "packed", "cos"),
    [
        ("glm-half-bias", 1, True, [64, 8]),
        ("glm-wide", 1, True, [64, 16]),
        ("llama", 0, True, [64, 8]),
        ("qwen3", 0, False, [64, 16]),
    ],
)
def test_attention_does_the_rotary_positions(
    variant: str, interleaved: int, packed: bool, cos: list[int], tmp_path: Path
) -> None:
    lowered, file = lower(save_wide(tmp_path / "ckpt", variant), tmp_path / "out")
    for node in nodes(file, "GroupQueryAttention"):
        assert attribute(node, "do_rotary") == 1
        assert attribute(node, "rotary_interleaved") == interleaved
        assert (node.input[1] == "") == packed
    model = onnx.load(str(file), load_external_data=False)
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    assert shapes["cos_cache"] == shapes["sin_cache"] == cos
    ends = ["embeddings", "block.0", "block.1", "logits"]
    assert [n for node in model.graph.node for n in node.output if n in ends] == ends
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17), ("com.microsoft", 1)]
    assert sum(lowered.parts.values()) > 0.9 * (file.parent / "model.onnx.data").stat().st_size


def test_last_logits_are_those_of_all(tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "ckpt", "glm4")
    _, every = lower(folder, tmp_path / "all")
    lowered, last = lower(folder, tmp_path / "last", LAST)
    assert lowered.outputs[0]["shape"] == [1, 1, 96]
    assert lowered.inputs[0]["shape"] == [1, "sequence"]
    feeds = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
    found = []
    for file in (every, last):
        session = open_file(file)
        found.append(session.run(["logits"], feeds | empty_past(session, 1))[0])
    assert found[1].shape == (1, 1, 96)
    assert np.abs(found[0][:, -1:] - found[1]).max() < 1e-5
    session = open_file(last)
    with pytest.raises(Exception, match="invalid dimensions"):  # two rows would come out wrong
        session.run(None, {"input_ids": IDS, "attention_mask": MASK, **empty_past(session, 2)})


def test_a_shorter_context_makes_shorter_tables(tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "ckpt", "llama")
    _, file = lower(folder, tmp_path / "out", ExportOptions(logits="all", max_length=12))
    session = open_file(file)
    assert worst(run_file(file, 0), run_torch(folder)) < 1e-4  # 12 tokens at the end
    ids = np.full((1, 13), 7)
    with pytest.raises(Exception, match="cos_cache dimension 0"):
        session.run(
            None, {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_past(session, 1)}
        )


# --- the integers --------------------------------------------------------------------------------

Array = npt.NDArray[Any]


def nibbles(packed: Array) -> Array:
    """uint8 [N, bytes] -> int8 [N, 2 * bytes], low nibble first, from -8."""
    pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return (pairs.astype(np.int16) - 8).astype(np.int8)


def initializers(file: Path) -> dict[str, Array]:
    """By the onnx library alone, external data included."""
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(file)).graph.initializer}


@pytest.mark.parametrize("bits", [4, 8])
def test_tied_embedding_and_head_are_one_tensor(bits: int, tmp_path: Path) -> None:
    group = 32 if bits == 4 else None
    folder = save_wide(tmp_path / "ckpt", "glm-wide")
    quantized(folder, {WORDS: TensorScheme(bits=bits, group_size=group)})
    _, file = lower(folder, tmp_path / "out")
    (reshape,) = (n for n in nodes(file, "Reshape") if "embed_tokens" in n.input[0])
    (gather,) = nodes(file, "GatherBlockQuantized")
    (head,) = (n for n in nodes(file, "MatMulNBits") if n.output[0] == "logits")
    assert head.input[1] == reshape.input[0] == "model.embed_tokens.weight"
    assert gather.input[0] == reshape.output[0]
    assert gather.input[2] == head.input[2]
    stored = initializers(file)
    large = [n for n, v in stored.items() if v.dtype == np.uint8]
    assert large == ["model.embed_tokens.weight"]
    wanted = read_quantized(Checkpoint.open(folder), "model.embed_tokens.weight")
    rows = stored[large[0]].reshape(96, -1)
    q = nibbles(rows) if bits == 4 else (rows.astype(np.int16) - 128).astype(np.int8)
    assert np.array_equal(q, wanted.q.numpy())
    blocks = 2 if bits == 4 else 1
    assert np.array_equal(stored["model.embed_tokens.scales"], wanted.scales.expand(96, blocks))


def test_tied_float_embedding_and_head_are_one_tensor(tmp_path: Path) -> None:
    _, file = lower(save_wide(tmp_path / "ckpt", "qwen2"), tmp_path / "out")
    (head,) = (n for n in nodes(file, "FusedMatMul") if n.output[0] == "logits")
    (gather,) = (n for n in nodes(file, "Gather") if n.output[0] == "embeddings")
    assert head.input[1] == gather.input[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_layers_lie_one_below_the_other(bits: int, tmp_path: Path) -> None:
    group = 32 if bits == 4 else None
    folder = save_wide(tmp_path / "ckpt", "llama")
    quantized(folder, body(bits=bits, group_size=group, symmetric=False))
    _, file = lower(folder, tmp_path / "out")
    stored, ckpt = initializers(file), Checkpoint.open(folder)
    at = "model.layers.1.self_attn."
    parts = [read_quantized(ckpt, f"{at}{n}_proj.weight") for n in "qkv"]
    name = f"{at}q_proj|{at}k_proj|{at}v_proj"
    block = group or 64
    wanted = np.concatenate([pack_blocks(part.q, bits, block) for part in parts])
    assert np.array_equal(stored[f"{name}.weight"], wanted)
    scales = np.concatenate([part.scales.numpy() for part in parts])
    assert np.array_equal(stored[f"{name}.scales"], scales)
    zeros = np.concatenate([part.zero_points for part in parts if part.zero_points is not None])
    found = stored[f"{name}.zero_points"]
    unpacked = nibbles(found) if bits == 4 else (found.astype(np.int16) - 128).astype(np.int8)
    assert np.array_equal(unpacked, zeros)


def test_one_changed_byte_changes_the_integers(tmp_path: Path) -> None:
    folder = quantized(save_wide(tmp_path / "ckpt", "llama"), body(bits=4, group_size=32))
    assert export(folder, ["onnx"], tmp_path / "out", options=LAST).targets[0].ok
    out = tmp_path / "out" / "onnx"
    before = initializers(out / "model.onnx")
    model = onnx.load(str(out / "model.onnx"), load_external_data=False)
    name = "model.layers.1.mlp.down_proj.weight"
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    offset = next(int(e.value) for e in tensor.external_data if e.key == "offset")
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[offset + 77] ^= 16
    (out / "model.onnx.data").write_bytes(data)
    after = initializers(out / "model.onnx")
    assert [n for n in before if not np.array_equal(before[n], after[n])] == [name]
    with pytest.raises(CheckpointError, match=r"model\.onnx\.data"):
        check_files(out, read_export(out))


# --- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_bytes_do_not_depend_on_the_chunks(bits: int, symmetric: bool, tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "ckpt", "llama")
    quantized(folder, body(bits=bits, group_size=32, symmetric=symmetric))
    ckpt = Checkpoint.open(folder)
    layers = ["blocks.0.ffn.gate", "blocks.0.ffn.up"]
    whole, parts = Rows(ckpt), Rows(ckpt, chunk=1)
    for rows in (whole, parts):
        assert rows.shape(*layers) == (192, 64)
    sources: list[Callable[..., Iterator[Array]]] = [Rows.integers, Rows.scales]
    for source in sources if symmetric else [*sources, Rows.zero_points]:
        chunks = list(source(parts, *layers))
        assert max(len(chunk) for chunk in chunks) == 8
        assert np.array_equal(np.concatenate(chunks), np.concatenate(list(source(whole, *layers))))
    floats = list(parts.floats("tokens.weight", "head.weight"))
    assert max(len(chunk) for chunk in floats) == 8
    wanted = [ckpt.read(f"{name}.weight") for name in ("model.embed_tokens", "lm_head")]
    assert np.array_equal(np.concatenate(floats), np.concatenate(wanted))


def test_half_precision_becomes_float(tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "ckpt", "llama", dtype=torch.bfloat16)
    ckpt = Checkpoint.open(folder)
    assert ckpt.tensors["lm_head.weight"].dtype == "BF16"
    (found,) = Rows(ckpt).floats("head.weight")
    assert found.dtype == np.float32
    assert np.array_equal(found, ckpt.read("lm_head.weight").astype(np.float32))
    _, file = lower(folder, tmp_path / "out")
    assert worst(run_file(file, 0), run_torch(folder)) < 1e-4


def test_weights_lie_in_one_file_of_aligned_tensors(tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "ckpt", "llama", vocab_size=6000)
    lowered, file = lower(folder, tmp_path / "out")
    assert file.stat().st_size < 20_000
    data = file.parent / "model.onnx.data"
    end, large = 0, 0
    for tensor in onnx.load(str(file), load_external_data=False).graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            assert len(tensor.raw_data) < 64
            continue
        entry = {e.key: e.value for e in tensor.external_data}
        assert entry["location"] == data.name
        offset, length = int(entry["offset"]), int(entry["length"])
        assert offset >= end
        assert offset % (4096 if length >= 1 << 20 else 64) == 0
        end, large = offset + length, large + (length >= 1 << 20)
    assert (end, large) == (data.stat().st_size, 2)
    assert lowered.parts["head"] == 6000 * 64 * 4
    assert lowered.digests == {data.name: hashlib.sha256(data.read_bytes()).hexdigest()}


@pytest.mark.parametrize("digest", [False, True])
def test_a_full_disk_is_noticed_though_another_thread_writes(*, digest: bool) -> None:
    def write() -> None:
        with ExternalData(Path("/dev/full")) as data:
            data.write("x", np.float32, (4,), [np.zeros(4, np.float32)])
            assert not digest or data.digest

    with pytest.raises(OSError, match="No space left"):
        write()


def test_wrong_chunks_are_refused(tmp_path: Path) -> None:
    with ExternalData(tmp_path / "data") as data:
        with pytest.raises(ValueError, match="declared float32, got float64"):
            data.write("a", np.float32, (2,), [np.zeros(2)])
        with pytest.raises(ValueError, match="should have 12 bytes, got 8"):
            data.write("a", np.float32, (3,), [np.zeros(2, np.float32)])


# --- refusals ------------------------------------------------------------------------------------


def reasons(folder: Path, options: ExportOptions = ALL) -> str:
    return "\n".join(TARGET.supports(Checkpoint.open(folder), options))


def test_what_cannot_be_carried_is_refused(tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "a", "llama", head_dim=24)
    assert "head_dim 24" in reasons(folder)
    assert "rotary dims 24" in reasons(folder)
    folder = save_wide(tmp_path / "b", "glm-half-bias", head_dim=16)
    assert reasons(folder).startswith("rotary dims 8: GroupQueryAttention takes multiples of 16")
    folder = save_wide(tmp_path / "c", "llama", intermediate_size=72)
    assert "opset 13: a decoder needs" in reasons(folder, ExportOptions(opset=13))
    assert reasons(folder, ExportOptions(opset=17)) == ""
    quantized(
        folder,
        {
            "down_proj.weight": TensorScheme(bits=8),
            "q_proj.weight": TensorScheme(bits=4, group_size=8),
            "v_proj.weight": TensorScheme(bits=8, activation="static"),
        },
    )
    found = reasons(folder)
    assert "layers.0.mlp.down_proj.weight and 1 more: K = 72 is not a multiple of 16" in found
    assert "group_size 8: the operators know [16, 32, 64, 128]" in found
    assert "activation static" in found


# --- the folder ----------------------------------------------------------------------------------


def test_the_folder_and_its_manifest(tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "ckpt", "glm-half-bias")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    quantized(folder, body(bits=4, group_size=32))
    options = ExportOptions(max_length=40, threads=3, spinning=True)
    entry = export(folder, ["onnx"], tmp_path / "out", options=options).targets[0]
    assert entry.ok, entry.error
    out = tmp_path / "out" / "onnx"
    manifest = read_export(out)
    check_files(out, manifest)
    assert set(manifest.files) == {
        "chat_template.jinja",
        "config.json",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (manifest.kind, manifest.output, manifest.precision) == ("decoder", "logits", "int4")
    assert (manifest.logits, manifest.max_length, manifest.vocab_size) == ("last", 40, 96)
    assert (manifest.bos_id, manifest.eos_ids, manifest.threads) == (1, [2, 5], 3)
    assert manifest.cache is not None
    assert (manifest.cache.layers, manifest.cache.kv_heads, manifest.cache.head_dim) == (2, 2, 32)
    assert manifest.cache.bytes_per_token == 2 * 2 * 2 * 32 * 4
    assert manifest.inputs[2] == {
        "name": "past_key_values.0.key",
        "dtype": "float32",
        "shape": [1, 2, "past", 32],
    }
    genai = read_json(out / "genai_config.json")
    model, decoder = genai["model"], genai["model"]["decoder"]
    assert (model["type"], model["context_length"], model["vocab_size"]) == ("decoder", 40, 96)
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([2, 5], 1, 0)
    session = decoder["session_options"]
    assert session["intra_op_num_threads"] == 3
    assert session["session.intra_op.allow_spinning"] == "1"
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (32, 2)
    assert genai["search"]["past_present_share_buffer"] is True
    assert genai["search"]["max_length"] == 40
    config = read_json(out / "config.json")
    assert (config["model_type"], config["architectures"]) == ("glm", ["GlmForCausalLM"])
    assert config["max_position_embeddings"] == 40
    assert "quantization_config" not in config


def test_an_end_token_beyond_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    _, file = lower(save_wide(tmp_path / "m", "glm4", eos_token_id=[1, 151329]), tmp_path / "out")
    model = read_json(file.parent / "genai_config.json")["model"]
    assert (model["eos_token_id"], model["vocab_size"] < 151329) == ([1], True)


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = quantized(save_wide(tmp_path / "ckpt", "qwen3"), body(bits=4, group_size=32))
    for name in ("a", "b"):
        assert export(folder, ["onnx"], tmp_path / name, options=LAST).targets[0].ok
    first, second = (read_export(tmp_path / name / "onnx") for name in ("a", "b"))
    assert first.files == second.files


def test_no_modelling_code_is_loaded(tmp_path: Path) -> None:
    """Neither transformers nor torch's compiler: they take seconds and hundreds of megabytes."""
    folder = save_wide(tmp_path / "ckpt", "glm-wide")
    code = (
        "import sys; from pathlib import Path\n"
        "from pocketglm.stages.export import export\n"
        f"result = export(Path({str(folder)!r}), ['onnx'], Path({str(tmp_path / 'out')!r}))\n"
        "assert result.targets[0].ok, result\n"
        "sys.exit(sorted({'transformers', 'torch._dynamo'} & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- onnxruntime-genai ---------------------------------------------------------------------------


@torch.inference_mode()
def greedy(folder: Path, prompt: Ids, count: int) -> list[int]:
    """Tokens of the checkpoint in PyTorch, up to and with an end token."""
    model = load_decoder(Checkpoint.open(folder))
    cache = model.new_cache(1)
    logits, found = model.prefill(torch.from_numpy(prompt[None]), None, cache), []
    for _ in range(count):
        found.append(int(logits.argmax()))
        if found[-1] in model.spec.eos_ids:
            break
        logits = model.step(torch.tensor([found[-1]]), cache)
    return found


@pytest.mark.parametrize("form", ["fp32", "int4"])
@pytest.mark.parametrize("variant", ["glm-wide", "glm4", "llama", "qwen3"])
def test_genai_generates_the_checkpoints_tokens(variant: str, form: str, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    folder = save_wide(tmp_path / "ckpt", variant, max_position_embeddings=128)
    quantized(folder, forms()[form])
    assert export(folder, ["onnx"], tmp_path / "out", options=LAST).targets[0].ok
    model = og.Model(str(tmp_path / "out" / "onnx"))
    distinct: set[int] = set()
    for length in (3, 5, 23):
        prompt = np.random.default_rng(length).integers(6, 96, length)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length + 64)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt.astype(np.int32))
        found = []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        assert found == greedy(folder, prompt, 64)
        distinct |= set(found)
    assert len(distinct) >= 20
