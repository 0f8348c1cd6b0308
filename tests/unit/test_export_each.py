"""`pocketglm export`: a process for every target; what a crash, a limit or Ctrl-C leaves."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_encoder import save_tiny
from tiny_export import save_wide

from pocketglm.artifacts.export import check_files, read_export
from pocketglm.artifacts.output import REQUEST, drop_unfinished
from pocketglm.artifacts.schemas import ExportResult
from pocketglm.contracts import ExportOptions
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.stages._memory import megabytes, parse_size
from pocketglm.stages.export import export
from pocketglm.stages.export_each import export_each

Started = subprocess.Popen[str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("each") / "tiny", max_length=24)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 million parameters, most of them in two blocks."""
    folder = tmp_path_factory.mktemp("each") / "wide"
    return save_wide(
        folder, "llama", hidden_size=768, intermediate_size=4096, head_dim=64, dtype=torch.bfloat16
    )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts `pocketglm export ... --out OUT --json`."""
    running: list[Started] = []

    def command(*arguments: object) -> Started:
        line = [sys.executable, "-m", "pocketglm", "export", *map(str, arguments)]
        running.append(
            subprocess.Popen(
                [*line, "--out", str(tmp_path / "out"), "--json"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return running[-1]

    yield command
    for process in running:
        process.kill()
        process.communicate()


def stopped_while_writing(process: Started, partial: Path) -> psutil.Process:
    """The target's process, held still while its folder is half written."""
    while not (partial / REQUEST).is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    (child,) = psutil.Process(process.pid).children()
    child.suspend()
    while child.status() != psutil.STATUS_STOPPED:
        time.sleep(0.002)
    assert partial.is_dir()
    return child


def ended(process: Started) -> tuple[int, Any, str]:
    """Exit code, the one JSON object, stderr."""
    out, err = process.communicate(timeout=120)
    return process.returncode, json.loads(out) if out else None, err


def test_the_same_files_as_in_one_process(tiny: Path, tmp_path: Path) -> None:
    result = export_each(tiny, ["onnx", "onnx"], tmp_path / "each")
    (entry,) = result.targets
    assert (entry.ok, entry.exit_code, entry.log, entry.hint) == (True, 0, None, "")
    assert entry.peak_memory is not None
    assert 100_000_000 < entry.peak_memory < 2_000_000_000
    (alone,) = export(tiny, ["onnx"], tmp_path / "alone").targets
    assert alone.peak_memory is None
    own = {"peak_memory": None, "out": alone.out}
    assert entry.model_copy(update=own) == alone
    each, one = (read_export(tmp_path / name / "onnx") for name in ("each", "alone"))
    assert each.request == one.request
    assert each.files == one.files
    (tmp_path / "each" / "onnx.log").write_text("of an earlier run")
    (again,) = export_each(tiny, ["onnx"], tmp_path / "each").targets
    assert (again.already_done, again.peak_memory) == (True, None)
    assert [f.name for f in (tmp_path / "each").iterdir()] == ["onnx"]


def test_what_is_wrong_with_the_command_comes_before_any_work(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no target named"):
        export_each(tiny, [], tmp_path / "out")
    with pytest.raises(UsageError, match="unknown target 'onyx'"):
        export_each(tiny, ["onnx", "onyx"], tmp_path / "out")
    with pytest.raises(CheckpointError):
        export_each(tmp_path, ["onnx"], tmp_path / "out")
    options = ExportOptions(max_length=10**6)
    with pytest.raises(UsageError, match="--max-length 1000000: the model has"):
        export_each(tiny, ["onnx"], tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_the_parent_loads_no_torch() -> None:
    code = "import sys, pocketglm.cli.export; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_crash_ends_its_target_alone(
    tiny: Path, tmp_path: Path, start: Callable[..., Started]
) -> None:
    """A segmentation fault in the middle of the work on the first of two targets."""
    pytest.importorskip("ai_edge_litert")
    process = start(tiny, "--target", "onnx,litert")
    child = stopped_while_writing(process, tmp_path / "out" / "onnx.partial")
    child.send_signal(signal.SIGSEGV)
    child.resume()
    code, told, err = ended(process)
    crashed, good = ExportResult.model_validate(told).targets
    assert (code, crashed.exit_code, crashed.ok, good.ok, good.exit_code) == (4, 4, False, True, 0)
    said = f"target onnx on {tiny} crashed (SIGSEGV, Segmentation fault)"
    assert crashed.error is not None
    assert crashed.error.startswith(said)
    assert f"error: onnx: {said}" in err
    log = tmp_path / "out" / "onnx.log"
    assert crashed.log == str(log)
    assert crashed.hint.endswith(f"what it printed is in {log}")
    assert "Fatal Python error: Segmentation fault" in log.read_text()
    assert "export_target" in log.read_text()  # the stack
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["litert", "onnx.log"]
    check_files(tmp_path / "out" / "litert", read_export(tmp_path / "out" / "litert"))
    code, told, _ = ended(start(tiny))
    assert (code, told["targets"][0]["already_done"]) == (0, False)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["litert", "onnx"]


def test_a_kill_by_the_system_is_told(
    tiny: Path, tmp_path: Path, start: Callable[..., Started]
) -> None:
    process = start(tiny, "--debug")
    stopped_while_writing(process, tmp_path / "out" / "onnx.partial").kill()
    code, told, err = ended(process)
    assert "target onnx has printed:\nexporting to onnx\n" in err
    (entry,) = ExportResult.model_validate(told).targets
    assert (code, entry.exit_code) == (4, 4)
    assert f"target onnx on {tiny} was killed (SIGKILL, Killed) with " in (entry.error or "")
    assert "memory runs out" in entry.hint
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["onnx.log"]


def test_an_interrupt_leaves_nothing(
    tiny: Path, tmp_path: Path, start: Callable[..., Started]
) -> None:
    process = start(tiny)
    child = stopped_while_writing(process, tmp_path / "out" / "onnx.partial")
    process.send_signal(signal.SIGINT)
    code, told, err = ended(process)
    assert (code, told) == (130, None)
    assert "interrupted" in err
    assert not child.is_running()
    assert not (tmp_path / "out").exists()


def test_a_target_that_outgrows_the_limit_is_stopped(wide: Path, tmp_path: Path) -> None:
    """LiteRT's file of the whole model is in memory; the limit has room for its largest part."""
    pytest.importorskip("ai_edge_litert")
    refused = export_each(wide, ["litert"], tmp_path / "a", options=ExportOptions(max_memory=1000))
    (entry,) = refused.targets
    assert entry.error is not None
    assert entry.error.startswith("export needs up to ")
    assert (entry.exit_code, entry.log) == (4, None)
    limit = parse_size(entry.hint.split()[3])
    assert limit is not None
    limit += 10_000_000
    options = ExportOptions(max_memory=limit)
    (entry,) = export_each(wide, ["litert"], tmp_path / "b", options=options).targets
    assert (entry.ok, entry.exit_code) == (False, 4), entry
    assert entry.error is not None
    assert entry.peak_memory is not None
    words = f"grew to {megabytes(entry.peak_memory)}, --max-memory allows {megabytes(limit)}"
    assert f"{words}: stopped; it was at: " in entry.error
    assert limit < entry.peak_memory
    assert [f.name for f in (tmp_path / "b").iterdir()] == ["litert.log"]
    assert "exporting to litert\n" in (tmp_path / "b" / "litert.log").read_text()


def test_unfinished_work_is_dropped_only_where_it_is_ours(tmp_path: Path) -> None:
    partial = tmp_path / "x.partial"
    drop_unfinished(tmp_path / "x")
    partial.mkdir()
    (partial / "mine").touch()
    drop_unfinished(tmp_path / "x")
    assert (partial / "mine").is_file()
    (partial / REQUEST).touch()
    holder = os.open(partial, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    drop_unfinished(tmp_path / "x")
    assert (partial / "mine").is_file()
    os.close(holder)
    drop_unfinished(tmp_path / "x")
    assert not partial.exists()
