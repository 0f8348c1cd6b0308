"""The `eval` verb: a task's scores of a checkpoint or an export."""

from __future__ import annotations

from pathlib import Path

from pocketglm import registry
from pocketglm.artifacts.schemas import EvalResult, MetricResult
from pocketglm.contracts import DataOptions, Reporter, RunOptions, Scores, Silent, Task
from pocketglm.runtimes import open_session
from pocketglm.text.tokenizer import Tokenizer


def evaluate(
    path: Path,
    task: str,
    data: DataOptions,
    max_length: int | None = None,
    options: RunOptions | None = None,
    reporter: Reporter | None = None,
) -> tuple[Scores, EvalResult]:
    """Score the model in folder `path` on the test rows of `data`.

    max_length: tokens per text, None = the model's.

    Raises:
        UsageError: unknown task, or a task that this kind of model cannot do.
        CheckpointError: the folder is no model.
        DataError: the data cannot be used, or has labels that the model does not know.
    """
    spec: Task = registry.load("eval", task)
    session = open_session(path, options or RunOptions())
    try:
        tokenizer = Tokenizer.load(path)
        scores = spec.score(session, tokenizer, data, max_length, reporter or Silent())
    finally:
        session.close()
    return scores, EvalResult(
        path=str(path),
        task=task,
        data=str(data.path),
        split="test",
        primary=scores.primary,
        metrics=metric_results(scores),
    )


def metric_results(scores: Scores) -> dict[str, MetricResult]:
    """The metrics in their JSON form."""
    return {
        name: MetricResult(value=m.value, n=m.n, low=m.low, high=m.high)
        for name, m in scores.metrics.items()
    }
