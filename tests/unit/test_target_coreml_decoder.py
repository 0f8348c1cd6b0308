"""The Core ML target for decoders: families, structures, forms, the state and its gate."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_file import REASON, functions_of, model_of, read_weights
from tiny_export import WIDE, body, quantized, save_wide
from tiny_structure import STRUCTURES, save_structure

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import ExportManifest, read_export
from pocketglm.artifacts.manifest import MANIFEST, write_json
from pocketglm.artifacts.scheme import CacheScheme, TensorScheme
from pocketglm.contracts import ExportOptions, Floats, RunOptions, Target
from pocketglm.model.hf import load_decoder
from pocketglm.ops.stored import read_quantized
from pocketglm.runtimes import open_decoder
from pocketglm.stages.export import export
from pocketglm.targets import _coreml_decoder as graphs

pytest.importorskip("coremltools", reason=REASON)

TARGET: Target = registry.load("targets", "coreml")
UNITS = ("cpuAndNeuralEngine", "cpuAndGPU")
# Weights as large as trained ones: those of other tests give scores far beyond fp16's digits.
STD = 0.07
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
INT4 = {"bits": 4, "group_size": 32}


def save(folder: Path, name: str) -> Path:
    return save_wide(folder, name, initializer_range=STD)


def exported(folder: Path, out: Path, **options: Any) -> tuple[Path, ExportManifest]:
    options = {"logits": "all", "threads": 1, **options}
    entry = export(folder, ["coreml"], out, options=ExportOptions(**options)).targets[0]
    assert entry.ok, entry.error
    return out / "coreml", read_export(out / "coreml")


@pytest.mark.parametrize(("name", "units"), list(zip(WIDE, itertools.cycle(UNITS), strict=False)))
def test_families(name: str, units: Any, tmp_path: Path) -> None:
    """Parity in export compares every block, the tables and the whole, in fp16 and in float32; both
    layouts take turns.
    """
    out, manifest = exported(save(tmp_path / "ckpt", name), tmp_path / "out", compute_units=units)
    parity = manifest.parity
    assert parity.scope == "whole"
    assert {"rotary", "embeddings", "block.0", "block.1", "head"} <= parity.blocks.keys()
    assert parity.blocks["rotary"] == parity.blocks["embeddings"] == 0
    assert max(parity.blocks.values()) < 5e-4
    assert parity.delegate_off is not None
    assert parity.delegate_off.max_abs < 1e-3
    assert manifest.minimum == {"iOS": "18", "macOS": "15"}
    assert manifest.cache is not None
    assert manifest.cache.dtype == "float16"
    for operators in functions_of(out / manifest.model_file).values():
        kinds = [operator.type for operator in operators]
        assert (kinds.count("read_state"), kinds.count("write_state")) == (8, 4)
        assert kinds.count("slice_update") == 4
        assert ("conv" in kinds, "linear" in kinds) == (units == UNITS[0], units == UNITS[1])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures(structure: str, tmp_path: Path) -> None:
    """Top-k attention, shared and unified blocks; shared weights are stored once. Which keys are
    among the k largest must not hang on a rounding to fp16.
    """
    folder = save_structure(tmp_path / "ckpt", std=STD, **STRUCTURES[structure])
    units = UNITS[0] if structure == "shared" else None
    out, manifest = exported(folder, tmp_path / "out", compute_units=units)
    whole = "top_k" in STRUCTURES[structure]
    assert manifest.floats == ("fp32" if whole else "fp16")
    assert max(manifest.parity.blocks.values()) < 5e-4
    weights = (out / manifest.model_file).rglob("weight.bin")
    values = sum(tensor.size for tensor in Checkpoint.open(folder).tensors.values())
    values += 2 * 16 * graphs.slots_of(64)  # cosines and sines
    assert sum(file.stat().st_size for file in weights) < 1.15 * values * (4 if whole else 2)


# name -> family, schemes
FORMS: dict[str, tuple[str, dict[str, TensorScheme]]] = {
    "int8": (
        "glm-half-bias",
        {EMBEDDING: TensorScheme(bits=8), HEAD: TensorScheme(bits=8), **body(bits=8)},
    ),
    "int4, tied int8": ("glm-wide", {EMBEDDING: TensorScheme(bits=8), **body(**INT4)}),
    "int4 by 64, tied": ("qwen2", {EMBEDDING: TensorScheme(bits=4, group_size=64)}),
    "asymmetric": (
        "llama",
        {
            EMBEDDING: TensorScheme(bits=8, symmetric=False),
            **body(**INT4, symmetric=False, activation="dynamic_block"),
        },
    ),
}


@pytest.mark.parametrize(("form", "units"), list(zip(FORMS, itertools.cycle(UNITS), strict=False)))
def test_quantized_forms(form: str, units: Any, tmp_path: Path) -> None:
    """The integers are the checkpoint's, and stored once for both functions."""
    family, schemes = FORMS[form]
    folder = quantized(save(tmp_path / "ckpt", family), schemes)
    out, manifest = exported(folder, tmp_path / "out", compute_units=units, logits="last")
    assert manifest.activation == "none"
    assert max(manifest.parity.blocks.values()) < 5e-4
    package, ckpt = out / manifest.model_file, Checkpoint.open(folder)
    decode, prefill = (read_weights(package, name) for name in ("decode", "prefill"))
    assert {n: w.at for n, w in decode.items()} == {n: w.at for n, w in prefill.items()}
    for name in ckpt.manifest.schemes:
        part, stored = read_quantized(ckpt, name), decode.pop(name.replace(".", "_"))
        assert np.array_equal(stored.q, part.q.numpy()), name
        assert np.array_equal(stored.scales, part.scales.numpy()), name
        zeros = None if part.zero_points is None else part.zero_points.numpy()
        if zeros is None or stored.zeros is None:
            assert zeros is stored.zeros, name
        else:
            assert np.array_equal(stored.zeros, zeros), name
    assert not decode


def logits_of(folder: Path, text: list[int]) -> Floats:
    """The checkpoint in PyTorch: [S, V]."""
    with torch.inference_mode():
        ids = torch.tensor([text])
        result: Floats = load_decoder(Checkpoint.open(folder))(ids, torch.ones_like(ids))[0].numpy()
    return result


@pytest.mark.parametrize(("logits", "units"), [("last", UNITS[0]), ("all", UNITS[1])])
def test_a_text_in_the_state(logits: Any, units: Any, tmp_path: Path) -> None:
    """A prompt longer than one call, steps, a rewind and a fork, against the uncached model."""
    folder = save_wide(tmp_path / "ckpt", "glm4", initializer_range=STD, max_position_embeddings=90)
    out, manifest = exported(folder, tmp_path / "out", compute_units=units, logits=logits)
    text = np.random.default_rng(3).integers(6, 96, 80).tolist()
    session, wanted = open_decoder(out, RunOptions(optimize=False)), logits_of(folder, text)
    limit = 2e-3 * float(np.abs(wanted).max())
    assert graphs.prompt_of(90) < 70
    np.testing.assert_allclose(session.prefill(text[:70]), wanted[69], atol=limit)
    other = session.fork()
    np.testing.assert_allclose(session.step(text[70]), wanted[70], atol=limit)
    session.rewind(31)
    assert (session.length, other.length) == (40, 70)
    np.testing.assert_allclose(session.prefill(text[40:80]), wanted[79], atol=limit)
    np.testing.assert_allclose(other.step(text[70]), wanted[70], atol=limit)
    np.testing.assert_allclose(session.score(text[:20]), wanted[:20], atol=limit)
    assert [list(port["shape"]) for port in manifest.inputs] == [[1, "tokens"], [1]]


def test_the_functions_share_one_description_of_the_state(tmp_path: Path) -> None:
    out, manifest = exported(save(tmp_path / "ckpt", "qwen3"), tmp_path / "out", max_length=20)
    model = model_of(out / manifest.model_file)
    assert model.description.defaultFunctionName == "decode"
    functions = {f.name: f for f in model.description.functions}
    assert functions.keys() == {"prefill", "decode"}
    states = [[(s.name, s.type.SerializeToString()) for s in f.state] for f in functions.values()]
    assert states[0] == states[1]
    assert [name for name, _ in states[0]] == ["key_0", "value_0", "key_1", "value_1"]
    shape = functions["decode"].state[0].type.stateType.arrayType.shape
    # 20 tokens, a last call's padding of 19, and as many as make 64 bytes a row.
    assert list(shape) == [1, 2, 64, 32]
    told = json.loads((out / "compute.json").read_text())
    assert told["default_function"] == "decode"
    sizes = {
        name: {port["name"]: port["shape"] for port in f["inputs"] + f["states"]}
        for name, f in told["functions"].items()
    }
    assert sizes["prefill"]["input_ids"] == [1, graphs.prompt_of(20)]
    assert sizes["decode"]["input_ids"] == [1, 1]
    assert sizes["prefill"]["value_1"] == sizes["decode"]["value_1"] == [1, 2, 64, 32]


def test_float32(tmp_path: Path) -> None:
    """The state is fp16 also there."""
    folder = save_wide(tmp_path / "ckpt", "llama")
    out, manifest = exported(folder, tmp_path / "out", compute_precision="float32")
    assert max(manifest.parity.blocks.values()) < 1e-4
    model = model_of(out / manifest.model_file)
    assert model.description.functions[0].state[0].type.stateType.arrayType.dataType == 65552


# --- refusals and the gate -----------------------------------------------------------------------


def test_refused(tmp_path: Path) -> None:
    folder = quantized(save(tmp_path / "ckpt", "llama"), body(bits=8, activation="static"))
    ckpt = Checkpoint.open(folder)
    state, static = TARGET.supports(ckpt, ExportOptions(deployment="iOS17"))
    assert state == (
        "a decoder's cache (a state): needs iOS18, not iOS17: the nearest that works is iOS18"
    )
    assert "static activations are for encoders" in static
    manifest = ckpt.manifest.model_copy(update={"schemes": {}, "cache": CacheScheme()})
    write_json(folder / MANIFEST, manifest)
    (cache,) = TARGET.supports(Checkpoint.open(folder), ExportOptions())
    assert "an INT8 cache: Core ML's states are fp16" in cache


def test_a_lost_write_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New keys are used but not kept: what the converter makes of `index_put`."""

    def lost(self: graphs.DecoderGraph, new: Any, name: str) -> Any:
        old = self.g.b.read_state(input=self.g.input(name))
        return self.g.b.slice_update(x=old, update=new, begin=self._begin, end=self._end)

    monkeypatch.setattr(graphs.DecoderGraph, "_keep", lost)
    entry = export(save(tmp_path / "ckpt", "llama"), ["coreml"], tmp_path / "out").targets[0]
    assert (entry.ok, entry.exit_code) == (False, 1)
    assert "has 4 operators read_state, not 8" in (entry.error or "")
    assert not (tmp_path / "out/coreml").exists()


def test_a_wrong_slot_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All operators are there; keys are written one slot too far."""
    place = graphs.DecoderGraph._place

    def shifted(self: graphs.DecoderGraph, first: Any) -> None:
        place(self, first)
        one = np.array([0, 0, 1, 0] if not self.g.form.channels else [0, 0, 0, 1], np.int32)
        self._begin, self._end = (self.g.b.add(x=x, y=one) for x in (self._begin, self._end))

    monkeypatch.setattr(graphs.DecoderGraph, "_place", shifted)
    entry = export(save(tmp_path / "ckpt", "llama"), ["coreml"], tmp_path / "out").targets[0]
    assert (entry.ok, entry.exit_code) == (False, 1)
    assert "'block.0' of the written file differs from the checkpoint" in (entry.error or "")
