"""`report.md`: the verdict and the claims as plain Markdown, for a terminal or a pull request."""

from __future__ import annotations

from pocketglm.artifacts.proof import Proof
from pocketglm.report import _format, _parity


def render(proof: Proof) -> str:
    """A title with the verdict, one line on what was compared, the table of claims."""
    name = cell(proof.candidate.get("name", "export"))
    return (
        f"# {_format.WORDS[proof.verdict]}: {name}\n\n"
        f"{cell(_format.precision(proof.candidate))} against "
        f"{cell(_format.precision(proof.baseline))}, task {cell(proof.task)}, "
        f"{_format.scored(proof)} of {cell(proof.data.get('path', ''))}, "
        f"{cell(proof.created)}.\n\n{table(proof)}{_files(proof)}"
    )


def _files(proof: Proof) -> str:
    """What the files compute, against their checkpoints."""
    found = _parity.rows(proof)
    if not found:
        return ""
    lines = [
        f"| {' | '.join(name.lower() for name in _parity.HEAD)} |",
        "|---|---|---:|---:|---:|---:|",
        *("| " + " | ".join(cell(text) for text in row) + " |" for row in found),
    ]
    return f"\n## {_parity.TITLE}\n\n{_parity.note(proof)}\n\n" + "\n".join(lines) + "\n"


def table(proof: Proof) -> str:
    """Every claim in one row: sides, value, interval, n, limit, verdict; then how and where."""
    lines = [
        "| claim | before \u2192 after | value | 95 % interval | n | limit | verdict |",
        "|---|---|---:|---|---:|---|---|",
    ]
    for claim in proof.claims:
        cells = [
            claim.title,
            _format.sides(claim),
            _format.quantity(claim.value, claim.unit),
            _format.interval(claim),
            f"{claim.n:,}",
            _format.limit(claim),
            claim.verdict,
        ]
        lines.append("| " + " | ".join(cell(text) for text in cells) + " |")
    devices = sorted({claim.device for claim in proof.claims})
    notes = "".join(f"{cell(note)}\n" for note in _format.notes(proof))
    return "\n".join(lines) + f"\n\n{notes}Measured on: {cell('; '.join(devices))}.\n"


def cell(value: object) -> str:
    """Text that cannot break out of a table cell, or become markup."""
    text = " ".join(str(value).split())
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, "\\" + sign)
    return text
