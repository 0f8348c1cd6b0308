"""The `eval` verb: a task's scores of a checkpoint or an export."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from pocketglm import registry
from pocketglm.artifacts.checkpoint import model_folder
from pocketglm.artifacts.export import check_files, is_export, read_export
from pocketglm.artifacts.manifest import read_manifest
from pocketglm.artifacts.schemas import EvalResult, MetricResult
from pocketglm.contracts import DataOptions, Reporter, RunOptions, Scores, Silent, Task
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
    baseline: Path | None = None,
) -> tuple[Scores, EvalResult]:
    """Score the model in folder `path` on the test rows of `data`.

    Of a single file that the model was trained on, only the rows that training held out for test.
    max_length: tokens per text, None = the model's. baseline: a model of the same tokenizer to
    compare it with, for the tasks that do so.

    Raises:
        UsageError: unknown task, a task that this kind of model cannot do, a `max_length` that is
            more than the model's, or a baseline that cannot be compared.
        CheckpointError: the folder is no model, or an export whose files were changed.
        DataError: the data cannot be used, or has labels that the model does not know.
    """
    reporter, options = reporter or Silent(), options or RunOptions()
    spec: Task = registry.load("eval", task)
    for one in (path, baseline):
        if one is not None and is_export(folder := model_folder(one)):
            check_files(folder, read_export(folder))
    with closing(open_session(path, options)) as session:
        check_kind(path, task, spec, session.info.kind)
        tokenizer = Tokenizer.load(path)
        data = held_out(path, data, reporter)
        if baseline is None:
            scores = spec.score(path, session, tokenizer, data, max_length, reporter)
        else:
            against = _comparison(path, baseline, task, spec, tokenizer)
            data = held_out(baseline, data, reporter)
            with closing(open_session(baseline, options)) as other:
                check_kind(baseline, task, spec, other.info.kind)
                scores = against(path, session, other, tokenizer, data, max_length, reporter)
    say_truncated(scores.truncated, reporter)
    return scores, EvalResult(
        path=str(path),
        task=task,
        data=str(data.path),
        split=f"test (held out of {data.path.name})" if data.divided_by else "test",
        primary=scores.primary,
        metrics=metric_results(scores),
        truncated=scores.truncated,
        baseline=None if baseline is None else str(baseline),
        notes=list(scores.notes),
    )


def _comparison(
    path: Path, baseline: Path, task: str, spec: Task, tokenizer: Tokenizer
) -> Callable[..., Scores]:
    if spec.against is None:
        able = [n for n in registry.names("eval") if registry.load("eval", n).against]
        raise UsageError(
            f"the task '{task}' compares no two models",
            f"score both, or use pocketglm prove; --baseline is for: {', '.join(able)}",
        )
    check_vocabularies(path, tokenizer, baseline)
    return spec.against


def check_vocabularies(path: Path, tokenizer: Tokenizer, baseline: Path) -> None:
    """Raises UsageError if `baseline` has other tokens than `tokenizer`, the one of `path`."""
    if Tokenizer.load(baseline).inner.get_vocab() != tokenizer.inner.get_vocab():
        raise UsageError(
            f"{path} and {baseline} have different tokenizers: their tokens cannot be compared",
            "take a baseline with the same tokenizer, such as the checkpoint it was made from",
        )


def check_kind(path: Path, task: str, spec: Task, kind: str) -> None:
    """Raises UsageError, which names the tasks for a model of this kind, if `spec` is not."""
    if kind != spec.kind:
        able = [n for n in registry.names("eval") if registry.load("eval", n).kind != spec.kind]
        raise UsageError(
            f"{path} is a model of kind {kind}, the task '{task}' is for kind {spec.kind}",
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
    return {name: MetricResult(**asdict(metric)) for name, metric in scores.metrics.items()}
