"""Functions that `stages._isolated` calls in a process of their own; most of them end it."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from pocketglm.contracts import Reporter
from pocketglm.errors import UnsupportedError
from pocketglm.runtimes._quiet import quiet

LIBC = ctypes.CDLL(None)


def add(a: int, b: int, reporter: Reporter) -> int:
    reporter.say("adding")
    reporter.progress("adding", 0, 2, "block.0")
    print("by print")
    os.write(1, b"to stdout\n")
    LIBC.puts(b"by C")
    LIBC.fflush(None)
    print("to stderr", file=sys.stderr)
    reporter.progress("adding", 2, 2)
    return a + b


def where(reporter: Reporter) -> list[Any]:
    return [os.getpid(), sys.path]


def refuse(reporter: Reporter) -> None:
    raise UnsupportedError("refused", ["one", "two"], "another")


def grid(reporter: Reporter) -> list[float]:
    return [math.nan, 1e300, 0.1]


def divide(by: int, reporter: Reporter) -> float:
    reporter.progress("dividing", 2, 5, "block.2")
    return 1 / by


def out_of_memory(reporter: Reporter) -> None:
    raise MemoryError("no more")


def lambda_(reporter: Reporter) -> Any:
    return lambda: 1


def segfault(reporter: Reporter) -> None:
    reporter.progress("writing", 2, 5, "block.2")
    ctypes.string_at(0)


def segfault_quietly(reporter: Reporter) -> None:
    """As a converter does whose words are kept from the terminal."""
    with quiet():
        print("its last words", file=sys.stderr, flush=True)
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("converter").warning("a log line")
        ctypes.string_at(0)


def abort(reporter: Reporter) -> None:
    reporter.say("about to abort")
    LIBC.abort()


def leave(code: int, reporter: Reporter) -> None:
    sys.exit(code)


def leave_at_once(code: int, reporter: Reporter) -> None:
    os._exit(code)


def kill(reporter: Reporter) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_by(number: int, reporter: Reporter) -> None:
    os.kill(os.getpid(), number)
    time.sleep(600)


def cut_short(reporter: Reporter) -> None:
    """Dies within a message: its first bytes alone are written."""
    send = reporter._answers  # type: ignore[attr-defined]
    send.write(b'{"say": "hal')
    send.flush()
    os.abort()


def grow(size: int, reporter: Reporter) -> int:
    """Memory in pieces of a megabyte, one every 10 ms, up to `size` megabytes."""
    kept = []
    for index in range(size):
        reporter.progress("growing", index, size, f"piece {index}")
        kept.append(bytearray(os.urandom(1000)) * 1000)
        time.sleep(0.01)
    return len(kept)


def wait(file: str, reporter: Reporter) -> None:
    """Writes its process id and that of a process that it starts; then it does not end."""
    other = subprocess.Popen(["sleep", "600"])
    part = Path(f"{file}.part")
    part.write_text(f"{os.getpid()} {other.pid}")
    part.rename(file)
    time.sleep(600)


def leave_an_heir(file: str, reporter: Reporter) -> None:
    """Crashes, and leaves a process behind that has everything open that it had."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    Path(file).write_text(str(pid))
    ctypes.string_at(0)
