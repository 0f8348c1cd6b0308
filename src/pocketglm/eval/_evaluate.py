"""The `eval` verb: a task's scores of a checkpoint or an export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pocketglm import registry
from pocketglm.artifacts.checkpoint import model_folder
from pocketglm.artifacts.export import is_export, read_export
from pocketglm.artifacts.manifest import read_manifest
from pocketglm.artifacts.schemas import EvalResult, MetricResult
from pocketglm.contracts import DataOptions, Reporter, RunOptions, Scores, Session, Silent, Task
from pocketglm.errors import UsageError
from pocketglm.eval._run import say_truncated
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

    Of a single file that the model was trained on, only the rows that training held out for test.
    max_length: tokens per text, None = the model's.

    Raises:
        UsageError: unknown task, a task that this kind of model cannot do, or a `max_length` that
            is more than the model's.
        CheckpointError: the folder is no model.
        DataError: the data cannot be used, or has labels that the model does not know.
    """
    reporter = reporter or Silent()
    spec: Task = registry.load("eval", task)
    session = open_session(path, options or RunOptions())
    try:
        _check_kind(path, task, spec, session)
        tokenizer = Tokenizer.load(path)
        data = held_out(path, data, reporter)
        scores = spec.score(path, session, tokenizer, data, max_length, reporter)
    finally:
        session.close()
    say_truncated(scores.truncated, reporter)
    return scores, EvalResult(
        path=str(path),
        task=task,
        data=str(data.path),
        split=f"test (held out of {data.path.name})" if data.divided_by else "test",
        primary=scores.primary,
        metrics=metric_results(scores),
        truncated=scores.truncated,
    )


def _check_kind(path: Path, task: str, spec: Task, session: Session) -> None:
    if session.info.kind != spec.kind:
        able = [n for n in registry.names("eval") if registry.load("eval", n).kind != spec.kind]
        raise UsageError(
            f"{path} is a model of kind {session.info.kind}, the task '{task}' is for kind "
            f"{spec.kind}",
            f"tasks for it: {', '.join(able)}",
        )


def held_out(path: Path, data: DataOptions, reporter: Reporter | None = None) -> DataOptions:
    """Options that leave out the rows that the model in folder `path` was trained on.

    They differ from `data` only if that is a single file which a fine-tuning step of the model's
    history names; `read_split(..., "test")` then gives the tenth that the step held out for test.
    For two models that are compared on the same rows, apply it with both.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    if data.divided_by or not data.path.is_file():
        return data
    folder = model_folder(path)
    lineage = (read_export(folder) if is_export(folder) else read_manifest(folder)).lineage
    for step in reversed(lineage):
        trained = step.settings.get("data")
        if step.method == "finetune" and trained and Path(trained).resolve() == data.path.resolve():
            (reporter or Silent()).say(
                f"{path} was trained on {data.path}: scoring only the rows held out for test"
            )
            text, label = (step.settings.get(f"{key}_column", key) for key in ("text", "label"))
            return replace(data, divided_by=(text, label))
    return data


def metric_results(scores: Scores) -> dict[str, MetricResult]:
    """The metrics in their JSON form."""
    return {
        name: MetricResult(value=m.value, n=m.n, low=m.low, high=m.high)
        for name, m in scores.metrics.items()
    }
