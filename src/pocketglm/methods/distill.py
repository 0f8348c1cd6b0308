"""Knowledge distillation: a student learns what a teacher says, beside the labels or instead.

loss = alpha * T^2 * KL(teacher || student, both divided by T) + (1 - alpha) * cross-entropy
(Hinton et al. 2015, https://arxiv.org/abs/1503.02531) + feature_weight * features. Features are
hidden states (a learned projection where widths differ) or MiniLMv2's relations
(https://arxiv.org/abs/2012.15828). With alpha 0 and no features it is plain fine-tuning; the
teacher is not even opened.

The student is the step's checkpoint as it is (healing), some of its layers, or a model of other
sizes. The teacher is the plan's input, or any folder; its outputs are kept in the step cache.

Changed copies of the texts (`augment`) are scored by the teacher too. They depend on nothing but
the texts and the settings, so all seeds and students share the teacher's outputs. The label of a
changed text counts only where the teacher's best guess agrees with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, model_validator

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import WORK, ModelMethod, StepContext
from pocketglm.errors import CheckpointError, InputError
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
from pocketglm.train._distill_job import Lessons, Pupil, Terms, distillation_loss
from pocketglm.train._encoder_job import EncoderJob, prepare_classifier
from pocketglm.train._step import StepTraining
from pocketglm.train._student import (
    Init,
    chosen_layers,
    init_reason,
    make_student,
    spread,
    student_spec,
)
from pocketglm.train._taps import Features, taps, width_of
from pocketglm.train._teacher import Teacher
from pocketglm.train.finetune import task_config
from pocketglm.train.loop import train

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "soft": {"alpha": 0.7, "temperature": 4.0, "features": "none"},
    "features": {"alpha": 0.7, "temperature": 6.0, "features": "hidden"},
}
_SHOWN = 5  # names in a message


class DistillConfig(StepTraining):
    """Settings; `docs/extensions.md` is generated from the descriptions."""

    preset: Literal["soft", "features"] = Field(
        "soft",
        description="where alpha, temperature and features begin: soft = 0.7, 4, none; features = "
        "0.7, 6, hidden",
    )
    alpha: float = Field(
        0.7, ge=0, le=1, description="weight of the teacher's term; 1 - alpha: of the labels'"
    )
    temperature: float = Field(
        4.0, gt=0, allow_inf_nan=False, description="what both models' logits are divided by"
    )
    teacher: str | None = Field(
        None, description="the teacher's folder; None = the checkpoint that the plan began with"
    )
    layers: int | list[int] | None = Field(
        None,
        description="the student keeps so many layers, spread evenly, the last one among them; or "
        "these (counted from 0); None = all",
    )
    student: dict[str, int | float | str] | str | None = Field(
        None,
        description="other sizes: num_layers, hidden_size, num_heads, intermediate_size, ...; or "
        "the path of a config.json; vocabulary, labels and pooling stay; None = as it is",
    )
    init: Init | None = Field(
        None,
        description="the student's first weights: teacher = those of the layers that it keeps; "
        "random; None = random for a student of other sizes, else teacher",
    )
    features: Features = Field(
        "none",
        description="what else the student imitates: hidden = states after layers, relations = "
        "those between tokens (for any widths and heads)",
    )
    feature_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="weight of the features' term"
    )
    layer_map: dict[int, int] | None = Field(
        None,
        description="student layer: teacher layer, counted from 0; None = all student layers, "
        "spread evenly over the teacher's (hidden), or the last to the last (relations)",
    )
    relation_heads: int | None = Field(
        None,
        ge=1,
        description="parts of queries, keys and values whose relations are compared; None = the "
        "teacher's attention heads",
    )
    augment: int = Field(
        0,
        ge=0,
        description="changed copies of each training text that the teacher scores; an epoch has "
        "every text and the next one of its copies, so twice the rows",
    )
    augment_share: float = Field(
        0.3, gt=0, le=1, description="share of a copy's words that are dropped, swapped or replaced"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, values: Any) -> Any:
        """What is set explicitly goes before the preset."""
        preset = PRESETS.get(values.get("preset", "soft")) if isinstance(values, dict) else None
        return {**preset, **values} if preset else values


# --- before any work -----------------------------------------------------------------------------


def _check(config: DistillConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if ckpt.manifest.schemes or "quantization_config" in ckpt.config:
        return ["it is quantized: distill first, then quantize; or train it with qat"]
    if is_decoder(ckpt):
        return ["it is a decoder: this method distills encoders"]
    if context.task != "intent":
        return [f"an encoder is distilled for intent, the task is {context.task}"]
    if context.rows is not None and not context.rows.train:
        return ["there are no training rows"]
    try:
        base = _base_spec(ckpt, context)
        spec = student_spec(base, config.layers, config.student)
        teacher = _teacher(config, context) if _terms(config).asks else None
    except InputError as error:
        return [f"{error.message}: {error.hint}" if error.hint else error.message]
    reasons = []
    kept = _kept(config, base, spec)
    if _init(config) == "teacher" and (reason := init_reason(base, spec, kept)):
        reasons.append(reason)
    if teacher is not None:
        reasons += _teacher_reasons(teacher, ckpt, context) or _feature_reasons(
            config, spec, teacher
        )
    return reasons


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
    reasons = []
    labels = {row.label for row in context.rows.train} if context.rows else set(labels_of(ckpt))
    for names, what in (
        (labels - known, "it does not know"),
        (known - labels, "only it knows"),
    ):
        if names:
            reasons.append(f"the teacher has other labels than the rows: {what} {_listed(names)}")
    if teacher.path.resolve() != ckpt.path.resolve():
        ours, theirs = (
            Tokenizer.load(c.path).inner.get_vocab(with_added_tokens=True) for c in (ckpt, teacher)
        )
        if missing := set(ours) - set(theirs):
            reasons.append(
                f"the teacher's vocabulary lacks {_listed(missing)}: it should have all tokens of "
                "the student's"
            )
    return reasons


def _listed(names: set[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _feature_reasons(config: DistillConfig, spec: EncoderSpec, teacher: Checkpoint) -> list[str]:
    theirs = spec_of(teacher)
    terms = _terms(config, spec, theirs)
    outside = [
        f"layer_map: {{{ours}: {other}}} is out of range: the student has layers 0 to "
        f"{spec.num_layers - 1}, the teacher 0 to {theirs.num_layers - 1}"
        for ours, other in terms.pairs.items()
        if not (0 <= ours < spec.num_layers and 0 <= other < theirs.num_layers)
    ]
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


# --- what the settings mean ----------------------------------------------------------------------


def _init(config: DistillConfig) -> Init:
    return config.init or ("teacher" if config.student is None else "random")


def _kept(config: DistillConfig, base: EncoderSpec, spec: EncoderSpec) -> tuple[int, ...]:
    """The layers whose weights a student begins with, unless it begins at random."""
    if config.student is None:
        return chosen_layers(config.layers, base.num_layers)
    return spread(spec.num_layers, base.num_layers)


def _teacher(config: DistillConfig, context: StepContext) -> Checkpoint:
    return context.source if config.teacher is None else Checkpoint.open(Path(config.teacher))


def _terms(
    config: DistillConfig, spec: EncoderSpec | None = None, teacher: EncoderSpec | None = None
) -> Terms:
    """The loss; without the specs, as far as it is known."""
    pairs: dict[int, int] = {}
    if config.features != "none" and spec and teacher:
        count, layers = spec.num_layers, teacher.num_layers
        if config.layer_map is not None:
            pairs = dict(sorted(config.layer_map.items()))
        elif config.features == "relations":
            pairs = {count - 1: layers - 1}
        else:
            pairs = {ours: (ours + 1) * layers // count - 1 for ours in range(count)}
            pairs = {ours: max(other, 0) for ours, other in pairs.items()}
    return Terms(
        alpha=config.alpha,
        temperature=config.temperature,
        features=config.features if config.feature_weight else "none",
        feature_weight=config.feature_weight,
        pairs=pairs,
        heads=config.relation_heads or (teacher.num_heads if teacher else 1),
        label_smoothing=config.label_smoothing,
    )


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


def _predict(config: DistillConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    base = _base_spec(ckpt, context)
    after = predicted(ckpt, student_spec(base, config.layers, config.student))
    labels = _labels(ckpt, context)
    names = {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    manifest = after.manifest.model_copy(update={"task": context.task})
    return replace(after, config=after.config | names, manifest=manifest)


# --- the work ------------------------------------------------------------------------------------


def _run(
    config: DistillConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    job = _job(config, ckpt, context)
    effect = _learn(config, job, ckpt, folder / WORK, context) if config.epochs else {}
    job.save(folder, ckpt, ckpt.manifest.model_copy(update={"task": context.task}))
    return effect


def _learn(
    config: DistillConfig, job: EncoderJob, ckpt: Checkpoint, work: Path, context: StepContext
) -> dict[str, float]:
    terms, teacher = _terms(config), None
    if terms.asks:
        source = _teacher(config, context)
        terms = _terms(config, job.model.spec, spec_of(source))
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
    )
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
    """The student with its rows.

    Raises:
        CheckpointError: a weight of the checkpoint holds NaN or infinity.
    """
    if context.task is None or context.data is None or context.rows is None:
        raise CheckpointError(f"{ckpt.path}: distilling needs rows of the task")
    for name, value in load_encoder(ckpt).state_dict().items():
        check_finite(ckpt, stored_name(ckpt, name), value)
    spec = student_spec(_base_spec(ckpt, context), config.layers, config.student)
    limit = min(max_length_of(ckpt), spec.max_position_embeddings)
    known = ckpt.manifest.max_length is not None or limit < max_length_of(ckpt)
    settings = task_config(
        context.task,
        context.data,
        max_length=limit if known else None,
        dropout=config.dropout,
        seed=context.seed,
    )
    rows: Any = context.rows
    job = prepare_classifier(ckpt, settings, rows, context.reporter)
    base = job.model
    student = make_student(base, spec, _kept(config, base.spec, spec), _init(config), context.seed)
    return replace(job, model=student, fresh=() if _init(config) == "random" else job.fresh)


def _inputs(config: DistillConfig) -> Sequence[Path]:
    named = [config.teacher, config.student if isinstance(config.student, str) else None]
    return [Path(name) for name in named if name is not None]


SPEC = ModelMethod(
    summary="train a student by what a teacher says",
    config=DistillConfig,
    check=_check,
    predict=_predict,
    run=_run,
    needs_rows=lambda config: True,
    inputs=_inputs,
    identity={"epochs": 0},
)
