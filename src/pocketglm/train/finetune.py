"""The `train` verb: a checkpoint and rows of a task in, a fine-tuned checkpoint out.

Reads the train and validation rows, never the test rows. What a task learns, and from what, is in
its own file: `_encoder_job.py` (intent), `_lm_job.py` and `_command_job.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest, Step, digest_value, tool_versions, write_json
from pocketglm.artifacts.origin import origin_of
from pocketglm.artifacts.output import is_done, output_folder
from pocketglm.artifacts.schemas import MetricResult, TrainResult
from pocketglm.contracts import DataOptions, Metric, Reporter, Silent, TaskRows
from pocketglm.errors import UsageError, nearest
from pocketglm.model.decoder import Decoder
from pocketglm.model.hf import is_decoder
from pocketglm.model.inputs import cache_scales, input_grids
from pocketglm.ops.fake_quant import quantized_inputs
from pocketglm.train._command_job import prepare_command, read_commands
from pocketglm.train._encoder_job import prepare_classifier, read_labelled
from pocketglm.train._job import FinetuneConfig, Job
from pocketglm.train._lm_job import prepare_lm, read_lm
from pocketglm.train._optim import accelerator
from pocketglm.train._plot import loss_svg
from pocketglm.train.loop import CHECKPOINT, LoopConfig, LoopResult, train

__all__ = [
    "PLOT",
    "RECORD",
    "TASKS",
    "FinetuneConfig",
    "finetune",
    "read_task",
    "task_config",
    "validate",
]

PLOT = "loss.svg"
RECORD = "training.json"
_COUNTS = ("epochs", "steps", "best_epoch", "parameters", "trained_parameters")


@dataclass(frozen=True, slots=True)
class _TrainTask:
    """`prepare` takes what `read` gives."""

    kind: str
    read: Callable[[FinetuneConfig], TaskRows]
    prepare: Callable[[Checkpoint, FinetuneConfig, Any, Reporter], Job]


TASKS = {
    "intent": _TrainTask("encoder", read_labelled, prepare_classifier),
    "lm": _TrainTask("decoder", read_lm, prepare_lm),
    "command": _TrainTask("decoder", read_commands, prepare_command),
}


def finetune(
    path: Path,
    config: FinetuneConfig,
    out: Path,
    *,
    force: bool = False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Fine-tune the checkpoint in folder `path` and write the result to `out`.

    The same call resumes an interrupted run, and finds a finished one "already done". Under
    `accelerate launch` every process calls it; the first one writes.

    Raises:
        UsageError: the task cannot be trained, or there is no such folder.
        CheckpointError: the checkpoint cannot be used.
        DataError: the data cannot be used.
        OutputExistsError: `out` holds something else.
        MissingExtraError: accelerate is not installed.
        WorkError: the loss diverged.
    """
    began = time.monotonic()
    task = _task(config.task)
    is_main: bool = accelerator().is_main_process
    reporter = (reporter or Silent()) if is_main else Silent()
    ckpt = Checkpoint.open(path)
    _check_kind(ckpt, config.task)
    rows = task.read(config)
    request = _request(ckpt, config, rows.contents)
    if is_done(out, request, force, [path]):
        return _already_done(out)
    if ckpt.manifest.cache:
        reporter.say("the cache becomes float again: run quantize_kv after training")
    job = task.prepare(ckpt, config, rows, reporter)
    parameters = _counts(job, reporter)
    loop_config: LoopConfig = config
    if config.minutes is not None:
        left = config.minutes - (time.monotonic() - began) / 60
        loop_config = config.model_copy(update={"minutes": max(left, 0.01)})
    with _output(path, out, request, force, is_main) as work:
        result = train(
            job.trainee,
            job.rows(),
            job.loss(config),
            loop_config,
            work,
            evaluate=job.score,
            is_head=lambda name: name.startswith(job.fresh),
            reporter=reporter,
        )
        reporter.say("validating the best weights")
        job.finish()
        answer = TrainResult(
            out=str(out),
            task=config.task,
            epochs=round(result.epochs, 3),
            steps=result.steps,
            best_epoch=result.best_epoch,
            **parameters,
            validation=_results(job.metrics()),
            loss_plot=str(out / PLOT),
            seconds=time.monotonic() - began,
        )
        if is_main:
            _save(work, ckpt, job, config, request, result, answer)
    return answer


def task_config(task: str, data: DataOptions, **settings: Any) -> FinetuneConfig:
    """The settings of a run on `data`."""
    return FinetuneConfig(
        task=task,
        data=data.path,
        text_column=data.text_column,
        label_column=data.label_column,
        oos_label=data.oos_label,
        limit=data.limit,
        **settings,
    )


def read_task(task: str, data: DataOptions) -> TaskRows:
    """The training and validation rows of a task.

    Raises:
        UsageError: no such task, or it cannot be trained.
        DataError: the rows cannot be used.
    """
    return _task(task).read(task_config(task, data))


def validate(ckpt: Checkpoint, task: str, data: DataOptions, rows: TaskRows) -> dict[str, Metric]:
    """Score a trained checkpoint on the validation rows; the most important metric comes first.

    Quantized weights are dequantized. Activations are float, but for static ones, which are rounded
    to their grids, and for an INT8 cache.
    """
    job = _task(task).prepare(ckpt, task_config(task, data), rows, Silent())
    if isinstance(job.model, Decoder):
        job.model.cache_scales = cache_scales(ckpt)
    with quantized_inputs(job.model, input_grids(ckpt, job.model)):
        return dict(job.metrics())


def _task(name: str) -> _TrainTask:
    if name == "embed":
        raise UsageError(
            "train --task embed is not available",
            "embedding models are used as they are (eval --task embed); "
            "to recognize labels, use --task intent",
        )
    if name not in TASKS:
        raise UsageError(f"unknown task '{name}' for train", nearest(name, TASKS))
    return TASKS[name]


def _check_kind(ckpt: Checkpoint, task: str) -> None:
    kind = "decoder" if is_decoder(ckpt) else "encoder"
    if TASKS[task].kind != kind:
        able = ", ".join(name for name, known in TASKS.items() if known.kind == kind)
        other = "pocketglm init autoglm-nano" if kind == "encoder" else "a BERT or MiniLM model"
        raise UsageError(
            f"{ckpt.path} is of kind {kind}, the task '{task}' is for kind {TASKS[task].kind}",
            f"train it for {able}, or start from {other}",
        )


def _request(ckpt: Checkpoint, config: FinetuneConfig, rows: list[Any]) -> str:
    return digest_value(
        {
            "verb": "train",
            "checkpoint": ckpt.digest(),
            "config": config.model_dump(mode="json", exclude={"data"}),
            "rows": rows,
        }
    )


def _counts(job: Job, reporter: Reporter) -> dict[str, int]:
    """Parameters of the model, and how many of them (or of its adapters) learn."""
    every = list(job.model.parameters())
    learned = sum(p.numel() for p in every if p.requires_grad)
    frozen = sum(p.numel() for p in every if not p.requires_grad)
    if frozen:
        reporter.say(f"adapters: {learned:,} parameters learn, {frozen:,} stay as they are")
    return {"parameters": learned + frozen, "trained_parameters": learned}


@contextmanager
def _output(path: Path, out: Path, request: str, force: bool, is_main: bool) -> Iterator[Path]:
    """The partial folder; only the first process locks and commits it."""
    if not is_main:
        yield out.with_name(out.name + ".partial")
        return
    with output_folder(out, request, force, [path]) as partial:
        yield partial


def _results(metrics: Mapping[str, Metric]) -> dict[str, MetricResult]:
    return {name: MetricResult(**asdict(metric)) for name, metric in metrics.items()}


def _save(
    work: Path,
    ckpt: Checkpoint,
    job: Job,
    config: FinetuneConfig,
    request: str,
    result: LoopResult,
    answer: TrainResult,
) -> None:
    """Write the checkpoint, the plot and the record; nothing in them depends on the clock."""
    settings = config.model_dump(mode="json", exclude={"seed", "task"})
    settings |= {**job.settings, "precision": result.precision}
    effect = {f"validation_{name}": metric.value for name, metric in answer.validation.items()}
    step = Step(
        method="finetune",
        settings=settings,
        seed=config.seed,
        parent=ckpt.digest(),
        versions=tool_versions("torch", "accelerate"),
        effect={**effect, "epochs": answer.epochs, "steps": float(answer.steps)},
    )
    manifest = Manifest(
        request=request,
        task=config.task,
        origin=ckpt.manifest.origin or origin_of(ckpt.path),
        lineage=[*ckpt.manifest.lineage, step],
    )
    plot = loss_svg(result.losses, result.scores, job.score_name)
    (work / PLOT).write_text(plot, encoding="utf-8")
    record = answer.model_dump(mode="json", include={"task", "validation", *_COUNTS})
    curves: dict[str, Any] = {"losses": result.losses, "scores": result.scores}
    write_json(work / RECORD, {**record, **curves})
    job.save(work, ckpt, manifest)
    (work / CHECKPOINT).unlink(missing_ok=True)


def _already_done(out: Path) -> TrainResult:
    record = json.loads((out / RECORD).read_bytes())
    known = {key: record[key] for key in ("task", "validation", *_COUNTS)}
    return TrainResult(
        out=str(out), already_done=True, loss_plot=str(out / PLOT), seconds=0.0, **known
    )
