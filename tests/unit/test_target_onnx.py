"""The ONNX target: every form runs in plain ONNX Runtime and computes what the checkpoint does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from tiny_encoder import quantize_weights, save_tiny

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint, read_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Floats, Ids, Lowered, Silent, Target
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import load_encoder

TARGET: Target = registry.load("targets", "onnx")
IDS: Ids = np.random.default_rng(0).integers(5, 57, (3, 9))
MASK: Ids = np.array([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
STANDARD = ExportOptions(opset=13)
DEFAULT = ExportOptions()
WORDS = "word_embeddings.weight"


def lower(folder: Path, out: Path, options: ExportOptions = DEFAULT) -> tuple[Lowered, Path]:
    out.mkdir()
    ckpt = Checkpoint.open(folder)
    assert TARGET.supports(ckpt, options) == []
    lowered = TARGET.lower(ckpt, out, options, Silent())
    return lowered, out / lowered.model_file


def run(file: Path, ids: Ids = IDS, mask: Ids = MASK, output: str | None = None) -> Floats:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output] if output else None
    result: Floats = session.run(names, {"input_ids": ids, "attention_mask": mask})[0]
    return result


def expected(folder: Path, ids: Ids = IDS, mask: Ids = MASK) -> Floats:
    """The checkpoint in PyTorch, weights dequantized, activations in float."""
    with torch.inference_mode():
        model = load_encoder(Checkpoint.open(folder))
        result: Floats = model(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    return result


HEADS: dict[str, dict[str, Any]] = {
    "mean classifier": {},
    "cls classifier with pooler": {"pooling": "cls", "pooler": True},
    "mean embedding": {"head": "embedding", "num_labels": 0},
    "cls embedding": {"head": "embedding", "num_labels": 0, "pooling": "cls"},
    "tanh gelu": {"activation": "gelu_new"},
    "relu": {"activation": "relu"},
}


@pytest.mark.parametrize("options", [DEFAULT, STANDARD], ids=["default", "opset 13"])
@pytest.mark.parametrize("head", HEADS)
def test_float_equals_the_checkpoint(head: str, options: ExportOptions, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "ckpt", **HEADS[head])
    lowered, file = lower(folder, tmp_path / "out", options)
    assert np.abs(run(file) - expected(folder)).max() < 1e-5
    assert file.name == "model.onnx"
    assert lowered.activation == "none"


@pytest.mark.parametrize("head", HEADS)
def test_opset_13_has_standard_operators_only(head: str, tmp_path: Path) -> None:
    lowered, file = lower(save_tiny(tmp_path / "ckpt", **HEADS[head]), tmp_path / "out", STANDARD)
    model = onnx.load(str(file))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)]
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)
    assert "LayerNormalization" not in lowered.operators
    assert lowered.minimum["opset"] == "13"


def linears(**scheme: Any) -> dict[str, TensorScheme]:
    """A scheme for all linear layers of the body."""
    names = ("query", "key", "value", "dense")
    return {f".{name}.weight": TensorScheme(**scheme) for name in names}


# form -> schemes, nodes that must be there
EXACT: dict[str, tuple[dict[str, TensorScheme], set[str]]] = {
    "int8": (linears(bits=8), {"com.microsoft.MatMulNBits"}),
    "int8 asymmetric": (linears(bits=8, symmetric=False), {"com.microsoft.MatMulNBits"}),
    "int8 groups": (linears(bits=8, group_size=64), {"com.microsoft.MatMulNBits"}),
    "int4": (linears(bits=4, group_size=32), {"com.microsoft.MatMulNBits"}),
    "int4 asymmetric": (
        linears(bits=4, group_size=128, symmetric=False),
        {"com.microsoft.MatMulNBits"},
    ),
    "int4 per row": (linears(bits=4), {"com.microsoft.MatMulNBits"}),
    "int8 words": ({WORDS: TensorScheme(bits=8)}, {"Gather"}),
    "int8 words asymmetric": ({WORDS: TensorScheme(bits=8, symmetric=False)}, {"Gather", "Sub"}),
    "int8 words in groups": (
        {WORDS: TensorScheme(bits=8, group_size=32)},
        {"com.microsoft.GatherBlockQuantized"},
    ),
    "int4 words": (
        {WORDS: TensorScheme(bits=4, group_size=32)},
        {"com.microsoft.GatherBlockQuantized"},
    ),
    "int4 words asymmetric, per row": (
        {WORDS: TensorScheme(bits=4, symmetric=False)},
        {"com.microsoft.GatherBlockQuantized"},
    ),
    "int8 positions and types": (
        {
            "position_embeddings.weight": TensorScheme(bits=8),
            "token_type_embeddings.weight": TensorScheme(bits=8),
        },
        {"Gather"},
    ),
    "int4 head": (
        {"classifier.weight": TensorScheme(bits=4, group_size=64)},
        {"com.microsoft.MatMulNBits"},
    ),
    "query alone": ({".query.weight": TensorScheme(bits=8)}, {"com.microsoft.MatMulNBits"}),
}


@pytest.mark.parametrize("form", EXACT)
def test_float_activations_are_exact(form: str, tmp_path: Path) -> None:
    schemes, operators = EXACT[form]
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), schemes)
    lowered, file = lower(folder, tmp_path / "out")
    assert np.abs(run(file) - expected(folder)).max() < 2e-5
    assert operators <= lowered.operators.keys()
    assert lowered.activation == "none"
    if form.startswith("int8") and operators == {"com.microsoft.MatMulNBits"}:
        assert lowered.minimum["onnxruntime"] == "1.23"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_are_no_whole_number_of_blocks(
    bits: int, symmetric: bool, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "ckpt", hidden_size=40, intermediate_size=200)
    words = {WORDS: TensorScheme(bits=bits, symmetric=symmetric)}
    quantize_weights(folder, words | linears(bits=bits, symmetric=symmetric))
    _, file = lower(folder, tmp_path / "out")
    assert np.abs(run(file) - expected(folder)).max() < 2e-5


DYNAMIC: dict[str, tuple[dict[str, TensorScheme], str, str, str]] = {
    "int8 tensor": (
        linears(bits=8, activation="dynamic_tensor"),
        "dynamic_tensor",
        "com.microsoft.DynamicQuantizeMatMul",
        "model_quantized.onnx",
    ),
    "int8 tensor asymmetric": (
        linears(bits=8, symmetric=False, activation="dynamic_tensor"),
        "dynamic_tensor",
        "com.microsoft.DynamicQuantizeMatMul",
        "model_quantized.onnx",
    ),
    "int8 block": (
        linears(bits=8, activation="dynamic_block"),
        "dynamic_block",
        "com.microsoft.MatMulNBits",
        "model_quantized.onnx",
    ),
    "int8 token": (
        linears(bits=8, activation="dynamic_token"),
        "dynamic_block",
        "com.microsoft.MatMulNBits",
        "model_quantized.onnx",
    ),
    "int4 block, int8 words": (
        {WORDS: TensorScheme(bits=8), **linears(bits=4, group_size=32, activation="dynamic_block")},
        "dynamic_block",
        "com.microsoft.MatMulNBits",
        "model_q4.onnx",
    ),
    "two forms": (
        {
            ".dense.weight": TensorScheme(bits=8, activation="dynamic_tensor"),
            ".query.weight": TensorScheme(bits=4, activation="dynamic_block"),
        },
        "mixed",
        "com.microsoft.MatMulNBits",
        "model_q4.onnx",
    ),
}


@pytest.mark.parametrize("form", DYNAMIC)
def test_dynamic_activations(form: str, tmp_path: Path) -> None:
    """Close as shipped; exact block by block when the same file runs with float activations."""
    schemes, activation, operator, name = DYNAMIC[form]
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), schemes)
    lowered, file = lower(folder, tmp_path / "out")
    wanted = expected(folder)
    difference = np.abs(run(file) - wanted).max()
    assert 1e-5 < difference < 0.3 * wanted.std()
    assert (lowered.activation, file.name) == (activation, name)
    assert operator in lowered.operators
    oldest = {"DynamicQuantizeMatMul": "1.16", "MatMulNBits": "1.22"}
    int4 = form == "int4 block, int8 words"
    assert lowered.minimum["onnxruntime"] == (
        "1.19" if int4 else oldest[operator.removeprefix("com.microsoft.")]
    )
    blocks = dict(TARGET.blocks(file, IDS, MASK))
    assert list(blocks) == ["embeddings", "block.0", "block.1", "head"]
    assert np.abs(blocks["head"] - wanted).max() < 2e-5
    model = load_encoder(Checkpoint.open(folder))
    with torch.inference_mode():
        hidden = model.hidden(torch.from_numpy(IDS), torch.from_numpy(MASK)).numpy()
    keep = MASK.astype(bool)
    assert np.abs(blocks["block.1"][keep] - hidden[keep]).max() < 2e-5


def test_padding_changes_nothing(tmp_path: Path) -> None:
    _, file = lower(save_tiny(tmp_path / "ckpt"), tmp_path / "out")
    alone = run(file, IDS[2:, :2], MASK[2:, :2])
    other = np.where(MASK == 1, IDS, 7)
    assert np.abs(run(file)[2] - alone[0]).max() < 1e-5
    assert np.abs(run(file, other) - run(file)).max() < 1e-5


def test_the_optimizer_brings_no_skip_layer_normalization(tmp_path: Path) -> None:
    """It is several times slower than Add and LayerNormalization on the CPU."""
    schemes = linears(bits=8, activation="dynamic_tensor")
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), schemes)
    _, file = lower(folder, tmp_path / "out")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that such a file fits this machine only
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node}
    assert "SkipLayerNormalization" not in kinds
    assert {"LayerNormalization", "DynamicQuantizeMatMul", "MultiHeadAttention"} <= kinds


def test_int8_tables_do_not_become_float_in_memory(tmp_path: Path) -> None:
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), {WORDS: TensorScheme(bits=8)})
    _, file = lower(folder, tmp_path / "out")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    initializers = onnx.load(str(tmp_path / "optimized.onnx")).graph.initializer
    shapes = {tuple(t.dims): numpy_helper.to_array(t).dtype for t in initializers}
    assert shapes[(57, 128)] == np.int8


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    schemes = {WORDS: TensorScheme(bits=8), **linears(bits=8, activation="dynamic_tensor")}
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), schemes)
    files = [lower(folder, tmp_path / name)[1] for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_embedding_outputs(tmp_path: Path) -> None:
    """`sentence_embedding` is ours; runners that pool by themselves read `token_embeddings`."""
    folder = save_tiny(tmp_path / "ckpt", head="embedding", num_labels=0)
    lowered, file = lower(folder, tmp_path / "out")
    assert [port["name"] for port in lowered.outputs] == ["sentence_embedding", "token_embeddings"]
    tokens = run(file, output="token_embeddings")
    weight = MASK[:, :, None].astype(np.float32)
    mean = (tokens * weight).sum(1) / weight.sum(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.abs(mean - run(file, output="sentence_embedding")).max() < 1e-6
    assert read_json(tmp_path / "out" / "config.json")["architectures"] == ["BertModel"]


def test_folder_and_description(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "ckpt", max_length=20)
    (folder / "vocab.txt").write_text("[PAD]\n")
    lowered, file = lower(folder, tmp_path / "out", ExportOptions(max_length=12))
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["model_type"], config["architectures"]) == (
        "bert",
        ["BertForSequenceClassification"],
    )
    assert config["id2label"] == {"0": "label 0", "1": "label 1", "2": "label 2"}
    assert config["label2id"] == {"label 0": 0, "label 1": 1, "label 2": 2}
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    tokenizer = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert (tokenizer["model_max_length"], tokenizer["pad_token"]) == (12, "[PAD]")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "onnx", "tokenizer.json", "tokenizer_config.json"}
    assert lowered.inputs[0] == {
        "name": "input_ids",
        "dtype": "int64",
        "shape": ["batch", "sequence"],
    }
    assert lowered.parts.keys() == {"attention", "embedding", "ffn", "head", "other"}
    assert lowered.parts["head"] == 4 * (3 * 128 + 3)
    assert sum(lowered.parts.values()) <= file.stat().st_size
    # Only the positions of 12 tokens are in the file: it computes those, and says no to more.
    assert np.abs(run(file) - expected(folder)).max() < 1e-5
    with pytest.raises(Exception, match="Add"):
        run(file, np.ones((1, 13), np.int64), np.ones((1, 13), np.int64))


@pytest.mark.parametrize(
    ("scheme", "options", "reason"),
    [
        ({"bits": 4, "activation": "static"}, DEFAULT, "static goes with INT8 per channel only"),
        ({"bits": 4, "activation": "dynamic_tensor"}, DEFAULT, "INT8 per channel only"),
        ({"bits": 8, "group_size": 8}, DEFAULT, "group_size 8"),
        ({"bits": 8}, STANDARD, "opset 13 is float32 or static INT8 only, and 2 weights"),
        (None, ExportOptions(opset=15), "opset 15: offered are 13"),
    ],
)
def test_refusals(
    scheme: dict[str, Any] | None, options: ExportOptions, reason: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "ckpt")
    if scheme:
        quantize_weights(folder, {".query.weight": TensorScheme(**scheme)})
    reasons = TARGET.supports(Checkpoint.open(folder), options)
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_a_wide_group_of_an_embedding_is_refused(tmp_path: Path) -> None:
    folder = quantize_weights(
        save_tiny(tmp_path / "ckpt"), {WORDS: TensorScheme(bits=8, group_size=8)}
    )
    reasons = TARGET.supports(Checkpoint.open(folder), DEFAULT)
    assert "word_embeddings.weight: group_size 8" in reasons[0]


def test_extreme_padding_rows(tmp_path: Path) -> None:
    """A row that is all padding must not become NaN (a mean over nothing is 0)."""

    def tidy(model: Encoder) -> None:
        assert model.classifier is not None
        model.classifier.bias.zero_()

    folder = save_tiny(tmp_path / "ckpt", change=tidy)
    _, file = lower(folder, tmp_path / "out")
    assert np.array_equal(run(file, IDS[:1], np.zeros_like(MASK[:1])), np.zeros((1, 3)))
