"""The placement part of the report: the model as a strip of blocks, by where each will run.

A block is filled from below by the share of its multiplications (where it has none, of its
operators) that the delegate takes; the rest, hatched, falls back to the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from pocketglm.artifacts.placement import PartShare, Placement
from pocketglm.artifacts.proof import Proof
from pocketglm.report import svg
from pocketglm.report._markup import esc, section

_UNITS = {"gpu": "GPU", "npu": "NPU"}
_KNOWN = {
    "measured": "its rules are compared with the real runtime in PocketGLM's tests",
    "source": "its rules are read from the runtime's source",
    "documented": "its rules are those of its documentation",
    "inferred": "its rules are inferred",
}
_SHOWN = 4  # reasons of a delegate


def sections(proof: Proof) -> list[str]:
    """One section, or none where the export was not made for a device."""
    entries = [Placement.model_validate(entry) for entry in proof.candidate.get("placement", [])]
    if not entries:
        return []
    figures = "".join(_figure(f"place{i}", entry) for i, entry in enumerate(entries))
    legend = (
        '<p class="legend"><span><i class="key unit-cpu"></i>CPU, by the delegate</span>'
        '<span><i class="key unit-gpu"></i>GPU</span><span><i class="key unit-npu"></i>NPU</span>'
        '<span><i class="key unit-rest"></i>falls back to plain kernels of the CPU</span></p>'
    )
    note = (
        f"Predicted for {entries[0].device}, not measured there: one strip for each of its "
        "delegates and each graph of the file. A block is filled by the share of its "
        "multiplications (of its operators, where it has none) that the delegate takes."
    )
    body = f'{legend}<div class="places">{figures}</div>'
    return [section("Where it runs", note, body)]


def _figure(key: str, entry: Placement) -> str:
    pieces = f"{entry.partitions} piece{'s' if entry.partitions != 1 else ''}"
    words = (
        f"{100 * entry.share:.0f} % of the multiplications, {entry.taken} of {entry.nodes} "
        f"operators, {pieces}"
    )
    unit = "" if entry.runs_on == "cpu" else f"{_UNITS[entry.runs_on]}, "
    unit += f"{entry.accelerator}, graph {entry.graph}"
    if not entry.lowered:
        unit += "; of a file that is lowered for it, which this one is not"
    return (
        f'<figure class="wide"><figcaption><b>{esc(entry.title)}</b><span>{esc(words)}</span>'
        f'</figcaption><p class="unit">{esc(unit)}; {esc(_KNOWN[entry.evidence])}.</p>'
        f"{strip(key, entry)}{_reasons(entry)}</figure>"
    )


def strip(key: str, entry: Placement) -> str:
    """Blocks of equal width, in the model's order."""
    blocks = [svg.Block(_name(part), _share(part)) for part in entry.parts]
    return svg.strip(key, f"Placement by {entry.title}", entry.runs_on, blocks)


def _name(part: PartShare) -> str:
    short = {"embeddings": "in", "head": "out"}
    return short.get(part.part, part.part.removeprefix("block."))


def _share(part: PartShare) -> float:
    if part.macs:
        return part.macs_taken / part.macs
    return part.taken / part.nodes if part.nodes else 0.0


def _reasons(entry: Placement) -> str:
    if not entry.left:
        return ""
    rows = "".join(
        f"<li><b>{rest.count} {esc(rest.op.removeprefix('com.microsoft.'))}</b> "
        f"{esc(rest.because)}{_rewrite(rest.rewrite)}</li>"
        for rest in entry.left[:_SHOWN]
    )
    more = _others(entry.left[_SHOWN:])
    return f'<ul class="rest">{rows}{more}</ul>'


def _rewrite(words: str) -> str:
    return f"<span>; {esc(words)}</span>" if words else ""


def _others(rest: Sequence[object]) -> str:
    if not rest:
        return ""
    more = "1 other reason" if len(rest) == 1 else f"{len(rest)} other reasons"
    return f"<li>{more}, see export.json</li>"
