"""Core ML's graphs are those of the package, and what must not run on the Neural Engine or GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import quantize_weights, save_tiny
from tiny_export import save_wide

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.placement import Placement
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.checks import placement
from pocketglm.checks._rules import all_rules
from pocketglm.contracts import ComputeUnits, ExportOptions, Silent
from pocketglm.errors import PlacementError
from pocketglm.stages._placement import foresee

pytest.importorskip("coremltools", reason="needs the extra: pip install 'pocketglm[coreml]'")

INT4 = {"_proj.weight": TensorScheme(bits=4, group_size=32)}
STATIC = {"query.weight": TensorScheme(bits=8, activation="static")}


def placed(folder: Path, units: ComputeUnits | None = None) -> dict[tuple[str, str], Placement]:
    options = ExportOptions(max_length=32, compute_units=units)
    graphs = registry.load("targets", "coreml").graphs(Checkpoint.open(folder), options)
    found = registry.load("checks", "placement").run(graphs, "coreml", "iphone-15-pro")
    return {(entry.delegate, entry.graph): entry for entry in found}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_graphs_are_those_of_the_package(kind: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    if kind == "encoder":
        save_tiny(folder, num_layers=1)
        quantize_weights(folder, STATIC)
    else:
        save_wide(folder, "glm-wide", num_hidden_layers=1)
        quantize_weights(folder, INT4)
    ckpt, target = Checkpoint.open(folder), registry.load("targets", "coreml")
    options = ExportOptions(max_length=32)
    graphs = target.graphs(ckpt, options)
    written = target.lower(ckpt, out, options, Silent()).operators
    operators = [node.op for graph in graphs for node in graph.nodes]
    counts = {name: operators.count(name) for name in set(operators)}
    # The builder's update of a state is written as a write and a read.
    updates = counts.pop("coreml_update_state", 0)
    if updates:
        counts["write_state"] = updates
        counts["read_state"] += updates
    constant = {"const", "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale"}
    assert counts == {name: n for name, n in written.items() if name not in constant}
    known = set(all_rules()["coreml-gpu"].plain)
    assert sum(op in known for op in operators) > 0.9 * len(operators)


def test_look_ups_and_integers_stay_on_the_cpu(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    found = placed(tmp_path)
    engine = found["coreml-ane", "main"]
    assert engine.share == 1
    left = {rest.op: rest for rest in engine.left}
    assert left.keys() == {"gather", "cast", "expand_dims"}
    assert left["cast"].evidence == "inferred"
    gpu = found["coreml-gpu", "main"]  # a layout for the Neural Engine does not ask for the GPU
    assert gpu.judgement == "little"
    assert "--compute-units cpuAndGPU" in gpu.left[0].rewrite
    rows = placed(tmp_path, "cpuAndGPU")
    assert rows["coreml-gpu", "main"].share == 1
    assert {rest.op for rest in rows["coreml-gpu", "main"].left} >= {"gather", "shape"}


def test_a_decoder_is_not_for_the_neural_engine(tmp_path: Path) -> None:
    save_wide(tmp_path, "glm-wide")
    quantize_weights(tmp_path, INT4)
    entry = placed(tmp_path)["coreml-ane", "decode"]
    assert entry.taken == 0
    assert "cpuAndNeuralEngine" in entry.left[0].rewrite
    assert [part.part for part in entry.parts] == ["embeddings", "block.0", "block.1", "head"]
    options = ExportOptions(max_length=32, device="iphone-15-pro", delegate="npu")
    with pytest.raises(PlacementError, match="Neural Engine"):
        foresee(Checkpoint.open(tmp_path), "coreml", registry.load("targets", "coreml"), options)


@pytest.mark.parametrize(
    ("units", "refused"), [("cpuAndNeuralEngine", "npu"), ("cpuAndGPU", "gpu"), ("cpuOnly", "")]
)
def test_the_compute_units_name_the_delegate(
    units: Any, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --delegate: what takes little of the package is refused only if it is asked for."""
    save_tiny(tmp_path)
    ckpt, target = Checkpoint.open(tmp_path), registry.load("targets", "coreml")
    options = ExportOptions(device="iphone-15-pro", compute_units=units, max_length=16)
    assert {entry.judgement for entry in foresee(ckpt, "coreml", target, options)} >= {"little"}
    monkeypatch.setattr(placement, "LITTLE", 2.0)  # now each takes little
    if not refused:
        assert foresee(ckpt, "coreml", target, options)
        return
    title = {"npu": "Neural Engine", "gpu": "GPU"}[refused]
    with pytest.raises(PlacementError, match=f"{title} through Core ML"):
        foresee(ckpt, "coreml", target, options)
