"""What every registered target promises: the file holds the checkpoint's own integers.

The file is read back here by plain format packages, and the checkpoint by plain numpy over
safetensors; nothing of ours takes part in the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coreml_file
import executorch_file
import gguf
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import safetensors.torch
from litert_file import flip, read_weights
from onnx import numpy_helper
from oracles.gguf_model import quantized_rows
from tiny_encoder import quantize_weights, save_tiny

from pocketglm import registry
from pocketglm.artifacts.export import check_files, read_export
from pocketglm.artifacts.manifest import read_manifest
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.stages.export import export

Array = npt.NDArray[Any]
Triple = tuple[Array, Array, Array | None]  # q [N, K], scales [N, G], zero points [N, G]

WORDS = "word_embeddings.weight"


def _forms() -> dict[str, dict[str, TensorScheme]]:
    int8 = TensorScheme(bits=8)
    dynamic = {"bits": 8, "activation": "dynamic_tensor"}
    int4 = {"bits": 4, "group_size": 32}
    return {
        "int8": {WORDS: int8, "dense.weight": TensorScheme(**dynamic), **_qkv(dynamic)},
        "int8 asymmetric": {
            WORDS: TensorScheme(bits=8, symmetric=False),
            "dense.weight": TensorScheme(**dynamic, symmetric=False),
            **_qkv(dynamic | {"symmetric": False}),
        },
        "int8 by block": {"dense.weight": TensorScheme(bits=8, activation="dynamic_block")},
        "int8 asymmetric, exact": {"dense.weight": TensorScheme(bits=8, symmetric=False)},
        "int4": {WORDS: TensorScheme(**int4), "dense.weight": TensorScheme(**int4), **_qkv(int4)},
        "int4 by block": {
            WORDS: TensorScheme(**int4),
            "dense.weight": TensorScheme(**int4, activation="dynamic_block"),
        },
        "int4 asymmetric": {
            WORDS: TensorScheme(bits=4, group_size=64, symmetric=False),
            "dense.weight": TensorScheme(bits=4, group_size=64, symmetric=False),
            **_qkv({"bits": 4, "group_size": 128, "symmetric": False}),
        },
        "int4 per row": {WORDS: TensorScheme(bits=4), "dense.weight": TensorScheme(bits=4)},
    }


def _qkv(scheme: dict[str, Any]) -> dict[str, TensorScheme]:
    return {f"self.{n}.weight": TensorScheme(**scheme) for n in ("query", "key", "value")}


# --- independent readers -------------------------------------------------------------------------


def stored_in_checkpoint(folder: Path) -> dict[str, Triple]:
    """The quantized weights of a compressed-tensors folder."""
    file = folder / "model.safetensors"
    tensors = {
        n: t.float().numpy()
        for n, t in safetensors.torch.load_file(file).items()
        if n.endswith("_scale")
    }  # bf16, which numpy lacks
    tensors |= _integers(file)
    found = {}
    for name, scheme in read_manifest(folder).schemes.items():
        zeros = tensors.get(f"{name}_zero_point")
        scales = tensors[f"{name}_scale"]
        if scheme.bits == 8:
            q = tensors[name]
        else:
            rows, columns = tensors[f"{name}_shape"]
            q = _nibbles(tensors[f"{name}_packed"])[:, :columns]
            zeros = None if zeros is None else _nibbles(zeros.T).T[:rows]
        found[name.removeprefix("bert.")] = (q, scales, zeros)
    return found


def _integers(file: Path) -> dict[str, Array]:
    loaded = safetensors.torch.load_file(file)
    return {n: t.numpy() for n, t in loaded.items() if not t.is_floating_point()}


def _nibbles(packed: Array) -> Array:
    """int32 [N, K / 8] -> int8 [N, K]: 8 values each, lowest bits first, stored with offset 8."""
    parts = [(packed.astype(np.int64) >> (4 * i)) & 15 for i in range(8)]
    return (np.stack(parts, axis=-1).reshape(len(packed), -1) - 8).astype(np.int8)


def read_onnx(file: Path) -> dict[str, Triple]:
    """The quantized weights of an ONNX file, by the names of its initializers."""
    graph = onnx.load(str(file)).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:  # a table that is the head too is read in the head's shape
        if node.op_type == "Reshape" and all(name in values for name in node.input):
            dimensions = values[node.input[1]]
            values[node.output[0]] = values[node.input[0]].reshape(dimensions)
    found: dict[str, Triple] = {}
    for node in graph.node:
        attributes = {a.name: a.i for a in node.attribute}
        at = dict(enumerate(node.input))
        if node.op_type == "DynamicQuantizeMatMul":
            triple = _columns(values, at[1], at[2], at.get(3, ""))
        elif node.op_type == "MatMulNBits":
            shape = (attributes["N"], attributes["K"])
            triple = _blocks(values, attributes["bits"], shape, at[1], at[2], at.get(3, ""))
        elif node.op_type == "GatherBlockQuantized":
            bits, table = attributes["bits"], values[at[0]]
            shape = (len(table), table.shape[1] * 8 // bits)
            triple = _blocks(values, bits, shape, at[0], at[2], at.get(3, ""))
        elif node.op_type == "Gather" and values.get(at[0], np.zeros(0)).dtype == np.int8:
            if at[0].endswith("zero_points"):
                continue
            base = at[0].removesuffix(".weight")
            zeros = values.get(f"{base}.zero_points")
            triple = (values[at[0]], values[f"{base}.scales"], zeros)
        else:
            continue
        name = at[0] if "Gather" in node.op_type else at[1]
        layers = name.removesuffix(".weight").split("|")
        if len(triple[0]) % len(layers):  # not as many keys and values as queries: left together
            found[name] = triple
            continue
        for index, layer in enumerate(layers):
            found[f"{layer}.weight"] = tuple(  # type: ignore[assignment]
                None if part is None else np.split(part, len(layers))[index] for part in triple
            )
    return found


def _columns(values: dict[str, Array], weight: str, scales: str, zeros: str) -> Triple:
    return (
        values[weight].T,
        values[scales][:, None],
        values[zeros][:, None] if zeros else None,
    )


def _blocks(
    values: dict[str, Array], bits: int, shape: tuple[int, int], weight: str, scale: str, zero: str
) -> Triple:
    rows, columns = shape
    scales = values[scale].reshape(rows, -1)
    q = _bytes(values[weight].reshape(rows, -1), bits)[:, :columns]
    zeros = _bytes(values[zero].reshape(rows, -1), bits)[:, : scales.shape[1]] if zero else None
    return q, scales, zeros


def _bytes(packed: Array, bits: int) -> Array:
    """uint8 -> int8; 4 bits: low nibble first. Stored from 0, so the middle is taken off."""
    if bits == 8:
        return (packed.astype(np.int16) - 128).astype(np.int8)
    pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return (pairs.astype(np.int16) - 8).astype(np.int8)


_GGUF_NAMES = {
    "token_embd": "embeddings.word_embeddings",
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "cls": "pooler.dense",
    "cls.output": "classifier",
}


def read_gguf(file: Path) -> dict[str, Triple]:
    """The quantized weights of a GGUF file of BERT."""
    found: dict[str, Triple] = {}
    for tensor in gguf.GGUFReader(str(file)).tensors:
        size = {"Q8_0": 34, "Q4_0": 18}.get(tensor.tensor_type.name)
        if size is None:
            continue
        base, layer = tensor.name.removesuffix(".weight"), ""
        if base.startswith("blk."):
            _, number, base = base.split(".", 2)
            layer = f"encoder.layer.{number}."
        q, scales = quantized_rows(np.array(tensor.data), size)
        found[f"{layer}{_GGUF_NAMES[base]}.weight"] = (q, scales, None)
    return found


def read_litert(file: Path) -> dict[str, Triple]:
    """The quantized weights of a .tflite file; all are symmetric."""
    return {name: (w.q, w.scales, None) for name, w in read_weights(file).items()}


def read_coreml(package: Path) -> dict[str, Triple]:
    """The quantized weights of a Core ML package; its names have "_" for "."."""
    found = coreml_file.read_weights(package)
    return {name: (w.q, w.scales, w.zeros) for name, w in found.items()}


def read_executorch(file: Path) -> dict[str, Triple]:
    """The quantized weights of a .pte file of BERT."""
    found = executorch_file.read_weights(file)
    return {name: (w.q, w.scales, w.zeros) for name, w in found.items()}


READERS: dict[str, Callable[[Path], dict[str, Triple]]] = {
    "coreml": read_coreml,
    "executorch": read_executorch,
    "gguf": read_gguf,
    "litert": read_litert,
    "onnx": read_onnx,
}
# What a target's format has no place for, or its runtime would compute wrongly: part of the reason
# that it gives.
REFUSED = {
    ("executorch", "int8 asymmetric"): "zero points",
    ("executorch", "int4"): "INT4 with float activations",
    ("executorch", "int4 asymmetric"): "zero points",
    ("executorch", "int4 per row"): "INT4 with float activations",
    ("gguf", "int8 asymmetric"): "zero points",
    ("gguf", "int8 asymmetric, exact"): "zero points",
    ("gguf", "int4 asymmetric"): "zero points",
    ("litert", "int8 asymmetric"): "zero points",
    ("litert", "int8 asymmetric, exact"): "zero points",
    ("litert", "int4 asymmetric"): "zero points",
    ("litert", "int4"): "INT4 by group with float activations",
}
# The model that is exported: llama.cpp classifies by the first token only; lowering to ExecuTorch
# takes seconds for each layer.
MODELS: dict[str, dict[str, Any]] = {
    "executorch": {"num_layers": 1, "activation": "relu", "pooling": "cls", "pooler": True},
    "gguf": {"pooling": "cls", "pooler": True},
}
# What a target does as with another form: ExecuTorch rounds inputs per token, whatever the blocks.
ALIKE = {("executorch", "int8 by block")}
PACKAGES = {"coreml": "coremltools", "executorch": "executorch", "litert": "ai_edge_litert"}


def differences(wanted: dict[str, Triple], found: dict[str, Triple]) -> list[str]:
    """Names of weights whose integers, scales or zero points are not the same."""
    assert wanted.keys() == found.keys()
    different = []
    for name, (q, scales, zeros) in wanted.items():
        q2, scales2, zeros2 = found[name]
        groups = scales2.shape[1]  # a target may repeat a scale for each of its own blocks
        same = np.array_equal(q, q2) and np.array_equal(_repeat(scales, groups), scales2)
        same &= (zeros is None) == (zeros2 is None)
        if zeros is not None and zeros2 is not None:
            same &= np.array_equal(_repeat(zeros, groups), zeros2)
        if not same:
            different.append(name)
    return different


def underscored(weights: dict[str, Triple]) -> dict[str, Triple]:
    """With names as Core ML allows them."""
    return {name.replace(".", "_"): triple for name, triple in weights.items()}


def _repeat(values: Array, groups: int) -> Array:
    return np.repeat(values, groups // values.shape[1], axis=1)


# --- the promises --------------------------------------------------------------------------------


def test_every_target_has_an_independent_reader() -> None:
    assert sorted(READERS) == registry.names("targets")


@pytest.mark.parametrize(
    ("target", "form"), [(t, f) for f in _forms() for t in READERS if (t, f) not in ALIKE]
)
def test_the_file_holds_the_checkpoints_integers(target: str, form: str, tmp_path: Path) -> None:
    if target in PACKAGES:
        pytest.importorskip(PACKAGES[target], reason=f"needs the extra '{target}'")
    model = save_tiny(tmp_path / "ckpt", **MODELS.get(target, {}))
    folder = quantize_weights(model, _forms()[form])
    result = export(folder, [target], tmp_path / "out").targets[0]
    if reason := REFUSED.get((target, form)):
        assert (result.ok, result.exit_code) == (False, 2)
        assert reason in (result.error or "")
        return
    assert result.ok, result.error
    manifest = read_export(tmp_path / "out" / target)
    check_files(tmp_path / "out" / target, manifest)
    file = tmp_path / "out" / target / manifest.model_file
    wanted = stored_in_checkpoint(folder)
    if target == "coreml":
        wanted = underscored(wanted)
    assert len(wanted) >= 3
    assert differences(wanted, READERS[target](file)) == []
    if target == "executorch":  # the same file once more: lowering takes seconds
        name = "encoder.layer.0.output.dense.weight"
        executorch_file.flip(file, name, 1234)
        assert differences(wanted, read_executorch(file)) == [name]


@pytest.mark.parametrize("form", ["int8", "int4 by block"])
def test_one_changed_integer_is_found_in_litert(form: str, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra 'litert'")
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), _forms()[form])
    assert export(folder, ["litert"], tmp_path / "out").targets[0].ok
    file, name = tmp_path / "out/litert/model.tflite", "encoder.layer.1.output.dense.weight"
    flip(file, name, 1234)
    assert differences(stored_in_checkpoint(folder), read_litert(file)) == [name]


@pytest.mark.parametrize("form", ["int8", "int4", "int4 asymmetric"])
def test_one_changed_integer_is_found_in_coreml(form: str, tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="needs the extra 'coreml'")
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), _forms()[form])
    assert export(folder, ["coreml"], tmp_path / "out").targets[0].ok
    package, name = tmp_path / "out/coreml/model.mlpackage", "encoder_layer_1_output_dense_weight"
    coreml_file.flip(package, name, 1234)
    wanted = underscored(stored_in_checkpoint(folder))
    assert differences(wanted, read_coreml(package)) == [name]


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_one_changed_integer_is_found(form: str, tmp_path: Path) -> None:
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), _forms()[form])
    assert export(folder, ["onnx"], tmp_path / "out").targets[0].ok
    file = tmp_path / "out" / "onnx" / read_export(tmp_path / "out" / "onnx").model_file
    model = onnx.load(str(file))
    name = "encoder.layer.1.output.dense.weight"
    tensor = next(t for t in model.graph.initializer if t.name == name)
    raw = bytearray(tensor.raw_data)
    raw[1234] ^= 1
    tensor.raw_data = bytes(raw)
    onnx.save(model, str(file))
    assert differences(stored_in_checkpoint(folder), read_onnx(file)) == [name]


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_one_changed_integer_of_a_gguf_file_is_found(form: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "ckpt", **MODELS["gguf"])
    folder = quantize_weights(model, _forms()[form])
    assert export(folder, ["gguf"], tmp_path / "out").targets[0].ok
    file = tmp_path / "out" / "gguf" / "model.gguf"
    tensor = next(
        t for t in gguf.GGUFReader(str(file)).tensors if t.name == "blk.1.ffn_down.weight"
    )
    raw = bytearray(file.read_bytes())
    raw[int(tensor.data_offset) + 34 * 18 + 5] ^= 1  # no scale's byte in either type
    file.write_bytes(raw)
    wanted = stored_in_checkpoint(folder)
    assert differences(wanted, read_gguf(file)) == ["encoder.layer.1.output.dense.weight"]
