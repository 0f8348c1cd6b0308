"""ExecuTorch's placement against its real partitioners, node by node and piece by piece."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import quantize_weights, save_tiny
from tiny_export import save_wide
from tiny_structure import save_structure

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.graph import Graph
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.checks._rules import all_rules
from pocketglm.checks.placement import assign, pieces_of
from pocketglm.contracts import ExportOptions
from pocketglm.stages._placement import warnings
from pocketglm.targets import _executorch_nodes as nodes

pytest.importorskip("executorch", reason="needs the extra: pip install 'pocketglm[executorch]'")

OPTIONS = ExportOptions(max_length=32)


def int8(activation: str) -> TensorScheme:
    return TensorScheme(bits=8, activation=activation)


def int4(activation: str, group: int) -> TensorScheme:
    return TensorScheme(bits=4, group_size=group, activation=activation)


# Part static, part INT4 with rounded inputs, part INT8 that XNNPACK leaves, the rest float.
MIXED = {
    "query.weight": int8("static"),
    "key.weight": int4("dynamic_block", 64),
    "value.weight": int8("none"),
    "output.dense.weight": int8("dynamic_token"),
    "word_embeddings.weight": int8("none"),
}


def encoder(schemes: dict[str, TensorScheme], **over: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save_tiny(folder, num_layers=1, **over)
        if schemes:
            quantize_weights(folder, schemes)

    return make


def decoder(name: str, schemes: dict[str, TensorScheme]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save_wide(folder, name, num_hidden_layers=1)
        quantize_weights(folder, schemes)

    return make


MODELS: dict[str, Callable[[Path], Any]] = {
    "float32": encoder({}),
    "mixed": encoder(MIXED),
    "INT4 decoder": decoder(
        "glm-wide", {"_proj.weight": int4("dynamic_block", 32), "embed_tokens.weight": int8("none")}
    ),
    "mixed decoder": decoder(
        "qwen3",
        {
            "q_proj.weight": int8("none"),
            "o_proj.weight": int8("dynamic_token"),
            "embed_tokens.weight": int4("none", 32),
        },
    ),
    "top-k": lambda folder: save_structure(folder, "qwen2", top_k=3, num_layers=1),
}


def partitioners() -> dict[str, Any]:
    """The real ones by the rules that they are compared with."""
    vulkan = pytest.importorskip("executorch.backends.vulkan.partitioner.vulkan_partitioner")
    xnnpack = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    found = {
        "executorch-xnnpack": xnnpack.XnnpackPartitioner(),
        "executorch-vulkan": vulkan.VulkanPartitioner(),
    }
    pytest.importorskip("coremltools", reason="needs the extra: pip install 'pocketglm[coreml]'")
    apple = pytest.importorskip("executorch.backends.apple.coreml.partition.coreml_partitioner")
    return found | {"executorch-coreml": apple.CoreMLPartitioner()}


def tags_of(partitioner: Any, program: Any) -> dict[str, str | None]:
    """By node: the delegate that the partitioner gives it to."""
    for node in program.graph.nodes:
        node.meta.pop("delegation_tag", None)
    logging.disable(logging.WARNING)
    try:
        partitioner.partition(program)
    finally:
        logging.disable(logging.NOTSET)
    return {node.name: node.meta.get("delegation_tag") for node in program.graph.nodes}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Graph]]:
    """What a partitioner is given for a model, and the same as plain data; each is made once."""

    @cache
    def make(name: str) -> tuple[Any, Graph]:
        folder = tmp_path_factory.mktemp("model")
        if not name.startswith("top-k"):  # which is written from another checkpoint
            folder.mkdir(exist_ok=True)
        MODELS[name](folder)
        program = nodes.given(Checkpoint.open(folder), OPTIONS)
        return program, nodes.graph_of(program, 1)

    return make


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_partitioners_do_what_was_predicted(
    name: str, traced: Callable[[str], tuple[Any, Graph]]
) -> None:
    program, graph = traced(name)
    for delegate, partitioner in partitioners().items():
        rules, own = all_rules()[delegate], delegate == "executorch-xnnpack"
        if name.startswith("top-k") and not own:
            continue  # the others' rules know no top-k
        tags = tags_of(partitioner, program)
        real = {i for i, node in enumerate(graph.nodes) if tags[node.name] is not None}
        taken, left = assign(rules, graph, {})
        assert taken == real, [graph.nodes[i].name for i in taken ^ real]
        assert taken | left.keys() == set(range(len(graph.nodes)))
        if own:
            by_tag: dict[str | None, set[int]] = {}
            for index in real:
                by_tag.setdefault(tags[graph.nodes[index].name], set()).add(index)
            ours = {frozenset(piece) for piece in pieces_of(rules, graph, taken)}
            assert ours == {frozenset(piece) for piece in by_tag.values()}


def test_what_must_fall_back_does(traced: Callable[[str], tuple[Any, Graph]]) -> None:
    """Weight-only INT8 stays in plain kernels. Of each other rule set something does, too."""
    check, (_, graph) = registry.load("checks", "placement"), traced("mixed")
    found = {
        entry.delegate: entry
        for device in ("galaxy-s25-ultra", "iphone-15-pro")
        for entry in check.run([graph], "executorch", device)
    }
    expected = {
        "executorch-xnnpack": "aten.addmm.default",
        "executorch-vulkan": "quantized_decomposed.embedding_byte.dtype",
        "executorch-coreml": "quantized_decomposed.dequantize_per_channel_group.default",
        "executorch-qualcomm": "aten.linear.default",
    }
    assert found.keys() == expected.keys()
    for name, op in expected.items():
        rest = next(rest for rest in found[name].left if rest.op == op)
        assert rest.because
        assert rest.rewrite
    value = found["executorch-xnnpack"].left[0]
    assert (value.op, value.part, value.count) == ("aten.addmm.default", "block.0", 1)
    assert "dynamic_token" in value.rewrite
    assert found["executorch-xnnpack"].judgement == "partial"
    (message, hint), *_ = warnings([found["executorch-xnnpack"]])
    assert "XNNPACK in ExecuTorch" in message
    assert hint == value.rewrite
    parts = found["executorch-xnnpack"].parts
    assert [part.part for part in parts] == ["embeddings", "block.0", "head"]
