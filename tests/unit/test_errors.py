"""The exception tree: exit codes, hints, the place of an error, optional packages."""

from __future__ import annotations

import errno
import json
import pickle
import sys
from pathlib import Path

import pytest

from pocketglm import errors
from pocketglm.errors import (
    CheckpointError,
    CrashError,
    DataError,
    DiskFullError,
    FinishedElsewhereError,
    GateError,
    InputError,
    LockedError,
    MemoryCeilingError,
    MissingExtraError,
    OutputExistsError,
    ParityError,
    PlacementError,
    PlanError,
    PocketError,
    UnsupportedError,
    UsageError,
    WorkError,
    as_lines,
    explained,
    from_json,
    nearest,
    require,
    to_json,
)

EXIT_CODES: dict[type[PocketError], int] = {
    GateError: 1,
    ParityError: 1,
    PlacementError: 1,
    InputError: 2,
    UsageError: 2,
    CheckpointError: 2,
    DataError: 2,
    PlanError: 2,
    UnsupportedError: 2,
    OutputExistsError: 2,
    MissingExtraError: 3,
    WorkError: 4,
    DiskFullError: 4,
    LockedError: 4,
    FinishedElsewhereError: 4,
    MemoryCeilingError: 4,
    CrashError: 4,
    PocketError: 4,
}


def test_lines_for_stderr() -> None:
    assert as_lines("no row\n  - in x", "add one") == "error: no row\n  - in x\n  try: add one\n"
    assert as_lines("no row", "") == "error: no row\n"


def test_every_error_has_its_exit_code() -> None:
    defined = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, PocketError)
    }
    assert defined == set(EXIT_CODES)
    for kind, code in EXIT_CODES.items():
        assert kind.exit_code == code, kind


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_message_and_hint_survive_a_process_boundary(kind: type[PocketError]) -> None:
    error = pickle.loads(pickle.dumps(kind("it broke", hint="mend it")))
    assert type(error) is kind
    assert (error.message, error.hint, str(error)) == ("it broke", "mend it", "it broke")
    value = json.loads(json.dumps(to_json(error)))
    assert value["exit_code"] == kind.exit_code
    again = from_json(value)
    assert (type(again), again.message, again.hint) == (kind, "it broke", "mend it")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UsageError("no"), UsageError, "no"),
        (MemoryError("8 GB"), MemoryCeilingError, "out of memory: 8 GB"),
        (OSError(errno.ENOSPC, "full"), DiskFullError, "no space left on the disk: "),
        (OSError(errno.EIO, "broken"), CrashError, "OSError: "),
        (KeyError("x"), CrashError, "KeyError: 'x'"),
    ],
)
def test_any_error_is_explained(error: Exception, kind: type[PocketError], message: str) -> None:
    told = explained(error)
    assert type(told) is kind
    assert told.message.startswith(message)
    assert told.hint or told is error


@pytest.mark.parametrize("kind", [DataError, PlanError])
def test_place_of_an_error(kind: type[DataError] | type[PlanError]) -> None:
    file = Path("rows.jsonl")
    assert kind("bad", path=file, line=3).message == "rows.jsonl:3: bad"
    assert kind("bad", path=file).message == "rows.jsonl: bad"
    assert kind("bad", line=3).message == "bad"
    assert kind("bad", "mend it").hint == "mend it"


def test_unsupported_lists_every_reason() -> None:
    error = UnsupportedError("onnx cannot take this", ["rope is 3-d", "no head"], "try litert")
    assert error.message == "onnx cannot take this\n  - rope is 3-d\n  - no head"
    assert error.reasons == ["rope is 3-d", "no head"]
    assert error.hint == "try litert"


def test_nearest_guesses_only_what_is_close() -> None:
    known = {"quantize_rtn", "prune", "distill"}
    assert nearest("quantise_rtn", known) == (
        "did you mean 'quantize_rtn'? known: distill, prune, quantize_rtn"
    )
    assert nearest("xyz", known) == "known: distill, prune, quantize_rtn"


def test_require_returns_the_module() -> None:
    assert require("json", extra="train") is sys.modules["json"]


def test_require_names_the_pip_command() -> None:
    with pytest.raises(MissingExtraError) as caught:
        require("no_such_package_here.part", extra="coreml")
    assert "'no_such_package_here'" in caught.value.message
    assert caught.value.hint == "pip install 'pocketglm[coreml]'"


def test_require_does_not_blame_the_extra_for_a_broken_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import its_missing_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="its_missing_dependency"):
        require("half_installed", extra="train")
