"""Distilling a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import WORK, StepContext
from pocketglm.errors import CheckpointError
from pocketglm.methods._distill import (
    DistillConfig,
    TeachingConfig,
    corpus_of,
    corpus_reasons,
    hold_zeros,
    init_of,
    init_reasons,
    kept_of,
    listed,
    pair_reasons,
    teacher_of,
    terms_of,
    vocabulary_reasons,
)
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import (
    is_decoder,
    labels_of,
    load_encoder,
    max_length_of,
    predicted,
    spec_of,
    stored_name,
)
from pocketglm.model.layers import bare_modules
from pocketglm.model.spec import EncoderSpec
from pocketglm.ops.stored import check_finite
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._distill_job import Lessons, Pupil, distillation_loss
from pocketglm.train._encoder_job import EncoderJob, prepare_classifier
from pocketglm.train._student import make_student, student_spec
from pocketglm.train._taps import taps, width_of
from pocketglm.train._teacher import Teacher
from pocketglm.train.finetune import task_config
from pocketglm.train.loop import train


def reasons(config: DistillConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    """Why this encoder cannot be distilled so.

    Raises:
        InputError: another reason.
    """
    if context.task != "intent":
        return [f"an encoder is distilled for intent, the task is {context.task}"]
    base = _base_spec(ckpt, context)
    spec = student_spec(base, config.layers, config.student)
    return init_reasons(config, base, spec) + teaching_reasons(config, spec, ckpt, context)


def teaching_reasons(
    config: TeachingConfig, spec: EncoderSpec, ckpt: Checkpoint, context: StepContext
) -> list[str]:
    """Why a student `spec`, made from `ckpt`, cannot learn from the teacher, if it has one.

    Raises:
        InputError: the teacher's folder cannot be opened.
    """
    if config.slot_swap or config.made_up or config.max_length:
        return ["slot_swap, made_up and max_length are for decoders: leave them out"]
    if found := corpus_reasons(config):
        return found
    if not terms_of(config).asks:
        return []
    teacher = teacher_of(config, context)
    return _teacher_reasons(teacher, ckpt, context) or _feature_reasons(config, spec, teacher)


def _teacher_reasons(teacher: Checkpoint, ckpt: Checkpoint, context: StepContext) -> list[str]:
    """Why this teacher cannot teach this task, or this student."""
    if is_decoder(teacher):
        return [f"the teacher {teacher.path} is a decoder"]
    known = set(labels_of(teacher))
    if not known:
        return [
            f"the teacher {teacher.path} is no classifier: train it first (pocketglm train), or "
            "set alpha to 0 and features to none"
        ]
    found = []
    labels = {row.label for row in context.rows.train} if context.rows else set(labels_of(ckpt))
    for names, what in (
        (labels - known, "it does not know"),
        (known - labels, "only it knows"),
    ):
        if names:
            found.append(f"the teacher has other labels than the rows: {what} {listed(names)}")
    return found + vocabulary_reasons(ckpt, teacher)


def _feature_reasons(config: TeachingConfig, spec: EncoderSpec, teacher: Checkpoint) -> list[str]:
    theirs = spec_of(teacher)
    terms = terms_of(config, spec, theirs)
    outside = pair_reasons(terms, spec, theirs)
    if outside or terms.features != "relations":
        return outside
    sides = (spec, list(terms.pairs)), (theirs, list(terms.pairs.values()))
    with bare_modules():
        widths = {
            width_of(place)
            for side, layers in sides
            for place in taps(Encoder(side), "relations", layers)
        }
    bad = sorted(width for width in widths if width % terms.heads)
    return [
        f"relation_heads: {terms.heads} does not divide {width} features of attention: set a "
        f"divisor of {' and '.join(map(str, sorted(widths)))}"
        for width in bad
    ]


def _labels(ckpt: Checkpoint, context: StepContext) -> list[str]:
    """The student's, in order: the checkpoint's own where they are those of the rows."""
    known = labels_of(ckpt)
    wanted = {row.label for row in context.rows.train} if context.rows else set(known)
    return known if set(known) == wanted else sorted(wanted)


def _base_spec(ckpt: Checkpoint, context: StepContext) -> EncoderSpec:
    """The step's checkpoint with a head for the rows' labels."""
    spec, labels = spec_of(ckpt), _labels(ckpt, context)
    return replace(
        spec, head="classification", num_labels=len(labels), pooler=spec.pooling == "cls"
    )


def predict(config: DistillConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    """As `ModelMethod.predict`."""
    base = _base_spec(ckpt, context)
    after = predicted(ckpt, student_spec(base, config.layers, config.student))
    labels = _labels(ckpt, context)
    names = {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    manifest = after.manifest.model_copy(update={"task": context.task})
    return replace(after, config=after.config | names, manifest=manifest)


def run(
    config: DistillConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    """As `ModelMethod.run`."""
    job = _job(config, ckpt, context)
    effect = learn(config, job, ckpt, folder / WORK, context) if config.epochs else {}
    job.save(folder, ckpt, ckpt.manifest.model_copy(update={"task": context.task}))
    return effect


def learn(
    config: TeachingConfig, job: EncoderJob, ckpt: Checkpoint, work: Path, context: StepContext
) -> dict[str, float]:
    """Train the job's model in place, on the labels and by the teacher; `work` is for a resume."""
    terms, teacher = terms_of(config), None
    if terms.asks:
        source = teacher_of(config, context)
        terms = terms_of(config, job.model.spec, spec_of(source))
        teacher = Teacher(
            ckpt=source,
            root=context.cache,
            length=min(max_length_of(source), job.max_length),
            features=terms.features,
            layers=tuple(terms.pairs.values()),
            reporter=context.reporter,
        )
    lessons = Lessons(
        job=job,
        tokenizer=Tokenizer.load(ckpt.path),
        texts=[row.text for row in context.rows.train] if context.rows else [],
        teacher=teacher,
        copies=config.augment,
        share=config.augment_share,
        unlabelled=corpus_of(config, context),
    )
    hold_zeros(config, ckpt, job.model)
    new = ("projections.", *(f"student.{name}" for name in job.fresh))
    result = train(
        Pupil(job.model, terms, teacher.widths if teacher else (), context.seed),
        lessons.rows(),
        distillation_loss(terms),
        config.loop(context.seed),
        work,
        evaluate=lambda pupil: job.score(cast(Pupil, pupil).student),
        is_head=lambda name: name.startswith(new),
        reporter=context.reporter,
    )
    return {
        "epochs": round(result.epochs, 3),
        "steps": float(result.steps),
        "best_epoch": float(result.best_epoch),
    }


def _job(config: DistillConfig, ckpt: Checkpoint, context: StepContext) -> EncoderJob:
    """The student with its rows."""
    spec = student_spec(_base_spec(ckpt, context), config.layers, config.student)
    job = classifier_job(ckpt, context, config.dropout, spec.max_position_embeddings)
    base = job.model
    student = make_student(
        base, spec, kept_of(config, base.spec, spec), init_of(config), context.seed
    )
    return replace(job, model=student, fresh=() if init_of(config) == "random" else job.fresh)


def classifier_job(
    ckpt: Checkpoint, context: StepContext, dropout: float | None, positions: int
) -> EncoderJob:
    """The checkpoint's classifier with the plan's rows, for a student of so many positions.

    Raises:
        CheckpointError: a weight of the checkpoint holds NaN or infinity.
    """
    if context.task is None or context.data is None or context.rows is None:
        raise CheckpointError(f"{ckpt.path}: learning needs rows of the task")
    for name, value in load_encoder(ckpt).state_dict().items():
        check_finite(ckpt, stored_name(ckpt, name), value)
    limit = min(max_length_of(ckpt), positions)
    known = ckpt.manifest.max_length is not None or limit < max_length_of(ckpt)
    settings = task_config(
        context.task,
        context.data,
        max_length=limit if known else None,
        dropout=dropout,
        seed=context.seed,
    )
    rows: Any = context.rows
    return prepare_classifier(ckpt, settings, rows, context.reporter)
