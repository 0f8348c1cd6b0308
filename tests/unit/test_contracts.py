"""What the extension contract promises whoever writes an extension."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pydantic import ValidationError

from pocketglm import contracts
from pocketglm.contracts import Config, DataOptions, ExportOptions, Lowered, RunOptions, Silent


class Settings(Config):
    bits: int = 8


def test_config_refuses_an_unknown_key_and_a_change() -> None:
    with pytest.raises(ValidationError, match="bitz"):
        Settings.model_validate({"bitz": 4})
    with pytest.raises(ValidationError, match="frozen"):
        Settings().bits = 4  # type: ignore[misc]


def test_silent_is_a_reporter_that_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    reporter: contracts.Reporter = Silent()
    reporter.say("words")
    reporter.progress("steps", 1, 2, note="loss 0.4")
    assert capfd.readouterr() == ("", "")


def test_defaults_leave_the_choice_to_the_runtime() -> None:
    assert RunOptions() == RunOptions(threads=None, spinning=False, optimize=True)
    assert ExportOptions() == ExportOptions(opset=None, max_length=None, threads=None)
    options = DataOptions(Path("data"))
    assert (options.text_column, options.label_column, options.oos_label) == (
        "text",
        "label",
        "oos",
    )


def test_lowered_objects_share_no_mutable_default() -> None:
    first, second = (Lowered("m.onnx", [], [], {}) for _ in range(2))
    first.minimum["android"] = "12"
    assert second.minimum == {}


def test_every_record_is_frozen() -> None:
    for name, value in vars(contracts).items():
        if dataclasses.is_dataclass(value):
            assert value.__dataclass_params__.frozen, name  # type: ignore[union-attr]
