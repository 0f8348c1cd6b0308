"""A function in a process of its own: what it says and gives, and every way in which it can end."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pocketglm.contracts import Silent
from pocketglm.errors import CrashError, MemoryCeilingError, UnsupportedError
from pocketglm.stages._isolated import Outcome, run


class Heard(Silent):
    """A Reporter that keeps everything."""

    def __init__(self) -> None:
        self.all: list[tuple[Any, ...]] = []

    def say(self, text: str) -> None:
        self.all.append((text,))

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        self.all.append((label, done, total, note))


def call(name: str, *arguments: Any, limit: int | None = None) -> Outcome:
    return run(f"crashes:{name}", arguments, what="the work", reporter=Silent(), max_memory=limit)


def failed(name: str, *arguments: Any, limit: int | None = None) -> tuple[str, Outcome]:
    """The message of a CrashError."""
    outcome = call(name, *arguments, limit=limit)
    assert isinstance(outcome.error, CrashError), outcome
    assert (outcome.value, outcome.error.exit_code) == (None, 4)
    return outcome.error.message, outcome


def gone(pid: int) -> bool:
    """Within ten seconds; a zombie that nobody has waited for is gone, too."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_value_reports_output_and_memory(capfd: pytest.CaptureFixture[str]) -> None:
    heard = Heard()
    outcome = run("crashes:add", [2, 3], what="the work", reporter=heard)
    assert (outcome.value, outcome.error) == (5, None)
    assert heard.all == [("adding",), ("adding", 0, 2, "block.0"), ("adding", 2, 2, "")]
    for words in ("by print", "to stdout", "by C", "to stderr", "adding 0/2 block.0"):
        assert f"{words}\n" in outcome.output
    assert 5_000_000 < outcome.peak < 200_000_000
    assert capfd.readouterr() == ("", "")


def test_it_imports_what_its_parent_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing from the folder that it is started in."""
    (tmp_path / "pickle.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    pid, path = call("where").value
    assert pid != os.getpid()
    assert set(sys.path) <= set(path)
    assert str(tmp_path) not in path


def test_errors_of_ours_stay_what_they_are() -> None:
    outcome = call("refuse")
    assert isinstance(outcome.error, UnsupportedError)
    assert (outcome.error.message, outcome.error.hint) == ("refused\n  - one\n  - two", "another")
    assert "UnsupportedError: refused" in outcome.output


def test_other_exceptions_have_their_traceback_in_the_output() -> None:
    message, outcome = failed("divide", 0)
    assert message == "ZeroDivisionError: division by zero; it was at: dividing 2/5 block.2"
    assert "Traceback" in outcome.output
    assert "return 1 / by" in outcome.output
    assert call("divide", 4).value == 0.25
    assert call("grid").value == [pytest.approx(math.nan, nan_ok=True), 1e300, 0.1]
    assert isinstance(call("out_of_memory").error, MemoryCeilingError)


@pytest.mark.parametrize(
    ("name", "arguments", "message", "output"),
    [
        ("segfault", (), "the work crashed (SIGSEGV, Segmentation fault); "
         "it was at: writing 2/5 block.2", "in segfault"),
        ("abort", (), "the work crashed (SIGABRT, Aborted); it was at: about to abort", "in abort"),
        ("cut_short", (), "the work crashed (SIGABRT, Aborted)", "in cut_short"),
        ("kill", (), "the work was killed (SIGKILL, Killed) with ", ""),
        ("end_by", (36,), "the work crashed (signal 36, Real-time signal ", ""),
        ("leave", (3,), "the work ended its process with exit code 3", ""),
        ("leave_at_once", (0,), "the work ended its process with exit code 0", ""),
        ("lambda_", (), "the work ended its process with exit code 1", "Traceback"),
    ],
)  # fmt: skip
def test_the_end_of_the_process_is_told(
    name: str, arguments: tuple[int, ...], message: str, output: str
) -> None:
    told, outcome = failed(name, *arguments)
    assert told.startswith(message)
    assert output in outcome.output
    assert outcome.error is not None
    assert ("memory runs out" in outcome.error.hint) == (name == "kill")


def test_what_is_kept_from_the_terminal_is_in_the_log() -> None:
    _, outcome = failed("segfault_quietly")
    for words in ("its last words", "a warning", "a log line", "in segfault_quietly"):
        assert words in outcome.output


def test_growth_beyond_the_limit_is_stopped() -> None:
    small = call("grow", 1)
    assert (small.value, small.error) == (1, None)
    limit = small.peak + 20_000_000
    outcome = call("grow", 2000, limit=limit)
    assert isinstance(outcome.error, MemoryCeilingError)
    grew = f"the work grew to {-(-outcome.peak // 10**6)} MB, --max-memory allows "
    assert outcome.error.message.startswith(f"{grew}{-(-limit // 10**6)} MB: stopped; it was at: ")
    assert "growing " in outcome.error.message
    assert limit < outcome.peak < limit + 60_000_000
    assert call("grow", 1, limit=limit).value == 1


def test_what_a_crashed_process_started_ends_with_it(tmp_path: Path) -> None:
    start = time.monotonic()
    message, _ = failed("leave_an_heir", str(tmp_path / "heir"))
    assert "SIGSEGV" in message
    assert time.monotonic() - start < 60
    assert gone(int((tmp_path / "heir").read_text()))


PARENT = """
import sys
from pocketglm.contracts import Silent
from pocketglm.stages._isolated import run
run("crashes:wait", [sys.argv[1]], what="the work", reporter=Silent())
"""


@pytest.fixture
def parent(tmp_path: Path) -> Callable[[], tuple[subprocess.Popen[bytes], list[int]]]:
    """Starts a process whose own one is at work, and says the ids of the latter and its child."""

    def start() -> tuple[subprocess.Popen[bytes], list[int]]:
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(tmp_path / "ids")],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        while not (tmp_path / "ids").is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process, [int(pid) for pid in (tmp_path / "ids").read_text().split()]

    return start


def test_an_interrupt_ends_it(
    parent: Callable[[], tuple[subprocess.Popen[bytes], list[int]]],
) -> None:
    process, pids = parent()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in error
    assert all(map(gone, pids))


def test_it_does_not_outlive_its_parent(
    parent: Callable[[], tuple[subprocess.Popen[bytes], list[int]]],
) -> None:
    process, pids = parent()
    process.kill()
    process.communicate(timeout=60)
    assert all(map(gone, pids))
