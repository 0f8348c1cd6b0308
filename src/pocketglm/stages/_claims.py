"""Two sets of measurements in, claims with intervals and verdicts out; pure functions.

Accuracy: paired bootstrap over rows. Speed: one ratio per interleaved pair, and the
distribution-free interval of their median (order statistics; Conover 1999, "Practical
Nonparametric Statistics", 3.2); memory and load time likewise, over fresh processes. Sizes and the
worst cosine are exact, so their interval is the value. `_claims_decoder.py` has what only decoders
are measured by.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import FiniteFloat

from pocketglm.artifacts.proof import Claim, verdict
from pocketglm.contracts import Config, Scores
from pocketglm.errors import UsageError
from pocketglm.eval._stats import macro_f1, mean_metric, paired_bootstrap, wilson
from pocketglm.stages._timing import Timings

Values = npt.NDArray[np.float64]

# How much a value varies from run to run on a machine that does other things too, as a share of it.
TIME_NOISE = 0.05
MEMORY_NOISE = 0.02
_RESAMPLES = 1000
_TITLES = {
    "accuracy": "Accuracy drop",
    "accuracy_all": "Accuracy drop, all rows",
    "oos_recall": "Out-of-scope recall drop",
    "nn_accuracy": "Nearest-neighbour accuracy drop",
}


class Gates(Config):
    """The limits of a proof; None = the figure is stated and not judged.

    max_accuracy_drop, max_oos_recall_drop: percentage points of the task's primary metric and of
    the out-of-scope recall. max_perplexity_increase: percent. min_speedup, min_size_ratio: baseline
    over candidate (latency, of a decoder that of a new token; model file). max_latency_ms: p50, of
    a decoder that of a new token. max_memory_mb: peak of the process. max_size_mb: whole folder.
    """

    max_accuracy_drop: FiniteFloat | None = None
    max_oos_recall_drop: FiniteFloat | None = None
    max_perplexity_increase: FiniteFloat | None = None
    min_speedup: FiniteFloat | None = None
    min_size_ratio: FiniteFloat | None = None
    max_latency_ms: FiniteFloat | None = None
    max_memory_mb: FiniteFloat | None = None
    max_size_mb: FiniteFloat | None = None


# The claims of which one is judged by each gate.
_GATED = {
    "max_accuracy_drop": ("accuracy_drop", "nn_accuracy_drop", "exact_match_drop"),
    "max_oos_recall_drop": ("oos_recall_drop",),
    "max_perplexity_increase": ("perplexity_increase",),
    "min_speedup": ("speedup", "decode_speedup"),
    "min_size_ratio": ("size_ratio",),
    "max_latency_ms": ("latency_p50",),
    "max_memory_mb": ("peak_memory",),
    "max_size_mb": ("size",),
}


def check_gates(claims: list[Claim], gates: Gates) -> None:
    """Every gate that is set must have judged a claim: a proof never drops one silently.

    Raises:
        UsageError: a gate has no claim; names it and what was not measured.
    """
    judged = {claim.metric for claim in claims if claim.limit is not None}
    for gate, metrics in _GATED.items():
        if getattr(gates, gate) is not None and not judged & {*metrics}:
            option = "--" + gate.replace("_", "-")
            raise UsageError(
                f"{option}: {' or '.join(metrics)} could not be measured on this data",
                f"leave {option} out, or give data that has such rows",
            )


@dataclass(frozen=True, slots=True)
class Builder:
    """Makes claims measured on one device."""

    device: str

    def claim(
        self,
        metric: str,
        title: str,
        unit: str,
        value: float,
        interval: tuple[float, float],
        n: int,
        tolerance: float,
        *,
        sides: tuple[float, float] | None = None,
        limit: float | None = None,
        better: Literal["lower", "higher"] = "lower",
    ) -> Claim:
        """One claim; its verdict follows from the interval and the limit."""
        low, high = interval
        return Claim(
            metric=metric,
            title=title,
            value=value,
            unit=unit,
            n=n,
            low=low,
            high=high,
            device=self.device,
            baseline=sides[0] if sides else None,
            candidate=sides[1] if sides else None,
            better=better,
            limit=limit,
            tolerance=tolerance,
            verdict="stated" if limit is None else verdict(low, high, limit, better),
        )

    def drop(
        self, metric: str, title: str, before: Values, after: Values, limit: float | None = None
    ) -> Claim:
        """How many points the mean of `after` is lower; shares [N] of the same rows, NaN: none."""
        n = int((~np.isnan(before - after)).sum())
        drop, low, high = paired_bootstrap(before, after)
        sides = (100 * float(np.nanmean(before)), 100 * float(np.nanmean(after)))
        return self.claim(
            metric, title, "points", 100 * drop, (100 * low, 100 * high), n, 100 / n,
            sides=sides, limit=limit,
        )  # fmt: skip

    def flips(self, baseline: Scores, candidate: Scores) -> Claim:
        """The share of predictions that changed."""
        pairs = list(zip(baseline.predictions, candidate.predictions, strict=True))
        n, changed = len(pairs), sum(a != b for a, b in pairs)
        low, high = wilson(changed, n)
        return self.claim(
            "flips", "Changed predictions", "%", 100 * changed / n, (100 * low, 100 * high), n,
            100 / n,
        )  # fmt: skip

    def speedup(
        self,
        metric: str,
        title: str,
        ratios: Values,
        sides: tuple[float, float],
        limit: float | None = None,
    ) -> Claim:
        """The median of the rounds' ratios."""
        value = float(np.median(ratios))
        return self.claim(
            metric, title, "x", value, median_interval(ratios), len(ratios), TIME_NOISE * value,
            sides=sides, limit=limit, better="higher",
        )  # fmt: skip

    def latency(
        self,
        metric: str,
        title: str,
        sides: tuple[float, float],
        medians: Values,
        limit: float | None = None,
    ) -> Claim:
        """p50 in ms of both sides; `medians` are those of the candidate's rounds or processes."""
        value = sides[1]
        low, high = median_interval(medians)
        return self.claim(
            metric, title, "ms", value, (min(low, value), max(high, value)), len(medians),
            TIME_NOISE * value, sides=sides, limit=limit,
        )  # fmt: skip


def median_interval(values: Values) -> tuple[float, float]:
    """Interval of the median by order statistics, at least 95 % sure.

    Raises:
        ValueError: fewer than 6 values; even their range is less than 95 % sure.
    """
    n = len(values)
    if n < 6:
        raise ValueError(f"a 95 % interval of a median needs 6 values, got {n}")
    ordered = np.sort(values)
    k, tail = 0, 0.0
    while (tail := tail + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    return float(ordered[k - 1]), float(ordered[n - k])


# --- what the task says ------------------------------------------------------------------------


def task_claims(build: Builder, baseline: Scores, candidate: Scores, gates: Gates) -> list[Claim]:
    """Drops of the metrics of both models in points, the gated ones first, then the flips."""
    limits = {baseline.primary: gates.max_accuracy_drop, "oos_recall": gates.max_oos_recall_drop}
    names = [baseline.primary]
    if baseline.primary == "accuracy" and np.isnan(baseline.rows["accuracy"]).any():
        names += ["accuracy_all", "oos_recall"]
    claims = []
    for name in names:
        plain = name in ("accuracy", "accuracy_all") and name == baseline.primary
        metric = "accuracy_drop" if plain else f"{name}_drop"
        title = "Accuracy drop" if plain else _TITLES[name]
        rows = (baseline.rows[name], candidate.rows[name])
        claims.append(build.drop(metric, title, *rows, limits.get(name)))
    if "macro_f1" in baseline.metrics:
        claims.append(_macro_f1_drop(build, baseline, candidate))
    return [*claims, build.flips(baseline, candidate)]


def _macro_f1_drop(build: Builder, baseline: Scores, candidate: Scores) -> Claim:
    labels = sorted({*baseline.gold, *baseline.predictions, *candidate.predictions})
    number = {label: index for index, label in enumerate(labels)}
    gold, a, b = (
        np.array([number[label] for label in names], np.int64)
        for names in (baseline.gold, baseline.predictions, candidate.predictions)
    )
    n, rng = len(gold), np.random.default_rng(0)
    drops = []
    for _ in range(_RESAMPLES):
        rows = rng.integers(0, n, n)
        before, after = (macro_f1(gold[rows], x[rows], len(labels)) for x in (a, b))
        drops.append(100 * (before - after))
    low, high = np.percentile(drops, [2.5, 97.5])
    if not any(drops):  # rule of three, as in paired_bootstrap
        high = 100 * min(1.0, 3 / n)
        low = -high
    sides = tuple(100 * macro_f1(gold, x, len(labels)) for x in (a, b))
    return build.claim(
        "macro_f1_drop", "Macro-F1 drop", "points", sides[0] - sides[1],
        (float(low), float(high)), n, 100 / n, sides=(sides[0], sides[1]),
    )  # fmt: skip


def cosine_claims(build: Builder, cosines: Values) -> list[Claim]:
    """Mean and worst cosine between the two models' embeddings of the same texts."""
    mean, worst, n = mean_metric(cosines), float(cosines.min()), len(cosines)
    return [
        build.claim(
            "cosine", "Cosine to the baseline, mean", "cosine", mean.value, (mean.low, mean.high),
            n, 1e-5, better="higher",
        ),
        build.claim(
            "cosine_min", "Cosine to the baseline, worst row", "cosine", worst, (worst, worst),
            n, 0.0, better="higher",
        ),
    ]  # fmt: skip


# --- what the machine says ---------------------------------------------------------------------


def speed_claims(build: Builder, a: Timings, b: Timings, gates: Gates) -> list[Claim]:
    """Speedup and p50 latency over the rounds, load time over the processes."""
    p50 = (float(np.median(a.samples)), float(np.median(b.samples)))
    return [
        build.speedup("speedup", "Speedup", a.medians / b.medians, p50, gates.min_speedup),
        build.latency("latency_p50", "Latency, p50", p50, b.medians, gates.max_latency_ms),
        load_claim(build, a, b),
    ]


def load_claim(build: Builder, a: Timings, b: Timings) -> Claim:
    """Load time over fresh processes."""
    loads = (float(np.median(a.loads)), float(np.median(b.loads)))
    return build.latency("load_time", "Load time", loads, np.asarray(b.loads))


def memory_claims(build: Builder, a: Timings, b: Timings, gates: Gates) -> list[Claim]:
    """Peak memory of fresh processes; the ratio is the median over pairs of processes."""
    before, after = (np.asarray(t.peaks, np.float64) / 1e6 for t in (a, b))
    sides = (float(np.median(before)), float(np.median(after)))
    ratios = before / after
    ratio = float(np.median(ratios))
    return [
        build.claim(
            "peak_memory", "Peak memory", "MB", sides[1], median_interval(after),
            len(after), MEMORY_NOISE * sides[1], sides=sides, limit=gates.max_memory_mb,
        ),
        build.claim(
            "memory_ratio", "Memory ratio", "x", ratio, median_interval(ratios), len(ratios),
            MEMORY_NOISE * ratio, sides=sides, better="higher",
        ),
    ]  # fmt: skip


def size_claims(
    build: Builder, files: tuple[int, int], folders: tuple[int, int], gates: Gates
) -> list[Claim]:
    """Bytes of the model file and of the whole folder, (baseline, candidate)."""
    ratio, whole = files[0] / files[1], folders[0] / folders[1]
    mb = (folders[0] / 1e6, folders[1] / 1e6)
    return [
        build.claim(
            "size_ratio", "Size ratio", "x", ratio, (ratio, ratio), 1, 0.0, better="higher",
            sides=(files[0] / 1e6, files[1] / 1e6), limit=gates.min_size_ratio,
        ),
        build.claim(
            "folder_ratio", "Size ratio, whole folder", "x", whole, (whole, whole), 1, 0.0,
            sides=mb, better="higher",
        ),
        build.claim(
            "size", "Size of the folder", "MB", mb[1], (mb[1], mb[1]), 1, 0.0, sides=mb,
            limit=gates.max_size_mb,
        ),
    ]  # fmt: skip


# --- what changed ------------------------------------------------------------------------------


def flips(baseline: Scores, candidate: Scores) -> dict[str, int]:
    """How many predictions changed, and into what."""
    count: Counter[str] = Counter()
    for gold, a, b in _rows(baseline, candidate):
        if a != b:
            kind = "to_wrong" if a == gold else "to_right" if b == gold else "wrong_to_wrong"
            count.update(("changed", kind))
    return {k: count[k] for k in ("changed", "to_wrong", "to_right", "wrong_to_wrong")}


def confusions(baseline: Scores, candidate: Scores, most: int = 8) -> list[dict[str, Any]]:
    """(gold, predicted) pairs that the candidate confuses more often, with up to 3 new rows."""
    rows = _rows(baseline, candidate)
    before = Counter((gold, a) for gold, a, _ in rows if a != gold)
    after = Counter((gold, b) for gold, _, b in rows if b != gold)
    worse = sorted(
        (p for p in after if after[p] > before[p]), key=lambda p: (before[p] - after[p], p)
    )
    examples: dict[tuple[str, str], list[str]] = {pair: [] for pair in worse[:most]}
    for (gold, a, b), text in zip(rows, baseline.texts, strict=True):
        if a != b and len(examples.get((gold, b), [""] * 3)) < 3:
            examples[gold, b].append(text)
    return [
        {
            "gold": gold,
            "predicted": predicted,
            "before": before[gold, predicted],
            "after": after[gold, predicted],
            "examples": examples[gold, predicted],
        }
        for gold, predicted in worse[:most]
    ]


def classes(baseline: Scores, candidate: Scores, most: int = 8) -> list[dict[str, Any]]:
    """Recall (a fraction) of the classes that changed most, the worst first."""
    rows = _rows(baseline, candidate)
    n = Counter(gold for gold, _, _ in rows)
    before = Counter(gold for gold, a, _ in rows if a == gold)
    after = Counter(gold for gold, _, b in rows if b == gold)
    change = {label: (after[label] - before[label]) / n[label] for label in n}
    moved = sorted((k for k in n if change[k]), key=lambda k: (-abs(change[k]), k))[:most]
    return [
        {
            "label": label,
            "n": n[label],
            "baseline": before[label] / n[label],
            "candidate": after[label] / n[label],
        }
        for label in sorted(moved, key=lambda k: (change[k], k))
    ]


def _rows(baseline: Scores, candidate: Scores) -> list[tuple[str, str, str]]:
    return list(zip(baseline.gold, baseline.predictions, candidate.predictions, strict=True))
