"""The demo's decoder: its settings, its table, and how much CPU its training may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pocketglm.artifacts.proof import Claim, Proof
from pocketglm.artifacts.schemas import DemoCommands
from pocketglm.cli import _demo_decoder as demo
from pocketglm.contracts import Metric
from pocketglm.data.commands import generate
from pocketglm.stages.plan import Plan
from pocketglm.train.finetune import FinetuneConfig

PLANS = Path(__file__).resolve().parents[2] / "plans"


def claim(metric: str, before: float, after: float) -> Claim:
    return Claim(
        metric=metric, title=metric, value=before / after, unit="x", n=9, low=1, high=9,
        device="cpu", baseline=before, candidate=after, tolerance=0,
    )  # fmt: skip


def proof(**fp32: float) -> Proof:
    metrics = {
        name: {"value": value, "n": 40, "low": value - 0.02, "high": value + 0.03}
        for name, value in fp32.items()
    }
    half = {name: {**metric, "value": metric["value"] / 2} for name, metric in metrics.items()}
    return Proof(
        created="", device={}, task="command", data={}, verdict="stated",
        baseline={"metrics": metrics}, candidate={"metrics": half},
        claims=[claim("size_ratio", 12.345, 2.4), claim("decode_speedup", 1234.5, 9876.5)],
    )  # fmt: skip


def test_no_request_is_a_training_row() -> None:
    shown = {row.text for split in ("train", "validation") for row in generate(split, "both")}
    assert len(set(demo.REQUESTS) - shown) == 5
    assert any(text.isascii() for text in demo.REQUESTS)
    assert not all(text.isascii() for text in demo.REQUESTS)


def test_the_recipe_is_the_one_of_the_plans_folder() -> None:
    assert Plan.from_file(PLANS / "int4-decoder.yaml") == Plan.single("quantize_rtn", demo.INT4)


def test_the_training_settings_are_valid() -> None:
    config = FinetuneConfig(task="command", data=demo.DATA.path, **demo.TRAINING)
    assert config.patience >= config.epochs  # the time ends it


def test_training_takes_one_thread_and_gives_the_others_back() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with demo._one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)


def test_the_table_has_a_row_for_each_measure_that_there_is() -> None:
    near = {"exact_match": Metric(0.3, 40, 0.2, 0.4), "intent_accuracy": Metric(0.5, 40, 0.4, 0.6)}
    rows = demo._rows(proof(exact_match=0.5, intent_accuracy=0.7, slot_f1=0.4), near)
    assert [row["measure"] for row in rows] == [
        "exact match, %", "intent, %", "slot F1, %", "model file, MB", "new tokens per second",
    ]  # fmt: skip
    assert rows[0]["nearest"]["low"] == 0.2
    assert (rows[0]["fp32"]["value"], rows[0]["int4"]["value"]) == (0.5, 0.25)
    assert rows[2]["nearest"] is None  # the baseline found no slot
    assert rows[3] == {"measure": "model file, MB", "nearest": None, "fp32": 12.345, "int4": 2.4}


def test_what_a_person_sees(capsys: pytest.CaptureFixture[str]) -> None:
    near = {"exact_match": Metric(0.3, 40, 0.21, 0.41)}
    request = {"text": "去人民公园", "action": 'do(action="Navigate")', "milliseconds": 2.34}
    demo.show(
        DemoCommands(
            report="proof/report.html",
            verdict="stated",
            rows=demo._rows(proof(exact_match=0.5), near),
            actions=[request],
            training_cpu_seconds=139.6,
        )
    )
    shown = capsys.readouterr().out
    assert "40 unseen phrasings" in shown
    assert "30.0 ± 11.0" in shown
    assert "50.0 ± 3.0" in shown
    assert "12.35" in shown
    assert "9,876" in shown or "9,877" in shown
    assert "去人民公园" in shown
    assert "2.3 ms" in shown
    assert "140 CPU seconds" in shown
