"""`report.html`: one small self-contained page from a Proof. No script, no request, no font file.

Verdicts come first, then the plots, then what got worse with example sentences, then every claim
with n, interval, device and tolerance. All text that comes from data is escaped; the page's own
Content-Security-Policy forbids scripts and requests besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketglm.artifacts.proof import Claim, Proof
from pocketglm.report import _format, _parity, _placement, _worse, svg
from pocketglm.report._markup import esc, section

_STYLE = Path(__file__).with_name("style.css")
_ICONS = {"pass": "\u2713", "fail": "\u2715", "inconclusive": "~", "stated": "i"}
# what a task is judged by: metric -> what the claim's two sides are
_QUALITY = {
    "accuracy_drop": "accuracy",
    "nn_accuracy_drop": "nearest-neighbour accuracy",
    "exact_match_drop": "exact match",
    "perplexity_increase": "perplexity",
}
_SPEED = ("speedup", "decode_speedup")
_PAIRED = {
    "p50_ms": _SPEED,
    "first_token_ms": ("prefill_speedup",),
    "peak_rss_bytes": ("memory_ratio",),
}
_PART_NAMES = {
    "embedding": "Embedding",
    "attention": "Attention",
    "ffn": "Feed-forward",
    "head": "Head",
    "other": "Norms, graph, other",
}


def render(proof: Proof) -> str:
    """The whole page as one string."""
    name = str(proof.candidate.get("name", "export"))
    sections = [
        _hero(proof),
        _gates(proof),
        _compare(proof),
        _latency(proof),
        _parts(proof),
        _parity.render(proof),
        *_placement.sections(proof),
        *_worse.sections(proof),
        _claims(proof),
        _origin(proof),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{esc(_format.WORDS[proof.verdict])}: {esc(name)}</title>\n"
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        + "".join(section for section in sections if section)
        + f'<footer class="wrap">Made with PocketGLM, {esc(proof.created)}. '
        "MB is 10<sup>6</sup> bytes. The same numbers are in proof.json.</footer>\n"
        "</body>\n</html>\n"
    )


def _find(proof: Proof, *metrics: str) -> Claim | None:
    return next((claim for claim in proof.claims if claim.metric in metrics), None)


# --- verdicts ----------------------------------------------------------------------------------


def _hero(proof: Proof) -> str:
    side, base = proof.candidate, proof.baseline
    about = (
        f"{_format.precision(side)} against {_format.precision(base)}, task {proof.task}, "
        f"{_format.scored(proof)}, on {proof.device.get('cpu', 'this machine')}"
    )
    return (
        f'<div class="hero {proof.verdict}"><div class="wrap">'
        f'<p class="eyebrow">PocketGLM proof</p>'
        f'<h1><span class="icon" aria-hidden="true">{_ICONS[proof.verdict]}</span>'
        f"{_format.WORDS[proof.verdict]}</h1>"
        f'<p class="lead">{esc(_sentence(proof))}</p>'
        f'<p class="about"><b>{esc(side.get("name", "export"))}</b>: {esc(about)}.</p>'
        f'<dl class="figures">{_figures(proof)}</dl></div></div>\n'
    )


def _sentence(proof: Proof) -> str:
    gates = [claim for claim in proof.claims if claim.limit is not None]
    if not gates:
        return "No limits were set; every figure below is only stated."
    by = {v: [c.title.lower() for c in gates if c.verdict == v] for v in _ICONS}
    if proof.verdict == "pass":
        return "The one limit is kept." if len(gates) == 1 else f"All {len(gates)} limits are kept."
    parts = []
    if by["fail"]:
        parts.append(f"Beyond its limit: {', '.join(by['fail'])}.")
    if by["inconclusive"]:
        parts.append(
            f"Not decided by this measurement: {', '.join(by['inconclusive'])}; "
            "the interval holds the limit, so measure on more rows or in more pairs."
        )
    return " ".join(parts)


def _figures(proof: Proof) -> str:
    """The headline numbers: what it lost, how much faster, smaller and leaner it is."""
    cells = []
    for claim in (
        _find(proof, *_QUALITY),
        _find(proof, *_SPEED),
        _find(proof, "size_ratio"),
        _find(proof, "memory_ratio"),
    ):
        if claim is None:
            continue
        label, value, unit = _headline(claim)
        cells.append(
            f"<div><dt>{esc(label)}</dt><dd><strong>{esc(value)}{unit}</strong>"
            f"<span>{esc(_format.sides(claim))}</span></dd></div>"
        )
    return "".join(cells)


def _headline(claim: Claim) -> tuple[str, str, str]:
    """(words, number, markup of the unit); the words carry the sign, so the number has none."""
    name = _QUALITY.get(claim.metric)
    if name:
        value = _format.number(abs(claim.value), claim.unit)
        if claim.unit == "points":
            word = "gained" if claim.value < 0 else "lost"
            return f"{name} {word}", value, "<small> points</small>"
        return f"{'lower' if claim.value < 0 else 'higher'} {name}", value, "<small> %</small>"
    words = {
        "speedup": ("faster", "slower"),
        "decode_speedup": ("faster decoding", "slower decoding"),
        "size_ratio": ("smaller file", "larger file"),
        "memory_ratio": ("less memory", "more memory"),
    }[claim.metric]
    larger = max(claim.value, 1 / claim.value)
    return words[claim.value < 1], _format.quantity(larger, "x"), ""


def _gates(proof: Proof) -> str:
    gates = [claim for claim in proof.claims if claim.limit is not None]
    if not gates:
        return ""
    items = "".join(
        f'<li><div class="what"><h3>{esc(c.title)}</h3><span class="badge {c.verdict}">'
        f'<i aria-hidden="true">{_ICONS[c.verdict]}</i>{_format.WORDS[c.verdict]}</span></div>'
        f'<div class="value"><strong>{esc(_format.quantity(c.value, c.unit))}</strong>'
        f"<span>limit {esc(_format.limit(c))}</span></div>"
        f'<div class="plot">{svg.gate(f"g{i}", c)}</div></li>'
        for i, c in enumerate(gates)
    )
    return section(
        "Limits",
        "The dot is the measured value, the bar its 95 % interval; an exact value has none. A "
        "limit is kept when the whole interval lies in the shaded range.",
        f'<ul class="gates">{items}</ul>',
    )


# --- plots -------------------------------------------------------------------------------------


def _compare(proof: Proof) -> str:
    a, b = proof.baseline, proof.candidate
    figures = []
    for key, title, unit, scale, good in (
        ("model_bytes", "Model file", "MB", 1e-6, "smaller"),
        ("p50_ms", _latency_title(proof), "ms", 1.0, "faster"),
        ("first_token_ms", "Time to first token", "ms", 1.0, "faster"),
        ("peak_rss_bytes", "Peak memory", "MB", 1e-6, "less"),
    ):
        if a.get(key) and b.get(key):
            before, after = float(a[key]) * scale, float(b[key]) * scale
            plot = svg.bars(f"c-{key}", title, unit, before, after)
            # These are medians over pairs, which differ a little from the ratio of the medians.
            paired = _find(proof, *_PAIRED.get(key, ()))
            ratio = paired.value if paired else before / after
            figures.append(_figure(title, _change(ratio, good), plot))
    lost = _find(proof, *_QUALITY)
    if lost and lost.baseline is not None and lost.candidate is not None:
        title, words = _QUALITY[lost.metric].capitalize(), ("gained", "lost")
        if lost.unit != "points":
            words = ("lower", "higher")
        plot = svg.bars("c-acc", title, _format.side_unit(lost), lost.baseline, lost.candidate)
        note = f"{_format.quantity(abs(lost.value), lost.unit)} {words[lost.value >= 0]}"
        figures.append(_figure(title, note, plot))
    if not figures:
        return ""
    note = (
        f"Before: {_format.precision(a)}. After: {_format.precision(b)}. Both exported to the same "
        "runtime, each measured in a process of its own."
    )
    return section("Before and after", note, f'<div class="grid">{"".join(figures)}</div>')


def _latency_title(proof: Proof) -> str:
    return "Latency per new token" if _format.is_decoder(proof) else "Latency, p50"


def _change(ratio: float, good: str) -> str:
    if ratio >= 1:
        return f"{_format.quantity(ratio, 'x')} {good}"
    bad = {"smaller": "larger", "faster": "slower", "less": "more"}[good]
    return f"{_format.quantity(1 / ratio, 'x')} {bad}"


def _figure(title: str, note: str, plot: str) -> str:
    caption = f"<figcaption><b>{esc(title)}</b><span>{esc(note)}</span></figcaption>"
    return f"<figure>{caption}{plot}</figure>"


def _latency(proof: Proof) -> str:
    data = proof.details.get("latency")
    if not data or not data.get("baseline") or not data.get("candidate"):
        return ""
    what, how = "runs", f"batch {data['batch']}, {data['tokens']} tokens"
    if data.get("new_tokens"):
        what = "new tokens"
        how = f"{data['new_tokens']} after each prompt of {data['tokens']} tokens, batch 1"
    note = (
        f"{len(data['candidate']):,} {what} of each, alternating in one run: {how}, "
        f"{data['threads']} threads. Line: p50. Each tick is one {what.removesuffix('s')}; the "
        "axis ends near the slower p99."
    )
    plot = svg.latency("lat", data["baseline"], data["candidate"])
    return section(
        _latency_title(proof).split(",")[0], note, f'<figure class="wide">{plot}</figure>'
    )


def _parts(proof: Proof) -> str:
    a, b = proof.baseline.get("parts"), proof.candidate.get("parts")
    if not a or not b:
        return ""
    rows = "".join(
        f'<tr><th scope="row"><i class="key part-{part}"></i>{_PART_NAMES[part]}</th>'
        f"<td>{_format.megabytes(a.get(part, 0))}</td><td>{_format.megabytes(b.get(part, 0))}</td>"
        f"<td>{_ratio(a.get(part, 0), b.get(part, 0))}</td></tr>"
        for part in svg.PARTS
        if a.get(part) or b.get(part)
    )
    table = (
        '<table class="parts"><thead><tr><th scope="col">Part</th><th scope="col">Before</th>'
        f'<th scope="col">After</th><th scope="col">Ratio</th></tr></thead><tbody>{rows}</tbody>'
        "</table>"
    )
    plot = f'<figure class="wide">{svg.stacked("parts", a, b)}</figure>'
    return section("Where the bytes are", "The model file, by part of the model.", plot + table)


def _ratio(before: float, after: float) -> str:
    return _format.quantity(before / after, "x") if after > 0 and before > 0 else "\u2013"


# --- evidence ----------------------------------------------------------------------------------


def _claims(proof: Proof) -> str:
    devices = {claim.device for claim in proof.claims}
    head = ["Claim", "Value", "95 % interval", "n", "Limit", "Noise", "Verdict"]
    if len(devices) > 1:
        head.append("Device")
    body = "".join(_row(claim, head) for claim in proof.claims)
    heads = "".join(f'<th scope="col">{esc(h)}</th>' for h in head)
    where = f" All on: {', '.join(devices)}." if len(devices) == 1 else ""
    paired = (
        "Perplexity is paired: both models predict the same tokens, and the interval is a "
        "bootstrap over texts"
        if "texts" in proof.data
        else "Accuracy is paired: both models see the same rows, and the interval is a bootstrap "
        "over rows"
    )
    notes = "".join(f'<p class="notes">{esc(note)}</p>' for note in _format.notes(proof))
    return section(
        "Every claim",
        f"{paired}; counted values are exact. Noise is about what a metric varies by from run to "
        f"run; verdicts come from the interval alone.{where}",
        f'{notes}<table class="claims"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>'
        "</table>",
    )


def _row(claim: Claim, head: Sequence[str]) -> str:
    cells = [
        _format.quantity(claim.value, claim.unit),
        _format.interval(claim),
        f"{claim.n:,}",
        _format.limit(claim) or "\u2013",
        _format.quantity(claim.tolerance, claim.unit) if claim.tolerance else "none",
        _format.WORDS[claim.verdict],
        claim.device,
    ]
    shown = _format.sides(claim)
    title = esc(claim.title) + (f"<small>{esc(shown)}</small>" if shown else "")
    tds = "".join(
        f'<td data-label="{esc(label)}">{esc(cell)}</td>'
        for label, cell in zip(head[1:], cells, strict=False)
    )
    return f'<tr><th scope="row">{title}</th>{tds}</tr>'


def _origin(proof: Proof) -> str:
    lineage: Sequence[Mapping[str, Any]] = proof.candidate.get("lineage", [])
    steps = "".join(
        f"<li><b>{esc(step.get('method', ''))}</b> {esc(_settings(step.get('settings', {})))}</li>"
        for step in lineage
    )
    facts = [(key, value) for key, value in proof.device.items() if value]
    facts += [
        ("data", f"{proof.data.get('path', '')} (sha256 {str(proof.data.get('digest', ''))[:12]})"),
        ("candidate", f"sha256 {str(proof.candidate.get('digest', ''))[:12]}"),
        ("baseline", f"sha256 {str(proof.baseline.get('digest', ''))[:12]}"),
    ]
    table = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in facts)
    command = str(proof.details.get("command", ""))
    body = (f'<h3>Made by</h3><ol class="steps">{steps}</ol>' if steps else "") + (
        f'<h3>Measured on</h3><dl class="facts">{table}</dl>'
    )
    if command:
        body += f"<h3>Run it again</h3><pre><code>{esc(command)}</code></pre>"
    return section("Origin", "What was measured, where, and how to repeat it.", body)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
