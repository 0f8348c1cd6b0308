"""methods/qat: without steps the bytes of post-training quantization; trained as it is deployed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from killed_distill import KILLED
from onnx import TensorProto, helper
from tiny_encoder import quantize_weights, save_tiny

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import DataOptions, EncoderSession, ExportOptions, RunOptions
from pocketglm.errors import UnsupportedError
from pocketglm.ops.affine import quantize
from pocketglm.ops.fake_quant import fake_quant_dynamic
from pocketglm.ops.fake_weight import FakeWeight
from pocketglm.ops.stored import read_weight
from pocketglm.runtimes import open_encoder
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan, PlanStep
from pocketglm.text.tokenizer import Tokenizer

QUICK: dict[str, Any] = {"rows": 32, "batch_size": 16, "learning_rate": 1e-3, "precision": "fp32"}
WORDS = ["abc", "bcd", "cab", "dab", "fig", "hij"]
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "tiny", max_length=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    """The label is the number of the first word, modulo 3."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 96), ("validation", 32)):
        numbers = rng.integers(len(WORDS), size=(count, 4))
        rows = [
            {"text": " ".join(WORDS[n] for n in row), "label": f"label {row[0] % 3}"}
            for row in numbers
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return DataOptions(folder)


def run(
    method: str, source: Path, out: Path, data: DataOptions, seed: int = 0, **settings: Any
) -> Checkpoint:
    step = Plan.single(method, settings).steps[0]
    compress(source, Plan((PlanStep(method, step.config),), seed), out, data=data)
    return Checkpoint.open(out)


def tensors(ckpt: Checkpoint) -> dict[str, np.ndarray[Any, Any]]:
    return {name: ckpt.read(name) for name in ckpt.tensors}


def same(a: Checkpoint, b: Checkpoint) -> bool:
    ours, theirs = tensors(a), tensors(b)
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], theirs[name]) for name in ours
    )


SETTINGS: list[dict[str, Any]] = [
    {},
    {"calibrator": "entropy", "symmetric_inputs": True, "embeddings": 8, "head": 8},
    {"smoothquant": 0.5, "float_layers": 1, "embeddings": 4, "search": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "all", "smooth"])
def test_no_steps_give_the_bytes_of_quantize_static(
    settings: dict[str, Any], source: Path, data: DataOptions, tmp_path: Path
) -> None:
    ours = run("qat", source, tmp_path / "qat", data, epochs=0, rows=32, **settings)
    theirs = run("quantize_static", source, tmp_path / "ptq", data, rows=32, **settings)
    assert same(ours, theirs)
    assert ours.manifest.schemes == theirs.manifest.schemes
    assert (tmp_path / "qat" / "config.json").read_bytes() == (
        tmp_path / "ptq" / "config.json"
    ).read_bytes()


def test_no_steps_with_dynamic_inputs_give_the_bytes_of_quantize_rtn(
    source: Path, data: DataOptions, tmp_path: Path
) -> None:
    both: dict[str, Any] = {"embeddings": 8, "head": 8}
    ours = run("qat", source, tmp_path / "q", data, epochs=0, activation="dynamic_tensor", **both)
    theirs = run("quantize_rtn", source, tmp_path / "r", data, bits=8, **both)
    assert same(ours, theirs)
    assert ours.manifest.schemes == theirs.manifest.schemes


@pytest.mark.parametrize("settings", [{"bits": 4, "embeddings": 8}, {"group_size": 32, "head": 8}])
def test_other_forms_are_those_of_quantize_rtn(
    settings: dict[str, Any], source: Path, data: DataOptions, tmp_path: Path
) -> None:
    """INT4, and inputs by block: without steps its bytes; trained, better, and exported."""
    ours = run("qat", source, tmp_path / "q", data, epochs=0, **settings)
    theirs = run("quantize_rtn", source, tmp_path / "r", data, **settings)
    assert same(ours, theirs)
    assert ours.manifest.schemes == theirs.manifest.schemes
    more = {**QUICK, "scales": "learned", "epochs": 12, "patience": 12}
    after = run("qat", source, tmp_path / "l", data, **more, **settings)
    scores = [c.manifest.lineage[-1].effect["validation_accuracy"] for c in (ours, after)]
    assert scores[1] > max(scores[0], 0.7)
    (result,) = export(after.path, ["onnx"], tmp_path / "out", options=ExportOptions()).targets
    assert result.ok, result.error


@pytest.mark.parametrize("activation", ["static", "dynamic_tensor"])
def test_the_stored_model_learns_and_its_grids_stay(
    activation: str, source: Path, data: DataOptions, tmp_path: Path
) -> None:
    """The score of the files rises; scales and grids are those of the first weights."""
    settings = {**QUICK, "activation": activation, "head": 8}
    before = run("qat", source, tmp_path / "a", data, **settings, epochs=0)
    after = run("qat", source, tmp_path / "b", data, **settings, epochs=15, patience=15)
    scores = [c.manifest.lineage[-1].effect["validation_accuracy"] for c in (before, after)]
    assert scores[1] > max(scores[0], 0.8)
    old, new = tensors(before), tensors(after)
    fixed = [name for name in old if name.endswith(("_scale", "zero_point"))]
    assert fixed
    assert all(np.array_equal(old[name], new[name]) for name in fixed)
    moved = np.mean(old[QUERY] != new[QUERY])
    assert moved > 0.2


def test_the_runtime_computes_what_was_trained(
    source: Path, data: DataOptions, tmp_path: Path
) -> None:
    ckpt = run("qat", source, tmp_path / "q", data, **QUICK, epochs=2, head=8)
    (result,) = export(ckpt.path, ["onnx"], tmp_path / "out", options=ExportOptions()).targets
    assert result.ok, result.error
    encoded = Tokenizer.load(ckpt.path).encode(["abc bcd", "fig", "hij dab cab abc"], 32)
    logits = []
    for folder in (ckpt.path, tmp_path / "out" / "onnx"):
        session: EncoderSession = open_encoder(folder, RunOptions(threads=1))
        logits.append(session.logits(encoded.ids, encoded.mask))
        session.close()
    assert np.abs(logits[0] - logits[1]).max() < 0.1 * logits[0].std()


def test_a_teacher_may_help(source: Path, data: DataOptions, tmp_path: Path) -> None:
    """With its term alone the answers stay near the teacher's; the labels draw them away."""
    texts = ["abc bcd", "fig", "hij dab cab abc", "cab cab"]
    encoded = Tokenizer.load(source).encode(texts, 32)

    def answers(folder: Path) -> torch.Tensor:
        session: EncoderSession = open_encoder(folder, RunOptions(threads=1))
        logits = session.logits(encoded.ids, encoded.mask)
        session.close()
        return torch.from_numpy(logits).log_softmax(-1)

    teacher = answers(source)
    distances = []
    for alpha in (0.0, 1.0):
        settings = {**QUICK, "preset": "soft", "alpha": alpha, "epochs": 4, "patience": 4}
        ckpt = run("qat", source, tmp_path / f"{alpha}", data, **settings)
        found = answers(ckpt.path)
        distances.append(float((teacher.exp() * (teacher - found)).sum(-1).mean()))
    assert distances[1] < 0.3 * distances[0]


def test_kill_9_and_the_same_command_give_the_same_bytes(
    source: Path, data: DataOptions, tmp_path: Path
) -> None:
    settings = {**QUICK, "epochs": 4, "patience": 9, "preset": "soft", "augment": 1, "dropout": 0.1}
    arguments = [source, tmp_path / "a", data.path, json.dumps(settings), "train", "qat"]
    environment = os.environ | {"POCKETGLM_CACHE": str(tmp_path / "cache-a")}
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    killed = subprocess.run(command, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "cache-a").rglob("training.pt")), "nothing to go on from"
    for out in "ab":
        cache = tmp_path / f"cache-{out}"
        compress(source, Plan.single("qat", settings), tmp_path / out, data=data, cache=cache)
    a, b = (Checkpoint.open(tmp_path / out) for out in "ab")
    assert a.digest() == b.digest()


# --- the parts -----------------------------------------------------------------------------------


def test_dynamic_inputs_are_onnx_runtimes() -> None:
    """Each row as DynamicQuantizeLinear, then DequantizeLinear, of that row alone."""
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    back = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = helper.make_graph([node, back], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
    x[1] = x[1].abs()
    x[2] = -x[2].abs() * 100
    x[3] = 0
    found = fake_quant_dynamic(x)
    for row, ours in zip(x, found, strict=True):
        (theirs,) = session.run(None, {"x": row.numpy()})
        assert np.abs(theirs - ours.numpy()).max() <= 1e-5 * max(1.0, float(row.abs().max()))
    leaf = x.clone().requires_grad_()
    fake_quant_dynamic(leaf).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones_like(x))


def test_a_fake_weight_is_the_packed_one() -> None:
    scheme = TensorScheme(bits=8)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    q, scales, zeros = quantize(weight, scheme)
    found = FakeWeight(scheme, scales, zeros)(weight)
    assert torch.equal(found, q * scales)
    grown = FakeWeight(scheme, scales, zeros)(weight * 3)  # the scales do not follow
    assert float((grown / scales).abs().max()) == 127


# --- refusals ------------------------------------------------------------------------------------


def test_refused_before_any_work(source: Path, data: DataOptions, tmp_path: Path) -> None:
    for folder, change, reason in (
        ("labels", {"num_labels": 4}, "other labels than the model: 'label 3'"),
        ("plain", {"num_labels": 0, "head": "embedding"}, "train it first"),
    ):
        other = save_tiny(tmp_path / folder, **change)
        with pytest.raises(UnsupportedError, match=reason):
            run("qat", other, tmp_path / "out", data)
    integers = save_tiny(tmp_path / "integers")
    quantize_weights(integers, {"query.weight": TensorScheme(bits=8)})
    with pytest.raises(UnsupportedError, match="already quantized"):
        run("qat", integers, tmp_path / "out", data)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"float_layers": 99}, "layers to quantize"),
        ({"head": 4}, "the head is 8 bits or float"),
        ({"bits": 4, "activation": "static"}, "static inputs are for encoders in INT8 by row"),
        ({"bits": 4, "smoothquant": 0.5}, "need inputs that are looked at"),
        ({"bits": 4, "max_length": 9}, "are for decoders: leave them out"),
    ]
    for settings, reason in refused:
        with pytest.raises(UnsupportedError, match=reason):
            run("qat", source, tmp_path / "out", data, **settings)
    assert not (tmp_path / "out").exists()


def test_weights_are_finite_in_the_end(source: Path, data: DataOptions, tmp_path: Path) -> None:
    ckpt = run("qat", source, tmp_path / "q", data, **QUICK, epochs=1)
    assert all(read_weight(ckpt, n).isfinite().all() for n in ckpt.manifest.schemes)
