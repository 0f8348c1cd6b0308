"""`proof.json`: measured claims about an export, each with n, interval, device and tolerance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from pocketglm.contracts import Config
from pocketglm.errors import CheckpointError

PROOF = "proof.json"
Verdict = Literal["pass", "fail", "inconclusive", "stated"]


class Claim(Config):
    """One measured value. A claim with a `limit` is a gate and gets a verdict.

    value: the measured value in `unit`. better: which direction is good. limit: the gate, None =
    the figure is only stated. tolerance: about what the metric varies by from run to run, in
    `unit`, 0 = exact; for the reader, verdicts come from low and high alone.

    low, high, n:
    * drops, mean cosine: 95 % bootstrap interval over the n rows that count in both models; where
      no row differs the rule of three, 3/n. Changed predictions: 95 % Wilson interval, n rows.
    * perplexity, divergence, changed next tokens: of n tokens, 95 % bootstrap interval over texts.
    * speedup, latency: 95 % interval of the median over the n rounds; memory, load time: of the
      median over n fresh processes.
    * sizes, worst cosine: exact, low = high = value; n = 1, or the n texts.
    """

    metric: str
    title: str
    value: float
    unit: str
    n: int
    low: float
    high: float
    device: str
    baseline: float | None = None
    candidate: float | None = None
    better: Literal["lower", "higher"] = "lower"
    limit: float | None = None
    tolerance: float
    verdict: Verdict = "stated"

    @model_validator(mode="after")
    def _valid(self) -> Claim:
        if self.n < 1:
            raise ValueError(f"claim '{self.metric}' has n = {self.n}; it must be measured")
        if not self.device.strip():
            raise ValueError(f"claim '{self.metric}' does not say on which device it was measured")
        if not self.low <= self.high:
            raise ValueError(f"claim '{self.metric}' has an empty interval {self.low}..{self.high}")
        if not math.isfinite(self.value):
            raise ValueError(f"claim '{self.metric}' has no value: {self.value}")
        if (self.limit is None) != (self.verdict == "stated"):
            raise ValueError(f"claim '{self.metric}': exactly a claim with a limit has a verdict")
        return self


def verdict(low: float, high: float, limit: float, better: Literal["lower", "higher"]) -> Verdict:
    """pass: the whole interval is within the limit; fail: all of it beyond; else inconclusive."""
    if better == "higher":
        low, high, limit = -high, -low, -limit
    if high <= limit:
        return "pass"
    return "fail" if low > limit else "inconclusive"


class Proof(Config):
    """`candidate` and `baseline` describe the two exports; `details` feeds the report's plots."""

    format: Literal[1] = 1
    request: str = ""
    created: str
    device: dict[str, str]
    task: str
    data: dict[str, Any]
    candidate: dict[str, Any]
    baseline: dict[str, Any]
    claims: list[Claim]
    verdict: Verdict
    details: dict[str, Any] = {}


def overall(claims: list[Claim]) -> Verdict:
    """The worst verdict among the gates; 'stated' if there is no gate."""
    verdicts = {claim.verdict for claim in claims}
    for worst in ("fail", "inconclusive", "pass"):
        if worst in verdicts:
            return worst
    return "stated"


def read_proof(folder: Path) -> Proof:
    """The folder's `proof.json`.

    Raises:
        CheckpointError: missing, or not of this version.
    """
    file = folder / PROOF
    try:
        return Proof.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{folder} has no {PROOF}", "make one with: pocketglm prove") from (
            error
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise CheckpointError(f"{file}: {where}: {first['msg']}", "prove the export again") from (
            error
        )
