"""stages/plan: the grammar, and errors that name line, key and the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketglm.errors import PlanError
from pocketglm.stages.plan import Plan

GOOD = "seed: 7\nsteps:\n  - quantize_rtn:\n      bits: 4\n      skip: ['*.x']\n"


def test_a_plan_is_read(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(GOOD)
    plan = Plan.from_file(file)
    assert plan.seed == 7
    assert [step.method for step in plan.steps] == ["quantize_rtn"]
    assert plan.steps[0].settings["bits"] == 4
    assert plan.steps[0].settings["skip"] == ["*.x"]


def test_defaults_written_out_are_the_same_plan() -> None:
    short = Plan.from_text("steps: [{quantize_rtn: }]")
    long = Plan.from_text("steps: [{quantize_rtn: {bits: 8, symmetric: true}}]")
    assert short.describe() == long.describe()
    assert Plan.single("quantize_rtn").describe() == short.describe()
    assert short.describe() != Plan.single("quantize_rtn", {"bits": 4}).describe()


def test_settings_of_a_single_method_are_yaml() -> None:
    step = Plan.single("quantize_rtn", {"bits": "4", "symmetric": "no", "skip": "['*.a', b]"})
    settings = step.steps[0].settings
    assert (settings["bits"], settings["symmetric"]) == (4, False)
    assert settings["skip"] == ["*.a", "b"]
    assert Plan.single("quantize_rtn", {"bits": 4}).steps[0].settings["bits"] == 4


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ("", 1, "the plan is empty", "steps:"),
        ("# only words\n", 1, "the plan is empty", "steps:"),
        ("seed: 1\n", 1, "no `steps:`", ""),
        ("steps: []\n", 1, "should be a list of methods", ""),
        ("steps: 3\n", 1, "should be a list of methods", ""),
        ("- quantize_rtn: {}\n", 1, "the plan should be a mapping", ""),
        ("steps:\n  - quantize_rtn: {}\nstpes: 1\n", 3, "unknown key 'stpes'", "'steps'"),
        ("steps:\n  - quantise_rtn: {}\n", 2, "unknown method 'quantise_rtn'", "'quantize_rtn'"),
        ("steps:\n  - quantize_rtn:\n      bit: 8\n", 3, "has no setting 'bit'", "'bits'"),
        ("steps:\n  - quantize_rtn:\n      bits: 5\n", 3, "quantize_rtn.bits = 5", ""),
        ("steps:\n  - quantize_rtn:\n      search: often\n", 3, "quantize_rtn.search", ""),
        ("steps:\n  - quantize_rtn:\n      skip: [[1]]\n", 3, "quantize_rtn.skip.0", ""),
        ("steps:\n  - quantize_rtn: 8\n", 2, "settings of quantize_rtn should be a mapping", ""),
        ("steps:\n  - quantize_rtn\n", 2, "has no settings", "- quantize_rtn: {}"),
        ("steps:\n  - quantize_rtn:\n    bits: 8\n", 2, "has 2 keys: quantize_rtn, bits", ""),
        ("steps:\n  - [quantize_rtn]\n", 2, "a step should be a mapping", ""),
        ("seed: 1\nsteps:\n  - quantize_rtn: {}\nseed: 2\n", 4, "'seed' is given twice", ""),
        ("steps:\n  - quantize_rtn:\n      bits: 8\n      bits: 4\n", 4, "(first in line 3)", ""),
        ("seed: x\nsteps:\n  - quantize_rtn: {}\n", 1, "seed should be a whole number", ""),
        ("seed: true\nsteps:\n  - quantize_rtn: {}\n", 1, "seed should be a whole number", ""),
        ("steps:\n  - quantize_rtn: {bits: 8\n", 3, "not YAML", ""),
        ("steps:\n\t- x\n", 2, "not YAML", ""),
    ],
)
def test_errors_name_the_place(
    text: str, line: int, message: str, hint: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(PlanError) as error:
        Plan.from_file(file)
    assert error.value.message.startswith(f"{file}:{line}: ")
    assert message in error.value.message
    assert hint in error.value.hint


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.from_file(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.from_file(tmp_path / "binary.yaml")


def test_wrong_set_options() -> None:
    with pytest.raises(PlanError, match="unknown method 'rtn'"):
        Plan.single("rtn")
    with pytest.raises(PlanError, match="no setting 'bots'") as error:
        Plan.single("quantize_rtn", {"bots": "8"})
    assert "did you mean 'bits'" in error.value.hint
    with pytest.raises(PlanError, match="the value is not YAML"):
        Plan.single("quantize_rtn", {"skip": "["})
