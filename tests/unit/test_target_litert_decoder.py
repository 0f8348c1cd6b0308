"""The LiteRT target for decoders: families, forms, the session, and LiteRT-LM's bundle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_decoder import save_chat_decoder
from litert_file import REASON, flip, model_of, read_weights
from tiny_export import WIDE, body, quantized, save_wide
from tiny_structure import STRUCTURES, save_structure

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import EXPORT, read_export
from pocketglm.artifacts.manifest import MANIFEST, write_json
from pocketglm.artifacts.scheme import CacheScheme, TensorScheme
from pocketglm.contracts import DecoderSession, ExportOptions, Ids, RunOptions, Silent, Target
from pocketglm.errors import CheckpointError, ParityError, UsageError
from pocketglm.ops.stored import read_quantized
from pocketglm.runtimes import open_decoder
from pocketglm.stages._parity_decoder import check_decoder_parity
from pocketglm.stages.export import export
from pocketglm.targets._litert_decoder import prefills_of, slots_of
from pocketglm.text.tokenizer import Tokenizer

pytest.importorskip("ai_edge_litert", reason=REASON)
pytest.importorskip("litert_lm_builder", reason=REASON)

TARGET: Target = registry.load("targets", "litert")
POSITIONS = 200  # more than the longest prompt graph takes
TEXT: Ids = np.random.default_rng(3).integers(6, 96, POSITIONS)
ONE = RunOptions(threads=1)
INT8 = {"bits": 8, "activation": "dynamic_block"}
INT4 = {"bits": 4, "group_size": 32, "activation": "dynamic_block"}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def exported(folder: Path, out: Path, logits: Any = "all") -> Path:
    options = ExportOptions(logits=logits, threads=1)
    entry = export(folder, ["litert"], out, options=options).targets[0]
    assert entry.ok, entry.error
    return out / "litert"


@pytest.mark.parametrize("name", WIDE)
def test_families_in_float(name: str, tmp_path: Path) -> None:
    """Parity in export compares every block, the tables and the whole."""
    out = exported(save_wide(tmp_path / "ckpt", name), tmp_path / "out")
    parity = read_export(out).parity
    assert parity.scope == "whole"
    assert parity.output_max_abs < 2e-5
    assert {"rotary", "embeddings", "block.0", "block.1", "head"} <= parity.blocks.keys()
    assert max(parity.blocks.values()) < 5e-5


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures(structure: str, tmp_path: Path) -> None:
    """Top-k attention, shared and unified blocks."""
    folder = save_structure(tmp_path / "ckpt", **STRUCTURES[structure])
    parity = read_export(exported(folder, tmp_path / "out")).parity
    assert parity.output_max_abs < 2e-5
    assert max(parity.blocks.values()) < 5e-5


# name -> family, schemes
FORMS: dict[str, tuple[str, dict[str, TensorScheme]]] = {
    "int8": (
        "glm-half-bias",
        {EMBEDDING: TensorScheme(bits=8), HEAD: TensorScheme(**INT8), **body(**INT8)},
    ),
    "int4, tied int8": ("glm-wide", {EMBEDDING: TensorScheme(bits=8), **body(**INT4)}),
    "int4 by 64, tied": (
        "qwen2",
        {EMBEDDING: TensorScheme(bits=4, group_size=64), "q_proj.weight": TensorScheme(**INT8)},
    ),
    "int4 per row, tied": (
        "qwen2",
        {EMBEDDING: TensorScheme(bits=4), **body(bits=4, activation="dynamic_token")},
    ),
    "int4 embedding": (
        "llama",
        {EMBEDDING: TensorScheme(bits=4, group_size=32), **body(**INT4)},
    ),
    "int8, float inputs": ("llama", {EMBEDDING: TensorScheme(bits=8), **body(bits=8)}),
}


@pytest.mark.parametrize("logits", ["last", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_quantized_forms(form: str, logits: str, tmp_path: Path) -> None:
    """The integers are the checkpoint's, and stored once for all graphs."""
    family, schemes = FORMS[form]
    folder = quantized(save_wide(tmp_path / "ckpt", family), schemes)
    out = exported(folder, tmp_path / "out", logits)
    manifest = read_export(out)
    exact = form == "int8, float inputs"
    assert manifest.activation == ("none" if exact else "dynamic_token")
    assert max(manifest.parity.blocks.values()) < 5e-5
    assert (manifest.parity.output_max_abs < 2e-5) == exact
    found, ckpt = read_weights(out / "model.tflite"), Checkpoint.open(folder)
    for name in ckpt.manifest.schemes:
        part, stored = read_quantized(ckpt, name), found[name]
        assert np.array_equal(stored.q, part.q.numpy()), name
        assert np.array_equal(stored.scales, part.scales.expand(stored.scales.shape).numpy()), name
    model = model_of(out / "model.tflite")
    assert len(model.subgraphs) == 2
    for name in found:
        buffers = {t.buffer for g in model.subgraphs for t in g.tensors if t.name.decode() == name}
        assert len(buffers) == 1


def test_a_changed_integer_is_found(tmp_path: Path) -> None:
    folder = quantized(save_wide(tmp_path / "ckpt", "glm-wide"), body(**INT4))
    out = exported(folder, tmp_path / "out")
    manifest, ckpt, name = read_export(out), Checkpoint.open(folder), "model.layers.1.mlp.down_proj"
    flip(out / "model.tflite", f"{name}.weight", 40)
    different = read_weights(out / "model.tflite")[f"{name}.weight"].q != (
        read_quantized(ckpt, f"{name}.weight").q.numpy()
    )
    assert different.sum() == 1
    with pytest.raises(ParityError, match=r"'block.1' of the written file differs"):
        check_decoder_parity(ckpt, out, manifest, TARGET, ExportOptions(), Silent())


def test_the_signatures_are_those_that_litert_lm_knows(tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "ckpt", "llama", max_position_embeddings=POSITIONS)
    model = model_of(exported(folder, tmp_path / "out", "last") / "model.tflite")
    names = {}
    for definition in model.signatureDefs:
        tensors = model.subgraphs[definition.subgraphIndex].tensors
        names[definition.signatureKey.decode()] = (
            {
                entry.name.decode(): tensors[entry.tensorIndex].shape.tolist()
                for entry in definition.inputs
            },
            {entry.name.decode() for entry in definition.outputs},
        )
    assert names.keys() == {"prefill_16", "prefill_128", "decode"}
    inputs, outputs = names["decode"]
    caches = {f"kv_cache_{kind}_{index}" for kind in "kv" for index in range(2)}
    assert inputs.keys() == {"tokens", "input_pos"} | caches
    assert inputs["kv_cache_k_0"] == [1, 2, slots_of(POSITIONS), 16]
    assert outputs == {"logits"} | caches
    assert names["prefill_16"][1] == caches
    assert names["prefill_16"][0]["tokens"] == [1, 16]


def test_prompt_lengths() -> None:
    assert prefills_of(8) == [8]
    assert prefills_of(64) == [16]
    assert prefills_of(128) == [16, 128]
    assert slots_of(64) == 79


@pytest.mark.parametrize(
    ("schemes", "reason"),
    [
        (body(bits=8, activation="static"), "static activations are for encoders"),
        (body(bits=4, group_size=32), "activation: dynamic_block"),
        (body(**(INT8 | {"symmetric": False})), "zero points"),
    ],
)
def test_refusals(schemes: dict[str, TensorScheme], reason: str, tmp_path: Path) -> None:
    folder = quantized(save_wide(tmp_path / "ckpt", "llama"), schemes)
    reasons = TARGET.supports(Checkpoint.open(folder), ExportOptions())
    assert len(reasons) == 1
    assert reason in reasons[0]


def test_an_int8_cache_is_refused(tmp_path: Path) -> None:
    ckpt = Checkpoint.open(save_wide(tmp_path / "ckpt", "llama"))
    manifest = ckpt.manifest.model_copy(update={"cache": CacheScheme()})
    write_json(ckpt.path / MANIFEST, manifest)
    reasons = TARGET.supports(Checkpoint.open(ckpt.path), ExportOptions())
    assert ["an INT8 cache" in reason for reason in reasons] == [True]


# --- the session ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ckpt` with float activations, and its exports `last/litert` and `all/litert`."""
    root = tmp_path_factory.mktemp("decoder")
    folder = save_wide(root / "ckpt", "glm-half-bias", max_position_embeddings=POSITIONS)
    quantized(folder, body(bits=8))
    for name in ("last", "all"):
        exported(folder, root / name, name)
    return root


@pytest.fixture(params=["last", "all"])
def session(root: Path, request: pytest.FixtureRequest) -> DecoderSession:
    return open_decoder(root / request.param / "litert", ONE)


def same(a: object, b: object) -> bool:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) < 1e-4


def test_info(root: Path) -> None:
    info = open_decoder(root / "last" / "litert", ONE).info
    assert (info.runtime, info.kind, info.output) == ("litert", "decoder", "logits")
    assert (info.max_length, info.vocab_size, info.threads) == (POSITIONS, 96, 1)
    assert (info.bos_id, info.eos_ids, info.scores) == (1, (2, 5), "last")


def test_prompt_and_steps_equal_the_checkpoint(session: DecoderSession, root: Path) -> None:
    """Pieces of any length, up to the last position, where padding must not harm the cache."""
    wanted = open_decoder(root / "ckpt", ONE).score(TEXT.tolist())
    at = 0
    for count in (7, 1, 150, 2):
        logits = session.prefill(TEXT[at : at + count].tolist())
        at += count
        assert logits.shape == (96,)
        assert same(logits, wanted[at - 1])
    for token in TEXT[at:197]:
        at += 1
        assert same(session.step(int(token)), wanted[at - 1])
    assert same(session.prefill(TEXT[197:].tolist()), wanted[-1])
    assert session.length == POSITIONS
    with pytest.raises(UsageError, match="the cache holds 200"):
        session.step(7)


def test_rewind_fork_and_score(session: DecoderSession, root: Path) -> None:
    wanted = open_decoder(root / "ckpt", ONE).score(TEXT[:40].tolist())
    session.prefill(TEXT[:30].tolist())
    other = session.fork()
    session.rewind(10)
    assert (session.length, other.length) == (20, 30)
    assert same(session.step(int(TEXT[20])), wanted[20])
    assert same(other.prefill(TEXT[30:40].tolist()), wanted[39])
    assert same(session.score(TEXT[:40].tolist()), wanted)
    assert session.length == 21
    with pytest.raises(UsageError, match="cannot rewind 22"):
        session.rewind(22)
    session.close()


def test_contexts(root: Path) -> None:
    short = open_decoder(root / "last" / "litert", RunOptions(threads=1, context=10))
    assert short.info.max_length == 10
    with pytest.raises(UsageError, match="the cache holds 10"):
        short.prefill(TEXT[:11].tolist())
    with pytest.raises(UsageError, match="holds 200"):
        open_decoder(root / "last" / "litert", RunOptions(context=201))


def test_a_manifest_without_its_logits(root: Path, tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes((root / "last/litert/model.tflite").read_bytes())
    manifest = read_export(root / "last" / "litert").model_copy(update={"logits": None})
    write_json(tmp_path / EXPORT, manifest)
    with pytest.raises(CheckpointError, match="does not say which logits"):
        open_decoder(tmp_path)


def test_a_broken_file_and_a_quiet_one(root: Path, tmp_path: Path) -> None:
    """LiteRT itself would name the accelerators that it looks for."""
    out = root / "last" / "litert"
    code = f"from pocketglm.runtimes import *; open_decoder(Path('{out}')).prefill([7, 8])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    (tmp_path / EXPORT).write_bytes((out / EXPORT).read_bytes())
    (tmp_path / "model.tflite").write_bytes(b"\0" * (out / "model.tflite").stat().st_size)
    with pytest.raises(CheckpointError, match="LiteRT cannot open"):
        open_decoder(tmp_path)


# --- LiteRT-LM -----------------------------------------------------------------------------------


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    session = open_decoder(folder, ONE)
    logits, found = session.prefill(ids), []
    for _ in range(count):
        found.append(int(logits.argmax()))
        logits = session.step(found[-1])
    return found


@pytest.mark.parametrize("form", ["int8, float inputs", "int4"])
def test_litert_lm_writes_what_pytorch_does(form: str, tmp_path: Path) -> None:
    """The real runtime, over the bundle. With float activations its tokens are PyTorch's on the
    dequantized weights; INT4's are those of our session (its int8 inputs are rounded alike).
    """
    lm: Any = pytest.importorskip("litert_lm", reason=REASON)
    lm.set_min_log_severity(lm.LogSeverity.FATAL)
    stop = 3
    folder = save_chat_decoder(tmp_path / "ckpt", positions=96, eos_token_id=[stop])
    schemes = body(bits=8) if form != "int4" else {EMBEDDING: TensorScheme(bits=8), **body(**INT4)}
    out = exported(quantized(folder, schemes), tmp_path / "out", "last")
    tokenizer = Tokenizer.load(out)
    (tmp_path / "cache").mkdir()
    backend = lm.Backend.CPU(thread_count=1)
    path = str(out / "model.litertlm")
    with lm.Engine(path, backend=backend, cache_dir=str(tmp_path / "cache")) as engine:
        for text in ("hi", "set an alarm for seven, please"):
            ids = tokenizer.encode([text], 96).ids[0].tolist()
            wanted = greedy(out if form == "int4" else folder, ids, 95 - len(ids))
            if stop in wanted:
                wanted = wanted[: wanted.index(stop)]
            with engine.create_session() as session:
                session.run_prefill([text])
                written = session.run_decode().texts[0]
            expected = tokenizer.inner.decode(wanted, skip_special_tokens=False)
            assert len(expected) > 20
            # What ends in the middle of a character, it leaves out.
            assert written.rstrip("\ufffd").startswith(expected.rstrip("\ufffd")[:-2])


def test_the_bundle_is_the_same_each_time_and_needs_a_stop_token(tmp_path: Path) -> None:
    folder = save_chat_decoder(tmp_path / "ckpt", eos_token_id=[3])
    bundles = [exported(folder, tmp_path / n, "last") / "model.litertlm" for n in ("a", "b")]
    assert bundles[0].read_bytes() == bundles[1].read_bytes()
    endless = save_chat_decoder(tmp_path / "endless")
    out = exported(endless, tmp_path / "c", "last")
    assert not (out / "model.litertlm").exists()
    assert "model.litertlm" in read_export(bundles[0].parent).files
