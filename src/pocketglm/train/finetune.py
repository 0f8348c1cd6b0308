"""The `train` verb: a checkpoint and labelled texts in, a classifier checkpoint out.

Reads the train and validation rows, never the test rows. The loss is cross-entropy with optional
label smoothing (Szegedy et al. 2016) and balanced class weights n / (classes * rows of the class).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest, Step, digest_value, tool_versions, write_json
from pocketglm.artifacts.origin import origin_of
from pocketglm.artifacts.output import is_done, output_folder
from pocketglm.artifacts.schemas import TrainResult
from pocketglm.contracts import DataOptions, Reporter, Scores, Silent
from pocketglm.data.readers import Example
from pocketglm.errors import UsageError, nearest
from pocketglm.eval._evaluate import metric_results
from pocketglm.eval.intent import intent_scores
from pocketglm.model.encoder import Encoder, with_classifier
from pocketglm.model.hf import labels_of, load_encoder, max_length_of, save_encoder
from pocketglm.model.spec import Pooling
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._optim import accelerator
from pocketglm.train._plot import loss_svg
from pocketglm.train._rows import Tokens, choose_length, describe, pad, read_rows, tokenize
from pocketglm.train.loop import CHECKPOINT, Batch, LoopConfig, LoopResult, Loss, Rows, train

PLOT = "loss.svg"
RECORD = "training.json"
_BATCH = 128  # rows of a validation batch


class FinetuneConfig(LoopConfig):
    """What to train on and how.

    learning_rate: the default suits encoders of MiniLM's width; BERT-base wants about 5e-5.
    max_length: tokens per text, None = the data's 99.5th percentile. pooling: None = the
    checkpoint's (mean where it states none). minutes: time budget of the whole run.
    class_weights: weigh each label by the inverse of its share. head_multiplier: for the new
    layers; those that come trained with the checkpoint learn at the body's rate. limit: rows of
    training, and of validation, at most.
    """

    learning_rate: float = Field(3e-4, gt=0)
    task: str = "intent"
    data: Path
    text_column: str = "text"
    label_column: str = "label"
    oos_label: str = "oos"
    limit: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=3)
    pooling: Pooling | None = None
    class_weights: bool = False
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    @property
    def options(self) -> DataOptions:
        """The data part, for the readers."""
        return DataOptions(
            self.data, self.text_column, self.label_column, self.oos_label, self.limit
        )


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
    _check_task(config.task)
    is_main: bool = accelerator().is_main_process
    reporter = (reporter or Silent()) if is_main else Silent()
    ckpt = Checkpoint.open(path)
    examples, validation = read_rows(config.options)
    request = _request(ckpt, config, [*examples, *validation])
    if is_done(out, request, force, [path]):
        return _already_done(out)
    job = _prepare(ckpt, config, examples, validation, reporter)
    loop_config: LoopConfig = config
    if config.minutes is not None:
        left = config.minutes - (time.monotonic() - began) / 60
        loop_config = config.model_copy(update={"minutes": max(left, 0.01)})
    with _output(path, out, request, force, is_main) as work:
        result = train(
            job.model,
            Rows(job.tokens.lengths, job.collate),
            job.loss(config),
            loop_config,
            work,
            evaluate=lambda model: float((job.predict(model) == job.truth).mean()),
            is_head=lambda name: name.startswith(job.fresh),
            reporter=reporter,
        )
        reporter.say("validating the best weights")
        scores = intent_scores(
            [row.label for row in validation], job.predict(job.model), job.labels, config.oos_label
        )
        answer = _result(out, config, result, scores, time.monotonic() - began)
        if is_main:
            _save(work, ckpt, job, config, request, result, answer)
    return answer


def _check_task(task: str) -> None:
    if task == "embed":
        raise UsageError(
            "train --task embed is not available",
            "embedding models are used as they are (eval --task embed); "
            "to recognize labels, use --task intent",
        )
    if task != "intent":
        raise UsageError(f"unknown task '{task}' for train", nearest(task, ["intent"]))


def _request(ckpt: Checkpoint, config: FinetuneConfig, rows: Sequence[Example]) -> str:
    return digest_value(
        {
            "verb": "train",
            "checkpoint": ckpt.digest(),
            "config": config.model_dump(mode="json", exclude={"data"}),
            "rows": [[row.text, row.label] for row in rows],
        }
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """The model with its head, and the rows as numbers. `targets` and `truth` are label numbers.

    fresh: name prefixes of the layers that no one has trained yet.
    """

    model: Encoder
    fresh: tuple[str, ...]
    labels: list[str]
    max_length: int
    tokens: Tokens
    targets: npt.NDArray[np.int64]
    held_out: Tokens
    truth: npt.NDArray[np.int64]
    pad_id: int

    def collate(self, rows: npt.NDArray[np.int64]) -> Batch:
        batch = pad(self.tokens.ids, rows, self.pad_id)
        return {**batch, "labels": torch.from_numpy(self.targets[rows])}

    def loss(self, config: FinetuneConfig) -> Loss:
        """Cross-entropy, summed over the rows."""
        counts = Counter(self.targets.tolist())
        weights = torch.ones(len(self.labels))
        if config.class_weights:
            for label, count in counts.items():
                weights[label] = len(self.targets) / (len(counts) * count)

        def cross_entropy(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            weight = weights.to(batch["labels"].device)
            logits = model(batch["ids"], batch["mask"])
            total = F.cross_entropy(
                logits.float(),
                batch["labels"],
                weight,
                reduction="sum",
                label_smoothing=config.label_smoothing,
            )
            return total, weight[batch["labels"]].sum()

        return cross_entropy

    def predict(self, model: nn.Module) -> npt.NDArray[np.int64]:
        """Label numbers of the validation rows, [N]."""
        device = next(model.parameters()).device
        order = np.argsort(self.held_out.lengths, kind="stable")
        result = np.empty(len(order), np.int64)
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                rows = order[start : start + _BATCH]
                batch = pad(self.held_out.ids, rows, self.pad_id)
                logits = model(batch["ids"].to(device), batch["mask"].to(device))
                result[rows] = logits.argmax(dim=1).cpu().numpy()
        return result


def _prepare(
    ckpt: Checkpoint,
    config: FinetuneConfig,
    examples: Sequence[Example],
    validation: Sequence[Example],
    reporter: Reporter,
) -> _Job:
    tokenizer = Tokenizer.load(ckpt.path)
    model, labels, fresh = _classifier(ckpt, config, {row.label for row in examples})
    tokenizer.check_vocabulary(model.spec.vocab_size, ckpt.path)
    limit = max_length_of(ckpt)
    if config.max_length is not None and config.max_length > limit:
        raise UsageError(
            f"--max-length {config.max_length} is more than this model's {limit} tokens",
            f"use {limit} or less",
        )
    texts = [row.text for row in examples]
    length = config.max_length or choose_length(tokenize(tokenizer, texts, limit).lengths, limit)
    tokens = tokenize(tokenizer, texts, length)
    describe(examples, validation, tokens, length, reporter)
    number = {label: index for index, label in enumerate(labels)}
    return _Job(
        model=model,
        fresh=fresh,
        labels=labels,
        max_length=length,
        tokens=tokens,
        targets=np.array([number[row.label] for row in examples], np.int64),
        held_out=tokenize(tokenizer, [row.text for row in validation], length),
        truth=np.array([number[row.label] for row in validation], np.int64),
        pad_id=tokenizer.pad_id,
    )


def _classifier(
    ckpt: Checkpoint, config: FinetuneConfig, labels: set[str]
) -> tuple[Encoder, list[str], tuple[str, ...]]:
    """The checkpoint's own classifier where it fits the labels, else a new head; its new layers."""
    model, known = load_encoder(ckpt), labels_of(ckpt)
    if set(known) == labels and config.pooling in (None, model.spec.pooling):
        return model, known, ()
    fresh = ("classifier.", "pooler.") if model.pooler is None else ("classifier.",)
    model = with_classifier(model, len(labels), config.pooling, config.seed)
    return model, sorted(labels), fresh


@contextmanager
def _output(path: Path, out: Path, request: str, force: bool, is_main: bool) -> Iterator[Path]:
    """The partial folder; only the first process locks and commits it."""
    if not is_main:
        yield out.with_name(out.name + ".partial")
        return
    with output_folder(out, request, force, [path]) as partial:
        yield partial


def _result(
    out: Path, config: FinetuneConfig, result: LoopResult, scores: Scores, seconds: float
) -> TrainResult:
    return TrainResult(
        out=str(out),
        task=config.task,
        epochs=round(result.epochs, 3),
        steps=result.steps,
        best_epoch=result.best_epoch,
        validation=metric_results(scores),
        loss_plot=str(out / PLOT),
        seconds=seconds,
    )


def _save(
    work: Path,
    ckpt: Checkpoint,
    job: _Job,
    config: FinetuneConfig,
    request: str,
    result: LoopResult,
    answer: TrainResult,
) -> None:
    """Write the checkpoint, the plot and the record; nothing in them depends on the clock."""
    settings = config.model_dump(mode="json", exclude={"seed", "task"})
    settings |= {"max_length": job.max_length, "precision": result.precision}
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
        max_length=job.max_length,
        origin=ckpt.manifest.origin or origin_of(ckpt.path),
        lineage=[*ckpt.manifest.lineage, step],
    )
    (work / PLOT).write_text(loss_svg(result.losses, result.scores), encoding="utf-8")
    record = answer.model_dump(mode="json", include={"task", "epochs", "steps", "best_epoch"})
    record["validation"] = answer.model_dump(mode="json")["validation"]
    curves: dict[str, Any] = {"losses": result.losses, "scores": result.scores}
    write_json(work / RECORD, {**record, **curves})
    save_encoder(job.model, work, source=ckpt, labels=job.labels, manifest=manifest)
    (work / CHECKPOINT).unlink(missing_ok=True)


def _already_done(out: Path) -> TrainResult:
    record = json.loads((out / RECORD).read_bytes())
    known = {key: record[key] for key in ("task", "epochs", "steps", "best_epoch", "validation")}
    return TrainResult(
        out=str(out), already_done=True, loss_plot=str(out / PLOT), seconds=0.0, **known
    )
