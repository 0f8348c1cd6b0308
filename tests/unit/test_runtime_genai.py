"""onnxruntime-genai over our exports: the logits of the checkpoint, its threads, its limits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from chat_decoder import VOCAB, edit, save_chat_decoder
from tiny_encoder import save_tiny

from pocketglm import registry
from pocketglm.contracts import DecoderSession, ExportOptions, Floats, RunOptions
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.generate import Sampling, generate
from pocketglm.runtimes import open_decoder, open_session
from pocketglm.runtimes._cores import usable_cores
from pocketglm.stages.export import export

pytest.importorskip("onnxruntime_genai")
IDS = [7, 3, 90, 41, 41, 12, 8, 200]
ONE = RunOptions(threads=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and its exports with logits of the last token and of all."""
    folder = tmp_path_factory.mktemp("genai")
    save_chat_decoder(folder / "ckpt", eos_token_id=[1, 5])
    for logits in ("last", "all"):
        options = ExportOptions(threads=3, logits=logits)
        result = export(folder / "ckpt", ["onnx"], folder / logits, options=options)
        assert result.targets[0].ok, result.targets[0].error
    return folder


@pytest.fixture(params=["last", "all"])
def session(world: Path, request: pytest.FixtureRequest) -> DecoderSession:
    return open_decoder(world / request.param / "onnx", ONE, "genai")


@pytest.fixture(scope="module")
def theirs(world: Path) -> DecoderSession:
    return open_decoder(world / "ckpt", ONE)


def expected(theirs: DecoderSession, ids: list[int]) -> Floats:
    return theirs.score(ids)


def test_info(world: Path, session: DecoderSession) -> None:
    info = session.info
    assert (info.runtime, info.kind, info.output) == ("genai", "decoder", "logits")
    assert (info.max_length, info.vocab_size, info.eos_ids) == (64, VOCAB, (1, 5))
    assert info.bos_id is None
    assert open_decoder(world / "all" / "onnx", ONE, "genai").info.scores == "all"
    assert open_decoder(world / "last" / "onnx", ONE, "genai").info.scores == "last"


def test_logits_are_the_checkpoints(session: DecoderSession, theirs: DecoderSession) -> None:
    wanted = expected(theirs, IDS)
    first = session.prefill(IDS[:4])
    assert first.shape == (VOCAB,)
    assert first.dtype == np.float32
    assert np.abs(first - wanted[3]).max() < 1e-4
    assert np.abs(session.step(IDS[4]) - wanted[4]).max() < 1e-4
    assert np.abs(session.prefill(IDS[5:7]) - wanted[6]).max() < 1e-4
    assert session.length == 7


def test_score_leaves_the_text_alone(session: DecoderSession, theirs: DecoderSession) -> None:
    wanted = expected(theirs, IDS)
    session.prefill(IDS[:2])
    assert np.abs(session.score(IDS) - wanted).max() < 1e-4
    assert session.length == 2
    assert np.abs(session.step(IDS[2]) - wanted[2]).max() < 1e-4


def test_rewind_and_fork(session: DecoderSession, theirs: DecoderSession) -> None:
    wanted = expected(theirs, IDS)
    session.rewind(0)
    assert session.fork().length == 0
    session.prefill([*IDS[:3], 60, 61])
    session.rewind(2)
    fork = session.fork()
    assert np.abs(session.step(IDS[3]) - wanted[3]).max() < 1e-4
    assert (session.length, fork.length) == (4, 3)
    assert np.abs(fork.prefill([9, 9]) - expected(theirs, [*IDS[:3], 9, 9])[-1]).max() < 1e-4
    session.rewind(4)
    assert np.abs(session.prefill(IDS) - wanted[-1]).max() < 1e-4
    with pytest.raises(UsageError, match="cannot rewind 9 tokens, the text has 8"):
        session.rewind(9)
    session.close()
    assert fork.step(4).shape == (VOCAB,)


def test_a_call_that_was_broken_off_is_forgotten(
    session: DecoderSession, theirs: DecoderSession
) -> None:
    """Ctrl-C between genai's call and our note of it."""
    session.prefill(IDS[:3])
    session._generator.append_tokens(np.array([60, 61], np.int32))  # type: ignore[attr-defined]
    assert np.abs(session.step(IDS[3]) - expected(theirs, IDS)[3]).max() < 1e-4


def test_the_same_greedy_text_beyond_an_end_token(
    session: DecoderSession, theirs: DecoderSession
) -> None:
    sampling = Sampling(max_new_tokens=24)
    mine, wanted = (list(generate(s.fork(), [79, 80], sampling)) for s in (session, theirs))
    assert mine == wanted
    assert len(set(mine)) > 8
    session.prefill([7, 1, 5])  # an end in the middle of a text is a token as others are
    assert np.abs(session.step(8) - expected(theirs, [7, 1, 5, 8])[-1]).max() < 1e-4


def test_the_context(world: Path) -> None:
    folder = world / "last" / "onnx"
    session = open_decoder(folder, RunOptions(threads=1, context=8), "genai")
    assert session.info.max_length == 8
    session.prefill(IDS)
    with pytest.raises(UsageError, match="9 tokens of text, the cache holds 8"):
        session.step(1)
    assert session.length == 8
    with pytest.raises(UsageError, match=r"context of 65 tokens was asked for, .* holds 64"):
        open_decoder(folder, RunOptions(context=65), "genai")


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_an_id_outside_of_the_vocabulary(session: DecoderSession, wrong: int) -> None:
    with pytest.raises(UsageError, match=f"token id {wrong}"):
        session.prefill([3, wrong])


def more_threads(folder: Path, options: RunOptions) -> tuple[int, int]:
    """Threads that opening starts in this process, and what the session says."""
    before = len(os.listdir("/proc/self/task"))
    session = open_decoder(folder, options, "genai")
    return len(os.listdir("/proc/self/task")) - before, session.info.threads


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_threads_are_the_files_unless_the_caller_has_others(world: Path, tmp_path: Path) -> None:
    folder = world / "last" / "onnx"
    assert more_threads(folder, RunOptions()) == (2, 3)  # beside the caller's own
    assert more_threads(folder, RunOptions(threads=1)) == (0, 1)
    assert more_threads(folder, RunOptions(threads=4, spinning=True)) == (3, 4)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = tmp_path / "genai_config.json"
    text = config.read_text().replace('"intra_op_num_threads": 3,', "")
    config.unlink()
    config.write_text(text)
    assert more_threads(tmp_path, RunOptions()) == (usable_cores() - 1, usable_cores())


def test_without_the_optimizer(world: Path, theirs: DecoderSession) -> None:
    options = RunOptions(threads=1, optimize=False)
    session = open_decoder(world / "last" / "onnx", options, "genai")
    assert np.abs(session.prefill(IDS) - expected(theirs, IDS)[-1]).max() < 1e-4


def test_what_it_cannot_open(world: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an export"):
        open_session(world / "ckpt", ONE, "genai")
    encoder = save_tiny(tmp_path / "encoder")
    assert export(encoder, ["onnx"], tmp_path / "out").targets[0].ok
    with pytest.raises(UsageError, match="no ONNX export of a decoder"):
        open_session(tmp_path / "out" / "onnx", ONE, "genai")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (world / "last" / "onnx").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="cannot open") as error:
        open_session(broken, ONE, "genai")
    assert error.value.hint
    edit(broken / "genai_config.json", model={"type": "glm"})
    with pytest.raises(CheckpointError, match=r"onnxruntime-genai .* cannot open"):
        open_session(broken, ONE, "genai")


def test_the_runtime_is_found_by_its_name() -> None:
    assert "genai" in registry.names("runtimes")
    assert registry.load("runtimes", "genai").summary
