"""What a task says of two exports: which rows are scored, what they lost, and what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pocketglm.artifacts.manifest import digest_value
from pocketglm.artifacts.proof import Claim
from pocketglm.contracts import DataOptions, Metric, Reporter, RunOptions, Scores
from pocketglm.data.frames import read_frames
from pocketglm.data.readers import read_split
from pocketglm.data.texts import read_text_rows
from pocketglm.errors import UsageError
from pocketglm.eval._evaluate import evaluate
from pocketglm.eval.embed import cosine_parity
from pocketglm.runtimes import open_encoder
from pocketglm.stages import _claims, _claims_decoder
from pocketglm.stages._claims import Builder, Gates
from pocketglm.stages._sides import Side
from pocketglm.text.tokenizer import Tokenizer

_COSINE_TEXTS = 500


@dataclass(frozen=True, slots=True)
class Job:
    """What `prove` measures; `rows` is the digest of the rows that are scored, `threads` what both
    models run with."""

    task: str
    data: DataOptions
    gates: Gates
    threads: int
    pairs: int
    max_length: int | None
    rows: str

    @property
    def run(self) -> RunOptions:
        return RunOptions(threads=self.threads)

    def key(self) -> list[Any]:
        """What decides the result, for the request's digest."""
        asked = [self.task, self.rows, self.gates.model_dump(), self.threads, self.pairs]
        return [*asked, self.max_length, self.data.oos_label]


@dataclass(frozen=True, slots=True)
class Found:
    """metrics: of the baseline, of the candidate. n: how many rows were scored, or what `counts`
    says. details: for the report's sections. notes: how it was measured, one sentence each."""

    metrics: tuple[Mapping[str, Metric], Mapping[str, Metric]]
    claims: list[Claim]
    n: int
    details: dict[str, Any]
    counts: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


Sides = tuple[Side, Side]


def compare(build: Builder, sides: Sides, job: Job, reporter: Reporter) -> Found:
    """Score baseline and candidate on the same rows.

    Raises:
        UsageError: the data does not let the task's intervals be measured; as `evaluate`.
        DataError: as `evaluate`.
    """
    return _COMPARE.get(job.task, _encoders)(build, sides, job, reporter)


def _score(side: Side, job: Job, reporter: Reporter, baseline: Side | None = None) -> Scores:
    other = f" against {baseline.name}" if baseline else ""
    reporter.say(f"scoring {side.name} ({side.manifest.precision}){other}")
    path = baseline.path if baseline else None
    return evaluate(side.path, job.task, job.data, job.max_length, job.run, reporter, path)[0]


def _encoders(build: Builder, sides: Sides, job: Job, reporter: Reporter) -> Found:
    before, after = (_score(side, job, reporter) for side in sides)
    claims = _claims.task_claims(build, before, after, job.gates)
    if job.task == "embed":
        claims += _cosines(build, sides, before, job, reporter)
    details: dict[str, Any] = {"flips": _claims.flips(before, after)}
    if job.task == "intent":
        details["confusions"] = _claims.confusions(before, after)
        details["classes"] = _claims.classes(before, after)
    return Found((before.metrics, after.metrics), claims, len(before.gold), details)


def _cosines(
    build: Builder, sides: Sides, scores: Scores, job: Job, reporter: Reporter
) -> list[Claim]:
    texts = list(scores.texts)[:_COSINE_TEXTS]
    a, b = (open_encoder(side.path, job.run) for side in sides)
    try:
        tokenizer = Tokenizer.load(sides[0].path)
        values = cosine_parity(a, b, tokenizer, texts, job.max_length, reporter)
    finally:
        a.close()
        b.close()
    return _claims.cosine_claims(build, values)


def _commands(build: Builder, sides: Sides, job: Job, reporter: Reporter) -> Found:
    before, after = (_score(side, job, reporter) for side in sides)
    claims = _claims_decoder.command_claims(build, before, after, job.gates)
    details: dict[str, Any] = {
        "flips": _claims_decoder.command_flips(before, after),
        "spoiled": _claims_decoder.spoiled(before, after),
    }
    cut = after.truncated
    notes = [f"{cut:.2%} of the commands are longer than the limit and were cut"] if cut else []
    metrics = (before.metrics, after.metrics)
    return Found(metrics, claims, len(before.gold), details, notes=notes)


def _texts(build: Builder, sides: Sides, job: Job, reporter: Reporter) -> Found:
    scores = _score(sides[1], job, reporter, sides[0])
    claims = _claims_decoder.lm_claims(build, scores, job.gates)
    texts = int((scores.rows["tokens"] > 0).sum())
    return Found(
        (_claims_decoder.baseline_metrics(scores), scores.metrics),
        claims,
        claims[0].n,
        {},
        {"unit": "tokens", "texts": texts},
        scores.notes,
    )


_COMPARE: dict[str, Callable[[Builder, Sides, Job, Reporter], Found]] = {
    "command": _commands,
    "lm": _texts,
}


# --- what was asked ----------------------------------------------------------------------------


def read_rows(data: DataOptions, task: str, gates: Gates) -> str:
    """sha256 over the rows that are scored (for `embed` also those they are compared with).

    Raises:
        UsageError: a gate for what the task or these rows do not let measure, or too few texts.
        DataError: the rows cannot be used.
    """
    _check_gates(task, gates)
    if task == "lm":
        texts = read_text_rows(data, "test")
        _claims_decoder.check_texts(len(texts))
        return digest_value([[row.prompt, row.text] for row in texts])
    if task == "command":
        frames = read_frames(data, "test")
        return digest_value([[r.text, r.label, r.frame.slots, r.action] for r in frames])
    train = read_split(data, "train") if task == "embed" else []
    test = read_split(data, "test")
    if gates.max_oos_recall_drop is not None:
        _check_oos([row.label == data.oos_label for row in test], data.oos_label)
    return digest_value([len(train), *([row.text, row.label] for row in [*train, *test])])


def _check_gates(task: str, gates: Gates) -> None:
    for gate, able, what in (
        ("max_oos_recall_drop", task == "intent", "out-of-scope recall"),
        ("max_accuracy_drop", task != "lm", "accuracy"),
        ("max_perplexity_increase", task == "lm", "perplexity"),
    ):
        if getattr(gates, gate) is not None and not able:
            instead = "--max-perplexity-increase" if task == "lm" else "--max-accuracy-drop"
            raise UsageError(
                f"--{gate.replace('_', '-')}: the task '{task}' has no {what} to limit",
                f"leave it out ({instead} limits what this task measures)",
            )


def _check_oos(oos: Sequence[bool], label: str) -> None:
    if all(oos) or not any(oos):
        why = (
            f"every test row has the label '{label}', so their recall is the accuracy"
            if any(oos)
            else f"no test row has the label '{label}'"
        )
        raise UsageError(
            f"--max-oos-recall-drop: {why}",
            "leave it out (--max-accuracy-drop limits the accuracy), or name the label with "
            "--oos-label",
        )
