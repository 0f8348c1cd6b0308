"""The loss plot: well-formed, small, and where the values say."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from pocketglm.train._plot import loss_svg

SVG = "{http://www.w3.org/2000/svg}"


def _points(root: ET.Element, kind: str) -> list[tuple[float, float]]:
    line = next(e for e in root.iter(f"{SVG}polyline") if e.get("class") == kind)
    return [(float(x), float(y)) for x, y in (p.split(",") for p in line.get("points", "").split())]


def test_curve_and_scores_are_drawn_at_scale() -> None:
    losses = [4.0 - 3.0 * step / 999 for step in range(1000)]
    text = loss_svg(losses, [(500, 0.80), (1000, 0.95)], "a < b")
    assert len(text) < 8000
    root = ET.fromstring(text)
    curve = _points(root, "loss")
    assert len(curve) == 200  # 1000 steps in 200 stretches
    assert curve[0][1] < curve[100][1] < curve[-1][1]  # the loss falls: y grows downwards
    middle, last = _points(root, "score")
    left, right = 56.0, 584.0
    assert middle[0] == pytest.approx((left + right) / 2, abs=0.2)
    assert last[0] == pytest.approx(right)
    assert (middle[1], last[1]) == (284.0, 34.0)  # lowest and highest value over the full height
    words = [e.text for e in root.iter(f"{SVG}text")]
    assert {"0", "step 1000", "training loss", "validation a < b", "0.95", "0.8"} <= set(words)
    assert "prefers-color-scheme:dark" in text
    assert len(list(root.iter(f"{SVG}circle"))) == 2


def test_the_smallest_runs() -> None:
    one = ET.fromstring(loss_svg([2.0], [(1, 0.5)]))
    assert len(_points(one, "loss")) == 1
    flat = ET.fromstring(loss_svg([1.0, 1.0], []))
    assert {y for _, y in _points(flat, "loss")} == {284.0}
    assert "validation accuracy" not in [e.text for e in flat.iter(f"{SVG}text")]
    assert not list(ET.fromstring(loss_svg([], [])).iter(f"{SVG}polyline"))
