"""The fixture `shared_data`: a wrong place fails, and real sets are read as they are described."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from task_data import SETS, find_task_data

from pocketglm.contracts import DataOptions
from pocketglm.data.readers import Split, read_split

ROWS: dict[Split, int] = {"train": 15_100, "validation": 3_100, "test": 5_500}


def test_only_absent_data_is_skipped(tmp_path: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="set POCKETGLM_DATA"):
        find_task_data(None, tmp_path / "none")
    for name in SETS:
        (tmp_path / "data" / name).mkdir(parents=True)
    data = tmp_path / "data"
    assert find_task_data(None, data) == find_task_data(str(data), tmp_path / "none") == data
    for wrong in (str(tmp_path / "none"), ""):  # the data beside is no excuse
        with pytest.raises(pytest.fail.Exception, match=r"is no folder|lacks"):
            find_task_data(wrong, data)
    (data / "snips").rmdir()
    for variable in (None, str(data)):
        with pytest.raises(pytest.fail.Exception, match="lacks the task data snips"):
            find_task_data(variable, data)


def test_clinc150(shared_data: Path) -> None:
    options = DataOptions(shared_data / "clinc150")
    rows = {split: read_split(options, split) for split in ROWS}
    assert {split: len(part) for split, part in rows.items()} == ROWS
    assert all(len({row.label for row in part}) == 151 for part in rows.values())
    assert Counter(row.label for row in rows["test"])["oos"] == 1000


def test_snips_and_chinese_commands_are_joined_tokens(shared_data: Path) -> None:
    snips = read_split(DataOptions(shared_data / "snips"), "train")
    assert (len(snips), len({row.label for row in snips})) == (13_084, 7)
    assert snips[0].text == "Add another song to the Cita Romántica playlist ."
    chinese = read_split(DataOptions(shared_data / "ha_intents_zh"), "train")
    assert (len(chinese), len({row.label for row in chinese})) == (4_048, 25)
    assert (chinese[0].text, chinese[0].label) == ("关闭定时", "HassCancelTimer")
    assert not any(" " in row.text for row in chinese if row.text.isalpha())
