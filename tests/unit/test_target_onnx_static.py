"""Static INT8 in ONNX: the QDQ form, what ONNX Runtime makes of it, and what it computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from tiny_encoder import quantize_weights, save_tiny

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import read_export
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Floats, Ids, RunOptions, Silent, Target
from pocketglm.model.hf import load_encoder
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.stored import read_grid
from pocketglm.runtimes.torch import TorchSession
from pocketglm.stages.export import export

TARGET: Target = registry.load("targets", "onnx")
IDS: Ids = np.random.default_rng(0).integers(5, 57, (3, 9))
MASK: Ids = np.array([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
OPSETS = [None, 13]
LAYERS = 12  # linear layers of the tiny model's body


def static(folder: Path, *, symmetric: bool = True, grid: InputGrid | None = None) -> Path:
    names = ("query", "key", "value", "dense")
    scheme = TensorScheme(bits=8, symmetric=symmetric, activation="static")
    schemes = {f".{name}.weight": scheme for name in names}
    words = {"word_embeddings.weight": TensorScheme(bits=8)}
    return quantize_weights(save_tiny(folder), words | schemes, grid or InputGrid(0.05, -7))


def lower(folder: Path, out: Path, opset: int | None) -> Path:
    ckpt, options = Checkpoint.open(folder), ExportOptions(opset=opset)
    out.mkdir()
    assert TARGET.supports(ckpt, options) == []
    lowered = TARGET.lower(ckpt, out, options, Silent())
    assert lowered.activation == "static"
    assert lowered.minimum["onnxruntime"] == ("1.15" if opset else "1.16")
    return out / lowered.model_file


def run(file: Path) -> Floats:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    result: Floats = session.run(None, {"input_ids": IDS, "attention_mask": MASK})[0]
    return result


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_file_computes_what_the_checkpoint_does(
    symmetric: bool, opset: int | None, tmp_path: Path
) -> None:
    folder = static(tmp_path / "ckpt", symmetric=symmetric)
    file = lower(folder, tmp_path / "out", opset)
    assert file.name == "model_quantized.onnx"
    ckpt = Checkpoint.open(folder)
    simulated = TorchSession(ckpt, RunOptions()).logits(IDS, MASK)
    with torch.inference_mode():
        ids, mask = torch.from_numpy(IDS), torch.from_numpy(MASK)
        exact = load_encoder(ckpt)(ids, mask).numpy()
    found = run(file)
    rounding = np.abs(simulated - exact).max()
    # Some roundings turn out the other way; most do not.
    assert np.abs(found - simulated).max() < 0.5 * rounding
    assert rounding > 1e-3
    blocks = dict(TARGET.blocks(file, IDS, MASK))
    assert np.abs(blocks["head"] - exact).max() < 2e-5, "not exact with rounding off"


@pytest.mark.parametrize("opset", OPSETS)
def test_onnx_runtime_uses_its_integer_products(opset: int | None, tmp_path: Path) -> None:
    file = lower(static(tmp_path / "ckpt"), tmp_path / "out", opset)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kinds = Counter(n.op_type for n in onnx.load(str(tmp_path / "optimized.onnx")).graph.node)
    # Query, key and value are one product in ONNX Runtime's dialect.
    layers = LAYERS if opset else LAYERS - 2 * 2
    assert kinds["MatMulIntegerToFloat"] == layers
    assert kinds["DequantizeLinear"] == 0
    assert kinds["QuantizeLinear"] == LAYERS - 2 * 2, "one for each input"


def test_opset_13_has_standard_operators_only(tmp_path: Path) -> None:
    model = onnx.load(str(lower(static(tmp_path / "ckpt"), tmp_path / "out", 13)))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 13)]
    onnx.checker.check_model(model, full_check=True)


def test_integers_scales_and_grids_are_the_checkpoints(tmp_path: Path) -> None:
    """Read back from the file by its own graph."""
    folder = static(tmp_path / "ckpt", grid=InputGrid(0.04, 11))
    model = onnx.load(str(lower(folder, tmp_path / "out", 13)))
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    ckpt, seen = Checkpoint.open(folder), 0
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in makers:
            continue
        rounded, columns = (makers[name] for name in node.input)
        if columns.op_type != "DequantizeLinear":
            continue
        name = columns.input[0]
        stored = next(n for n in ckpt.manifest.schemes if n.endswith(name))
        assert (constants[name] == ckpt.read(stored).T).all()
        scales = ckpt.read(f"{stored}_scale").astype(np.float32)[:, 0]
        assert (constants[columns.input[1]] == scales).all()
        grid = read_grid(ckpt, stored)
        assert grid == InputGrid(float(np.float32(0.04)), 11)
        for end in (rounded, makers[rounded.input[0]]):
            assert constants[end.input[1]] == np.float32(grid.scale)
            assert constants[end.input[2]] == grid.zero_point + 128
            assert constants[end.input[2]].dtype == np.uint8
        seen += 1
    assert seen == LAYERS


def test_query_with_a_grid_of_its_own(tmp_path: Path) -> None:
    """Then it cannot be one product with key and value."""
    folder = static(tmp_path / "ckpt")
    _change(folder, "layer.0.attention.self.query.input_scale", 0.04)
    file = lower(folder, tmp_path / "out", None)
    operators = Counter(node.op_type for node in onnx.load(str(file)).graph.node)
    assert operators["MultiHeadAttention"] == 1
    simulated = TorchSession(Checkpoint.open(folder), RunOptions()).logits(IDS, MASK)
    assert np.abs(run(file) - simulated).max() < 0.1 * simulated.std()


def _change(folder: Path, end: str, value: float) -> None:
    file = folder / "model.safetensors"
    tensors: dict[str, Any] = load_file(file)
    name = next(n for n in tensors if n.endswith(end))
    tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, file)


@pytest.mark.parametrize("opset", OPSETS)
def test_an_export_passes_parity(opset: int | None, tmp_path: Path) -> None:
    folder = static(tmp_path / "ckpt")
    (result,) = export(
        folder, ["onnx"], tmp_path / "out", options=ExportOptions(opset=opset)
    ).targets
    assert result.ok, result.error
    manifest = read_export(tmp_path / "out" / "onnx")
    assert manifest.activation == "static"
    assert max(manifest.parity.blocks.values()) < 1e-4
