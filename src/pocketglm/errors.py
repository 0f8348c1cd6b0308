"""Every error that PocketGLM raises on purpose, and the exit code it ends with.

PocketError
├── GateError              1  a proof gate failed, or was inconclusive
│   ├── ParityError        1  an export does not compute what its checkpoint computes
│   └── PlacementError     1  a device's delegate would take little of an export
├── InputError             2  bad usage or input
│   ├── UsageError            an option or a name
│   ├── CheckpointError       a model folder
│   ├── DataError             a data file (file and line)
│   ├── PlanError             a compression plan (file and line)
│   ├── UnsupportedError      a target or method refuses, with reasons
│   └── OutputExistsError     the output folder holds something else
├── MissingExtraError      3  an optional package is not installed
└── WorkError              4  the work could not be done
    ├── DiskFullError
    ├── LockedError           another process writes the same output
    │   └── FinishedElsewhereError    or has just written it
    ├── MemoryCeilingError
    └── CrashError            a converter or runtime, or our own code

The rule of a message: what was wrong, with the value; `hint` says what to do next.
"""

from __future__ import annotations

import difflib
import errno
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class PocketError(Exception):
    """Base of the tree. `message` says what was wrong, `hint` what to do next."""

    exit_code = 4

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class GateError(PocketError):
    exit_code = 1


class ParityError(GateError):
    pass


class PlacementError(GateError):
    pass


class InputError(PocketError):
    exit_code = 2


class UsageError(InputError):
    pass


class CheckpointError(InputError):
    pass


class DataError(InputError):
    """A data file that cannot be used; `line` counts from 1."""

    def __init__(
        self, message: str, hint: str = "", *, path: Path | None = None, line: int = 0
    ) -> None:
        where = f"{path}:{line}: " if path and line else f"{path}: " if path else ""
        super().__init__(where + message, hint)


class PlanError(InputError):
    """A plan that cannot be run; `line` counts from 1."""

    def __init__(
        self, message: str, hint: str = "", *, path: Path | None = None, line: int = 0
    ) -> None:
        where = f"{path}:{line}: " if path and line else f"{path}: " if path else ""
        super().__init__(where + message, hint)


class UnsupportedError(InputError):
    """A target or method refuses this checkpoint; every reason is listed."""

    def __init__(self, message: str, reasons: Sequence[str] = (), hint: str = "") -> None:
        super().__init__("\n".join([message, *(f"  - {reason}" for reason in reasons)]), hint)
        self.reasons = list(reasons)


class OutputExistsError(InputError):
    pass


class MissingExtraError(PocketError):
    exit_code = 3


class WorkError(PocketError):
    exit_code = 4


class DiskFullError(WorkError):
    pass


class LockedError(WorkError):
    pass


class FinishedElsewhereError(LockedError):
    """Another process finished the same work between our look and our lock: ask again."""


class MemoryCeilingError(WorkError):
    pass


class CrashError(WorkError):
    """What nobody raised on purpose, or the end of a process that should have answered."""


def explained(error: Exception) -> PocketError:
    """Any error as one of ours: a crash must not look like a failed gate (exit code 1)."""
    if isinstance(error, PocketError):
        return error
    if isinstance(error, MemoryError):
        return MemoryCeilingError(f"out of memory: {error}", "use a smaller batch or model")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"no space left on the disk: {error}", "free some space, run it again")
    return CrashError(
        f"{type(error).__name__}: {error}",
        "this is a defect or a broken file: run it again with --debug and report what it prints",
    )


def to_json(error: PocketError) -> dict[str, Any]:
    """An error as `--json` prints it."""
    return {
        "type": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }


def from_json(value: Mapping[str, Any]) -> PocketError:
    """The error that `to_json` told, of the same class; its message and hint alone."""
    kinds: list[type[PocketError]] = [PocketError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kind = {kind.__name__: kind for kind in kinds}[value["type"]]
    return kind(value["message"], hint=value["hint"])


def as_lines(message: str, hint: str) -> str:
    """An error as stderr shows it."""
    return f"error: {message}\n" + (f"  try: {hint}\n" if hint else "")


def nearest(value: str, known: Iterable[str]) -> str:
    """'did you mean ...?' plus the known names; for the hint of an unknown name."""
    names = sorted(known)
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.6)
    guess = f"did you mean '{close[0]}'? " if close else ""
    return f"{guess}known: {', '.join(names)}"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which pip command brings it.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs the package '{error.name}', which is not installed",
            f"pip install 'pocketglm[{extra}]'",
        ) from error
