"""What the files compute, against their checkpoints in float32: one table for every report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketglm.artifacts.proof import Proof
from pocketglm.report import _format
from pocketglm.report._markup import esc, section

TITLE = "What the files compute"
HEAD = ("File", "Run", "Worst difference", "Divergence", "Flips", "n")


def note(proof: Proof) -> str:
    """How to read the table."""
    return (
        "Each file's own outputs on the sample texts of its export, against its checkpoint in "
        f"float32 (standard deviation {_spread(proof)}). Divergence: KL of the answers' "
        "probabilities, nats. Flips: rows whose most likely answer is another."
    )


def rows(proof: Proof) -> list[tuple[str, ...]]:
    """Cells as `HEAD`; empty where neither export was compared whole."""
    found: list[tuple[str, ...]] = []
    for side in (proof.baseline, proof.candidate):
        parity = side.get("parity") or {}
        name = side.get("delegate") or ""
        words = {
            "delegate_on": f"with {name}" if name else "as shipped",
            "delegate_off": f"without {name}",
        }
        for key, how in words.items():
            if values := parity.get(key):
                found.append((_format.precision(side), how, *_cells(values), f"{parity['n']:,}"))
    return found


def _cells(values: Mapping[str, Any]) -> tuple[str, str, str]:
    kl, flips = values.get("kl"), values.get("flip_rate")
    return (
        f"{values['max_abs']:.2g}",
        "–" if kl is None else f"{kl:.2g}",
        "–" if flips is None else f"{100 * flips:.1f} %",
    )


def _spread(proof: Proof) -> str:
    value = (proof.candidate.get("parity") or {}).get("output_std")
    return "unknown" if value is None else f"{value:.2g}"


def render(proof: Proof) -> str:
    """The report's section; empty where there is nothing to show."""
    found = rows(proof)
    if not found:
        return ""
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in HEAD)
    body = "".join(
        f'<tr><th scope="row">{esc(name)}</th>'
        + "".join(
            f'<td data-label="{esc(label)}">{esc(cell)}</td>'
            for label, cell in zip(HEAD[1:], cells, strict=True)
        )
        + "</tr>"
        for name, *cells in found
    )
    table = f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return section(TITLE, note(proof), table)
