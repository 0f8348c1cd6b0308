"""Sessions on Core ML exports, computed by the reference evaluator, and the reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coreml_models import (
    SLOTS,
    STATES,
    D,
    TinyDecoder,
    TinyEncoder,
    V,
    build,
    convert,
    convert_encoder,
    torch_logits,
    two_functions,
)

from pocketglm.artifacts.export import EXPORT, ExportManifest, Parity, list_files
from pocketglm.artifacts.manifest import write_json
from pocketglm.contracts import DataOptions, DecoderSession, RunOptions
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.eval._evaluate import evaluate
from pocketglm.runtimes import _coreml_program, open_decoder, open_encoder
from pocketglm.runtimes._coreml_eval import Evaluator
from pocketglm.runtimes._coreml_file import read_package
from pocketglm.stages.bench import bench

pytest.importorskip("coremltools")

PROMPT, CONTEXT = 4, SLOTS - 3  # the padding of the last prompt has room
IDS = (3, 17, 39, 5, 5, 0, 21, 8)
MODEL = "model.mlpackage"


def manifest(folder: Path, **over: Any) -> None:
    """An `export.json` of what is in the folder."""
    fields: dict[str, Any] = {
        "target": "coreml",
        "runtime": "coreml",
        "kind": "decoder",
        "output": "logits",
        "precision": "fp16",
        "model_file": MODEL,
        "inputs": [],
        "outputs": [],
        "max_length": CONTEXT,
        "vocab_size": V,
        "tokenizer_sha256": "",
        "operators": {},
        "checkpoint": "",
        "eos_ids": [2],
        "parity": Parity(
            scope="whole", n=1, output_max_abs=0, output_std=1, tolerance=1, agreement=1
        ),
        "files": list_files(folder),
    }
    write_json(folder / EXPORT, ExportManifest(**(fields | over)).model_dump(mode="json"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of decoders with logits of the `last` token or of `all`."""
    root = tmp_path_factory.mktemp("coreml")
    for name in ("last", "all"):
        folder, made = root / name, root / f"parts-{name}"
        folder.mkdir()
        made.mkdir()
        two_functions(made / MODEL, PROMPT, every=name == "all")
        shutil.move(made / MODEL, folder / MODEL)
        manifest(folder, logits=name)
    return root


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "last", tmp_path / "copy"))


@pytest.fixture(params=["last", "all"])
def session(root: Path, request: pytest.FixtureRequest) -> DecoderSession:
    return open_decoder(root / request.param)


def near(found: Any, wanted: Any, limit: float = 5e-3) -> bool:
    return float(np.abs(found - wanted).max()) < limit


# --- decoders -----------------------------------------------------------------------------------


def test_info(root: Path) -> None:
    info = open_decoder(root / "last").info
    assert (info.runtime, info.kind, info.output, info.scores) == (
        "coreml",
        "decoder",
        "logits",
        "last",
    )
    assert (info.max_length, info.vocab_size, info.eos_ids) == (CONTEXT, V, (2,))
    assert open_decoder(root / "all", RunOptions(context=5)).info.max_length == 5


@pytest.mark.parametrize("count", [1, PROMPT, PROMPT + 1, len(IDS)])
def test_prompts_of_any_length(session: DecoderSession, count: int) -> None:
    wanted = torch_logits(IDS)
    assert near(session.prefill(IDS[:count]), wanted[count - 1])
    assert session.length == count
    for place in range(count, len(IDS)):
        assert near(session.step(IDS[place]), wanted[place])


def test_float32_is_closer(root: Path) -> None:
    exact = open_decoder(root / "last", RunOptions(optimize=False)).prefill(IDS)
    half = open_decoder(root / "last").prefill(IDS)
    assert near(exact, torch_logits(IDS)[-1], 1e-3)
    assert not np.array_equal(exact, half)


def test_rewind_and_fork(session: DecoderSession) -> None:
    session.prefill(IDS)
    session.rewind(3)
    other = session.fork()
    first = session.step(9)
    assert near(first, torch_logits([*IDS[:5], 9])[-1])
    assert near(other.prefill(IDS[5:]), torch_logits(IDS)[-1])
    assert (session.length, other.length) == (6, 8)
    with pytest.raises(UsageError, match="cannot rewind 7 tokens"):
        session.rewind(7)


def test_score_leaves_the_text_alone(session: DecoderSession) -> None:
    session.prefill(IDS[:2])
    assert near(session.score(IDS), torch_logits(IDS))
    assert session.length == 2
    assert near(session.step(IDS[2]), torch_logits(IDS)[2])


def test_a_full_cache(session: DecoderSession) -> None:
    session.prefill([1] * CONTEXT)
    with pytest.raises(UsageError, match=f"the cache holds {CONTEXT}"):
        session.step(1)
    session.close()


def test_functions_share_their_weights(root: Path) -> None:
    package = read_package(root / "last" / MODEL)
    first = Evaluator(package, "decode")
    held = {key: id(value) for key, value in package.shared.items()}
    assert len(held) > 8  # an embedding, four layers and their biases
    second = Evaluator(package, "prefill")
    assert {key: id(value) for key, value in package.shared.items() if key in held} == held
    assert len(package.shared) < len(held) + 4  # beside weights, what only one of them has
    del first, second
    assert not package.shared  # nothing stays when the evaluators are gone


def test_bench_refuses_to_time_the_evaluator(root: Path) -> None:
    with pytest.raises(Exception, match="computed here by its runtime's reference evaluator"):
        bench(root / "last", tokens=2, new_tokens=1, runs=1)


# --- broken folders -----------------------------------------------------------------------------


def test_a_changed_file(copy: Path) -> None:
    file = copy / MODEL / "Data/com.apple.CoreML/weights/weight.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"weight\.bin has \d+ bytes, it was exported with"):
        open_decoder(copy)


def test_a_flipped_nibble_is_not_scored(copy: Path, tmp_path: Path) -> None:
    file = copy / MODEL / "Data/com.apple.CoreML/weights/weight.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"weight\.bin is not the file that was exported \(sha256"
    ):
        evaluate(copy, "lm", DataOptions(tmp_path))


def test_a_missing_package(copy: Path) -> None:
    shutil.rmtree(copy / MODEL)
    with pytest.raises(CheckpointError, match="is missing"):
        open_decoder(copy)


def test_an_export_that_does_not_say_its_logits(copy: Path) -> None:
    manifest(copy, logits=None)
    with pytest.raises(CheckpointError, match="does not say which logits"):
        open_decoder(copy)


def test_an_output_of_another_name(copy: Path) -> None:
    manifest(copy, logits="last", output="scores")
    with pytest.raises(CheckpointError, match="has no output scores"):
        open_decoder(copy)


def replaced(copy: Path, **options: Any) -> Path:
    """The export with one converted function, `main`."""
    shutil.rmtree(copy / MODEL)
    convert(TinyDecoder(options.pop("write", "slice")), copy / MODEL, **options)
    manifest(copy, logits="last")
    return copy


def test_a_cache_that_is_never_written(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="the write was dropped"):
        open_decoder(replaced(copy, write="index_put"))


def test_a_cache_that_is_no_state(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="writes into a constant"):
        open_decoder(replaced(copy, states=False))


def test_a_package_without_decode(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="has no function decode"):
        open_decoder(replaced(copy))


# --- encoders -----------------------------------------------------------------------------------

TABLE = np.random.default_rng(2).standard_normal((V, 6)).astype(np.float32)


def encoder(folder: Path, size: Any, **over: Any) -> Path:
    """Means of the rows of a table: ids and mask [1, S] -> [1, 6]."""
    folder.mkdir()

    def function(mb: Any, types: Any, input_ids: Any, attention_mask: Any) -> Any:
        mask = mb.expand_dims(x=mb.cast(x=attention_mask, dtype="fp32"), axes=[2])
        rows = mb.mul(x=mb.gather(x=TABLE, indices=input_ids, axis=0), y=mask)
        total = mb.reduce_sum(x=rows, axes=[1], keep_dims=False)
        count = mb.reduce_sum(x=mask, axes=[1], keep_dims=False)
        return [mb.real_div(x=total, y=count, name="sentence_embedding")]

    ports = dict.fromkeys(("input_ids", "attention_mask"), ((1, size), "int32"))
    build(folder / MODEL, function, ports)
    manifest(folder, kind="encoder", output="sentence_embedding", max_length=7, **over)
    return folder


def test_an_encoder_of_fixed_length(tmp_path: Path) -> None:
    session = open_encoder(encoder(tmp_path / "fixed", 7))
    ids = np.array([[3, 4, 5, 0], [9, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = session.logits(ids, mask)
    assert near(found, np.stack([TABLE[3:6].mean(0), TABLE[9]]), 1e-6)
    with pytest.raises(UsageError, match="8 tokens in a row"):
        session.logits(np.zeros((1, 8), int), np.ones((1, 8), int))
    with pytest.raises(UsageError, match=f"token id {V} is outside"):
        session.logits(np.full((1, 2), V), np.ones((1, 2), int))
    session.close()


@pytest.mark.parametrize("sizes", [None, (4, 7)])
def test_an_encoder_of_flexible_length(tmp_path: Path, sizes: tuple[int, ...] | None) -> None:
    convert_encoder(tmp_path / MODEL, sizes)
    manifest(tmp_path, kind="encoder", output="sentence_embedding", max_length=7)
    session = open_encoder(tmp_path)
    ids = np.array([[3, 4, 5, 6, 9, 8, 0], [9, 0, 0, 0, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        wanted = TinyEncoder()(torch.tensor(ids), torch.tensor(mask)).numpy()
    assert near(session.logits(ids, mask), wanted, 2e-3)
    port = Evaluator(read_package(tmp_path / MODEL)).inputs["input_ids"]
    assert port.type.shape == (1, None)
    assert port.shapes == (() if sizes is None else ((1, 4), (1, 7)))
    assert port.ranges == (((1, 1), (2, 7)) if sizes is None else ())
    assert [port.takes((1, size)) for size in (1, 4, 8)] == [False, True, False]


def test_an_encoder_with_an_input_of_another_name(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    build(folder / MODEL, lambda mb, types, x: [mb.relu(x=x)], {"x": ((1, 7), "fp32")})
    manifest(folder, kind="encoder")
    with pytest.raises(CheckpointError, match="has no input input_ids"):
        open_encoder(folder)


# --- the reader ---------------------------------------------------------------------------------


def test_the_reader_agrees_with_coremltools(root: Path) -> None:
    """Same operations as in its messages; same constants as its reader finds."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    path = root / "last" / MODEL
    spec = ct.models.utils.load_spec(str(path))
    package = read_package(path)
    assert package.version == spec.specificationVersion == 9
    assert set(package.functions) == set(spec.mlProgram.functions) == {"prefill", "decode"}
    assert package.default == "decode"
    for name, function in package.functions.items():
        message = spec.mlProgram.functions[name]
        operations = message.block_specializations[message.opset].operations
        assert [op.type for op in function.operations] == [op.type for op in operations]
        outputs = [n for op in operations for n in ((o.name) for o in op.outputs)]
        assert [n for op in function.operations for n, _ in op.outputs] == outputs
        assert set(function.states) == set(STATES)
    program = load(spec, 9, str(path / "Data/com.apple.CoreML/weights"))
    constants = {
        op.outputs[0].name: op.outputs[0].val
        for op in program.functions["decode"].operations
        if op.op_type == "const"
    }
    ours = {op.name: op.value for op in package.function("decode").operations if op.value}
    compared = [name for name in constants if name in ours]
    assert len(compared) > 10
    for name in compared:
        np.testing.assert_array_equal(ours[name].read(), np.asarray(constants[name]), name)


def test_what_is_stored_can_be_read_by_name(root: Path) -> None:
    package = read_package(root / "last" / MODEL)
    name = next(op.name for op in package.function().operations if "tokens_weight" in op.name)
    table = package.stored(name)["val"]
    assert table.shape == (V, D)
    assert table.dtype == np.float16
    with pytest.raises(UsageError, match="stores no weight tokens"):
        package.stored("tokens")


def test_opening_needs_no_coremltools_and_no_torch(root: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path; from pocketglm.runtimes import open_decoder\n"
        f"s = open_decoder(Path({str(root / 'last')!r})); s.prefill([1, 2, 3])\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "coremltools", "transformers"} & set(json.loads(done.stdout))
    assert done.stderr == ""


def test_on_a_mac_core_ml_itself_is_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here coremltools can only say that it is no Mac; that it is asked shows that much."""
    monkeypatch.setattr(_coreml_program, "runs_here", lambda: True)
    with pytest.raises(Exception, match=r"only supported on macOS|Core ML Framework"):
        open_decoder(root / "last").prefill(IDS)
