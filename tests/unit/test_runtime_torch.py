"""Opening checkpoints as sessions: numpy in and out, threads, info, and errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pocketglm import registry
from pocketglm.artifacts.manifest import Manifest
from pocketglm.contracts import Ids, RunOptions
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.model.encoder import Encoder, init_encoder, with_classifier
from pocketglm.model.hf import save_encoder
from pocketglm.model.spec import EncoderSpec
from pocketglm.runtimes import open_encoder
from pocketglm.runtimes._cores import usable_cores

IDS: Ids = np.arange(12).reshape(2, 6)
MASK: Ids = np.array([[1] * 6, [1] * 4 + [0] * 2])


def saved(folder: Path, labels: list[str], manifest: Manifest | None = None) -> Encoder:
    model = init_encoder(EncoderSpec(50, 16, 2, 4, 24, max_position_embeddings=32), 1)
    if labels:
        model = with_classifier(model, len(labels), "mean", seed=2)
    save_encoder(model, folder, source=None, labels=labels, manifest=manifest or Manifest())
    return model


def expected(model: Encoder) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    with torch.inference_mode():
        result: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = model(
            torch.from_numpy(IDS), torch.from_numpy(MASK)
        ).numpy()
    return result


def test_classifier_session(tmp_path: Path) -> None:
    model = saved(tmp_path, ["a", "b", "c"], Manifest(max_length=16))
    session = open_encoder(tmp_path)
    assert session.info.runtime == "torch"
    assert session.info.threads == usable_cores()
    assert open_encoder(tmp_path, RunOptions(threads=3)).info.threads == 3
    assert (session.info.output, session.info.labels) == ("logits", ("a", "b", "c"))
    assert (session.info.max_length, session.info.pooling) == (16, "mean")
    logits = session.logits(IDS, MASK)
    assert isinstance(logits, np.ndarray)
    assert logits.dtype == np.float32
    assert logits.shape == (2, 3)
    assert np.abs(logits - expected(model)).max() < 1e-6


def test_embedding_session(tmp_path: Path) -> None:
    model = saved(tmp_path, [])
    session = open_encoder(tmp_path, RunOptions(threads=1))
    assert (session.info.output, session.info.labels) == ("sentence_embedding", ())
    assert session.info.max_length == 32
    vectors = session.logits(IDS, MASK)
    assert np.abs(vectors - expected(model)).max() < 1e-6
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-6)


def test_threads_are_those_asked_for_and_only_during_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, ["a", "b"])
    before = torch.get_num_threads()
    wanted = before + 1
    seen: list[int] = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: object, **kwargs: object) -> object:
        seen.append(torch.get_num_threads())
        return inner(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    session = open_encoder(tmp_path, RunOptions(threads=wanted))
    session.logits(IDS, MASK)
    assert seen == [wanted, wanted]
    assert torch.get_num_threads() == before


def test_other_integers_and_read_only_arrays_are_accepted(tmp_path: Path) -> None:
    saved(tmp_path, ["a", "b"])
    session = open_encoder(tmp_path)
    frozen = IDS.astype(np.int32)
    frozen.flags.writeable = False
    given: Ids = frozen  # type: ignore[assignment]
    assert np.array_equal(session.logits(given, MASK), session.logits(IDS, MASK))
    turned = np.asfortranarray(IDS)
    assert np.array_equal(session.logits(turned, MASK), session.logits(IDS, MASK))


@pytest.mark.parametrize("wrong", [50, -1])
def test_an_id_outside_the_vocabulary_is_an_error(tmp_path: Path, wrong: int) -> None:
    saved(tmp_path, ["a", "b"])
    ids = IDS.copy()
    ids[1, 2] = wrong
    session = open_encoder(tmp_path)
    with pytest.raises(UsageError, match=rf"token id {wrong} is outside .* \(50 ids\)") as error:
        session.logits(ids, MASK)
    assert "tokenizer" in error.value.hint


def test_a_row_beyond_the_positions_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, ["a", "b"])
    long = np.zeros((1, 33), np.int64)
    with pytest.raises(UsageError, match="33 tokens in a row, the model has 32 positions"):
        open_encoder(tmp_path).logits(long, np.ones_like(long))


def test_close_frees_the_model(tmp_path: Path) -> None:
    saved(tmp_path, ["a", "b"])
    session = open_encoder(tmp_path)
    session.close()
    with pytest.raises(AttributeError):
        session.logits(IDS, MASK)


def test_an_export_is_not_opened_as_a_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, ["a", "b"])
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"export.json is not an export manifest"):
        open_encoder(tmp_path)


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not download"):
        open_encoder(Path("someone/model"))
    with pytest.raises(UsageError, match="does not exist"):
        open_encoder(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        open_encoder(tmp_path)


def test_the_runtime_is_found_by_its_name() -> None:
    assert "torch" in registry.names("runtimes")
    assert registry.load("runtimes", "torch").summary
