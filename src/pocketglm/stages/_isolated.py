"""A function in a process of its own: a crash of native code, or too much memory, ends that alone.

`run` starts `python -m pocketglm.stages._isolated MODULE:FUNCTION`, sends it the arguments, passes
on what it reports, watches its memory, and says how it ended. Its stdout and stderr, those of
native libraries too, go into one text; after a crash the stack of every thread is in it. The
process ends with its parent. Importing this loads no torch.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, cast

import psutil

from pocketglm.contracts import Reporter
from pocketglm.errors import (
    CrashError,
    MemoryCeilingError,
    PocketError,
    explained,
    from_json,
    to_json,
)
from pocketglm.runtimes._quiet import keep_output
from pocketglm.stages._memory import megabytes, peak_rss

_EVERY = 0.05  # seconds between two looks at the memory
_GRACE = 10.0  # seconds for the process to end after its last word
_KEPT = 1 << 20  # bytes of its output, the last ones


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: the function's `value`, or the `error` that ended it.

    peak: the most bytes that the process had in memory. output: the end of what it printed.
    """

    value: Any
    error: PocketError | None
    peak: int
    output: str


class Trail:
    """A Reporter that passes everything on and knows the last of it, to say where a crash was."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.last = ""

    def say(self, text: str) -> None:
        self.last = text
        self.reporter.say(text)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        self.last = f"{label} {done}/{total} {note}".rstrip()
        self.reporter.progress(label, done, total, note)

    @property
    def at(self) -> str:
        """For the end of a message."""
        return f"; it was at: {self.last}" if self.last else ""


def run(
    function: str,
    arguments: Sequence[Any],
    *,
    what: str,
    reporter: Reporter,
    max_memory: int | None = None,
) -> Outcome:
    """Call `function` ("module:name") with `arguments`, JSON values, and a last one, its reporter.

    What it returns is a JSON value, too. what: the work, for messages. max_memory: bytes; a process
    that has more is ended, see `_Watch`.
    An exception is an error of the Outcome, too: one of ours as it is, any other as CrashError.
    """
    command = [sys.executable, "-P", "-m", "pocketglm.stages._isolated", function]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    trail = Trail(reporter)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=paths,
            start_new_session=True,  # Ctrl-C is for the parent, who ends it
        )
        try:
            with _Watch(process, max_memory, trail) as watch:
                answer = _listen(process, arguments, trail)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE)
        finally:
            _end(process)
        output.seek(max(output.seek(0, os.SEEK_END) - _KEPT, 0))
        text = output.read().decode("utf-8", "replace")
    if answer is None:
        return Outcome(None, _cause(process.returncode, what, trail, watch), watch.peak, text)
    value, error, peak = answer["value"], None, int(answer["peak"])
    if answer["error"] is not None:
        error = from_json(answer["error"])
    if isinstance(error, CrashError) and trail.last and trail.at not in error.message:
        error = CrashError(f"{error.message}{trail.at}", error.hint)
    return Outcome(value, error, max(peak, watch.peak), text)


def _listen(
    process: subprocess.Popen[bytes], arguments: Sequence[Any], reporter: Reporter
) -> dict[str, Any] | None:
    """`value`, `error` and `peak`; None: the process ended without an answer."""
    asks, answers = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    with suppress(BrokenPipeError):
        asks.write(_line(arguments))
        asks.flush()
    for line in answers:
        if not line.endswith(b"\n"):  # it ended within a message
            break
        told: dict[str, Any] = json.loads(line)
        if "say" in told:
            reporter.say(told["say"])
        elif "progress" in told:
            reporter.progress(*told["progress"])
        else:
            return told
    return None


def _line(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()


class _Watch:
    """Looks at a process's memory while the block runs, and ends it above the limit.

    That holds from its first report on: the function itself may refuse before, and then says what
    it needs.
    """

    def __init__(self, process: subprocess.Popen[bytes], limit: int | None, trail: Trail) -> None:
        self.process, self.limit, self.trail = process, limit, trail
        self.peak = 0
        self.exceeded = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        pid = self.process.pid
        while not self._stop.wait(_EVERY):
            try:
                dead = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
                self.peak = max(self.peak, peak_rss(pid))
            except (psutil.Error, OSError):  # it is gone
                return
            limited = self.limit is not None and bool(self.trail.last)
            self.exceeded = limited and self.peak > (self.limit or 0)
            if dead or self.exceeded:  # dead: what it started must not keep its pipe open
                _kill(self.process)
                return


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it and what it started, which is in its session."""
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        _kill(process)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()


def _cause(code: int, what: str, trail: Trail, watch: _Watch) -> PocketError:
    """Why the process ended without an answer."""
    peak = megabytes(watch.peak)
    if watch.exceeded and watch.limit is not None:
        return MemoryCeilingError(
            f"{what} grew to {peak}, --max-memory allows {megabytes(watch.limit)}: "
            f"stopped{trail.at}",
            "give it more, or a smaller model",
        )
    if code >= 0:
        number = hex(code) if code > 255 else str(code)
        return CrashError(f"{what} ended its process with exit code {number}{trail.at}", "")
    name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
    means = f"{name}, {signal.strsignal(-code)}"
    if -code == signal.SIGKILL:
        return CrashError(
            f"{what} was killed ({means}) with {peak} in memory{trail.at}",
            "the system kills when memory runs out: end other programs, or give it a smaller model",
        )
    return CrashError(f"{what} crashed ({means}){trail.at}", "")


# --- in the process ------------------------------------------------------------------------------


class _Told:
    """The Reporter of the process: to the parent, and into the output."""

    def __init__(self, answers: IO[bytes]) -> None:
        self._answers = answers
        self._lock = threading.Lock()

    def send(self, **message: Any) -> None:
        line = _line(message)
        with self._lock:
            self._answers.write(line)
            self._answers.flush()

    def say(self, text: str) -> None:
        _print(text)
        self.send(say=text)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        _print(f"{label} {done}/{total} {note}".rstrip())
        self.send(progress=[label, done, total, note])


def _print(text: str) -> None:
    with suppress(OSError):  # a full disk ends the work where its files do not fit, not here
        print(text, file=sys.stderr, flush=True)


def main(function: str) -> None:
    """The process's whole life."""
    # Libraries print to stdout; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    faulthandler.enable()
    keep_output()
    told = _Told(answers)
    value: Any = None
    error: PocketError | None = None
    try:
        arguments = json.loads(sys.stdin.buffer.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        value = pkgutil.resolve_name(function)(*arguments, told)
    except PocketError as known:
        traceback.print_exc()
        error = known
    except Exception as crash:
        traceback.print_exc()
        error = explained(crash)
        if isinstance(error, CrashError):
            error.hint = ""  # not --debug: the output has the traceback
    sys.stderr.flush()
    told.send(value=value, error=error and to_json(error), peak=peak_rss())


def _end_with_parent() -> None:
    """stdin stays open as long as the parent lives. What this process started ends, too."""
    os.read(0, 1)
    if sys.platform != "win32" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
