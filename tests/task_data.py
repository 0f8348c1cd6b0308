"""Where the task data is. Tests that need it are skipped only where nobody said it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

SETS = ("clinc150", "snips", "ha_intents_zh")  # the sets that tests read


def find_task_data(variable: str | None, beside: Path) -> Path:
    """The folder that $POCKETGLM_DATA (`variable`) names, or else `beside`.

    Fails the test where the variable names no folder or a folder lacks a set; skips it where the
    variable is unset and `beside` is absent.
    """
    folder = beside if variable is None else Path(variable)
    if not folder.is_dir():
        if variable is None:
            pytest.skip(f"task data is not here: {folder} (set POCKETGLM_DATA)")
        pytest.fail(f"POCKETGLM_DATA is '{variable}', which is no folder")
    if missing := [name for name in SETS if not (folder / name).is_dir()]:
        pytest.fail(f"{folder} lacks the task data {', '.join(missing)}")
    return folder
