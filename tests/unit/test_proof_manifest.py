"""`proof.json`: which claims are valid, and what decides a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pocketglm.artifacts.manifest import write_json
from pocketglm.artifacts.proof import PROOF, Claim, Proof, Verdict, overall, read_proof, verdict
from pocketglm.errors import CheckpointError


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "metric": "accuracy_drop",
        "title": "Accuracy drop",
        "value": 0.1,
        "unit": "points",
        "n": 1000,
        "low": -0.1,
        "high": 0.3,
        "device": "a laptop",
        "tolerance": 0.1,
        **changes,
    }


def claim(**changes: Any) -> Claim:
    return Claim.model_validate(fields(**changes))


@pytest.mark.parametrize("missing", ["n", "device", "tolerance", "low", "high", "value", "unit"])
def test_a_claim_must_say_how_it_was_measured(missing: str) -> None:
    values = fields()
    del values[missing]
    with pytest.raises(ValidationError, match=missing):
        Claim.model_validate(values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 0}, "n = 0; it must be measured"),
        ({"device": "  "}, "does not say on which device"),
        ({"low": 0.4, "high": 0.3}, "empty interval 0.4..0.3"),
        ({"low": float("nan")}, "empty interval nan..0.3"),
        ({"value": float("nan")}, "has no value: nan"),
        ({"limit": 1.0, "verdict": "stated"}, "exactly a claim with a limit"),
        ({"limit": None, "verdict": "pass"}, "exactly a claim with a limit"),
    ],
)
def test_an_empty_claim_is_invalid(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        claim(**changes)


@pytest.mark.parametrize(
    ("low", "high", "limit", "better", "expected"),
    [
        (-0.1, 0.4, 0.5, "lower", "pass"),
        (-0.1, 0.5, 0.5, "lower", "pass"),  # the limit itself is allowed
        (0.4, 0.6, 0.5, "lower", "inconclusive"),
        (0.5, 0.6, 0.5, "lower", "inconclusive"),
        (0.51, 0.6, 0.5, "lower", "fail"),
        (1.6, 1.9, 1.5, "higher", "pass"),
        (1.5, 1.9, 1.5, "higher", "pass"),
        (1.4, 1.6, 1.5, "higher", "inconclusive"),
        (1.2, 1.4, 1.5, "higher", "fail"),
        (float("nan"), float("nan"), 0.5, "lower", "inconclusive"),
    ],
)
def test_verdict(
    low: float, high: float, limit: float, better: Literal["lower", "higher"], expected: Verdict
) -> None:
    assert verdict(low, high, limit, better) == expected


@given(
    st.floats(-10, 10), st.floats(0, 5), st.floats(-10, 10), st.sampled_from(["lower", "higher"])
)
def test_verdict_is_symmetric_and_passing_never_gets_worse(
    low: float, width: float, limit: float, better: Literal["lower", "higher"]
) -> None:
    high = low + width
    got = verdict(low, high, limit, better)
    other: Literal["lower", "higher"] = "higher" if better == "lower" else "lower"
    assert verdict(-high, -low, -limit, other) == got
    looser = limit + 1 if better == "lower" else limit - 1
    rank = {"fail": 0, "inconclusive": 1, "pass": 2}
    assert rank[verdict(low, high, looser, better)] >= rank[got]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["pass", "inconclusive", "fail", "stated"], "fail"),
        (["pass", "inconclusive", "stated"], "inconclusive"),
        (["stated", "pass"], "pass"),
        (["stated"], "stated"),
        ([], "stated"),
    ],
)
def test_the_worst_gate_decides(verdicts: list[str], expected: str) -> None:
    claims = [claim(verdict=v, limit=None if v == "stated" else 1.0) for v in verdicts]
    assert overall(claims) == expected


def proof() -> Proof:
    return Proof(
        request="r",
        created="2025-01-01T00:00:00Z",
        device={"cpu": "a laptop"},
        task="intent",
        data={"path": "test.jsonl", "n": 1000},
        candidate={"bytes": 23},
        baseline={"bytes": 91},
        claims=[claim(limit=0.5, verdict="pass")],
        verdict="pass",
    )


def test_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / PROOF, proof())
    assert read_proof(tmp_path) == proof()


def test_missing_proof_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=f"has no {PROOF}") as caught:
            read_proof(folder)
        assert "pocketglm prove" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "where"),
    [({"claims": [fields(n=0)]}, "claims.0"), ({"format": 9}, "format"), (None, "top level")],
)
def test_bad_proof_says_where(tmp_path: Path, change: dict[str, Any] | None, where: str) -> None:
    if change is None:
        (tmp_path / PROOF).write_text("{")
    else:
        write_json(tmp_path / PROOF, {**proof().model_dump(), **change})
    with pytest.raises(CheckpointError, match=f"{PROOF}: {where}: "):
        read_proof(tmp_path)
