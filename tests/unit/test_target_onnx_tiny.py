"""Shared and unified blocks and top-k attention as ONNX files, in ONNX Runtime and genai."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_file import ALL, TARGET, lower, nodes, run_file, run_torch, worst
from tiny_export import body, quantized
from tiny_structure import FAMILIES, STRUCTURES, save_structure

from pocketglm.artifacts.checkpoint import Checkpoint, read_json
from pocketglm.artifacts.export import read_export
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, RunOptions
from pocketglm.model.hf import decoder_spec_of
from pocketglm.model.layers import unified_widths
from pocketglm.model.spec import RopeSpec
from pocketglm.runtimes import open_decoder
from pocketglm.stages import _parity_decoder as stage
from pocketglm.stages.export import export
from pocketglm.targets import _onnx_decoder, _onnx_sparse

IDS = [7, 3, 90, 41, 41, 12, 8, 20, 33, 60]
ONE = RunOptions(threads=1)
every_structure = pytest.mark.parametrize("structure", STRUCTURES)
WORDS = "embed_tokens.weight"
INT4 = {"bits": 4, "group_size": 32}
FORMS: dict[str, dict[str, TensorScheme]] = {
    "fp32": {},
    "int8": body(bits=8) | {WORDS: TensorScheme(bits=8)},
    "int4": body(**INT4) | {WORDS: TensorScheme(**INT4)},
    "int4 dynamic": body(**INT4, activation="dynamic_block") | {WORDS: TensorScheme(bits=8)},
}


def save(folder: Path, name: str, structure: str, **own: Any) -> Path:
    return save_structure(folder, name, **(STRUCTURES[structure] | own))


@every_structure
@pytest.mark.parametrize("name", FAMILIES)
def test_padded_rows_and_steps_equal_the_checkpoint(
    name: str, structure: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "a", name, structure)
    lowered, file = lower(folder, tmp_path / "out")
    wanted = run_torch(folder)
    assert min(float(logits.std()) for logits in wanted) > 0.3
    sparse = structure in ("top-k", "all")
    assert sparse or worst(run_file(file, 0), wanted) < 1e-4
    assert worst(run_file(file, 20), wanted) < 1e-4  # one buffer for past and present
    lengths = {port["shape"][2] for port in lowered.inputs[2:]}
    assert lengths == {"slots" if sparse else "past"}
    assert lowered.operators.get("TopK", 0) == (4 if sparse else 0)
    assert lowered.operators.get("com.microsoft.GroupQueryAttention", 0) == (0 if sparse else 4)
    assert lowered.minimum["onnxruntime"] == "1.19"


@every_structure
def test_a_block_is_stored_once(structure: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "glm-wide", structure)
    _, file = lower(folder, tmp_path / "out")
    spec = decoder_spec_of(Checkpoint.open(folder))
    model = onnx.load(str(file), load_external_data=False)
    stored = {t.name.split(".")[2] for t in model.graph.initializer if ".layers." in t.name}
    assert stored == {str(block) for block in set(spec.blocks())}
    past = [i.name for i in model.graph.input if i.name.startswith("past_key_values.")]
    assert len(past) == 2 * spec.num_layers
    weights = sum(info.nbytes for info in Checkpoint.open(folder).tensors.values())
    tables = 2 * 4 * 64 * spec.rope.dims // 2
    assert abs((file.parent / "model.onnx.data").stat().st_size - weights - tables) < 16384


@pytest.mark.parametrize("form", FORMS)
@every_structure
def test_every_form_in_every_runtime(structure: str, form: str, tmp_path: Path) -> None:
    """Exported with parity by blocks and as a whole; prompt, steps, rewind, scores."""
    pytest.importorskip("onnxruntime_genai")
    # Other activations choose other keys: of few keys each one counts for much.
    own = {"top_k": 8} if "dynamic" in form and structure in ("top-k", "all") else {}
    folder = quantized(save(tmp_path / "a", "qwen3", structure, **own), FORMS[form])
    (entry,) = export(folder, ["onnx"], tmp_path / "out", options=ALL).targets
    assert entry.ok, entry.error
    assert entry.parity
    assert [n for n in entry.parity.blocks if n.startswith("block.")] == [
        f"block.{layer}" for layer in range(4)
    ]
    assert entry.parity.scope == "whole"
    out = tmp_path / "out" / "onnx"
    limit = 0.5 if "dynamic" in form else 1e-4
    wanted = open_decoder(folder, ONE).score(IDS)
    for runtime in ("onnx", "genai"):
        session = open_decoder(out, ONE, runtime)
        found = [session.prefill(IDS[:5]), session.step(IDS[5])]
        session.rewind(2)
        found += [session.prefill(IDS[4:8]), session.step(IDS[8]), session.fork().step(IDS[9])]
        for place, logits in zip((4, 5, 7, 8, 9), found, strict=True):
            assert np.abs(logits - wanted[place]).max() < limit, (runtime, place)
        assert np.abs(session.score(IDS) - wanted).max() < limit
    config = read_json(out / "config.json")
    assert (config["model_type"], config["num_hidden_layers"]) == ("qwen3", 4)
    assert not {"layer_blocks", "unified_blocks", "attention_top_k", "family"} & set(config)


def test_a_long_text_grows_the_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketglm.runtimes._onnx_decoder._FIRST", 4)
    folder = save(tmp_path / "a", "glm-wide", "all")
    assert export(folder, ["onnx"], tmp_path / "out").targets[0].ok
    ids = np.random.default_rng(0).integers(6, 90, 60).tolist()
    wanted = open_decoder(folder, ONE).score(ids)
    session = open_decoder(tmp_path / "out" / "onnx", ONE)
    assert np.abs(session.prefill(ids[:3]) - wanted[2]).max() < 1e-4
    for place in range(3, 60):
        assert np.abs(session.step(ids[place]) - wanted[place]).max() < 1e-4


def test_k_keys_that_are_all_need_no_choice(tmp_path: Path) -> None:
    """GroupQueryAttention where the context has no more than k tokens."""
    folder = save_structure(tmp_path / "a", "glm-wide", top_k=12)
    options = ExportOptions(logits="all", max_length=12, threads=1)
    lowered, file = lower(folder, tmp_path / "out", options)
    assert lowered.operators["com.microsoft.GroupQueryAttention"] == 4
    assert worst(run_file(file, 0), run_torch(folder)) < 1e-4  # 12 tokens at the end
    odd: dict[str, Any] = {"head_dim": 24, "rope": RopeSpec(24, interleaved=True)}
    small = Checkpoint.open(save_structure(tmp_path / "b", "glm-wide", top_k=12, **odd))
    assert "head_dim 24" in str(TARGET.supports(small, options))
    _, file = lower(small.path, tmp_path / "small")
    assert worst(run_file(file, 12), run_torch(small.path)) < 1e-4


def test_a_large_one_is_compared_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "WHOLE", 1000)
    folder = quantized(save(tmp_path / "a", "glm-wide", "all"), FORMS["int4"])
    (entry,) = export(folder, ["onnx"], tmp_path / "out", options=ALL).targets
    assert entry.ok, entry.error
    assert entry.parity
    assert entry.parity.scope == "blocks"
    names = ["embeddings", "rotary", *(f"block.{n}" for n in range(4)), "head"]
    assert list(entry.parity.blocks) == names


@pytest.mark.parametrize("defect", ["k", "block", "order", "pairs"])
def test_a_planted_defect_is_found(
    defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "a", "glm-wide", "all")
    if defect == "k":
        monkeypatch.setattr(_onnx_decoder, "top_k_of", lambda spec, context: 3)
    elif defect == "block":
        graph: Any = _onnx_decoder.DecoderGraph
        monkeypatch.setattr(graph, "_at", lambda self, index: f"blocks.{index // 2}.")
    elif defect == "order":
        swap = unified_widths
        monkeypatch.setattr(
            _onnx_decoder, "unified_widths", lambda spec: [*swap(spec)[2:], *swap(spec)[:2]]
        )
    else:  # halves are turned instead of pairs
        attention: Any = _onnx_sparse.SparseAttention
        made = attention.__init__

        def halves(self: Any, g: Any, spec: Any, *rest: Any) -> None:
            made(self, g, replace(spec, rope=replace(spec.rope, interleaved=False)), *rest)

        monkeypatch.setattr(attention, "__init__", halves)
    (entry,) = export(folder, ["onnx"], tmp_path / "out", options=ALL).targets
    assert not entry.ok


@pytest.mark.parametrize("wrong", [19, 21])
def test_a_k_beyond_the_sample_texts_is_compared_too(
    wrong: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts have 12 tokens at most; of a model with k = 20 one goes on to 22."""
    assert stage._texts(None) == stage._TEXTS
    assert [length for _, length in stage._texts(20)] == [8, 22, 12, 5]
    folder = save_structure(tmp_path / "a", "glm-wide", top_k=20)
    (entry,) = export(folder, ["onnx"], tmp_path / "right", options=ALL).targets
    assert entry.ok, entry.error
    monkeypatch.setattr(_onnx_decoder, "top_k_of", lambda spec, context: wrong)
    (entry,) = export(folder, ["onnx"], tmp_path / "wrong", options=ALL).targets
    assert not entry.ok


def test_export_json_tells_the_cache(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", "glm-wide", "shared")
    assert export(folder, ["onnx"], tmp_path / "out").targets[0].ok
    manifest = read_export(tmp_path / "out" / "onnx")
    assert manifest.cache is not None
    assert manifest.cache.layers == 4
    assert len(nodes(tmp_path / "out" / "onnx" / "model.onnx", "GroupQueryAttention")) == 4
