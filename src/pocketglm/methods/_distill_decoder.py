"""Distilling a decoder: text (`lm`) and commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import WORK, StepContext
from pocketglm.data.frames import grammar_of
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.methods._distill import (
    DistillConfig,
    TeachingConfig,
    hold_zeros,
    init_of,
    init_reasons,
    kept_of,
    pair_reasons,
    teacher_of,
    terms_of,
    vocabulary_reasons,
)
from pocketglm.model.decoder import Decoder
from pocketglm.model.hf import (
    decoder_spec_of,
    is_decoder,
    load_decoder,
    predicted,
    stored_name,
)
from pocketglm.model.spec import DecoderSpec
from pocketglm.ops.stored import check_finite, precision_of
from pocketglm.text.frame import mark_names
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._command_job import prepare_command
from pocketglm.train._decoder_job import DecoderJob, set_dropout
from pocketglm.train._distill_decoder import DecoderPupil, shared_tokens, token_loss
from pocketglm.train._lm_job import prepare_lm
from pocketglm.train._student import decoder_student_spec, make_student
from pocketglm.train._vocabulary import rows_for
from pocketglm.train.finetune import task_config
from pocketglm.train.loop import train

_PREPARE = {"lm": prepare_lm, "command": prepare_command}
_STORED = {"bf16": "BF16", "fp16": "F16"}
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def reasons(config: DistillConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    """Why this decoder cannot be distilled so.

    Raises:
        InputError: another reason.
    """
    if why := task_reason(context):
        return why
    base = base_spec(ckpt, context)
    spec = decoder_student_spec(base, config.layers, config.student)
    return init_reasons(config, base, spec) + teaching_reasons(config, spec, ckpt, context)


def task_reason(context: StepContext) -> list[str]:
    """Why there is no task to distil for, or nothing."""
    if context.task in _PREPARE:
        return []
    return [f"a decoder is distilled for lm or command, the task is {context.task}"]


def teaching_reasons(
    config: TeachingConfig, spec: DecoderSpec, ckpt: Checkpoint, context: StepContext
) -> list[str]:
    """Why a student `spec`, made from `ckpt`, cannot learn so.

    Raises:
        InputError: the teacher's folder cannot be opened.
    """
    found = []
    if config.features == "relations":
        found.append("features: relations are for encoders: set hidden or none")
    if config.corpora:
        found.append("corpora is for encoders; a decoder learns from more rows: put them into DATA")
    if config.augment:
        found.append("augment is for encoders; of commands, slot_swap and made_up change the rows")
    if context.task != "command" and (config.slot_swap or config.made_up):
        found.append("slot_swap and made_up are for commands: leave them out")
    if not terms_of(config).asks:
        return found
    teacher = teacher_of(config, context)
    if not is_decoder(teacher):
        return [*found, f"the teacher {teacher.path} is an encoder"]
    theirs = decoder_spec_of(teacher)
    found += pair_reasons(terms_of(config, spec, theirs), spec, theirs)
    return found + vocabulary_reasons(ckpt, teacher, _marks(context))


def _marks(context: StepContext) -> list[str]:
    """Tokens that the task adds to a model."""
    if context.task != "command" or context.rows is None:
        return []
    return mark_names(grammar_of(context.rows.train))


def base_spec(ckpt: Checkpoint, context: StepContext) -> DecoderSpec:
    """The step's checkpoint with a vocabulary for the task."""
    spec, tokenizer = decoder_spec_of(ckpt), Tokenizer.load(ckpt.path)
    tokenizer.inner.add_special_tokens(_marks(context))
    return replace(spec, vocab_size=rows_for(spec.vocab_size, tokenizer.size))


def predict(config: DistillConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    """As `ModelMethod.predict`."""
    spec = decoder_student_spec(base_spec(ckpt, context), config.layers, config.student)
    return predict_student(ckpt, spec, context)


def predict_student(ckpt: Checkpoint, spec: DecoderSpec, context: StepContext) -> Checkpoint:
    """What `learn` writes of a student of this spec; the weights keep their type."""
    after, dtype = predicted(ckpt, spec), _STORED.get(precision_of(ckpt), "F32")
    command = grammar_of(context.rows.train) if context.rows and _marks(context) else None
    return replace(
        after,
        config=after.config | {"dtype": _NAMES[dtype]},
        tensors={name: replace(info, dtype=dtype) for name, info in after.tensors.items()},
        manifest=after.manifest.model_copy(update={"task": context.task, "command": command}),
    )


def run(
    config: DistillConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    """As `ModelMethod.run`."""

    def student(base: Decoder) -> Decoder:
        spec = decoder_student_spec(base.spec, config.layers, config.student)
        kept = kept_of(config, base.spec, spec)
        return make_student(base, spec, kept, init_of(config), context.seed)

    return teach(config, ckpt, folder, context, student)


def teach(
    config: TeachingConfig,
    ckpt: Checkpoint,
    folder: Path,
    context: StepContext,
    make: Callable[[Decoder], Decoder],
) -> Mapping[str, float]:
    """Train what `make` makes of the checkpoint's model, and write it."""
    job = decoder_job(config, ckpt, context)
    student = make(job.model)
    if config.dropout:
        set_dropout(student, config.dropout)
    job = replace(job, source=replace(job.source, model=student))
    effect = learn(config, job, ckpt, folder / WORK, context) if config.epochs else {}
    job.finish()
    job.save(folder, ckpt, ckpt.manifest.model_copy(update={"task": context.task}))
    return effect


def learn(
    config: TeachingConfig, job: DecoderJob, ckpt: Checkpoint, work: Path, context: StepContext
) -> dict[str, float]:
    """Train the job's model in place, on the rows and by the teacher; `work` is for a resume."""
    hold_zeros(config, ckpt, job.model)
    trainee: nn.Module = job.trainee
    job.trainee.smoothing = config.label_smoothing
    if terms_of(config).asks:
        trainee = _pupil(config, job, context)
    result = train(
        trainee,
        job.rows(),
        token_loss,
        config.loop(context.seed),
        work,
        evaluate=cast(Any, job).score,
        is_head=lambda name: name.startswith("projections."),
        reporter=context.reporter,
    )
    return {
        "epochs": round(result.epochs, 3),
        "steps": float(result.steps),
        "best_epoch": float(result.best_epoch),
    }


def _pupil(config: TeachingConfig, job: DecoderJob, context: StepContext) -> DecoderPupil:
    source = teacher_of(config, context)
    theirs = decoder_spec_of(source)
    longest = int(job.train.lengths.max()) - 1
    if longest > theirs.max_position_embeddings:
        raise UsageError(
            f"a row has {longest} tokens, the teacher {theirs.max_position_embeddings} positions",
            f"set max_length to {theirs.max_position_embeddings} or less",
        )
    teacher = load_decoder(source)
    for name, value in teacher.state_dict().items():
        check_finite(source, stored_name(source, name), value)
    terms = terms_of(config, job.model.spec, theirs)
    sizes = job.model.spec.vocab_size, theirs.vocab_size
    shared = shared_tokens(job.source.tokenizer, Tokenizer.load(source.path), sizes)
    return DecoderPupil(job.model, teacher, terms, shared, context.seed)


def decoder_job(config: TeachingConfig, ckpt: Checkpoint, context: StepContext) -> DecoderJob:
    """The checkpoint's decoder, with tokens for the task, and the plan's rows.

    Raises:
        CheckpointError: a weight of the checkpoint holds NaN or infinity.
    """
    if context.task is None or context.data is None:
        raise CheckpointError(f"{ckpt.path}: learning needs rows of the task")
    settings = task_config(
        context.task,
        context.data,
        max_length=config.max_length,
        seed=context.seed,
        slot_swap=config.slot_swap,
        made_up=config.made_up,
    )
    rows: Any = context.rows
    prepare: Any = _PREPARE[context.task]
    job: DecoderJob = prepare(ckpt, settings, rows, context.reporter)
    for name, value in job.model.state_dict().items():
        check_finite(ckpt, stored_name(ckpt, name), value)
    return job
