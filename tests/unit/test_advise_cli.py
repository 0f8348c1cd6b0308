"""`pocketglm advise` as a user types it: words, JSON, exit codes, and how fast it answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pocketglm.artifacts.schemas import AdviseResult
from pocketglm.cli._main import main

PHONE = ("--device", "snapdragon-8-gen-3")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["advise", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    error: dict[str, Any] = json.loads(out)["error"]
    assert error["exit_code"] == code
    return error


def test_what_a_person_reads(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *PHONE)
    assert (code, err) == (0, "")
    assert out.startswith("Xiaomi 14 (12 GB), task lm: a prompt of 128 and 64 new tokens")
    for words in (
        "memory: at most 6,200 MB; what one app gets on the device",
        "time, first token: at most 1,000 ms",
        "Fits, and this version makes it",
        "this version has no such target",
        "Does not fit, or nobody can say",
        "% more perplexity [1]",
        "[1] ",
        "Next, ",
        "pocketglm prove runs/",
    ):
        assert words in out
    assert all(len(line.split("[")[0]) < 250 for line in out.splitlines())


def test_an_encoders_table_has_one_time(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *PHONE, "--task", "intent", "--min-accuracy", "90")
    assert code == 0
    assert "accuracy: at least 90 %; asked for" in out
    assert "tokens/s" not in out
    assert "points of in-scope accuracy (-0.04 to 0.22) [1]" in out


def test_all_rows(capsys: pytest.CaptureFixture[str]) -> None:
    _, few, _ = run(capsys, *PHONE)
    _, every, _ = run(capsys, *PHONE, "--all")
    assert "more (--all)" in few
    assert "more (--all)" not in every
    assert len(every.splitlines()) > 2 * len(few.splitlines())


def test_json_is_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *PHONE, "--task", "command", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    result = AdviseResult.model_validate_json(out)
    assert result.fits
    assert result.best == result.rows[0]
    with pytest.raises(SystemExit):
        main(["schema", "advise"])
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(json.loads(out))


def test_nothing_fits_is_a_gate_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *PHONE, "--max-latency-ms", "1")
    assert (code, err) == (1, "")
    assert "try: allow --max-latency-ms " in out
    assert "edge node" in out
    assert "Next, " not in out
    code, out, _ = run(capsys, *PHONE, "--max-latency-ms", "1", "--json")
    assert code == 1
    assert AdviseResult.model_validate_json(out).hints


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    near = failure(capsys, "--device", "xiaomi14")
    assert near["exit_code"] == 2
    assert "xiaomi-14" in near["hint"]
    assert "did you mean 'intent'" in failure(capsys, *PHONE, "--task", "inten")["hint"]
    assert "above 0" in failure(capsys, *PHONE, "--max-memory-mb", "0")["message"]
    assert "less than the smallest" in failure(capsys, *PHONE, "--max-memory-mb", "1")["message"]
    assert failure(capsys, str(tmp_path / "no"), *PHONE)["exit_code"] == 2
    (tmp_path / "empty").mkdir()
    broken = failure(capsys, str(tmp_path / "empty"), *PHONE)
    assert (broken["type"], broken["exit_code"]) == ("CheckpointError", 2)
    assert run(capsys)[0] == 2  # no device


def test_it_answers_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['x']\n"
        "from pocketglm.cli._main import main\n"
        "try: main(['advise', '--device', 'pixel-6', '--json'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
