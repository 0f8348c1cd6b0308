"""The report's sections on what a model got wrong that its baseline had right, with examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocketglm.artifacts.proof import Proof
from pocketglm.report import svg
from pocketglm.report._markup import esc, section


def sections(proof: Proof) -> list[str]:
    """Those that the task has; an empty text for the others."""
    return [_confusions(proof), _spoiled(proof), _classes(proof)]


def _confusions(proof: Proof) -> str:
    if "confusions" not in proof.details:
        return ""
    cards = "".join(
        _misread(
            entry,
            60,
            f'<span class="count">{int(entry["before"])} \u2192 {int(entry["after"])}</span>',
            entry.get("examples", []),
        )
        for entry in proof.details["confusions"]
    )
    body = f'<ul class="confusions">{cards}</ul>' if cards else "<p>No confusion became worse.</p>"
    return section("Confusions that got worse", _flips(proof, "predictions", "label"), body)


def _spoiled(proof: Proof) -> str:
    if "spoiled" not in proof.details:
        return ""
    cards = "".join(_misread(e, 240, "", [e["text"]]) for e in proof.details["spoiled"])
    body = f'<ul class="confusions">{cards}</ul>' if cards else "<p>No command became wrong.</p>"
    return section("Commands that became wrong", _flips(proof, "actions", "action"), body)


def _flips(proof: Proof, what: str, one: str) -> str:
    flips = proof.details.get("flips", {})
    return (
        f"{flips.get('changed', 0):,} of {int(proof.data.get('n', 0)):,} {what} changed: "
        f"{flips.get('to_wrong', 0)} became wrong, {flips.get('to_right', 0)} became right, "
        f"{flips.get('wrong_to_wrong', 0)} moved from one wrong {one} to another."
    )


def _misread(entry: Mapping[str, Any], limit: int, count: str, texts: Sequence[str]) -> str:
    examples = "".join(f'<li dir="auto">{esc(_short(text))}</li>' for text in texts)
    return (
        f'<li><p class="pair"><code>{esc(_short(entry["gold"], limit))}</code>'
        f'<span class="arrow">read as</span><code class="wrong">'
        f"{esc(_short(entry['predicted'], limit))}</code>{count}</p><ul>{examples}</ul></li>"
    )


def _short(text: object, limit: int = 240) -> str:
    value = str(text)
    return value if len(value) <= limit else value[: limit - 1] + "\u2026"


def _classes(proof: Proof) -> str:
    entries: Sequence[Mapping[str, Any]] = proof.details.get("classes", [])
    if not entries:
        return ""
    rows = [(e["label"], float(e["baseline"]), float(e["candidate"]), int(e["n"])) for e in entries]
    legend = (
        '<p class="legend"><i class="key a"></i>before <i class="key b"></i>after</p>'
        f'<figure class="wide">{svg.dumbbells("cls", rows)}</figure>'
    )
    note = "Share of each class's rows that were recognized; the largest changes, worst first."
    return section("Recall by class", note, legend)
