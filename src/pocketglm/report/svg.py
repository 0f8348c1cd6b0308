"""The report's plots as inline SVG strings; pure functions of numbers.

Every plot is as wide as its container: positions are percentages and text is in pixels, so that
a label keeps its size on a phone. Curves sit in a nested, stretched viewport. Colours come from
the style sheet's classes. Every plot has a title and a description for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from pocketglm.artifacts.proof import Claim
from pocketglm.report import _format

Floats = npt.NDArray[np.float64]
PARTS = ("embedding", "attention", "ffn", "head", "other")


def _tag(name: str, content: str = "", **attributes: str | float) -> str:
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{text}>{content}</{name}>" if content else f"<{name}{text}/>"


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def _pct(value: float) -> str:
    return _value(value) + "%"


def _text(content: str, x: str, y: float, css: str = "", anchor: str = "start") -> str:
    return _tag("text", escape(content), x=x, y=y, class_=css or "t", text_anchor=anchor)


def _chart(key: str, height: float, title: str, description: str, *body: str) -> str:
    head = _tag("title", escape(title), id=f"{key}-t") + _tag(
        "desc", escape(description), id=f"{key}-d"
    )
    return _tag(
        "svg",
        head + "".join(body),
        width="100%",
        height=height,
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most `count` + 1 round values inside [low, high]."""
    span = max(high - low, 1e-12)
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def bars(key: str, title: str, unit: str, baseline: float, candidate: float) -> str:
    """Two horizontal bars from zero, baseline above candidate."""
    top = max(baseline, candidate, 1e-12)
    body = []
    for row, (name, value) in enumerate((("before", baseline), ("after", candidate))):
        y = 44 * row
        css = ("a", "b")[row]
        body += [
            _text(name, "0", y + 14, "t mute"),
            _text(_format.quantity(value, unit), "100%", y + 14, f"t num {css}", "end"),
            _tag("rect", x=0, y=y + 21, width="100%", height=12, rx=3, class_="track"),
            _tag("rect", x=0, y=y + 21, width=_pct(value / top * 100), height=12, rx=3, class_=css),
        ]
    said = f"before {_format.quantity(baseline, unit)}, after {_format.quantity(candidate, unit)}"
    return _chart(key, 80, title, said, *body)


def gate(key: str, claim: Claim) -> str:
    """A claim's value and interval on an axis with its limit; the allowed side is shaded."""
    if claim.limit is None:
        raise ValueError(f"claim '{claim.metric}' has no limit to draw")
    neutral = 1.0 if claim.unit == "x" else 0.0
    points = [claim.low, claim.high, claim.value, claim.limit, neutral]
    pad = max(max(points) - min(points), 1e-9) * 0.14
    start, end = min(points) - pad, max(points) + pad
    if claim.unit not in ("points", "%", "x"):  # the others are never negative
        start = max(start, 0.0)

    def at(value: float) -> float:
        return (value - start) / (end - start) * 100

    edge = at(claim.limit)
    left, width = (0.0, edge) if claim.better == "lower" else (edge, 100 - edge)
    low, high, middle = at(claim.low), at(claim.high), at(claim.value)
    body = [
        _tag("rect", x=_pct(left), y=22, width=_pct(width), height=24, class_="allowed"),
        _tag("line", x1=0, x2="100%", y1=46, y2=46, class_="axis"),
        _tag("line", x1=_pct(at(neutral)), x2=_pct(at(neutral)), y1=41, y2=46, class_="axis"),
        _tag("line", x1=_pct(edge), x2=_pct(edge), y1=18, y2=46, class_="limit"),
        _text(f"limit {_format.number(claim.limit, claim.unit)}", *_place(edge, 13), _side(edge)),
        _tag(
            "rect", x=_pct(low), y=31, width=_pct(max(high - low, 0.0)), height=6, rx=3,
            class_=f"ci {claim.verdict}",
        ),
        _tag("circle", cx=_pct(middle), cy=34, r=6, class_=f"dot {claim.verdict}"),
        *_ends(claim, low, high),
    ]  # fmt: skip
    interval = "exact" if _format.exact(claim) else f"95 % interval {_format.interval(claim)}"
    said = (
        f"{_format.quantity(claim.value, claim.unit)}, {interval}, "
        f"limit {_format.limit(claim)}: {claim.verdict}"
    )
    return _chart(key, 64, claim.title, said, *body)


def _side(percent: float) -> str:
    return "start" if percent < 20 else "end" if percent > 80 else "middle"


def _place(percent: float, y: float) -> tuple[str, float, str]:
    return _pct(percent), y, "t mute"


def _ends(claim: Claim, low: float, high: float) -> list[str]:
    """The interval's ends in figures; one text where the two would run into each other."""
    if _format.exact(claim):
        return []
    if high - low >= 24:
        return [
            _text(_format.number(claim.low, claim.unit), *_place(low, 61), _side(low)),
            _text(_format.number(claim.high, claim.unit), *_place(high, 61), _side(high)),
        ]
    middle = (low + high) / 2
    return [_text(_format.interval(claim), *_place(middle, 61), _side(middle))]


def density(samples: Floats, grid: Floats) -> Floats:
    """Gaussian kernel density of `samples` at `grid`; Silverman's robust bandwidth."""
    quartiles = np.percentile(samples, [25, 75])
    spread = min(float(np.std(samples)), float(quartiles[1] - quartiles[0]) / 1.34)
    floor = (grid[-1] - grid[0]) / 150
    width = max(0.9 * (spread or float(np.std(samples))) * len(samples) ** -0.2, floor)
    z = (grid[:, None] - samples[None, :]) / width
    values: Floats = np.exp(-0.5 * z * z).sum(1) / (len(samples) * width * math.sqrt(2 * math.pi))
    return values


def latency(key: str, baseline: Sequence[float], candidate: Sequence[float]) -> str:
    """Distribution of two sets of latencies in ms: density, every run as a tick, p50 and p99."""
    groups = [np.asarray(baseline, np.float64), np.asarray(candidate, np.float64)]
    end = max(float(np.percentile(g, 99)) for g in groups) * 1.06
    start = min(float(g.min()) for g in groups)
    start = 0.0 if start < 0.5 * end else max(start - 0.15 * (end - start), 0.0)
    grid = np.linspace(start, end, 181)
    body, said = [], []
    for row, (name, group) in enumerate(zip(("before", "after"), groups, strict=True)):
        y = 112 * row
        css = ("a", "b")[row]
        p50, p99 = np.percentile(group, [50, 99])
        note = f"p50 {_format.number(p50, 'ms')} \u00b7 p99 {_format.quantity(p99, 'ms')}"
        x = _pct((p50 - start) / (end - start) * 100)
        body += [
            _text(name, "0", y + 14, "t mute"),
            _text(note, "100%", y + 14, f"t num {css}", "end"),
            _ridge(group, grid, y + 24, css),
            _tag("line", x1=x, x2=x, y1=y + 24, y2=y + 92, class_=f"p50 {css}"),
        ]
        said.append(f"{name}: {note} over {len(group)} runs")
    body.append(_tag("line", x1=0, x2="100%", y1=222, y2=222, class_="axis"))
    for tick in ticks(start, end, 4):
        percent = (tick - start) / (end - start) * 100
        x = _pct(percent)
        anchor = "start" if percent < 3 else "end" if percent > 95 else "middle"
        label = f"{tick:g}" + (" ms" if tick == 0 else "")
        body.append(_tag("line", x1=x, x2=x, y1=222, y2=227, class_="axis"))
        body.append(_text(label, x, 242, "t mute", anchor))
    return _chart(key, 248, "Latency distribution", "; ".join(said), *body)


def _ridge(group: Floats, grid: Floats, y: float, css: str) -> str:
    """Curve (60 high) and a rug of at most 300 runs (8 high) in a stretched 1000 x 68 viewport."""
    start, end = grid[0], grid[-1]
    height = density(group, grid)
    height = 60 - 58 * height / height.max()
    curve = " ".join(f"{x:.0f},{h:.1f}" for x, h in zip(np.linspace(0, 1000, 181), height))  # noqa: B905
    shown = np.sort(group[group <= end])
    shown = shown[np.linspace(0, len(shown) - 1, min(len(shown), 300)).astype(int)]
    rug = "".join(f"M{(v - start) / (end - start) * 1000:.0f} 62v6" for v in shown)
    inner = (
        _tag("polygon", points=f"0,60 {curve} 1000,60", class_=f"fill {css}")
        + _tag("polyline", points=curve, class_=f"line {css}")
        + _tag("path", d=rug, class_=f"rug {css}")
    )
    return _tag(
        "svg", inner, x=0, y=y, width="100%", height=68, viewBox="0 0 1000 68",
        preserveAspectRatio="none",
    )  # fmt: skip


def stacked(key: str, baseline: Mapping[str, float], candidate: Mapping[str, float]) -> str:
    """Bytes by part of the model, before and after, on one scale."""
    totals = [sum(baseline.values()), sum(candidate.values())]
    top = max(*totals, 1.0)
    body, said = [], []
    for row, (name, parts) in enumerate((("before", baseline), ("after", candidate))):
        y, x = 62 * row, 0.0
        body += [
            _text(name, "0", y + 14, "t mute"),
            _text(_format.megabytes(totals[row]), "100%", y + 14, "t num", "end"),
        ]
        for part in PARTS:
            width = parts.get(part, 0) / top * 100
            if width > 0:
                body.append(
                    _tag("rect", x=_pct(x), y=y + 22, width=_pct(max(width - 0.25, 0.15)),
                         height=28, class_=f"part-{part}")
                )  # fmt: skip
            x += width
        listed = ", ".join(f"{p} {_format.megabytes(parts[p])}" for p in PARTS if parts.get(p))
        said.append(f"{name}: {listed}")
    return _chart(key, 114, "Size by part of the model", "; ".join(said), *body)


def dumbbells(key: str, rows: Sequence[tuple[str, float, float, int]]) -> str:
    """Recall of classes before and after, in fractions: (label, before, after, rows)."""
    start = min(min(before, after) for _, before, after, _ in rows)
    start = max(math.floor((start - 0.02) * 20) / 20, 0.0)
    scale = 98 / max(1 - start, 1e-9)
    body = []
    for index, (label, before, after, count) in enumerate(rows):
        y = 46 * index
        a, b = (_pct(1 + (v - start) * scale) for v in (before, after))
        change = f"{before * 100:.0f} \u2192 {after * 100:.0f} % of {count}"
        name = label if len(label) <= 24 else label[:23] + "\u2026"
        body += [
            _text(name, "0", y + 14, "t"),
            _text(change, "100%", y + 14, "t num mute", "end"),
            _tag("line", x1=0, x2="100%", y1=y + 28, y2=y + 28, class_="guide"),
            _tag("line", x1=a, x2=b, y1=y + 28, y2=y + 28, class_="span"),
            _tag("circle", cx=a, cy=y + 28, r=5, class_="a"),
            _tag("circle", cx=b, cy=y + 28, r=5, class_="b"),
        ]
    bottom = 46 * len(rows)
    for value in (start, (start + 1) / 2, 1.0):
        x = 1 + (value - start) * scale
        anchor = "start" if value == start else "end" if value == 1 else "middle"
        body.append(_text(f"{value * 100:g} %", _pct(x), bottom + 12, "t mute", anchor))
    said = "; ".join(f"{label} {b * 100:.0f} to {a * 100:.0f} %" for label, b, a, _ in rows)
    return _chart(key, bottom + 18, "Recall of the classes that changed most", said, *body)


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the model. share: of its work that a delegate takes, 0 to 1."""

    label: str
    share: float


def strip(key: str, title: str, unit: str, blocks: Sequence[Block]) -> str:
    """Blocks side by side, each filled from below by its share, striped above. unit: cpu, gpu, npu.

    At most a dozen of them are labelled, so that the labels fit on a phone.
    """
    height, width = 44.0, 100 / max(len(blocks), 1)
    every = max(1, math.ceil((len(blocks) - 2) / 10))
    body, said = [], []
    for index, block in enumerate(blocks):
        left, wide = index * width, max(width - 0.4, 0.2)
        place = {"x": _pct(left), "width": _pct(wide)}
        rest = height * (1 - block.share)
        if rest:
            x, y = (_pct(left), _pct(left + wide)), rest / 2
            body += [
                _tag("rect", **place, y=0, height=rest, class_="unit-rest-ground"),
                _tag(
                    "line", x1=x[0], x2=x[1], y1=y, y2=y, stroke_width=rest,
                    class_="unit-rest-stripes",
                ),
            ]  # fmt: skip
        if block.share:
            taken = height - rest
            body.append(_tag("rect", **place, y=rest, height=taken, class_=f"unit-{unit}"))
        if index in (0, len(blocks) - 1) or (index - 1) % every == 0:
            middle = _pct(left + width / 2)
            body.append(_text(block.label, middle, height + 16, "t mute", "middle"))
        said.append(f"{block.label} {100 * block.share:.0f} %")
    return _chart(key, height + 22, title, ", ".join(said), *body)


@dataclass(frozen=True, slots=True)
class Range:
    """A predicted value with its range. css: pass, fail, inconclusive or stated."""

    label: str
    value: float
    low: float
    high: float
    css: str


def ranges(key: str, title: str, unit: str, rows: Sequence[Range], limit: float | None) -> str:
    """Ranges on one logarithmic axis, a row each; the upright line is the limit."""
    values = [number for row in rows for number in (row.low, row.high)]
    ends = [*values, limit] if limit else values
    start, end = math.log10(min(ends)) - 0.04, math.log10(max(ends)) + 0.04
    span, bottom = max(end - start, 1e-9), 40.0 * len(rows) + 4

    def at(value: float) -> float:
        return (math.log10(value) - start) / span * 100

    body, said = [], []
    for index, row in enumerate(rows):
        y = 40 * index
        words = f"{_format.number(row.low, unit)} to {_format.quantity(row.high, unit)}"
        body += [
            _text(row.label, "0", y + 14, "t"),
            _text(words, "100%", y + 14, "t num mute", "end"),
            _tag("line", x1=0, x2="100%", y1=y + 27, y2=y + 27, class_="guide"),
            _tag(
                "rect", x=_pct(at(row.low)), y=y + 24, width=_pct(at(row.high) - at(row.low)),
                height=6, rx=3, class_=f"ci {row.css}",
            ),
            _tag("circle", cx=_pct(at(row.value)), cy=y + 27, r=5, class_=f"dot {row.css}"),
        ]  # fmt: skip
        said.append(f"{row.label} {words}")
    if limit:
        x = _pct(at(limit))
        for index in range(len(rows)):  # not across the words between them
            y = 40 * index
            body.append(_tag("line", x1=x, x2=x, y1=y + 19, y2=y + 35, class_="limit"))
        words = f"limit {_format.quantity(limit, unit)}"
        body.append(_text(words, x, bottom + 15, "t mute", _side(at(limit))))
        said.append(words)
    return _chart(key, bottom + (22 if limit else 4), title, "; ".join(said), *body)
