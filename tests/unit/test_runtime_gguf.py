"""runtimes/gguf: without llama-cpp-python it says what to install; with it, it is as PyTorch."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from chat_decoder import edit
from gguf_models import IDS, save_bpe_decoder

from pocketglm.contracts import DecoderSession, ExportOptions, RunOptions
from pocketglm.errors import CheckpointError, MissingExtraError, UsageError
from pocketglm.runtimes import open_decoder, open_session
from pocketglm.stages._measure import sample
from pocketglm.stages.export import export

INSTALLED = importlib.util.find_spec("llama_cpp") is not None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in float32 and its export."""
    folder = save_bpe_decoder(tmp_path_factory.mktemp("gguf") / "m", "llama")
    out = folder.with_name("out")
    (result,) = export(folder, ["gguf"], out, options=ExportOptions(threads=1)).targets
    assert result.ok, result.error
    assert result.parity
    assert result.parity.scope == ("whole" if INSTALLED else "blocks")
    return folder, out / "gguf"


@pytest.mark.skipif(INSTALLED, reason="llama-cpp-python is installed")
def test_a_missing_package_is_named(model: tuple[Path, Path]) -> None:
    with pytest.raises(MissingExtraError) as error:
        open_session(model[1])
    assert error.value.hint == "pip install 'pocketglm[llama]'"


def test_timing_takes_the_vocabulary_from_the_export(model: tuple[Path, Path]) -> None:
    ids, mask = sample(model[1], 2, 400)
    assert (ids.shape, int(mask.sum())) == ((2, 400), 800)
    assert 300 < ids.max() < 426


def test_another_folder_is_refused(tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m", "llama")
    with pytest.raises(CheckpointError, match="is not an export"):
        open_session(folder, runtime="gguf")


def test_an_export_for_another_runtime_is_refused(model: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(model[1], tmp_path / "copy")
    edit(tmp_path / "copy" / "export.json", runtime="onnx")
    with pytest.raises(UsageError, match="is no GGUF export"):
        open_session(tmp_path / "copy", runtime="gguf")


@pytest.mark.skipif(not INSTALLED, reason="llama-cpp-python is not installed")
def test_a_session_is_pytorchs_equal(model: tuple[Path, Path]) -> None:
    options = RunOptions(threads=1)
    torch_session = open_decoder(model[0], options)
    session: DecoderSession = open_decoder(model[1], options)
    wanted = torch_session.score(IDS)
    np.testing.assert_allclose(session.score(IDS), wanted, atol=1e-4)
    np.testing.assert_allclose(session.prefill(IDS[:6]), wanted[5], atol=1e-4)
    np.testing.assert_allclose(session.step(IDS[6]), wanted[6], atol=1e-4)
    session.rewind(3)
    other = session.fork()
    np.testing.assert_allclose(other.prefill(IDS[4:]), wanted[-1], atol=1e-4)
    other.close()
    assert session.length == 4
    np.testing.assert_allclose(session.prefill(IDS[4:]), wanted[-1], atol=1e-4)
    with pytest.raises(UsageError, match="the cache holds 64"):
        session.prefill([1] * 60)
    session.close()
