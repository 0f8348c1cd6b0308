"""Placement: LiteRT's XNNPACK against the real interpreter, node by node, and every rule set with
something that must fall back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from litert_file import delegated
from tiny_encoder import quantize_weights, save_tiny
from tiny_export import save_wide
from tiny_structure import save_structure

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.graph import Graph, Node, Value
from pocketglm.artifacts.placement import Placement
from pocketglm.artifacts.schemas import ExportResult, TargetResult
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.checks._devices import delegates
from pocketglm.checks._partitions import pieces
from pocketglm.checks._rules import RULES, Range, all_rules, load_rules, refusal, scene_of
from pocketglm.checks.placement import assign, judge
from pocketglm.cli._main import main
from pocketglm.cli._placement import warn
from pocketglm.contracts import ExportOptions, Silent
from pocketglm.devices.profile import all_profiles
from pocketglm.errors import PlacementError, UnsupportedError, UsageError, WorkError
from pocketglm.stages._placement import _chosen, foresee, warnings
from pocketglm.stages.export import export

CHECK = registry.load("checks", "placement")


def int8(activation: str) -> TensorScheme:
    return TensorScheme(bits=8, activation=activation)


def int4(activation: str, group: int | None = None) -> TensorScheme:
    return TensorScheme(bits=4, group_size=group, activation=activation)


def encoder(folder: Path, schemes: dict[str, TensorScheme] | None = None, **over: Any) -> Path:
    save_tiny(folder, **over)
    return quantize_weights(folder, schemes) if schemes else folder


def decoder(folder: Path, name: str, schemes: dict[str, TensorScheme]) -> Path:
    save_wide(folder, name)
    return quantize_weights(folder, schemes) if schemes else folder


DYNAMIC = {"word_embeddings.weight": int8("none"), ".weight": int8("dynamic_token")}
STATIC = {"query.weight": int8("static"), "dense.weight": int8("static")}
WEIGHT_ONLY_INT4 = {"query.weight": int4("none"), "dense.weight": int4("none")}
# Part static, part INT4 with rounded inputs, part INT4 that XNNPACK leaves, the rest float.
MIXED = {
    "query.weight": int8("static"),
    "key.weight": int4("dynamic_block", 64),
    "value.weight": int4("none"),
    "output.dense.weight": int8("none"),
}
INT4 = {"_proj.weight": int4("dynamic_block", 32), "embed_tokens.weight": int8("none")}

MODELS: dict[str, Callable[[Path], Path]] = {
    "float32": encoder,
    "float32, relu": lambda folder: encoder(folder, activation="relu", pooling="cls", pooler=True),
    "embedding": lambda folder: encoder(folder, head="embedding", num_labels=0),
    "dynamic INT8": lambda folder: encoder(folder, DYNAMIC),
    "static INT8": lambda folder: encoder(folder, STATIC),
    "weight-only INT4": lambda folder: encoder(folder, WEIGHT_ONLY_INT4),
    "mixed": lambda folder: encoder(folder, MIXED),
    "INT4 decoder": lambda folder: decoder(folder, "glm-wide", INT4),
    "float decoder, four norms": lambda folder: decoder(folder, "glm4", {}),
    "top-k decoder": lambda folder: save_structure(folder, top_k=3, num_layers=2),
    "mixed decoder": lambda folder: decoder(
        folder, "qwen3", {"q_proj.weight": int4("none"), "up_proj.weight": int8("dynamic_token")}
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    return made


def graphs_of(folder: Path, target: str, **options: Any) -> list[Graph]:
    ckpt = Checkpoint.open(folder)
    graphs: list[Graph] = registry.load("targets", target).graphs(ckpt, ExportOptions(**options))
    return graphs


def placements(
    folder: Path, target: str, device: str, **options: Any
) -> dict[tuple[str, str], Placement]:
    found = CHECK.run(graphs_of(folder, target, **options), target, device)
    return {(entry.delegate, entry.graph): entry for entry in found}


# --- the real runtime ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_litert_and_xnnpack_do_what_was_predicted(name: str, folder: Path, tmp_path: Path) -> None:
    """Node by node, and in as many pieces, in every graph of the file."""
    MODELS[name](folder)
    options = ExportOptions(max_length=32)
    ckpt, target = Checkpoint.open(folder), registry.load("targets", "litert")
    predicted = target.graphs(ckpt, options)
    target.lower(ckpt, tmp_path, options, Silent())
    rules = all_rules()["litert-xnnpack"]
    for graph in predicted:
        operators, taken, count = delegated(tmp_path / "model.tflite", graph.name)
        assert [node.op for node in graph.nodes] == operators
        ours, left = assign(rules, graph, {})
        assert ours == taken
        assert ours | left.keys() == set(range(len(operators)))
        assert len(pieces(graph, ours)) == count


def test_the_models_differ_in_what_xnnpack_takes(folder: Path) -> None:
    """Some leave layers, with their reason; others leave nothing that multiplies."""
    encoder(folder, MIXED)
    mixed = placements(folder, "litert", "galaxy-a05")["litert-xnnpack", "serving_default"]
    assert 0.5 < mixed.share < 0.95
    assert mixed.judgement == "partial"
    first = mixed.left[0]
    assert first.op == "FULLY_CONNECTED"
    assert first.part == "block.0"
    assert first.count == 2
    assert first.first == "encoder.layer.0.attention.self.value.weight"
    assert "dynamic_block" in first.rewrite
    assert first.evidence == "measured"
    quantize_weights(folder, {"value.weight": int8("dynamic_token")})
    better = placements(folder, "litert", "galaxy-a05")["litert-xnnpack", "serving_default"]
    assert better.share == 1
    assert better.judgement == "good"
    assert all(rest.macs == 0 for rest in better.left)
    assert sum(part.nodes for part in better.parts) == better.nodes
    assert [part.part for part in better.parts] == ["embeddings", "block.0", "block.1", "head"]


@pytest.mark.parametrize(
    ("schemes", "opset"),
    [({}, None), ({}, 13), (DYNAMIC, None), (STATIC, None), (STATIC, 13)],
    ids=["float", "float 13", "dynamic", "static", "static 13"],
)
def test_onnx_graphs_are_those_of_the_file(
    schemes: dict[str, TensorScheme], opset: int | None, folder: Path, tmp_path: Path
) -> None:
    encoder(folder, schemes)
    ckpt, options = Checkpoint.open(folder), ExportOptions(opset=opset)
    target = registry.load("targets", "onnx")
    (graph,) = target.graphs(ckpt, options)
    lowered = target.lower(ckpt, tmp_path, options, Silent())
    operators = [node.op for node in graph.nodes]
    assert {name: operators.count(name) for name in sorted(set(operators))} == lowered.operators
    _same_values(graph, tmp_path / lowered.model_file)


def _same_values(graph: Graph, file: Path) -> None:
    """Types and shapes are those that onnx infers for the written file, where it can."""
    onnx = pytest.importorskip("onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(str(file), load_external_data=False))
    for info in [*model.graph.value_info, *model.graph.output]:
        kind = info.type.tensor_type
        value = graph.values[info.name]
        assert onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name == value.dtype
        if kind.HasField("shape"):
            shape = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
            assert len(shape) == len(value.shape), info.name
            for theirs, own in zip(shape, value.shape, strict=True):
                assert theirs in (None, own), info.name


def test_onnx_decoder_graph(folder: Path, tmp_path: Path) -> None:
    decoder(folder, "glm-wide", INT4)
    ckpt, options = Checkpoint.open(folder), ExportOptions()
    target = registry.load("targets", "onnx")
    (graph,) = target.graphs(ckpt, options)
    lowered = target.lower(ckpt, tmp_path, options, Silent())
    operators = [node.op for node in graph.nodes]
    assert {name: operators.count(name) for name in sorted(set(operators))} == lowered.operators
    _same_values(graph, tmp_path / lowered.model_file)
    assert graph.values["block.1"].shape == (1, None, 64)
    assert graph.values["logits"].shape == (1, 1, 96)


def test_no_weight_is_read_before_conversion(folder: Path) -> None:
    """Graphs come from headers: the weights' bytes may be anything."""
    encoder(folder)
    before = {t: graphs_of(folder, t) for t in ("litert", "onnx")}
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start:] = bytes(len(raw) - start)
    file.write_bytes(bytes(raw))
    assert {t: graphs_of(folder, t) for t in before} == before


# --- every rule set -----------------------------------------------------------------------------

# delegate -> model, export options, device, an operator that must fall back, a word of the reason
FALLBACKS = {
    "litert-xnnpack": ("weight-only INT4", {}, "galaxy-a05", "FULLY_CONNECTED", "another operator"),
    "litert-gpu": ("dynamic INT8", {}, "galaxy-a05", "FULLY_CONNECTED", "version 12"),
    "litert-nnapi": ("dynamic INT8", {}, "pixel-8-pro", "FULLY_CONNECTED", "version 12"),
    "litert-qualcomm": ("INT4 decoder", {}, "galaxy-s25-ultra", "FULLY_CONNECTED", "blocks"),
    "litert-mediatek": ("INT4 decoder", {}, "xiaomi-13t-pro", "FULLY_CONNECTED", "blocks"),
    "onnx-coreml": ("dynamic INT8", {}, "iphone-15-pro", "com.microsoft.MatMulNBits", "no "),
    "onnx-nnapi": ("float32", {"opset": 13}, "pixel-8-pro", "MatMul", "known only when"),
    "onnx-xnnpack": ("dynamic INT8", {}, "galaxy-a05", "com.microsoft.MatMulNBits", "no "),
}


@pytest.mark.parametrize("delegate", FALLBACKS)
def test_what_must_fall_back_does(delegate: str, folder: Path) -> None:
    model, options, device, op, words = FALLBACKS[delegate]
    MODELS[model](folder)
    target = delegate.partition("-")[0]
    entry = next(
        entry
        for (name, _), entry in placements(folder, target, device, **options).items()
        if name == delegate
    )
    assert entry.judgement == "little"
    rest = next(rest for rest in entry.left if rest.op == op)
    assert words in rest.because
    assert rest.rewrite
    assert rest.source
    assert rest.evidence in ("measured", "source", "documented", "inferred")
    (message, hint), *_ = [w for w in warnings([entry]) if rest.op in w[0]]
    assert rest.part in message
    assert f"{entry.taken} of {entry.nodes}" in message
    assert hint


def test_every_rule_set_is_tested_here_or_with_its_target() -> None:
    elsewhere = {name for name in all_rules() if name.startswith(("executorch-", "coreml-"))}
    assert FALLBACKS.keys() | elsewhere == set(all_rules())


def test_rules_are_sourced_and_reach_a_device() -> None:
    found = {
        name
        for profile in all_profiles().values()
        for target in registry.names("targets")
        for name in delegates(target, profile)
    }
    assert found == set(all_rules())
    for name, rules in all_rules().items():
        assert name.startswith(f"{rules.target}-")
        assert rules.sources


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("title: XNNPACK", "titel: XNNPACK", "title: Field required"),
        ("evidence: measured", "evidence: guessed", "evidence"),
        ("source: here", "source: nowhere", "nowhere"),
        ("ops:", "ops: [", "cannot read"),
    ],
)
def test_wrong_rules_are_refused(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = (RULES / "litert-xnnpack.yaml").read_text(encoding="utf-8")
    file = tmp_path / "rules.yaml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(WorkError, match=words):
        load_rules(file)


def test_nnapi_follows_the_androids_level(folder: Path) -> None:
    """keep_num_dims came with API level 30: before, linear layers of three axes stay."""
    encoder(folder)
    (graph,) = graphs_of(folder, "litert")
    rules = all_rules()["litert-nnapi"]
    node = next(n for n in graph.nodes if n.op == "FULLY_CONNECTED")
    old = refusal(rules, node, scene_of(graph, {"api": 29}))
    assert old is not None
    assert "Android 11" in old.because
    assert refusal(rules, node, scene_of(graph, {"api": 30})) is None
    assert refusal(rules, node, scene_of(graph, {"api": 28})) is not None
    assert placements(folder, "litert", "galaxy-s25-ultra").keys() == {
        ("litert-gpu", "serving_default"),
        ("litert-qualcomm", "serving_default"),  # and no NNAPI: it was sold with Android 15
        ("litert-xnnpack", "serving_default"),
    }


def test_an_odd_multiple_and_a_range() -> None:
    assert Range(min=2, max=4).holds(3)
    assert not Range(min=2).holds(1)
    assert Range(multiple=32).holds(64)
    assert not Range(multiple=32).holds(16)
    assert not Range(max=9).holds("12")


def test_pieces_are_as_few_as_the_order_allows() -> None:
    """a and d go together: d waits for nothing that is left."""
    names = "abcdef"
    values = {name: Value(name, "float32", (1,)) for name in (*names, "x")}
    feeds = {"a": "x", "b": "a", "c": "b", "d": "x", "e": "d", "f": "c"}
    nodes = tuple(Node(name, "OP", tuple(feeds[name]), (name,), "block.0") for name in names)
    graph = Graph("g", values, nodes)
    assert pieces(graph, {0, 2, 3, 4, 5}) == [[0, 3, 4], [2, 5]]
    assert pieces(graph, set()) == []
    assert pieces(graph, {1}) == [[1]]
    with pytest.raises(ValueError, match="no order"):
        pieces(Graph("g", values, (Node("l", "OP", ("l",), ("l",), ""),)), {0})


def test_shares_and_their_names() -> None:
    assert [judge(share) for share in (0.0, 0.49, 0.5, 0.89, 0.9, 1.0)] == [
        "little",
        "little",
        "partial",
        "partial",
        "good",
        "good",
    ]


def test_where_nothing_multiplies_the_operators_count() -> None:
    def share(nodes: int, taken: int, macs: int, macs_taken: int) -> float:
        return Placement(
            target="onnx", device="d", delegate="x", title="X", runs_on="npu", accelerator="N",
            graph="g", nodes=nodes, taken=taken, partitions=1, macs=macs, macs_taken=macs_taken,
            parts=[], evidence="inferred", judgement="little",
        ).share  # fmt: skip

    assert share(4, 1, 0, 0) == 0.25
    assert share(4, 1, 100, 90) == 0.9
    assert share(0, 0, 0, 0) == 0.0


# --- the gate -----------------------------------------------------------------------------------


def test_an_export_for_a_device_says_where_it_will_run(folder: Path, tmp_path: Path) -> None:
    encoder(folder)
    options = ExportOptions(device="pixel-8-pro")
    (entry,) = export(folder, ["litert"], tmp_path / "out", options=options).targets
    assert entry.ok
    assert {p.delegate for p in entry.placement} >= {"litert-xnnpack", "litert-gpu"}
    written = (tmp_path / "out" / "litert" / "export.json").read_text()
    assert '"placement"' in written
    assert "litert-nnapi" in written
    (again,) = export(folder, ["litert"], tmp_path / "out", options=options).targets
    assert again.already_done
    assert again.placement == entry.placement


def test_an_export_that_would_hardly_be_taken_is_refused(folder: Path, tmp_path: Path) -> None:
    encoder(folder, WEIGHT_ONLY_INT4)
    out = tmp_path / "out"
    options = ExportOptions(device="galaxy-a05")
    (entry,) = export(folder, ["litert"], out, options=options).targets
    assert entry.exit_code == 1
    assert not (out / "litert" / "export.json").exists()
    assert entry.error is not None
    assert "XNNPACK in LiteRT" in entry.error
    assert "encoder.layer.0.attention.self.query.weight" in entry.error
    assert "dynamic_block" in entry.hint
    assert "--allow-fallback" in entry.hint
    allowed = ExportOptions(device="galaxy-a05", allow_fallback=True)
    (entry,) = export(folder, ["litert"], out, options=allowed).targets
    assert entry.ok
    assert warnings(entry.placement)


def test_the_named_delegate_decides(folder: Path) -> None:
    encoder(folder, DYNAMIC)
    ckpt, target = Checkpoint.open(folder), registry.load("targets", "litert")

    def ask(**options: Any) -> list[Placement]:
        return foresee(ckpt, "litert", target, ExportOptions(**options))

    assert ask() == []
    assert ask(device="galaxy-a05")  # XNNPACK takes all
    for name in ("gpu", "litert-gpu"):
        with pytest.raises(PlacementError, match="LiteRT's GPU delegate"):
            ask(device="galaxy-a05", delegate=name)
    with pytest.raises(PlacementError, match="NNAPI"):
        ask(device="pixel-8-pro", delegate="npu")
    with pytest.raises(UsageError, match="no delegate 'tpu'"):
        ask(device="galaxy-a05", delegate="tpu")
    with pytest.raises(UsageError, match="without --device"):
        ask(delegate="gpu")
    with pytest.raises(UsageError, match="unknown device"):
        ask(device="nokia-3310")


def test_of_two_ways_to_an_npu_the_better_one_counts(folder: Path) -> None:
    encoder(folder)
    ckpt, target = Checkpoint.open(folder), registry.load("targets", "litert")
    options = ExportOptions(device="galaxy-s24-ultra")
    rows = [p for p in foresee(ckpt, "litert", target, options) if p.runs_on == "npu"]
    assert len(rows) == 2
    worse, better = (row.model_copy(update={"graph": "g"}) for row in rows)
    worse = worse.model_copy(update={"macs_taken": 0, "judgement": "little"})
    for entries in ([worse, better], [better, worse]):
        assert _chosen(entries, "litert", replace(options, delegate="npu")) == [better]


def test_a_delegate_that_the_file_is_not_lowered_for_is_refused(folder: Path) -> None:
    """ExecuTorch's are chosen when the file is written; ours is for XNNPACK."""
    encoder(folder)
    ckpt, target = Checkpoint.open(folder), registry.load("targets", "executorch")
    options = ExportOptions(device="pixel-8-pro")
    rows = {entry.delegate: entry for entry in foresee(ckpt, "executorch", target, options)}
    assert rows["executorch-xnnpack"].lowered
    assert not rows["executorch-vulkan"].lowered
    words = "of a file that is lowered for it, which the executorch target does not write"
    with pytest.raises(PlacementError, match=words) as caught:
        foresee(ckpt, "executorch", target, replace(options, delegate="gpu"))
    assert "another delegate" in caught.value.hint


def test_a_target_that_the_device_cannot_have(folder: Path, tmp_path: Path) -> None:
    encoder(folder)
    ckpt = Checkpoint.open(folder)
    for name, device in (
        ("coreml", "pixel-8-pro"),
        ("gguf", "nokia-3310"),
        ("gguf", "pixel-8-pro"),
    ):
        options = ExportOptions(device=device, delegate="gpu" if name == "gguf" else None)
        with pytest.raises((UsageError, UnsupportedError)) as caught:
            foresee(ckpt, name, registry.load("targets", name), options)
        words = {"coreml": "coreml is for ios and macos", "nokia-3310": "unknown device"}
        wanted = words.get(name) or words.get(device) or "gguf has no delegates"
        assert wanted in caught.value.message


def test_a_gpu_that_would_be_handed_many_pieces_is_told(folder: Path) -> None:
    """Everything that multiplies is taken, but in more pieces than there are blocks."""
    encoder(folder)
    entries = CHECK.run(graphs_of(folder, "litert"), "litert", "pixel-8-pro")
    nnapi = next(entry for entry in entries if entry.delegate == "litert-nnapi")
    assert nnapi.share == 1
    assert nnapi.partitions > 2
    assert [message for message, _ in warnings(entries) if "NNAPI" in message]
    assert not [message for message, _ in warnings(entries) if "XNNPACK" in message]


def test_the_command_warns_refuses_and_says_it_as_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder(folder, DYNAMIC)

    def ask(*options: str) -> tuple[int, str, str]:
        capsys.readouterr()
        base = ["export", str(folder), "--target", "litert", "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as stop:
            main([*base, "--device", "galaxy-a05", *options])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    code, out, err = ask("--delegate", "gpu")
    assert code == 1
    assert not (tmp_path / "out" / "litert").exists()
    assert "error: litert: litert on galaxy-a05: LiteRT's GPU delegate" in err
    assert "try: export the float32 checkpoint" in err
    code, out, err = ask("--json")
    assert code == 0
    assert (
        "warning: litert on galaxy-a05: LiteRT's GPU delegate (Mali-G52 MC2) would take 9 %" in err
    )
    (entry,) = ExportResult.model_validate_json(out).targets
    assert {p.delegate for p in entry.placement} == {"litert-gpu", "litert-nnapi", "litert-xnnpack"}
    code, out, err = ask()
    assert code == 0
    assert "Predicted for galaxy-a05" in out
    assert "warning: " in err
    code, out, err = ask("--delegate", "tpu")
    assert code == 2


def test_a_target_without_delegates_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = TargetResult(target="gguf", ok=True)
    warn(entry, "pixel-8-pro")
    assert "gguf on pixel-8-pro: no delegate is known" in capsys.readouterr().err
    warn(entry, None)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("delegate", "table"),
    [("onnx-coreml", "coreml_supported_mlprogram_ops"), ("onnx-nnapi", "nnapi_supported_ops")],
)
def test_onnx_rules_are_the_tables_of_the_installed_package(delegate: str, table: str) -> None:
    """Of the operators that our files have: exactly those in ONNX Runtime's own list."""
    helpers = Path(onnxruntime.__file__).parent / "tools" / "mobile_helpers"
    text = (helpers / f"{table}.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\|(?:ai\.onnx:)?((?:com\.microsoft:)?\w+)\|", text, re.MULTILINE))
    listed = {name.replace(":", ".") for name in listed}
    rules = all_rules()[delegate]
    known = {*rules.plain, *rules.ops}
    assert known <= listed
    assert (set(rules.rewrites) & listed) <= known
