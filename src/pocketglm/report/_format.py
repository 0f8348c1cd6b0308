"""How numbers and units read in every report: one place, so that they agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pocketglm.artifacts.proof import Claim, Proof

MINUS = "\u2212"
WORDS = {"pass": "Pass", "fail": "Fail", "inconclusive": "Inconclusive", "stated": "Stated"}

# decimals of a unit; the others get three significant digits
_DECIMALS = {"points": 2, "%": 2, "x": 2, "cosine": 5, "nats": 5}
TARGETS = {
    "onnx": "ONNX",
    "litert": "LiteRT",
    "coreml": "Core ML",
    "executorch": "ExecuTorch",
    "gguf": "GGUF",
}
_SUFFIX = {"points": " points", "%": " %", "x": "\u00d7", "cosine": ""}

# unit of a claim's `baseline` and `candidate`, where it is not the claim's own
_SIDES = {
    "speedup": "ms",
    "size_ratio": "MB",
    "folder_ratio": "MB",
    "memory_ratio": "MB",
    "decode_speedup": "tokens/s",
    "prefill_speedup": "tokens/s",
    "perplexity_increase": "",
}


def number(value: float, unit: str) -> str:
    """A value without its unit: 0.13 points -> '0.13'; 1234.5 MB -> '1,234'."""
    if not math.isfinite(value):
        return "\u2013"
    if unit in _DECIMALS:
        digits = _DECIMALS[unit]
    else:
        size = abs(value)
        digits = 0 if size >= 100 or size == 0 else 1 if size >= 10 else 2
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def quantity(value: float, unit: str) -> str:
    """A value with its unit: '2.04×', '0.13 points', '22.9 MB'."""
    return number(value, unit) + _SUFFIX.get(unit, f" {unit}" if unit else "")


def exact(claim: Claim) -> bool:
    """Whether the value is counted or an extreme, such as a size or the worst row: no estimate."""
    return claim.low == claim.high and claim.tolerance == 0


def interval(claim: Claim) -> str:
    """'−0.07 to 0.33', or 'exact' (see `exact`)."""
    if exact(claim):
        return "exact"
    return f"{number(claim.low, claim.unit)} to {number(claim.high, claim.unit)}"


def limit(claim: Claim) -> str:
    """'≤ 0.50 points' or '≥ 1.50×'; empty for a claim that is only stated."""
    if claim.limit is None:
        return ""
    sign = "\u2264" if claim.better == "lower" else "\u2265"
    return f"{sign} {quantity(claim.limit, claim.unit)}"


def side_unit(claim: Claim) -> str:
    """The unit of `claim.baseline` and `claim.candidate`."""
    if claim.unit == "points":
        return "%"
    return _SIDES.get(claim.metric, claim.unit)


def sides(claim: Claim) -> str:
    """'96.41 → 96.28 %', or '' where the claim has no two sides."""
    if claim.baseline is None or claim.candidate is None:
        return ""
    unit = side_unit(claim)
    return f"{number(claim.baseline, unit)} \u2192 {quantity(claim.candidate, unit)}"


def scored(proof: Proof) -> str:
    """What the task was measured on: '700 test rows', '9,000 tokens of 120 test texts'."""
    n = f"{int(proof.data.get('n', 0)):,}"
    if "texts" not in proof.data:
        return f"{n} test rows"
    return f"{n} {proof.data.get('unit', '')} of {int(proof.data['texts']):,} test texts"


def notes(proof: Proof) -> list[str]:
    """How it was measured, in whole sentences."""
    return [f"{note[:1].upper()}{note[1:]}." for note in proof.details.get("notes", [])]


def is_decoder(proof: Proof) -> bool:
    """Whether the models write text."""
    return proof.candidate.get("kind") == "decoder"


def megabytes(count: float) -> str:
    """Bytes as decimal megabytes: 22_900_000 -> '22.9 MB'."""
    return quantity(count / 1e6, "MB")


def precision(side: Mapping[str, Any]) -> str:
    """'INT8 ONNX', of a proof's `candidate` or `baseline`."""
    name = str(side.get("precision", "")).upper().replace("MIXED", "mixed-precision")
    target = str(side.get("target", ""))
    return f"{name} {TARGETS.get(target, target)}".strip()
