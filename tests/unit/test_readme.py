"""What the README tells a user to type works: the tour, and the demo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pocketglm.artifacts.schemas import DemoResult

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")


def tour(readme: str) -> str:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return text.partition("```sh\n")[2].partition("```")[0]


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_tour(tmp_path: Path) -> None:
    """Every command, with less training and a gate to match."""
    script = tour("README.md")
    assert 5 < len(script.strip().splitlines()) <= 15
    (tmp_path / "plans").symlink_to(ROOT / "plans")
    for long, short in (("--minutes 2 ", "--minutes 0.1 "), ("-drop 1.5 ", "-drop 20 ")):
        assert long in script
        script = script.replace(long, short)
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verdict: pass" in done.stdout
    assert (tmp_path / "runs/proof/report.html").stat().st_size > 10_000


def test_both_readmes_have_the_same_tour() -> None:
    first, second = (re.sub(r" *#.*", "", tour(readme)) for readme in READMES)
    assert first == second


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_somewhere(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_demo(tmp_path: Path) -> None:
    """Trained for seconds only: the path is tested here, its accuracy in benchmarks/."""
    command = [sys.executable, "-m", "pocketglm", "demo", "--minutes", "0.2", "--out", "demo"]
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr[-2000:]  # 1: a gate failed after so few steps
    result = DemoResult.model_validate(json.loads(done.stdout))
    assert {row["model"] for row in result.rows} == {"MiniLM, English", "small encoder, Chinese"}
    assert [row["measure"] for row in result.rows].count("latency, ms") == 2
    assert len(result.answers) == 5
    assert (tmp_path / result.report).is_file()
