"""The Core ML target for encoders: every form and deployment target holds the checkpoint's integers
and computes what it does; a package that is not what it should be is not kept.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from coreml_file import REASON, flip, functions_of, model_of, read_weights
from tiny_encoder import quantize_weights, save_tiny

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import ExportManifest, check_files, read_export
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.cli._main import main
from pocketglm.contracts import (
    ComputeUnits,
    ExportOptions,
    Floats,
    Ids,
    RunOptions,
    Silent,
    Target,
    Tolerance,
)
from pocketglm.errors import ParityError
from pocketglm.model.hf import load_encoder
from pocketglm.ops.stored import read_quantized
from pocketglm.runtimes import open_encoder
from pocketglm.runtimes._coreml_eval import Evaluator, Precision
from pocketglm.runtimes._coreml_file import read_package
from pocketglm.stages._parity import check_parity
from pocketglm.stages.export import export
from pocketglm.targets import _coreml_check as gate
from pocketglm.targets._coreml_form import Form
from pocketglm.targets._coreml_graph import Graph
from pocketglm.targets._coreml_package import write_package
from pocketglm.targets._litert_weights import Weights

pytest.importorskip("coremltools", reason=REASON)

TARGET: Target = registry.load("targets", "coreml")
IDS: Ids = np.random.default_rng(0).integers(5, 57, (3, 9))
MASK: Ids = np.array([[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7])
WORDS, QUERY = "word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"
UNITS: tuple[ComputeUnits, ...] = ("cpuAndNeuralEngine", "cpuAndGPU")


def linears(**scheme: Any) -> dict[str, TensorScheme]:
    """A scheme for all linear layers of the body."""
    names = ("query", "key", "value", "dense")
    return {f".{name}.weight": TensorScheme(**scheme) for name in names}


def expected(folder: Path) -> Floats:
    """The checkpoint in PyTorch, weights dequantized, activations in float."""
    with torch.inference_mode():
        model = load_encoder(Checkpoint.open(folder))
        result: Floats = model(torch.from_numpy(IDS), torch.from_numpy(MASK)).numpy()
    return result


def exported(folder: Path, out: Path, **options: Any) -> tuple[Path, ExportManifest]:
    entry = export(folder, ["coreml"], out, options=ExportOptions(**options)).targets[0]
    assert entry.ok, entry.error
    return out / "coreml", read_export(out / "coreml")


def worst(folder: Path, out: Path, *, half: bool) -> float:
    """The greatest difference of the evaluator's outputs, as a share of the greatest output."""
    session = open_encoder(out, RunOptions(optimize=half))
    wanted = expected(folder)
    difference = np.abs(session.logits(IDS, MASK) - wanted).max() / max(1.0, np.abs(wanted).max())
    session.close()
    return float(difference)


HEADS: dict[str, dict[str, Any]] = {
    "mean classifier": {},
    "cls classifier with pooler": {"pooling": "cls", "pooler": True, "activation": "gelu_new"},
    "mean embedding": {"head": "embedding", "num_labels": 0, "activation": "relu"},
    "cls embedding": {"head": "embedding", "num_labels": 0, "pooling": "cls", "pooler": True},
    "unequal, factorized": {
        "layer_heads": (4, 1),
        "layer_ffn": (256, 64),
        "head_dim": 32,
        "layer_ranks": ((("ffn.up", 16),), (("attention.query", 8),)),
    },
}


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str, units: Any, tmp_path: Path) -> None:
    """fp16 values; parity in export compares block by block and the whole."""
    folder = save_tiny(tmp_path / "ckpt", **HEADS[head])
    out, manifest = exported(folder, tmp_path / "out", compute_units=units)
    assert (manifest.precision, manifest.floats) == ("fp16", "fp16")
    assert manifest.minimum == {"iOS": "15", "macOS": "12"}
    assert list(manifest.parity.blocks) == ["embeddings", "block.0", "block.1", "head"]
    assert max(manifest.parity.blocks.values()) < 5e-4
    assert worst(folder, out, half=True) < 5e-3
    (operators,) = functions_of(out / manifest.model_file).values()
    kinds = {operator.type for operator in operators}
    assert ("conv" in kinds, "linear" in kinds) == (units == UNITS[0], units == UNITS[1])


def test_float32_is_exact(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "ckpt")
    out, manifest = exported(folder, tmp_path / "out", compute_precision="float32")
    assert (manifest.precision, manifest.parity.output_max_abs < 2e-5) == ("fp32", True)
    assert json.loads((out / "compute.json").read_text())["compute_units"] == "cpuAndGPU"


def test_shapes(tmp_path: Path) -> None:
    """The Neural Engine's are fixed, the others' flexible; ids are integers."""
    folder = save_tiny(tmp_path / "ckpt")
    for units, ranges in zip(UNITS, (0, 2), strict=True):
        out, manifest = exported(
            folder, tmp_path / units, compute_units=units, max_length=20, deployment="iOS17"
        )
        for port in model_of(out / manifest.model_file).description.input:
            array = port.type.multiArrayType
            assert array.dataType == 0x20000 | 32  # int32
            assert list(array.shape) == [1, 20]
            assert len(array.shapeRange.sizeRanges) == ranges
        told = json.loads((out / "compute.json").read_text())["functions"]["main"]["inputs"]
        assert [port["shape"] for port in told] == [[1, [1, 20] if ranges else 20]] * 2
        session = open_encoder(out)
        assert session.logits(IDS, MASK).shape == (3, 3)
        assert session.info.max_length == 20


# form -> schemes, the first iOS
FORMS: dict[str, tuple[dict[str, TensorScheme], int]] = {
    "int8": ({WORDS: TensorScheme(bits=8), **linears(bits=8)}, 16),
    "int8 asymmetric": (linears(bits=8, symmetric=False), 16),
    "int8 with dynamic inputs": (linears(bits=8, activation="dynamic_tensor"), 16),
    "static": ({WORDS: TensorScheme(bits=8), **linears(bits=8, activation="static")}, 17),
    "int4 by 32": (
        {
            WORDS: TensorScheme(bits=4, group_size=32),
            **linears(bits=4, group_size=32, activation="dynamic_block"),
        },
        18,
    ),
    "int4 asymmetric": (linears(bits=4, group_size=64, symmetric=False), 18),
    "int4 per row": ({WORDS: TensorScheme(bits=4), **linears(bits=4)}, 18),
}


@pytest.mark.parametrize("form", FORMS)
def test_quantized_forms(form: str, tmp_path: Path) -> None:
    """The oldest target that has the form is the default, and each newer one holds the same; in
    both layouts by turns.
    """
    schemes, first = FORMS[form]
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), schemes)
    ckpt = Checkpoint.open(folder)
    for ios in range(15, 19):
        units = UNITS[(ios + list(FORMS).index(form)) % 2]
        options = ExportOptions(deployment=f"iOS{ios}", compute_units=units)
        if ios < first:
            *_, reason = TARGET.supports(ckpt, options)
            assert f"needs iOS{first}, not iOS{ios}: the nearest that works is iOS{first}" in reason
            continue
        chosen = {} if ios == first else {"deployment": f"iOS{ios}"}
        out, manifest = exported(folder, tmp_path / f"{ios}", compute_units=units, **chosen)
        assert manifest.minimum["iOS"] == str(ios)
        assert model_of(out / manifest.model_file).specificationVersion == ios - 9
        assert manifest.activation == ("static" if form == "static" else "none")
        assert max(manifest.parity.blocks.values()) < 5e-4
        if form != "static":
            assert worst(folder, out, half=True) < 5e-3
            assert worst(folder, out, half=False) < 1e-3
        weights = out / manifest.model_file / "Data/com.apple.CoreML/weights/weight.bin"
        assert 0.88 < sum(manifest.parameters.values()) / weights.stat().st_size < 1
        found = read_weights(out / manifest.model_file)
        for name in ckpt.manifest.schemes:
            part = read_quantized(ckpt, name)
            stored = found.pop(name.removeprefix("bert.").replace(".", "_"))
            zeros = None if part.zero_points is None else part.zero_points.numpy()
            assert np.array_equal(stored.q, part.q.numpy()), name
            assert np.array_equal(stored.scales, part.scales.numpy()), name
            if zeros is None or stored.zeros is None:
                assert zeros is stored.zeros, name
            else:
                assert np.array_equal(stored.zeros, zeros), name
        assert not found


def test_static_inputs_are_rounded_on_the_checkpoints_grid(tmp_path: Path) -> None:
    schemes = linears(bits=8, activation="static")
    out, manifest = exported(
        quantize_weights(save_tiny(tmp_path / "ckpt"), schemes), tmp_path / "out"
    )
    # Query, key and value share their input: 4 a layer, in 2 layers.
    assert manifest.operators["quantize"] == manifest.operators["dequantize"] == 8
    advice = json.loads((out / "compute.json").read_text())
    assert "faster" in advice["chips"]["A17 Pro"]["because"]
    assert "not time" in advice["chips"]["A12"]["because"]


IDENTITY = {"int8": 16, "int4": 18, "int4 by 32": 18}


@pytest.mark.parametrize("layout", ["channels", "rows"])
@pytest.mark.parametrize("form", IDENTITY)
def test_the_identity_matrix_gives_the_weight(form: str, layout: Any, tmp_path: Path) -> None:
    """What a layer gives for 0s and a 1 is the weight that is really used."""
    scheme = TensorScheme(bits=int(form[3]), group_size=32 if "by" in form else None)
    ckpt = Checkpoint.open(
        quantize_weights(save_tiny(tmp_path / "ckpt"), {".query.weight": scheme})
    )
    made = Form(IDENTITY[form], layout, "cpuOnly", half=True, why="")
    graph = Graph(made, Weights(ckpt), {"ids": (1, 128)})
    with graph as g:
        rows = g.b.one_hot(indices=g.input("ids"), one_hot_vector_size=128)
        x = g.b.cast(x=rows, dtype="fp16")
        if made.channels:
            x = g.b.expand_dims(x=g.b.transpose(x=x, perm=[0, 2, 1]), axes=[2])
        y = g.linear(x, "blocks.0.attention.query", bias=False)
        g.function.set_outputs([g.b.cast(x=y, dtype="fp32", name="y")])
    write_package(tmp_path / "one.mlpackage", {"main": graph}, "main", "identity")
    weight = read_quantized(ckpt, f"bert.{QUERY}").dequantized().numpy().T
    precisions: tuple[tuple[Precision, Any], ...] = (
        ("float32", np.float32),
        ("float16", np.float16),
    )
    for precision, kind in precisions:
        evaluator = Evaluator(read_package(tmp_path / "one.mlpackage"), None, precision)
        found = evaluator.run({"ids": np.arange(128, dtype=np.int32)[None]})["y"][0]
        found = found[:, 0].T if made.channels else found
        assert np.array_equal(found, weight.astype(kind).astype(np.float32))


def test_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), linears(bits=8))
    first = exported(folder, tmp_path / "a")[1]
    # A placement builds the graph, too.
    second = exported(folder, tmp_path / "b", device="iphone-15-pro")[1]
    assert first.files == second.files
    inside = {name.partition("/")[2] for name in first.files if name.startswith("model.mlpackage")}
    assert "Data/com.apple.CoreML/weights/weight.bin" in inside
    notes = model_of(tmp_path / "a/coreml/model.mlpackage").description.metadata.userDefined
    assert not any("date" in key for key in notes)


def test_opening_it_in_coremltools_changes_no_byte(tmp_path: Path) -> None:
    """coremltools writes Manifest.json again when it opens a package."""
    _, manifest = exported(save_tiny(tmp_path / "ckpt"), tmp_path / "out")
    folder = tmp_path / "out/coreml"
    tools = pytest.importorskip("coremltools")
    tools.models.MLModel(str(folder / manifest.model_file), skip_model_load=True)
    check_files(folder, manifest)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"deployment": "iOS14"}, "deployment target iOS14: offered are iOS15, iOS16"),
        (
            {"compute_precision": "float32", "compute_units": "cpuAndNeuralEngine"},
            "the Neural Engine computes in fp16",
        ),
        ({"max_memory": 1 << 20}, "--max-memory allows 1 MB"),
    ],
)
def test_refused_options(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    ckpt = Checkpoint.open(save_tiny(tmp_path / "ckpt"))
    (found,) = TARGET.supports(ckpt, ExportOptions(**options))
    assert reason in found


def test_scales_that_fp16_does_not_hold(tmp_path: Path) -> None:
    """The program computes in float32 then, and still holds them exactly."""
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), {".query.weight": TensorScheme(bits=8)})
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = f"bert.{QUERY}_scale"
    tensors[name] = tensors[name] * 2.0**-12
    safetensors.torch.save_file(tensors, file)
    ckpt = Checkpoint.open(folder)
    (reason,) = TARGET.supports(ckpt, ExportOptions(compute_precision="float16"))
    assert "scales that fp16 does not hold" in reason
    (reason,) = TARGET.supports(ckpt, ExportOptions(compute_units="cpuAndNeuralEngine"))
    assert "the Neural Engine computes in fp16" in reason
    out, manifest = exported(folder, tmp_path / "out")
    assert manifest.floats == "fp32"
    assert worst(folder, out, half=True) < 2e-5
    stored = read_weights(out / manifest.model_file)[QUERY.replace(".", "_")]
    assert np.array_equal(stored.scales, tensors[name].float().numpy())


def test_a_weight_beyond_fp16(tmp_path: Path) -> None:
    def large(model: Any) -> None:
        model.embeddings.norm.bias[3] = 1e5

    folder = save_tiny(tmp_path / "ckpt", change=large)
    entry = export(folder, ["coreml"], tmp_path / "out").targets[0]
    assert (entry.ok, entry.exit_code) == (False, 2)
    assert "it holds 1e+05, fp16 ends at 65504" in (entry.error or "")
    assert not (tmp_path / "out/coreml").exists()


# --- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["int8", "int4 by 32"])
def test_a_changed_integer_is_found(form: str, tmp_path: Path) -> None:
    folder = quantize_weights(save_tiny(tmp_path / "ckpt"), FORMS[form][0])
    out, manifest = exported(folder, tmp_path / "out")
    package, label = out / manifest.model_file, QUERY.replace(".", "_")
    ckpt, wanted = Checkpoint.open(folder), gate.Expected({}, frozenset(manifest.operators), False)
    gate.check_package(ckpt, package, wanted, {f"bert.{QUERY}": label})
    flip(package, label, 1234)
    with pytest.raises(ParityError, match="other integers, scales or zero points"):
        gate.check_package(ckpt, package, wanted, {f"bert.{QUERY}": label})


def test_a_missing_layer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that forgets the FFN is refused by its operators, before anything is computed."""
    product = Graph.linear

    def forgetful(self: Graph, x: Any, layer: str, **more: Any) -> Any:
        return x if layer == "blocks.1.attention.output" else product(self, x, layer, **more)

    monkeypatch.setattr(Graph, "linear", forgetful)
    entry = export(save_tiny(tmp_path / "ckpt"), ["coreml"], tmp_path / "out").targets[0]
    assert (entry.ok, entry.exit_code) == (False, 1)
    assert "has 12 operators conv, not 13" in (entry.error or "")
    assert not (tmp_path / "out/coreml").exists()


def test_a_wrong_connection_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators and integers are right; the block that computes something else is named."""
    product = Graph.linear

    def crossed(self: Graph, x: Any, layer: str, **more: Any) -> Any:
        return product(self, x, layer.replace("1.attention.key", "0.attention.key"), **more)

    monkeypatch.setattr(Graph, "linear", crossed)
    entry = export(save_tiny(tmp_path / "ckpt"), ["coreml"], tmp_path / "out").targets[0]
    assert (entry.ok, entry.exit_code) == (False, 1)
    assert "'block.1' of the written file differs from the checkpoint" in (entry.error or "")


def test_fp16_that_is_too_coarse(tmp_path: Path) -> None:
    """The hint names the way out."""
    folder = save_tiny(tmp_path / "ckpt")
    out, manifest = exported(folder, tmp_path / "out")
    strict = replace(TARGET, tolerance=Tolerance(part=1e-3, whole=1e-5))
    with pytest.raises(ParityError, match="the limit for fp16, activations none is") as error:
        check_parity(Checkpoint.open(folder), out, manifest, strict, Silent())
    assert "--compute-precision float32" in error.value.hint


def test_float_ids_are_found(tmp_path: Path) -> None:
    out, manifest = exported(save_tiny(tmp_path / "ckpt"), tmp_path / "out")
    function = read_package(out / manifest.model_file).function()
    port = function.inputs["input_ids"]
    wrong = replace(port, type=replace(port.type, dtype="fp16"))
    with pytest.raises(ParityError, match="ids beyond 2048 need int32"):
        gate._check_ports(replace(function, inputs={"input_ids": wrong}))


def test_what_is_said_while_exporting(tmp_path: Path) -> None:
    said: list[str] = []

    class Listener(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    options, folder = ExportOptions(compute_units="all"), save_tiny(tmp_path / "ckpt")
    (tmp_path / "out").mkdir()
    TARGET.lower(Checkpoint.open(folder), tmp_path / "out", options, Listener())
    assert said == [
        "Core ML for iOS15 (macOS 12) and newer, compute units all: a short text through all "
        "layers at once: least energy per answer"
    ]
    advice = json.loads((tmp_path / "out/compute.json").read_text())
    assert advice["tried"] is False
    assert advice["layout"]["name"] == "channels"
    assert {"A12", "A19"} <= advice["chips"].keys()
    assert advice["expected_on_the_cpu"]["operators"]["gather"] == 2


def test_options_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(save_tiny(tmp_path / "ckpt"))
    command = ["export", folder, "--target", "coreml", "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--deployment-target", "iOS14"])
    assert stop.value.code == 2
    assert "'iOS14' is not one of" in capsys.readouterr().err
    chosen = ["--deployment-target", "iOS17", "--compute-units", "cpuOnly"]
    with pytest.raises(SystemExit) as stop:
        main([*command, *chosen, "--compute-precision", "float32"])
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["targets"][0]["precision"] == "fp32"
    assert read_export(tmp_path / "out/coreml").minimum["iOS"] == "17"
    advice = json.loads((tmp_path / "out/coreml/compute.json").read_text())
    assert advice["chips"]["A12"]["compute_units"] == "cpuOnly"
