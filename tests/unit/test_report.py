"""The report, its plots and the model card, from a Proof made by hand."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from pocketglm.artifacts.proof import Claim, Proof, overall, verdict
from pocketglm.report import _format, card, html, markdown, svg

DEVICE = "Test CPU, 2 threads"
EVIL = '<script>alert("x")</script>&<img src=http://x.test/y onerror=z>'


def claim(metric: str, value: float, low: float, high: float, **more: Any) -> Claim:
    fields: dict[str, Any] = {
        "title": metric.replace("_", " ").capitalize(),
        "unit": "points",
        "n": 200,
        "device": DEVICE,
        "tolerance": 0.1,
    } | more
    if fields.get("limit") is not None:
        better = fields.get("better", "lower")
        fields["verdict"] = verdict(low, high, fields["limit"], better)
    return Claim(metric=metric, value=value, low=low, high=high, **fields)


def proof(**change: Any) -> Proof:
    rng = np.random.default_rng(0)
    claims = change.pop("claims", None) or [
        claim("accuracy_drop", 0.13, -0.07, 0.33, limit=0.5, baseline=95.93, candidate=95.8),
        claim(
            "speedup", 2.04, 1.96, 2.11, unit="x", n=9, better="higher", limit=1.5,
            baseline=8.52, candidate=4.18,
        ),
        claim(
            "size_ratio", 3.95, 3.95, 3.95, unit="x", n=1, better="higher", limit=3.8,
            baseline=90.9, candidate=23.0,
        ),
        claim(
            "memory_ratio", 1.9, 1.85, 1.95, unit="x", n=3, better="higher",
            baseline=221.0, candidate=118.0,
        ),
        claim("flips", 1.13, 0.87, 1.45, unit="%"),
    ]  # fmt: skip
    parts = {"embedding": 12e6, "attention": 4e6, "ffn": 7e6, "head": 1e5, "other": 1e5}
    details: dict[str, Any] = {
        "command": "pocketglm prove a --baseline b --data 'my data'",
        "latency": {
            "baseline": list(8 + rng.random(300)),
            "candidate": list(4 + rng.random(300)),
            "batch": 1,
            "tokens": 32,
            "threads": 2,
            "pairs": 9,
        },
        "flips": {"changed": 7, "to_wrong": 3, "to_right": 2, "wrong_to_wrong": 2},
        "confusions": [
            {"gold": "play", "predicted": "stop", "before": 0, "after": 2, "examples": ["go on"]}
        ],
        "classes": [{"label": "play", "n": 30, "baseline": 1.0, "candidate": 0.9}],
    }
    side = {
        "name": "tiny", "target": "onnx", "precision": "int8", "model_bytes": 23_000_000,
        "p50_ms": 4.18, "peak_rss_bytes": 118_000_000, "digest": "ab" * 32, "parts": parts,
        "model_file": "onnx/model_quantized.onnx", "labels": ["play", "stop"], "max_length": 64,
        "lineage": [{"method": "quantize_rtn", "settings": {"bits": 8}, "parent": "cd" * 32}],
    }  # fmt: skip
    fields: dict[str, Any] = {
        "created": "2025-01-02 03:04 UTC",
        "device": {"cpu": "Test CPU", "memory": "8 GB"},
        "task": "intent",
        "data": {"path": "data", "n": 200, "digest": "ef" * 32},
        "candidate": side,
        "baseline": side | {"precision": "fp32", "model_bytes": 90_900_000, "p50_ms": 8.52},
        "claims": claims,
        "verdict": overall(claims),
        "details": details,
    }
    return Proof(**(fields | change))


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that are not closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def test_the_page_is_one_small_file_that_asks_for_nothing() -> None:
    text = html.render(proof())
    page = Page(text)
    assert not page.open
    assert len(text.encode()) < 150_000
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in ("src", "href") or a[1].startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    assert "prefers-color-scheme: dark" in text


def test_ids_are_unique_and_plots_are_described() -> None:
    page = Page(html.render(proof()))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = [v or "" for t, name, v in page.attributes if t == "svg" and name == "aria-labelledby"]
    assert len(named) >= 8
    assert {part for value in named for part in value.split()} == set(ids)
    assert page.tags.count("title") == page.tags.count("desc") + 1  # the page has its own


def test_verdicts_come_first_with_value_interval_and_limit() -> None:
    text = Page(html.render(proof())).text
    order = ["Pass", "All 3 limits are kept", "Limits", "Before and after", "Every claim", "Origin"]
    found = [text.index(word) for word in order]
    assert found == sorted(found)
    for shown in ("0.13", "−0.07 to 0.33", "≤ 0.50 points", "2.04×", "≥ 1.50×", "95.93 → 95.80 %"):
        assert shown in text
    assert "pocketglm prove a --baseline b --data 'my data'" in text
    assert DEVICE in text


def placement(**change: Any) -> dict[str, Any]:
    """Two blocks of which a GPU takes one and a quarter of the other."""
    parts = [
        {"part": "embeddings", "nodes": 4, "taken": 0, "macs": 0, "macs_taken": 0},
        {"part": "block.0", "nodes": 10, "taken": 10, "macs": 400, "macs_taken": 400},
        {"part": "block.1", "nodes": 10, "taken": 7, "macs": 400, "macs_taken": 100},
        {"part": "head", "nodes": 2, "taken": 2, "macs": 10, "macs_taken": 10},
    ]
    rest = {
        "op": "FULLY_CONNECTED", "count": 3, "first": EVIL, "part": "block.1", "macs": 300,
        "because": f"weights in integers {EVIL}", "rewrite": "export float32",
        "evidence": "source", "source": "model_builder.cc",
    }  # fmt: skip
    entry = {
        "target": "litert", "device": "pixel-8-pro", "delegate": "litert-gpu", "title": "A GPU",
        "runs_on": "gpu", "accelerator": "Mali", "graph": "decode", "nodes": 26, "taken": 19,
        "partitions": 2, "macs": 810, "macs_taken": 510, "parts": parts, "left": [rest],
        "evidence": "source", "judgement": "partial",
    }  # fmt: skip
    return entry | change


def test_the_placement_is_a_strip_of_blocks() -> None:
    made = proof()
    whole = placement(graph="prefill", left=[], partitions=1, lowered=False)
    side = dict(made.candidate) | {"placement": [placement(), whole]}
    text = html.render(made.model_copy(update={"candidate": side}))
    page = Page(text)
    assert not page.open
    assert EVIL not in text
    assert "url(" not in text  # so nothing can be asked for
    words = " ".join(page.text.split())
    for shown in (
        "Where it runs",
        "Predicted for pixel-8-pro, not measured there",
        "63 % of the multiplications, 19 of 26 operators, 2 pieces",
        "3 FULLY_CONNECTED",
        "Mali, graph prefill; of a file that is lowered for it, which this one is not",
        "; export float32",
        "in 0 %, 0 100 %, 1 25 %, out 100 %",
    ):
        assert shown in words, shown
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    heights = [
        value
        for tag, name, value in page.attributes
        if tag == "rect" and name == "height" and value == "33"
    ]
    assert heights == ["33", "33"]  # three quarters of 44, in both strips
    assert "Where it runs" not in html.render(made)


def test_a_deep_model_has_few_labels() -> None:
    blocks = [svg.Block(str(i), 1.0) for i in range(-1, 41)]
    root = parse(svg.strip("s", "t", "npu", blocks))
    labels = [node.text for node in root.iter("text")]
    assert len(labels) <= 12
    assert labels[0] == "-1"
    assert labels[-1] == "40"
    assert len(list(root.iter("rect"))) == 42


def test_noise_is_told_as_what_it_is() -> None:
    text = " ".join(Page(html.render(proof())).text.split())
    assert "counts as none" not in text
    assert "what a metric varies by from run to run" in text
    assert "verdicts come from the interval alone" in text


def test_memory_reads_the_same_everywhere() -> None:
    memory = claim("memory_ratio", 1.55, 1.5, 1.6, unit="x", better="higher")
    text = Page(html.render(proof(claims=[memory]))).text
    assert "1.55× less" in text


def test_counted_values_have_no_interval() -> None:
    size = claim("size", 23, 23, 23, unit="MB", tolerance=0, limit=30)
    assert "23.0 MB, exact, limit ≤ 30.0 MB: pass" in svg.gate("g", size)
    text = Page(html.render(proof(claims=[size]))).text
    assert "counted values are exact" in text


@pytest.mark.parametrize(
    ("value", "low", "high", "words"),
    [
        (0.9, 0.7, 1.1, "Beyond its limit: accuracy drop."),
        (0.4, 0.2, 0.6, "Not decided by this measurement: accuracy drop"),
    ],
)
def test_other_verdicts(value: float, low: float, high: float, words: str) -> None:
    text = Page(html.render(proof(claims=[claim("accuracy_drop", value, low, high, limit=0.5)])))
    assert words in text.text


def test_a_proof_without_limits_is_only_stated() -> None:
    text = Page(html.render(proof(claims=[claim("flips", 1, 0, 2, unit="%")]))).text
    assert "No limits were set" in text
    assert "\nLimits\n" not in text


def test_one_limit_and_two_devices() -> None:
    claims = [
        claim("accuracy_drop", 0, 0, 0, limit=1.0),
        claim("flips", 1, 0, 2, unit="%", device="Other CPU"),
    ]
    text = Page(html.render(proof(claims=claims))).text
    assert "The one limit is kept." in text
    assert "\nDevice\n" in text
    assert "\nOther CPU\n" in text


def test_nothing_from_the_data_becomes_markup() -> None:
    evil = proof().details
    evil["confusions"][0] |= {"gold": EVIL, "predicted": EVIL, "examples": [EVIL, EVIL * 20]}
    evil["classes"][0]["label"] = EVIL
    evil["command"] = EVIL
    side = proof().candidate | {"name": EVIL, "target": EVIL, "precision": EVIL}
    side["lineage"] = [{"method": EVIL, "settings": {EVIL: EVIL}}]
    claims = [claim("accuracy_drop", 0.1, 0, 0.2, limit=0.5, title=EVIL, device=EVIL)]
    text = html.render(
        proof(
            details=evil, candidate=side, baseline=side, claims=claims, device={EVIL: EVIL},
            data={"path": EVIL, "n": 3}, task=EVIL, created=EVIL,
        )
    )  # fmt: skip
    page = Page(text)
    assert not page.open
    assert not {"script", "img"} & set(page.tags)
    assert "<script" not in text.lower()
    assert EVIL in page.text


def test_missing_details_leave_sections_out() -> None:
    text = Page(
        html.render(proof(details={}, candidate={"name": "x"}, baseline={}, claims=[]))
    ).text
    for title in ("Latency", "Where the bytes are", "Confusions that got worse", "Recall by class"):
        assert title not in text
    bars = Page(html.render(proof(details={"confusions": []}))).text
    assert "No confusion became worse." in bars


def test_losses_read_as_losses() -> None:
    claims = [
        claim("nn_accuracy_drop", -0.4, -0.9, 0.1, baseline=80.0, candidate=80.4),
        claim("speedup", 0.5, 0.4, 0.6, unit="x", better="higher"),
        claim("size_ratio", 0.8, 0.8, 0.8, unit="x", better="higher"),
    ]
    side = proof().candidate | {"p50_ms": 20.0, "model_bytes": 200_000_000}
    text = Page(html.render(proof(claims=claims, candidate=side))).text
    for words in (
        "nearest-neighbour accuracy gained", "slower", "larger file", "2.00×", "2.00× slower",
        "0.40 points gained",
    ):  # fmt: skip
        assert words in text


# --- plots -------------------------------------------------------------------------------------


def parse(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def widths(root: ElementTree.Element, css: str) -> list[float]:
    return [
        float(r.attrib["width"].rstrip("%")) for r in root.iter("rect") if r.get("class") == css
    ]


def test_bars_start_at_zero() -> None:
    root = parse(svg.bars("k", "Size & more", "MB", 80.0, 20.0))
    assert widths(root, "a") == [100.0]
    assert widths(root, "b") == [25.0]
    assert root[0].text == "Size & more"
    assert widths(parse(svg.bars("k", "t", "MB", 0.0, 0.0)), "a") == [0.0]


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_gate_places_value_interval_and_limit_in_order(better: str) -> None:
    root = parse(svg.gate("g", claim("x", 2.0, 1.0, 4.0, limit=5.0, better=better)))
    circle = next(root.iter("circle"))
    bar = next(r for r in root.iter("rect") if r.get("class", "").startswith("ci"))
    allowed = next(r for r in root.iter("rect") if r.get("class") == "allowed")
    edge = next(
        float(line.attrib["x1"].rstrip("%"))
        for line in root.iter("line")
        if line.get("class") == "limit"
    )
    x, width = (float(bar.attrib[k].rstrip("%")) for k in ("x", "width"))
    middle = float(circle.attrib["cx"].rstrip("%"))
    assert x < middle < x + width < edge < 100
    assert (middle - x) / width == pytest.approx(1 / 3, abs=0.01)
    start = float(allowed.attrib["x"].rstrip("%"))
    assert start == pytest.approx(0 if better == "lower" else edge, abs=0.01)


def test_gate_labels_that_would_collide_are_one() -> None:
    wide = svg.gate("g", claim("x", 2.0, 1.0, 4.0, limit=5.0))
    narrow = svg.gate("g", claim("x", 2.0, 1.99, 2.01, limit=50.0, unit="ms"))
    exact = svg.gate("g", claim("x", 2.0, 2.0, 2.0, limit=5.0, tolerance=0))
    same = svg.gate("g", claim("x", 0.0, 0.0, 0.0, limit=5.0))
    assert ">1.00<" in wide
    assert ">4.00<" in wide
    assert ">1.99 to 2.01<" in narrow
    assert len(re.findall("<text", exact)) == 1
    assert ">0.00 to 0.00<" in same
    with pytest.raises(ValueError, match="no limit"):
        svg.gate("g", claim("x", 1, 0, 2))


def test_density_is_a_density() -> None:
    rng = np.random.default_rng(1)
    samples = rng.normal(5, 1, 400)
    grid = np.linspace(-2, 12, 2001)
    values = svg.density(samples, grid)
    assert float(values.sum() * (grid[1] - grid[0])) == pytest.approx(1, abs=0.01)
    assert grid[values.argmax()] == pytest.approx(5, abs=0.5)
    assert np.isfinite(svg.density(np.full(9, 3.0), grid)).all()


def test_latency_of_one_value_and_of_an_outlier() -> None:
    parse(svg.latency("l", [3.0] * 10, [3.0] * 10))
    root = parse(svg.latency("l", [4.0] * 500 + [900.0], list(np.linspace(2, 3, 400))))
    labels = [t.text or "" for t in root.iter("text")]
    assert "p50 4.00 · p99 4.00 ms" in labels
    assert not any("900" in label for label in labels)


@pytest.mark.parametrize(("low", "high"), [(0.0, 10.6), (0.0, 0.013), (97.0, 131.0), (0.0, 6e4)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    found = svg.ticks(low, high, 4)
    assert 2 <= len(found) <= 5
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert all(len(f"{t:g}") <= 6 for t in found)


def test_stacked_widths_are_shares_of_the_larger_model() -> None:
    before = {"embedding": 50.0, "ffn": 50.0}
    root = parse(svg.stacked("s", before, {"embedding": 25.0, "other": 0.0}))
    assert widths(root, "part-embedding") == pytest.approx([49.75, 24.75])
    assert widths(root, "part-ffn") == pytest.approx([49.75])
    assert widths(root, "part-other") == []


def test_dumbbells_cut_long_labels_and_stay_inside() -> None:
    root = parse(svg.dumbbells("d", [("x" * 60, 1.0, 0.0, 3), ("b", 0.5, 0.75, 4)]))
    centres = [float(c.attrib["cx"].rstrip("%")) for c in root.iter("circle")]
    assert all(0 < c < 100 for c in centres)
    assert max(len(t.text or "") for t in root.iter("text")) <= 24


# --- numbers, Markdown -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.126, "points", "0.13 points"),
        (-0.4, "points", "−0.40 points"),
        (-0.0001, "points", "0.00 points"),
        (2.0449, "x", "2.04×"),
        (4.176, "ms", "4.18 ms"),
        (41.76, "ms", "41.8 ms"),
        (1234.5, "MB", "1,234 MB"),
        (0.0, "ms", "0 ms"),
        (float("nan"), "ms", "– ms"),
        (0.999987, "cosine", "0.99999"),
        (5, "", "5.00"),
    ],
)
def test_quantities(value: float, unit: str, text: str) -> None:
    assert _format.quantity(value, unit) == text


def test_markdown_table_cannot_be_broken_out_of() -> None:
    bad = claim("accuracy_drop", 0, 0, 0, title="a|b\n<b>*c*", device="x|y")
    text = markdown.render(proof(claims=[bad], candidate={"name": "n|m"}))
    assert "a\\|b \\<b\\>\\*c\\*" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert text.startswith("# Stated: n\\|m\n")


def front_matter(text: str) -> dict[str, Any]:
    value = yaml.safe_load(text.split("---")[1])
    assert isinstance(value, dict)
    return value


def test_card_of_a_classifier() -> None:
    text = card.render(proof())
    head = front_matter(text)
    assert head["license"] == "unknown"
    assert head["pipeline_tag"] == "text-classification"
    assert head["library_name"] == "transformers.js"
    assert "base_model" not in head
    assert {"onnx", "int8", "intent", "pocketglm"} == set(head["tags"])
    for words in (
        'InferenceSession("model/onnx/model_quantized.onnx")', 'dtype: "q8"', "id2label",
        "quantize\\_rtn from cdcdcdcdcdcd: bits=8", "-0.07".replace("-", "−"), "2: play, stop",
        "unknown: ask", "ab" * 32, "## Intended use",
    ):  # fmt: skip
        assert words in text


def test_card_of_an_embedding_model() -> None:
    known = {"labels": [], "license": "apache-2.0", "base_model": "a/b", "model_file": "model.onnx"}
    side = proof().candidate | known
    text = card.render(proof(task="embed", candidate=side, data={"language": ["en", "zh"]}))
    head = front_matter(text)
    assert (head["license"], head["base_model"]) == ("apache-2.0", "a/b")
    assert head["language"] == ["en", "zh"]
    assert head["pipeline_tag"] == "sentence-similarity"
    assert "sentence_embedding" in text
    assert 'dtype: "fp32"' in text


def test_card_of_another_runtime_and_many_labels() -> None:
    side = proof().candidate | {"target": "gguf", "labels": [f"l{i}" for i in range(50)]}
    text = card.render(proof(candidate=side | {"lineage": [], "model_bytes": 0}, task="other"))
    assert "onnxruntime" not in text
    assert "and 10 more" in text
    assert "No step is recorded." in text
    assert "size unknown" in text


def test_the_card_s_python_is_python() -> None:
    for labels in (["a"], []):
        text = card.render(proof(candidate=proof().candidate | {"labels": labels}))
        compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_parity_of_the_files_is_in_every_report() -> None:
    plain = proof()
    assert "What the files compute" not in html.render(plain) + markdown.render(plain)
    both = {"max_abs": 0.0123, "kl": 4.5e-5, "flip_rate": 0.0625}
    parity = {"n": 17, "output_std": 1.25, "delegate_on": both}
    side = plain.candidate | {
        "target": EVIL,
        "delegate": "XNNPACK",
        "parity": parity | {"delegate_off": both | {"kl": None, "flip_rate": None}},
    }
    other = plain.baseline | {"target": "gguf", "delegate": "", "parity": parity}
    found = proof(candidate=side, baseline=other)
    text = Page(html.render(found)).text
    for words in ("with XNNPACK", "without XNNPACK", "as shipped", "0.012", "4.5e-05", "6.2 %"):
        assert words in text
        assert words in markdown.render(found)
    assert "<script" not in html.render(found)
    assert "standard deviation 1.2)" in text
