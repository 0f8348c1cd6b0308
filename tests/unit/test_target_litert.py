"""The LiteRT target for encoders: every form runs, and computes what the checkpoint does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from litert_file import REASON, flip, model_of, read_weights, run
from tiny_encoder import quantize_weights, save_tiny

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint, read_json
from pocketglm.artifacts.export import read_export
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Floats, Ids, RunOptions, Silent, Target
from pocketglm.errors import CheckpointError, ParityError, UsageError
from pocketglm.model.hf import load_encoder
from pocketglm.ops.stored import read_quantized
from pocketglm.runtimes import open_encoder
from pocketglm.stages import _parity
from pocketglm.stages.export import export
from pocketglm.targets._litert_graph import FlatModel, Grid
from pocketglm.targets._litert_linear import linear, refusal
from pocketglm.targets._litert_weights import Weights

pytest.importorskip("ai_edge_litert", reason=REASON)

TARGET: Target = registry.load("targets", "litert")
IDS: Ids = np.random.default_rng(0).integers(5, 57, (3, 9))
MASK: Ids = np.array([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
WORDS = "word_embeddings.weight"
QUERY = "encoder.layer.0.attention.self.query.weight"
ONE = RunOptions(threads=1)


def linears(**scheme: Any) -> dict[str, TensorScheme]:
    """A scheme for all linear layers of the body."""
    names = ("query", "key", "value", "dense")
    return {f".{name}.weight": TensorScheme(**scheme) for name in names}


def dynamic(bits: int, group: int | None = None) -> dict[str, TensorScheme]:
    scheme = {"bits": bits, "group_size": group}
    return {
        WORDS: TensorScheme(**scheme),
        **linears(**scheme, activation="dynamic_block"),
    }


def expected(folder: Path, ids: Ids = IDS, mask: Ids = MASK) -> Floats:
    """The checkpoint in PyTorch, weights dequantized, activations in float."""
    with torch.inference_mode():
        model = load_encoder(Checkpoint.open(folder))
        result: Floats = model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    return result


def exported(folder: Path, out: Path, **options: Any) -> Path:
    entry = export(folder, ["litert"], out, options=ExportOptions(**options)).targets[0]
    assert entry.ok, entry.error
    return out / "litert"


HEADS: dict[str, dict[str, Any]] = {
    "mean classifier": {},
    "cls classifier with pooler": {"pooling": "cls", "pooler": True},
    "mean embedding": {"head": "embedding", "num_labels": 0},
    "cls embedding": {"head": "embedding", "num_labels": 0, "pooling": "cls"},
    "tanh gelu": {"activation": "gelu_new"},
    "relu": {"activation": "relu"},
    "unequal, factorized": {
        "layer_heads": (4, 2),
        "layer_ffn": (256, 64),
        "head_dim": 32,
        "layer_ranks": ((("ffn.up", 16),), (("attention.query", 8),)),
    },
}


@pytest.mark.parametrize("head", HEADS)
def test_float_equals_the_checkpoint(head: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "ckpt", **HEADS[head])
    session = open_encoder(exported(folder, tmp_path / "out"), ONE)
    assert np.abs(session.logits(IDS, MASK) - expected(folder)).max() < 1e-5
    assert session.info.activation == "none"
    session.close()


# form -> schemes, form of the activations in the file
FORMS: dict[str, tuple[dict[str, TensorScheme], str]] = {
    "int8, float inputs": (linears(bits=8), "none"),
    "int4 per row, float inputs": ({WORDS: TensorScheme(bits=4), **linears(bits=4)}, "none"),
    "int8": (dynamic(8), "dynamic_token"),
    "int4 per row": (dynamic(4), "dynamic_token"),
    "int4 by 32": (dynamic(4, 32), "dynamic_token"),
    "int4 by 64": (dynamic(4, 64), "dynamic_token"),
    "int4 by 128": (dynamic(4, 128), "dynamic_token"),
    "static": ({WORDS: TensorScheme(bits=8), **linears(bits=8, activation="static")}, "static"),
    "two forms": (
        {
            ".dense.weight": TensorScheme(bits=8, activation="dynamic_tensor"),
            ".query.weight": TensorScheme(bits=8),
        },
        "mixed",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_quantized_forms(form: str, tmp_path: Path) -> None:
    """Exact block by block with float activations, close as shipped; the integers are the same."""
    schemes, activation = FORMS[form]
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), schemes)
    out = exported(folder, tmp_path / "out")
    manifest = read_export(out)
    assert manifest.activation == activation
    assert max(manifest.parity.blocks.values()) < 2e-5
    session, wanted = open_encoder(out, ONE), expected(folder)
    difference = np.abs(session.logits(IDS, MASK) - wanted).max()
    assert difference < (1e-5 if activation == "none" else 0.4 * wanted.std())
    found, ckpt = read_weights(out / manifest.model_file), Checkpoint.open(folder)
    for name in ckpt.manifest.schemes:
        part, stored = read_quantized(ckpt, name), found[name.removeprefix("bert.")]
        assert np.array_equal(stored.q, part.q.numpy()), name
        assert np.array_equal(stored.scales, part.scales.expand(stored.scales.shape).numpy()), name


IDENTITY = {
    "int8": {"bits": 8, "activation": "dynamic_token"},
    "int8, float inputs": {"bits": 8},
    "int4": {"bits": 4, "activation": "dynamic_token"},
    "int4, float inputs": {"bits": 4},
    "int4 by 32": {"bits": 4, "group_size": 32, "activation": "dynamic_block"},
    "int4 by 128": {"bits": 4, "group_size": 128, "activation": "dynamic_block"},
}


@pytest.mark.parametrize("delegate", [True, False], ids=["XNNPACK", "plain"])
@pytest.mark.parametrize("form", IDENTITY)
def test_the_identity_matrix_gives_the_weight(form: str, delegate: bool, tmp_path: Path) -> None:
    """What a layer gives for 0s and a 1 is the weight that the runtime really uses."""
    scheme = {".query.weight": TensorScheme(**IDENTITY[form])}  # type: ignore[arg-type]
    ckpt = Checkpoint.open(quantize_weights(save_tiny(tmp_path / "ckpt"), scheme))
    layer = "blocks.0.attention.query"
    model = FlatModel()
    g = model.subgraph("serving_default")
    x = g.input("x", (1, 128, 128))
    g.outputs["y"] = linear(g, Weights(ckpt), x, layer, bias=False)
    model.write(tmp_path / "one.tflite")
    identity = np.eye(128, dtype=np.float32)[None]
    found = run(tmp_path / "one.tflite", {"x": identity}, delegate=delegate)[0].T
    wanted = read_quantized(ckpt, f"bert.{QUERY}").dequantized().numpy()
    assert np.abs(found - wanted).max() < 2e-6 * np.abs(wanted).max()


def test_a_changed_integer_is_found(tmp_path: Path) -> None:
    """By reading the file, and by parity, which names the block."""
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), dynamic(8))
    out = exported(folder, tmp_path / "out")
    file, ckpt, manifest = out / "model.tflite", Checkpoint.open(folder), read_export(out)
    raw = bytearray(file.read_bytes())
    stored = read_weights(file)[QUERY]
    raw[stored.at + 777] ^= 64
    file.write_bytes(bytes(raw))
    changed = read_weights(file)[QUERY].q != read_quantized(ckpt, f"bert.{QUERY}").q.numpy()
    assert changed.sum() == 1
    with pytest.raises(ParityError, match=r"'block.0' of the written file differs"):
        _parity.check_parity(ckpt, out, manifest, TARGET, Silent())


def test_a_flipped_bit_changes_one_integer(tmp_path: Path) -> None:
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), dynamic(4, 32))
    file = exported(folder, tmp_path / "out") / "model.tflite"
    before = read_weights(file)[QUERY].q.copy()
    flip(file, QUERY, 5)
    assert np.argwhere(read_weights(file)[QUERY].q != before).tolist() == [[0, 10]]


def test_padding_and_other_rows_change_nothing(tmp_path: Path) -> None:
    session = open_encoder(exported(save_tiny(tmp_path / "ckpt"), tmp_path / "out"), ONE)
    alone = session.logits(IDS[2:, :2], MASK[2:, :2])
    assert np.abs(session.logits(IDS, MASK)[2] - alone[0]).max() < 1e-6
    empty = session.logits(IDS[:1], np.zeros_like(MASK[:1]))
    assert np.isfinite(empty).all()


def test_a_caller_may_keep_the_file_as_long_as_it_is(tmp_path: Path) -> None:
    """Padding behind the text, no resizing: what GPUs and NPUs need."""
    folder = save_tiny(tmp_path / "ckpt")
    file = exported(folder, tmp_path / "out", max_length=24) / "model.tflite"
    ids, mask = (np.pad(x[1:2], ((0, 0), (0, 15))).astype(np.int32) for x in (IDS, MASK))
    found = run(file, {"input_ids": ids, "attention_mask": mask})
    assert np.abs(found - expected(folder)[1]).max() < 1e-5


def test_folder_and_description(tmp_path: Path) -> None:
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), dynamic(8))
    out = exported(folder, tmp_path / "out", max_length=12)
    assert {file.name for file in out.iterdir()} == {
        *("model.tflite", "config.json", "delegate.json", "export.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    manifest = read_export(out)
    assert manifest.inputs[0] == {
        "name": "input_ids",
        "dtype": "int32",
        "shape": [1, "sequence"],
    }
    assert manifest.outputs == [{"name": "logits", "dtype": "float32", "shape": [1, 3]}]
    assert manifest.operators["FULLY_CONNECTED"] == 13
    assert manifest.parameters.keys() == {"attention", "embedding", "ffn", "head", "other"}
    assert sum(manifest.parameters.values()) <= (out / "model.tflite").stat().st_size
    assert read_json(out / "config.json")["id2label"]["2"] == "label 2"
    assert "transformers.js_config" not in read_json(out / "config.json")
    tensors = model_of(out / "model.tflite").subgraphs[0].tensors
    names = [tensor.name.decode() for tensor in tensors]
    assert {"embeddings", "block.0", "block.1", "logits"} <= set(names)


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), FORMS["static"][0])
    files = [exported(folder, tmp_path / name) / "model.tflite" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_delegates(tmp_path: Path) -> None:
    """Each preference has a choice; the GPU only where it takes the products; XNNPACK measured."""
    folder = save_tiny(tmp_path / "ckpt")
    floats = read_json(exported(folder, tmp_path / "float") / "delegate.json")
    integers = quantize_weights(folder, dynamic(8))
    quantized = read_json(exported(integers, tmp_path / "int8") / "delegate.json")
    preferences = {"low_power", "fast_single_answer", "sustained_speed"}
    assert floats["preferences"].keys() == quantized["preferences"].keys() == preferences
    assert floats["preferences"]["sustained_speed"]["delegate"] == "gpu"
    assert floats["preferences"]["fast_single_answer"]["delegate"] == "xnnpack"
    assert {p["delegate"] for p in quantized["preferences"].values()} == {"xnnpack"}
    for described in (floats, quantized):
        nnapi = described["delegates"]["nnapi"]
        assert nnapi["deprecated_from"] == {"android": 15, "api_level": 35}
        assert any("Play services" in other for other in nnapi["replaced_by"])
        share = described["delegates"]["xnnpack"]["measured"]
        assert share["pieces"] == 1
        assert share["operators"] - share["delegated"] == sum(share["left"].values()) < 10
        assert "FULLY_CONNECTED" not in share["left"]
    reasons = " ".join(quantized["delegates"]["gpu"]["reasons"])
    assert "version 12" in reasons
    versions = {
        code.builtinCode: code.version
        for code in model_of(tmp_path / "int8/litert/model.tflite").operatorCodes
    }
    assert versions[9] in (5, 12)  # FULLY_CONNECTED; the classifier's is float
    json.dumps(quantized)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ({"bits": 8, "symmetric": False}, "symmetric: true"),
        ({"bits": 8, "group_size": 32}, "compress with no group_size"),
        (
            {"bits": 4, "group_size": 16, "activation": "dynamic_block"},
            "compress with group_size: 32",
        ),
        (
            {"bits": 4, "group_size": 256, "activation": "dynamic_block"},
            "compress with group_size: 128",
        ),
        ({"bits": 4, "group_size": 32}, "activation: dynamic_block"),
        ({"bits": 4, "activation": "static"}, "static activations go with INT8"),
    ],
)
def test_refusals(scheme: dict[str, Any], reason: str, tmp_path: Path) -> None:
    schemes = {".output.dense.weight": TensorScheme(**scheme)}
    folder = quantize_weights(save_tiny(tmp_path / "ckpt", hidden_size=256), schemes)
    entry = export(folder, ["litert"], tmp_path / "out").targets[0]
    assert (entry.ok, entry.exit_code) == (False, 2)
    assert reason in str(entry.error)
    assert "and 3 more:" in str(entry.error)


def test_widths_that_int4_cannot_have() -> None:
    rows = TensorScheme(bits=4)
    assert "K must be even" in refusal(rows, 33, linear=False)
    assert refusal(rows, 34, linear=False) == ""
    dynamic = TensorScheme(bits=4, activation="dynamic_token")
    assert "no multiple of 32" in refusal(dynamic, 40, linear=True)


# --- the session ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("litert")
    return exported(save_tiny(root / "ckpt"), root / "out", max_length=12)


def test_session_info(folder: Path) -> None:
    info = open_encoder(folder, RunOptions(threads=2)).info
    assert (info.runtime, info.output, info.pooling) == ("litert", "logits", "mean")
    assert (info.threads, info.max_length, len(info.labels)) == (2, 12, 3)


def test_the_session_refuses_what_it_cannot_take(folder: Path) -> None:
    session = open_encoder(folder, ONE)
    with pytest.raises(UsageError, match="13 tokens in a row"):
        session.logits(np.ones((1, 13), np.int64), np.ones((1, 13), np.int64))
    for token in (57, -1):
        with pytest.raises(UsageError, match=f"token id {token} is outside"):
            session.logits(np.array([[token]]), np.array([[1]]))


def test_files_that_are_not_what_was_exported(folder: Path, tmp_path: Path) -> None:
    for name in ("export.json", "model.tflite"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    model = tmp_path / "model.tflite"
    size = model.stat().st_size
    model.write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError, match="LiteRT cannot open"):
        open_encoder(tmp_path)
    model.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="has 5 bytes"):
        open_encoder(tmp_path)
    model.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_encoder(tmp_path)


# --- the file ------------------------------------------------------------------------------------


def test_a_constant_has_the_size_that_was_announced(tmp_path: Path) -> None:
    model = FlatModel()
    g = model.subgraph("f")
    g.lazy("w", (100,), "FLOAT32", lambda: np.zeros(99, np.float32))
    with pytest.raises(ValueError, match="396 bytes, 400 were announced"):
        model.write(tmp_path / "m.tflite")


def test_unknown_options_and_grids(tmp_path: Path) -> None:
    g = FlatModel().subgraph("f")
    x = g.input("x", (1, 4))
    with pytest.raises(ValueError, match="SOFTMAX has no option gamma"):
        g.op("SOFTMAX", [x], (1, 4), gamma=1.0)
    g.set_grid(x, Grid(np.array([0.5]), zero=3))
    assert g.tensors[x].quantization.zeroPoint.tolist() == [3]
