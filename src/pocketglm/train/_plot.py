"""The loss plot: one small SVG with the training loss and the validation score, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 320, 56, 34, 284
_RIGHT = _WIDTH - 56
_POINTS = 200  # the curve shows means over this many stretches of steps at most
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444}.loss{stroke:#2563eb}.score{stroke:#d97706}"
    "polyline{fill:none;stroke-width:1.8}circle{fill:#d97706}.axis{stroke:#ccc}"
    "@media(prefers-color-scheme:dark){text{fill:#bbb}.axis{stroke:#444}"
    ".loss{stroke:#60a5fa}.score{stroke:#fbbf24}circle{fill:#fbbf24}}"
)


def loss_svg(
    losses: Sequence[float], scores: Sequence[tuple[int, float]], score_name: str = "accuracy"
) -> str:
    """losses: one per step. scores: (step, validation score), its axis on the right."""
    steps = max(len(losses), 1)
    parts = np.array_split(np.asarray(losses, np.float64), min(_POINTS, steps))
    ends = np.cumsum([len(part) for part in parts])
    curve = [(float(x), float(p.mean())) for x, p in zip(ends, parts, strict=True) if len(p)]
    body = [_axes(steps), *_series(curve, steps, "loss", "training loss", "start", _LEFT)]
    if scores:
        points = [(float(step), float(score)) for step, score in scores]
        body += _series(points, steps, "score", f"validation {score_name}", "end", _RIGHT)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>training loss and validation {escape(score_name)}</title>"
        f"<style>{_STYLE}</style>{''.join(body)}</svg>\n"
    )


def _axes(steps: int) -> str:
    return (
        f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}V{_TOP}"/>'
        f'<text x="{_LEFT}" y="{_BOTTOM + 18}">0</text>'
        f'<text x="{_RIGHT}" y="{_BOTTOM + 18}" text-anchor="end">step {steps}</text>'
    )


def _series(
    points: Sequence[tuple[float, float]], steps: int, kind: str, name: str, anchor: str, edge: int
) -> list[str]:
    """A line from its lowest to its highest value over the full height, with both written."""
    if not points:
        return []
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    places = [
        (_LEFT + (_RIGHT - _LEFT) * x / steps, _BOTTOM - (_BOTTOM - _TOP) * (y - low) / span)
        for x, y in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    beside = "end" if anchor == "start" else "start"  # tick labels stand outside the frame
    x = edge + (-6 if anchor == "start" else 6)
    return [
        f'<polyline class="{kind}" points="{line}"/>',
        *(dots if kind == "score" else []),
        f'<text x="{edge}" y="{_TOP - 14}" text-anchor="{anchor}">{escape(name)}</text>',
        f'<text x="{x}" y="{_TOP + 4}" text-anchor="{beside}">{high:.3g}</text>',
        f'<text x="{x}" y="{_BOTTOM}" text-anchor="{beside}">{low:.3g}</text>',
    ]
