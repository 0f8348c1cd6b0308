"""stages/_parity_decoder: every form passes, and a planted defect is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from tiny_decoder import VARIANTS
from tiny_export import body, quantized, save_wide

from pocketglm import registry
from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import ExportManifest, Parity, read_export
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Silent, Target
from pocketglm.errors import CheckpointError, MemoryCeilingError, ParityError
from pocketglm.model.hf import decoder_spec_of, load_decoder
from pocketglm.stages import _parity_decoder as stage
from pocketglm.stages.export import export

TARGET: Target = registry.load("targets", "onnx")
INT4 = {**body(bits=4, group_size=32), "embed_tokens.weight": TensorScheme(bits=4, group_size=32)}
FORMS = {
    "fp32": {},
    "int4": INT4,
    "int4-dynamic": body(bits=4, group_size=32, activation="dynamic_block"),
    "asymmetric": body(bits=4, group_size=32, symmetric=False),
    "int8": {**body(bits=8), "embed_tokens.weight": TensorScheme(bits=8)},
}


def exported(folder: Path, options: ExportOptions | None = None) -> tuple[Parity, Path]:
    """Export a checkpoint; its parity and folder."""
    out = folder.with_name(folder.name + "-out")
    (result,) = export(folder, ["onnx"], out, options=options or ExportOptions(threads=1)).targets
    assert result.ok, result.error
    assert result.parity
    return result.parity, out / "onnx"


def check(
    ckpt: Path, folder: Path, options: ExportOptions | None = None, target: Target = TARGET
) -> Parity:
    manifest: ExportManifest = read_export(folder)
    return stage.check_decoder_parity(
        Checkpoint.open(ckpt), folder, manifest, target, options or ExportOptions(), Silent()
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in INT4 and its export."""
    ckpt = quantized(save_wide(tmp_path_factory.mktemp("parity") / "glm4", "glm4"), INT4)
    return ckpt, exported(ckpt)[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_agrees(name: str, tmp_path: Path) -> None:
    ckpt = save_wide(tmp_path / name, name)
    parity, _ = exported(ckpt)
    tables = ["rotary"] if decoder_spec_of(Checkpoint.open(ckpt)).tied else ["rows", "rotary"]
    assert list(parity.blocks) == ["embeddings", *tables, "block.0", "block.1", "head"]
    assert parity.scope == "whole"
    assert parity.output_max_abs < 1e-4
    assert parity.agreement == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("logits", ["last", "all"])
def test_every_form_agrees(form: str, logits: str, tmp_path: Path) -> None:
    ckpt = quantized(save_wide(tmp_path / "m", "glm-wide"), FORMS[form])
    options = ExportOptions(logits="last" if logits == "last" else "all", threads=1)
    parity, _ = exported(ckpt, options)
    assert parity.scope == "whole"
    assert max(parity.blocks.values()) < 1e-4
    assert parity.n == sum(count for _, count in stage._TEXTS)


def test_a_large_model_is_compared_by_blocks(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(*model).scope == "whole"
    monkeypatch.setattr(stage, "WHOLE", 1000)
    parity = check(*model)
    assert parity.scope == "blocks"
    assert parity.n == 2
    assert list(parity.blocks) == ["embeddings", "rows", "rotary", "block.0", "block.1", "head"]
    assert parity.output_max_abs == parity.blocks["head"] <= parity.tolerance


def test_the_whole_is_compared_with_the_whole(model: tuple[Path, Path]) -> None:
    """The logits that the file is compared with are the checkpoint's own."""
    ckpt = Checkpoint.open(model[0])
    ids, mask = stage._samples(model[1], read_export(model[1]))
    found = TARGET.blocks(model[1] / "model.onnx", ids, mask)
    reference = stage._Reference(ckpt, decoder_spec_of(ckpt))
    _, logits = stage._compare(reference, found, ids, mask, None, Silent(), whole=True)
    with torch.inference_mode():
        expected = load_decoder(ckpt)(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(logits, expected[mask.astype(bool)], atol=1e-5)


def test_a_file_that_errs_as_a_whole_is_found(model: tuple[Path, Path], tmp_path: Path) -> None:
    """Its parts are read from a good file, so that only the last comparison can see the defect."""
    folder = tmp_path / "copy"
    shutil.copytree(model[1], folder)
    edit_file(folder, "model.norm.weight", one_norm)
    target = replace(
        TARGET, blocks=lambda _, *batch: TARGET.blocks(model[1] / "model.onnx", *batch)
    )
    with pytest.raises(ParityError, match="the written file differs from the checkpoint by"):
        check(model[0], folder, target=target)


def test_the_limit_holds_while_blocks_are_compared(model: tuple[Path, Path]) -> None:
    with pytest.raises(MemoryCeilingError, match="export holds"):
        check(*model, ExportOptions(max_memory=1000))


def test_the_reference_is_the_model(model: tuple[Path, Path]) -> None:
    """Its parts, one after the other, give what the whole checkpoint gives."""
    ckpt = Checkpoint.open(model[0])
    whole = load_decoder(ckpt)
    ids = torch.arange(10, 28).reshape(2, 9)
    reference = stage._Reference(ckpt, whole.spec)
    with torch.inference_mode():
        x = reference.embeddings(ids)
        for index in range(whole.spec.num_layers):
            x = reference.block(index, x)
        torch.testing.assert_close(reference.head(x[:, -1]), whole(ids)[:, -1], atol=1e-5, rtol=0)


# --- planted defects -----------------------------------------------------------------------------


def edit_file(folder: Path, tensor: str, change: Callable[[bytearray], None]) -> None:
    """Change an initializer's bytes in the data file, in place."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    (found,) = (t for t in graph.initializer if t.name == tensor)
    place = {entry.key: entry.value for entry in found.external_data}
    start, length = int(place["offset"]), int(place["length"])
    with (folder / place["location"]).open("r+b") as file:
        file.seek(start)
        data = bytearray(file.read(length))
        change(data)
        file.seek(start)
        file.write(data)


def edit_nodes(folder: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    change(proto.graph)
    onnx.save(proto, folder / "model.onnx")


def one_integer(data: bytearray) -> None:
    data[40] ^= 0x08  # one INT4 value moves by half of its range


def one_norm(data: bytearray) -> None:
    data[:4] = np.float32(1.5).tobytes()


def last_cosine(data: bytearray) -> None:
    """That of the last position, which no sample text reaches."""
    data[-4:] = np.float32(0.9).tobytes()


def rare_integer(folder: Path) -> None:
    """One of a token that is in no sample text."""
    manifest = read_export(folder)
    ids, _ = stage._samples(folder, manifest)
    row = int(np.setdiff1d(np.arange(manifest.vocab_size), ids)[-1])

    def change(data: bytearray) -> None:
        data[row * len(data) // manifest.vocab_size] ^= 0x08

    edit_file(folder, "model.embed_tokens.weight", change)


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(entry for entry in node.attribute if entry.name == name)


def wrong_rope(graph: onnx.GraphProto) -> None:
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    attribute(nodes[1], "rotary_interleaved").i = 0


def wrong_scale(graph: onnx.GraphProto) -> None:
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    attribute(nodes[0], "scale").f *= 1.05


def swapped_weights(graph: onnx.GraphProto) -> None:
    """Both blocks' down projections are of one shape."""
    nodes = {
        node.input[1]: node
        for node in graph.node
        if node.op_type == "MatMulNBits" and "down_proj" in node.input[1]
    }
    first, second = nodes.values()
    first.input[1], second.input[1] = second.input[1], first.input[1]


def wrong_past(graph: onnx.GraphProto) -> None:
    """Block 1 reads its cache wrongly: only a step with tokens before it shows that."""
    (node,) = (n for n in graph.node if "past_key_values.1.key" in n.input)
    place = list(node.input).index("past_key_values.1.key")
    node.input[place] = "turned"
    graph.node.insert(0, helper.make_node("Neg", ["past_key_values.1.key"], ["turned"]))


def first_logits(graph: onnx.GraphProto) -> None:
    """The logits of a row's first token instead of its last: a single token hides that."""
    (node,) = (n for n in graph.node if n.op_type == "Gather" and n.input[0] == "block.1")
    graph.initializer.append(helper.make_tensor("first", onnx.TensorProto.INT64, [1], [0]))
    node.input[1] = "first"


DEFECTS: dict[str, Callable[[Path], None]] = {
    "block.0": lambda folder: edit_file(folder, "model.layers.0.mlp.down_proj.weight", one_integer),
    "block.1": lambda folder: edit_nodes(folder, wrong_rope),
    "attention scale|block.0": lambda folder: edit_nodes(folder, wrong_scale),
    "swapped|block.0": lambda folder: edit_nodes(folder, swapped_weights),
    "cache|block.1": lambda folder: edit_nodes(folder, wrong_past),
    "embeddings": lambda folder: edit_file(
        folder, "model.embed_tokens.weight", lambda data: data.__setitem__(slice(None), data[::-1])
    ),
    r"far position|rotary\.0:\d+": lambda folder: edit_file(folder, "cos_cache", last_cosine),
    r"rare token|rows\.\d+:\d+": rare_integer,
    "last token|head": lambda folder: edit_nodes(folder, first_logits),
    "norm|head": lambda folder: edit_file(folder, "model.norm.weight", one_norm),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found_and_the_part_named(defect: str, tmp_path: Path) -> None:
    ckpt = quantized(save_wide(tmp_path / "m", "glm4"), INT4)
    _, folder = exported(ckpt)
    DEFECTS[defect](folder)
    part = defect.rpartition("|")[2]
    with pytest.raises(ParityError, match=rf"'{part}' of the written file differs"):
        check(ckpt, folder)


def test_a_bad_weight_is_the_checkpoints_fault(model: tuple[Path, Path], tmp_path: Path) -> None:
    ckpt = save_wide(tmp_path / "bad", "glm4")
    opened = Checkpoint.open(ckpt)
    arrays = {name: opened.read(name) for name in opened.tensors}
    arrays["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    safetensors.write_file(ckpt / "model.safetensors", arrays.items())
    (result,) = export(ckpt, ["onnx"], tmp_path / "out").targets
    assert result.exit_code == CheckpointError.exit_code
    assert result.error
    assert "'model.layers.1.mlp.down_proj.weight' holds NaN or infinity" in result.error
    assert "first in row 3" in result.error
