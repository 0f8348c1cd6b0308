"""A decoder checkpoint as a session: the logits of transformers, the text it holds, its limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_decoder import BASE, save_tiny_decoder, tiny

from pocketglm.contracts import DecoderSession, Floats, RunOptions
from pocketglm.errors import UsageError
from pocketglm.runtimes import open_decoder, open_encoder
from pocketglm.runtimes._cores import usable_cores

IDS = [7, 3, 90, 41, 41, 12, 8]
LIMIT = BASE["max_position_embeddings"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_decoder(tmp_path_factory.mktemp("torch") / "glm", "glm-half-bias")


@pytest.fixture
def session(folder: Path) -> DecoderSession:
    return open_decoder(folder, RunOptions(threads=1))


def theirs(ids: list[int]) -> Floats:
    with torch.inference_mode():
        logits: Floats = tiny("glm-half-bias")(torch.tensor([ids])).logits[0].numpy()
    return logits


def test_info(folder: Path, session: DecoderSession) -> None:
    info = session.info
    assert (info.kind, info.runtime, info.output, info.scores) == (
        "decoder", "torch", "logits", "all",
    )  # fmt: skip
    assert (info.vocab_size, info.max_length, info.bos_id) == (96, LIMIT, 1)
    assert info.eos_ids == (2, 5)
    assert info.threads == 1
    assert open_decoder(folder).info.threads == usable_cores()


def test_logits_are_those_of_transformers(session: DecoderSession) -> None:
    expected = theirs(IDS)
    logits = session.prefill(IDS[:4])
    assert isinstance(logits, np.ndarray)
    assert logits.dtype == np.float32
    assert logits.shape == (96,)
    assert np.abs(logits - expected[3]).max() < 1e-4
    for position in (4, 5):
        assert np.abs(session.step(IDS[position]) - expected[position]).max() < 1e-4
    assert session.length == 6
    assert np.abs(session.prefill(np.array(IDS[6:])) - expected[6]).max() < 1e-4  # type: ignore[arg-type]


def test_score_is_every_position_and_leaves_the_text_alone(session: DecoderSession) -> None:
    session.prefill(IDS[:2])
    scores = session.score(IDS)
    assert scores.shape == (7, 96)
    assert np.abs(scores - theirs(IDS)).max() < 1e-4
    assert session.length == 2
    assert np.abs(session.step(IDS[2]) - theirs(IDS)[2]).max() < 1e-4


def test_rewind_forgets(session: DecoderSession) -> None:
    session.prefill([*IDS[:3], 60, 61])
    session.rewind(2)
    assert session.length == 3
    assert np.abs(session.step(IDS[3]) - theirs(IDS)[3]).max() < 1e-4
    session.rewind(4)
    assert session.length == 0
    assert np.abs(session.prefill(IDS) - theirs(IDS)[-1]).max() < 1e-4
    for count in (8, -1):
        with pytest.raises(UsageError, match=f"cannot rewind {count} tokens, the text has 7"):
            session.rewind(count)


def test_a_fork_goes_its_own_way(session: DecoderSession) -> None:
    session.prefill(IDS[:3])
    fork = session.fork()
    fork.prefill([9, 9])
    assert (session.length, fork.length) == (3, 5)
    assert np.abs(session.step(IDS[3]) - theirs(IDS)[3]).max() < 1e-4
    assert np.abs(fork.step(4) - theirs([*IDS[:3], 9, 9, 4])[-1]).max() < 1e-4
    session.close()
    assert fork.step(4).shape == (96,)


def test_a_text_that_is_too_long_changes_nothing(folder: Path) -> None:
    session = open_decoder(folder, RunOptions(threads=1, context=8))
    assert session.info.max_length == 8
    session.prefill(IDS)
    with pytest.raises(UsageError, match="9 tokens of text, the cache holds 8") as error:
        session.prefill([1, 1])
    assert "context" in error.value.hint
    assert session.length == 7
    session.step(1)
    with pytest.raises(UsageError, match="9 tokens"):
        session.step(1)
    with pytest.raises(UsageError, match="9 tokens of text, the cache holds 8"):
        session.score([1] * 9)


@pytest.mark.parametrize("wrong", [96, -1])
def test_an_id_outside_of_the_vocabulary(session: DecoderSession, wrong: int) -> None:
    with pytest.raises(UsageError, match=rf"token id {wrong} is outside .* \(96 ids\)"):
        session.prefill([3, wrong, 4])
    with pytest.raises(UsageError, match=f"token id {wrong}"):
        session.score([wrong])
    assert session.length == 0


def test_no_token(session: DecoderSession) -> None:
    with pytest.raises(UsageError, match="no token"):
        session.prefill([])


@pytest.mark.parametrize("asked", [LIMIT + 1, 0])
def test_a_context_that_the_model_does_not_have(folder: Path, asked: int) -> None:
    with pytest.raises(UsageError, match=f"context of {asked} tokens .* holds {LIMIT}") as error:
        open_decoder(folder, RunOptions(context=asked))
    assert f"--context {LIMIT}" in error.value.hint


def test_threads_are_put_back(folder: Path) -> None:
    before = torch.get_num_threads()
    session = open_decoder(folder, RunOptions(threads=before + 1))
    assert np.abs(session.prefill(IDS) - theirs(IDS)[-1]).max() < 1e-4
    assert torch.get_num_threads() == before


def test_a_decoder_is_no_encoder(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a decoder"):
        open_encoder(folder)


def test_close_frees_the_model(session: DecoderSession) -> None:
    session.close()
    with pytest.raises(AttributeError):
        session.prefill(IDS)
