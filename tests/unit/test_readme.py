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


def tours(readme: str) -> list[str]:
    """The scripts: an encoder, a smaller one, a decoder for commands, a larger one, runtimes."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(r"```sh\n(.*?)```", text, re.S)


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def follow(script: str, folder: Path) -> str:
    """What the commands print."""
    (folder / "plans").symlink_to(ROOT / "plans")
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def shortened(script: str, *replaced: tuple[str, str]) -> str:
    """The script with pairs of text replaced, so that it takes less time."""
    for long, short in replaced:
        assert long in script
        script = script.replace(long, short)
    return script


def test_the_tour_of_an_encoder(tmp_path: Path) -> None:
    """Every command, with less training and a gate to match."""
    script = tours("README.md")[0]
    assert 5 < len(script.strip().splitlines()) <= 15
    script = shortened(script, ("--minutes 2 ", "--minutes 0.1 "), ("-drop 1.5 ", "-drop 20 "))
    assert "verdict: pass" in follow(script, tmp_path)
    assert (tmp_path / "runs/proof/report.html").stat().st_size > 10_000


def test_the_tour_of_a_smaller_encoder(tmp_path: Path) -> None:
    """Of the first tour's model; few rows, gates of size alone."""
    first, small = tours("README.md")[:2]
    trained = "\n".join(line for line in first.splitlines() if "MINILM" in line)
    script = shortened(
        f"{trained}\n{small}",
        ("--minutes 2 ", "--minutes 0.1 "),
        ("commands-en --out runs/small", "commands-en --limit 600 --out runs/small"),
        ("-drop 5 ", "-drop 100 "),
        ("--min-speedup 2.5 ", ""),
    )
    assert "verdict: pass" in follow(script, tmp_path)
    assert (tmp_path / "runs/small-proof/report.html").stat().st_size > 10_000


def test_the_tour_of_a_decoder_for_commands(tmp_path: Path) -> None:
    script = shortened(
        tours("README.md")[2],
        ("--minutes 2 ", "--minutes 0.1 "),
        ("-drop 3 ", "-drop 40 --limit 100 "),
    )
    shown = follow(script, tmp_path)
    assert "autoglm-teacher" in shown
    assert "do(action=" in shown or "finish(message=" in shown
    assert "verdict: pass" in shown
    assert (tmp_path / "runs/parser-proof/report.html").stat().st_size > 10_000


def test_the_tour_of_a_larger_decoder(tmp_path: Path) -> None:
    """With the smallest model instead."""
    script = shortened(
        tours("README.md")[3],
        ("autoglm-tiny", "autoglm-nano"),
        ("--minutes 1 ", "--minutes 0.05 "),
    )
    assert "flip_rate" in follow(script, tmp_path)
    files = {file.name for file in (tmp_path / "runs/chat/onnx").iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= files


@pytest.mark.timeout(600)  # four converters, one after the other
def test_the_tour_of_every_runtime(tmp_path: Path) -> None:
    """Of the first tour's model."""
    for package in ("executorch", "ai_edge_litert", "coremltools"):
        pytest.importorskip(package, reason="needs the extras executorch, litert and coreml")
    first, runtimes = tours("README.md")[0], tours("README.md")[4]
    made = [line for line in first.splitlines() if "MINILM" in line or "compress" in line]
    script = shortened(
        "\n".join([*made, runtimes]),
        ("--minutes 2 ", "--minutes 0.1 "),
        ("-drop 1.5 ", "-drop 20 --limit 100 --pairs 7 "),
    )
    assert "verdict: pass" in follow(script, tmp_path)
    written = {folder.name for folder in (tmp_path / "runs/everywhere").iterdir()}
    assert written == {"onnx", "litert", "executorch", "coreml"}
    page = (tmp_path / "runs/pixel-proof/report.html").read_text(encoding="utf-8")
    assert "XNNPACK" in page


def test_both_readmes_have_the_same_tours() -> None:
    first, second = ([re.sub(r" *#.*", "", tour) for tour in tours(name)] for name in READMES)
    assert len(first) == 5
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
    assert len(result.commands.actions) == 5
    assert {row["measure"] for row in result.commands.rows} >= {"exact match, %", "model file, MB"}
    assert result.commands.rows[0]["nearest"]["n"] == 2000
    assert (tmp_path / result.commands.report).is_file()
