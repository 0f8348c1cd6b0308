"""Decoder exports in plain ONNX Runtime: the session's promises, and folders that are broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_export import body, quantized, save_wide

from pocketglm.artifacts.export import EXPORT, read_export
from pocketglm.artifacts.manifest import write_json
from pocketglm.contracts import DecoderSession, ExportOptions, Ids, RunOptions
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.runtimes import open_decoder, open_encoder
from pocketglm.stages.export import export

POSITIONS = 600
TEXT: Ids = np.random.default_rng(3).integers(6, 96, POSITIONS)
ONE = RunOptions(threads=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ckpt` and its exports: `last/onnx` and `all/onnx`."""
    root = tmp_path_factory.mktemp("decoder")
    folder = save_wide(root / "ckpt", "glm-half-bias", max_position_embeddings=POSITIONS)
    quantized(folder, body(bits=4, group_size=32))
    for name in ("last", "all"):
        options = ExportOptions(logits="all" if name == "all" else "last", threads=1)
        entry = export(folder, ["onnx"], root / name, options=options).targets[0]
        assert entry.ok, entry.error
    return root


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "last" / "onnx", tmp_path / "copy"))


@pytest.fixture(params=["last", "all"])
def session(root: Path, request: pytest.FixtureRequest) -> DecoderSession:
    return open_decoder(root / request.param / "onnx", ONE)


def same(a: object, b: object) -> bool:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) < 1e-4


def test_info(root: Path) -> None:
    info = open_decoder(root / "last" / "onnx").info
    assert (info.runtime, info.kind, info.output) == ("onnx", "decoder", "logits")
    assert (info.max_length, info.vocab_size, info.threads) == (POSITIONS, 96, 1)
    assert (info.bos_id, info.eos_ids, info.scores) == (1, (2, 5), "last")
    assert info.activation == "none"
    assert open_decoder(root / "all" / "onnx", RunOptions(threads=2)).info.scores == "all"
    assert open_decoder(root / "all" / "onnx", RunOptions(threads=2)).info.threads == 2


def test_prompt_and_steps_equal_the_checkpoint(session: DecoderSession, root: Path) -> None:
    """Past the first buffer, so it has grown; pieces of any length."""
    wanted = open_decoder(root / "ckpt", ONE).score(TEXT[:420].tolist())
    assert session.length == 0
    at = 0
    for count in (7, 1, 240, 150):
        logits = session.prefill(TEXT[at : at + count].tolist())
        at += count
        assert logits.shape == (96,)
        assert logits.dtype == np.float32
        assert same(logits, wanted[at - 1])
    for token in TEXT[at:420]:
        at += 1
        assert same(session.step(int(token)), wanted[at - 1])
    assert session.length == 420


def test_results_stay_as_they_were_returned(session: DecoderSession) -> None:
    first = session.prefill([7, 8, 9])
    kept = first.copy()
    session.step(10)
    assert np.array_equal(first, kept)


def test_rewind_forgets(session: DecoderSession, root: Path) -> None:
    reference = open_decoder(root / "ckpt", ONE)
    session.prefill(TEXT[:300].tolist())
    session.rewind(280)
    assert session.length == 20
    wanted = reference.score([*TEXT[:20], 50, 51])
    assert same(session.prefill([50, 51]), wanted[-1])
    session.rewind(22)
    assert same(session.step(50), reference.score([50])[0])
    with pytest.raises(UsageError, match="cannot rewind 2 tokens, the text has 1"):
        session.rewind(2)


def test_forks_go_their_own_ways(session: DecoderSession, root: Path) -> None:
    reference = open_decoder(root / "ckpt", ONE)
    session.prefill(TEXT[:30].tolist())
    other = session.fork()
    assert other.length == 30
    mine, theirs = session.step(40), other.step(41)
    assert same(mine, reference.score([*TEXT[:30], 40])[-1])
    assert same(theirs, reference.score([*TEXT[:30], 41])[-1])
    other.close()
    assert same(session.step(42), reference.score([*TEXT[:30], 40, 42])[-1])


def test_score_is_of_a_text_of_its_own(session: DecoderSession, root: Path) -> None:
    reference = open_decoder(root / "ckpt", ONE)
    session.prefill(TEXT[:10].tolist())
    found = session.score(TEXT[100:120].tolist())
    assert found.shape == (20, 96)
    assert found.dtype == np.float32
    assert same(found, reference.score(TEXT[100:120].tolist()))
    assert session.length == 10
    assert same(session.step(33), reference.score([*TEXT[:10], 33])[-1])


def test_the_whole_context_can_be_filled(session: DecoderSession, root: Path) -> None:
    reference = open_decoder(root / "ckpt", ONE)
    wanted = reference.prefill(TEXT.tolist())
    session.prefill(TEXT[:-1].tolist())
    assert same(session.step(int(TEXT[-1])), wanted)
    with pytest.raises(UsageError, match="601 tokens of text, the cache holds 600"):
        session.step(7)
    assert session.length == POSITIONS


def test_the_context_can_be_shorter_than_the_files(root: Path) -> None:
    session = open_decoder(root / "last" / "onnx", RunOptions(threads=1, context=5))
    assert session.info.max_length == 5
    session.prefill([7, 8, 9])
    with pytest.raises(UsageError, match="6 tokens of text, the cache holds 5"):
        session.prefill([7, 8, 9])
    assert session.length == 3
    assert session.fork().info.max_length == 5
    with pytest.raises(UsageError, match="holds 5"):
        session.score(TEXT[:6].tolist())


def test_a_longer_context_needs_another_export(root: Path) -> None:
    with pytest.raises(UsageError, match="context of 601 tokens") as caught:
        open_decoder(root / "last" / "onnx", RunOptions(context=601))
    assert "--max-length 601" in caught.value.hint


@pytest.mark.parametrize("token", [-1, 96])
def test_ids_outside_the_vocabulary_are_refused(token: int, session: DecoderSession) -> None:
    for call in (session.prefill, session.score):
        with pytest.raises(UsageError, match=f"token id {token} is outside"):
            call([7, token])
    with pytest.raises(UsageError, match=f"token id {token} is outside"):
        session.step(token)
    assert session.length == 0
    with pytest.raises(UsageError, match="no token"):
        session.prefill([])


@pytest.mark.parametrize(
    "options", [RunOptions(threads=2, spinning=True), RunOptions(threads=1, optimize=False)]
)
def test_options_do_not_change_the_result(options: RunOptions, root: Path) -> None:
    folder = root / "last" / "onnx"
    wanted = open_decoder(folder, ONE).prefill(TEXT[:9].tolist())
    assert same(open_decoder(folder, options).prefill(TEXT[:9].tolist()), wanted)


def test_a_decoder_is_no_encoder(root: Path) -> None:
    with pytest.raises(UsageError, match="is a decoder"):
        open_encoder(root / "last" / "onnx")


def test_files_that_are_missing_or_cut_are_named(copy: Path) -> None:
    data = copy / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.onnx\.data has \d+ bytes, it was exported"):
        open_decoder(copy)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"model\.onnx\.data is missing"):
        open_decoder(copy)
    data.write_bytes(whole)
    assert open_decoder(copy).step(7).shape == (96,)
    (copy / "model.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"model\.onnx is missing"):
        open_decoder(copy)


def test_a_manifest_without_its_fields_is_refused(copy: Path) -> None:
    write_json(copy / EXPORT, read_export(copy).model_copy(update={"logits": None}))
    with pytest.raises(CheckpointError, match="does not say which logits"):
        open_decoder(copy)


def test_no_torch_is_needed(root: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pocketglm.runtimes import open_decoder\n"
        f"open_decoder(Path({str(root / 'last' / 'onnx')!r})).prefill([7, 8])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
