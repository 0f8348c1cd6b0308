"""The claims that only decoders have: commands, language modelling, prompts and new tokens.

Slot F1: paired bootstrap over rows. Perplexity: the mean difference in nats on the same tokens,
with the bootstrap over texts, as a percentage of the baseline's perplexity.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pocketglm.artifacts.proof import Claim
from pocketglm.contracts import Metric, Scores
from pocketglm.errors import UsageError
from pocketglm.eval._stats import ratio_metric
from pocketglm.stages._claims import Builder, Gates, Values, load_claim
from pocketglm.stages._timing import Timings

TEXTS = 10  # the fewest whose resampling says anything about other texts
_RESAMPLES = 1000


def check_texts(count: int) -> None:
    """Raises UsageError if an interval over so many texts means nothing."""
    if count < TEXTS:
        raise UsageError(
            f"the data has {count} text(s) to score; an interval needs {TEXTS} or more",
            "divide long texts, one paragraph per row; or score more of them: --limit N",
        )


# --- commands ------------------------------------------------------------------------------------


def command_claims(
    build: Builder, baseline: Scores, candidate: Scores, gates: Gates
) -> list[Claim]:
    """Drops in points, the gated one first, then the changed actions."""
    a, b = baseline.rows, candidate.rows
    claims = [
        build.drop(f"{name}_drop", title, a[name], b[name], limit)
        for name, title, limit in (
            ("exact_match", "Exact-match drop", gates.max_accuracy_drop),
            ("intent_accuracy", "Intent accuracy drop", None),
        )
    ]
    before, after = (
        np.stack([side[name] for name in ("slot_hits", "slots", "slots_predicted")])
        for side in (a, b)
    )
    used = (before + after).any(axis=0)
    if used.any():
        claims.append(_slot_f1_drop(build, before[:, used], after[:, used]))
    return [*claims, build.flips(baseline, candidate)]


def _slot_f1_drop(build: Builder, before: Values, after: Values) -> Claim:
    """before, after: slots that are right, that there are, and that were predicted, [3, N]."""
    n, rng = before.shape[1], np.random.default_rng(0)
    drops = []
    for _ in range(_RESAMPLES):
        rows = rng.integers(0, n, n)
        drops.append(_f1(before[:, rows]) - _f1(after[:, rows]))
    low, high = (float(x) for x in np.percentile(drops, [2.5, 97.5]))
    change = (_faults(after) - _faults(before)).tolist()
    flat = low == high  # such as without a hit on either side, where new faults change nothing
    if max(change) <= 0 or flat:  # rule of three, as in paired_bootstrap
        high = min(1.0, high + 3 / n)
    if min(change) >= 0 or flat:
        low = max(-1.0, low - 3 / n)
    sides = (100 * _f1(before), 100 * _f1(after))
    return build.claim(
        "slot_f1_drop", "Slot F1 drop", "points", sides[0] - sides[1], (100 * low, 100 * high), n,
        100 / n, sides=sides,
    )  # fmt: skip


def _f1(counts: Values) -> float:
    hits, wanted, given = counts.sum(axis=1)
    return float(2 * hits / (wanted + given)) if wanted + given else 1.0


def _faults(counts: Values) -> Values:
    """Slots that were missed or made up, [N]."""
    hits, wanted, given = counts
    faults: Values = wanted + given - 2 * hits
    return faults


def command_flips(baseline: Scores, candidate: Scores) -> dict[str, int]:
    """How many actions changed, and into what; right is what matches exactly."""
    before, after = (scores.rows["exact_match"] == 1 for scores in (baseline, candidate))
    pairs = zip(baseline.predictions, candidate.predictions, strict=True)
    changed = np.array([a != b for a, b in pairs])
    return {
        "changed": int(changed.sum()),
        "to_wrong": int((changed & before & ~after).sum()),
        "to_right": int((changed & ~before & after).sum()),
        "wrong_to_wrong": int((changed & ~before & ~after).sum()),
    }


def spoiled(baseline: Scores, candidate: Scores, most: int = 8) -> list[dict[str, Any]]:
    """Commands that the baseline understands and the candidate does not, in the data's order.

    `gold` is the baseline's action, which is right, so that both are of one form.
    """
    lost = baseline.rows["exact_match"] - candidate.rows["exact_match"] == 1
    return [
        {
            "text": candidate.texts[row],
            "gold": baseline.predictions[row],
            "predicted": candidate.predictions[row],
        }
        for row in np.flatnonzero(lost)[:most]
    ]


# --- language modelling --------------------------------------------------------------------------


def lm_claims(build: Builder, scores: Scores, gates: Gates) -> list[Claim]:
    """Increase of the perplexity, divergence and changed next tokens; n is the tokens.

    Raises:
        UsageError: too few texts for an interval.
    """
    rows = scores.rows
    check_texts(int((rows["tokens"] > 0).sum()))
    change = _per_token(scores, rows["nll"] - rows["baseline_nll"])
    value, low, high = (100 * math.expm1(x) for x in (change.value, change.low, change.high))
    kl, flips, n = scores.metrics["kl"], scores.metrics["flip_rate"], change.n
    sides = (baseline_metrics(scores)["perplexity"].value, scores.metrics["perplexity"].value)
    return [
        build.claim(
            "perplexity_increase", "Perplexity increase", "%", value, (low, high), n, 0.01,
            sides=sides, limit=gates.max_perplexity_increase,
        ),
        build.claim(
            "kl", "KL from the baseline", "nats", kl.value, (kl.low, kl.high), n, 1e-5,
        ),
        build.claim(
            "flips", "Changed next tokens", "%", 100 * flips.value,
            (100 * flips.low, 100 * flips.high), n, 100 / n,
        ),
    ]  # fmt: skip


def baseline_metrics(scores: Scores) -> dict[str, Metric]:
    """What the scores of a candidate next to its baseline say of the baseline."""
    nll = _per_token(scores, scores.rows["baseline_nll"])
    value, low, high = (math.exp(x) for x in (nll.value, nll.low, nll.high))
    return {"perplexity": Metric(value, nll.n, low, high, "per token"), "nll": nll}


def _per_token(scores: Scores, means: Values) -> Metric:
    """The mean over tokens of a value that is the mean [N] of each text."""
    tokens = scores.rows["tokens"]
    counted = tokens > 0
    weights = tokens[counted]
    return ratio_metric(means[counted] * weights, weights, n=int(weights.sum()), unit="nats/token")


# --- speed ---------------------------------------------------------------------------------------


def speed_claims(build: Builder, a: Timings, b: Timings, tokens: int, gates: Gates) -> list[Claim]:
    """New tokens and prompts of `tokens` per second over the rounds, load time over processes."""
    p50 = (float(np.median(a.samples)), float(np.median(b.samples)))
    first = first_token_ms(a), first_token_ms(b)
    per_second = (1e3 / p50[0], 1e3 / p50[1])
    prefill = (1e3 * tokens / first[0], 1e3 * tokens / first[1])
    return [
        build.speedup(
            "decode_speedup", "Decode speedup", a.medians / b.medians, per_second,
            gates.min_speedup,
        ),
        build.speedup(
            "prefill_speedup", "Prefill speedup", a.prompt_medians / b.prompt_medians, prefill
        ),
        build.latency(
            "latency_p50", "Latency per new token, p50", p50, b.medians, gates.max_latency_ms
        ),
        build.latency("first_token", "Time to first token", first, b.prompt_medians),
        load_claim(build, a, b),
    ]  # fmt: skip


def first_token_ms(timings: Timings) -> float:
    """Median latency of a prompt."""
    return float(np.median(np.concatenate([np.asarray(r, np.float64) for r in timings.prompts])))
