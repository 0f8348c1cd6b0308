"""Settings of `distill`, and what they mean, for encoders and decoders alike."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import StepContext
from pocketglm.data.readers import read_texts
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._distill_job import Terms
from pocketglm.train._step import StepTraining
from pocketglm.train._student import Init, Spec, chosen_layers, init_reason, spread
from pocketglm.train._taps import Features

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "soft": {"alpha": 0.7, "temperature": 4.0, "features": "none"},
    "features": {"alpha": 0.7, "temperature": 6.0, "features": "hidden"},
    "qad": {"alpha": 0.5, "temperature": 1.0, "features": "none"},
}
_SHOWN = 5  # names in a message


class TeachingConfig(StepTraining):
    """What a step that trains may learn from a teacher, beside the labels."""

    preset: Literal["soft", "features", "qad"] | None = Field(
        "soft",
        description="where alpha, temperature and features begin: soft = 0.7, 4, none; features = "
        "0.7, 6, hidden; qad = 0.5, 1, none",
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
    features: Features = Field(
        "none",
        description="what else the student imitates: hidden = states after layers, relations = "
        "those between tokens (for any widths and heads; encoders)",
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
        description="encoders: changed copies of each training text that the teacher scores; an "
        "epoch has every text and the next one of its copies, so twice the rows",
    )
    augment_share: float = Field(
        0.3, gt=0, le=1, description="share of a copy's words that are dropped, swapped or replaced"
    )
    corpora: list[str] = Field(
        [],
        description="encoders: files with further texts, without labels (.txt, .jsonl[.gz], .csv), "
        "that the teacher scores; an epoch has as many of them as training rows",
    )
    reverse: bool = Field(
        False, description="KL(student || teacher) instead of KL(teacher || student)"
    )
    keep_zeros: bool | None = Field(
        None,
        description="weights that are 0 stay 0; None = if the checkpoint was pruned by "
        "prune_unstructured before",
    )
    max_length: int | None = Field(
        None, ge=3, description="decoders: tokens of a row; None = as `pocketglm train`"
    )
    slot_swap: float = Field(
        0.0, ge=0, le=1, description="commands: share of the rows that get other slot values"
    )
    made_up: float = Field(
        0.0, ge=0, le=1, description="commands: share of the slot values that become made-up words"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, values: Any) -> Any:
        """What is set explicitly goes before the preset."""
        if not isinstance(values, dict):
            return values
        preset = PRESETS.get(values.get("preset", cls.model_fields["preset"].default))
        return {**preset, **values} if preset else values


class DistillConfig(TeachingConfig):
    """Settings; `docs/extensions.md` is generated from the descriptions."""

    layers: int | list[int] | None = Field(
        None,
        description="the student keeps so many layers, spread evenly, the last one among them; or "
        "these (counted from 0); None = all",
    )
    student: dict[str, int | float | str] | str | None = Field(
        None,
        description="other sizes: num_layers, hidden_size, num_heads, intermediate_size, ...; or "
        "the path of a config.json, or one of `pocketglm sizes`; vocabulary, labels and pooling "
        "stay; None = as it is",
    )
    init: Init | None = Field(
        None,
        description="the student's first weights: teacher = those of the layers that it keeps; "
        "random; None = random for a student of other sizes, else teacher",
    )


def init_of(config: DistillConfig) -> Init:
    return config.init or ("teacher" if config.student is None else "random")


def kept_of(config: DistillConfig, base: Spec, spec: Spec) -> tuple[int, ...]:
    """The layers whose weights a student begins with, unless it begins at random."""
    if config.student is None:
        return chosen_layers(config.layers, base.num_layers)
    return spread(spec.num_layers, base.num_layers)


def teacher_of(config: TeachingConfig, context: StepContext) -> Checkpoint:
    return context.source if config.teacher is None else Checkpoint.open(Path(config.teacher))


def terms_of(
    config: TeachingConfig, spec: Spec | None = None, teacher: Spec | None = None
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
            pairs = {ours: max(other, 0) for ours, other in enumerate(spread(count, layers))}
    return Terms(
        alpha=config.alpha,
        temperature=config.temperature,
        features=config.features if config.feature_weight else "none",
        feature_weight=config.feature_weight,
        pairs=pairs,
        heads=config.relation_heads or (teacher.num_heads if teacher else 1),
        label_smoothing=config.label_smoothing,
        reverse=config.reverse,
    )


def keeps_zeros(config: TeachingConfig, ckpt: Checkpoint) -> bool:
    """Whether weights that are 0 stay 0."""
    pruned = any(step.method == "prune_unstructured" for step in ckpt.manifest.lineage)
    return pruned if config.keep_zeros is None else config.keep_zeros


def hold_zeros(config: TeachingConfig, ckpt: Checkpoint, model: nn.Module) -> None:
    """Let no gradient reach weights of `model` that are 0, if the settings say so: a weight whose
    gradient was always 0 is not moved by AdamW, whose decay multiplies.
    """
    if not keeps_zeros(config, ckpt):
        return
    for parameter in model.parameters():
        if parameter.ndim == 2 and (kept := parameter != 0).logical_not().any():
            held = functools.partial(torch.mul, kept.to(parameter.dtype))
            parameter.register_hook(held)  # type: ignore[no-untyped-call]


def corpus_of(config: TeachingConfig, context: StepContext) -> list[str]:
    """The unlabelled texts, each once.

    Raises:
        DataError: a file cannot be read.
    """
    column = context.data.text_column if context.data else "text"
    texts = (text for path in config.corpora for text in read_texts(Path(path), column))
    return list(dict.fromkeys(texts))


def corpus_reasons(config: TeachingConfig) -> list[str]:
    """Why the unlabelled texts cannot be used."""
    if config.corpora and not terms_of(config).asks:
        return ["corpora: without a teacher (alpha 0, features none) nothing says what they mean"]
    return [
        f"corpora: '{path}' is no file: give .txt, .jsonl[.gz] or .csv files"
        for path in config.corpora
        if not Path(path).is_file()
    ]


# --- refusals that both kinds have in common -----------------------------------------------------


def init_reasons(config: DistillConfig, base: Spec, spec: Spec) -> list[str]:
    """Why the student cannot begin as the settings say."""
    if init_of(config) == "random":
        return []
    reason = init_reason(base, spec, kept_of(config, base, spec))
    return [reason] if reason else []


def pair_reasons(terms: Terms, spec: Spec, teacher: Spec) -> list[str]:
    """Layers that one side does not have."""
    return [
        f"layer_map: {{{ours}: {other}}} is out of range: the student has layers 0 to "
        f"{spec.num_layers - 1}, the teacher 0 to {teacher.num_layers - 1}"
        for ours, other in terms.pairs.items()
        if not (0 <= ours < spec.num_layers and 0 <= other < teacher.num_layers)
    ]


def vocabulary_reasons(
    ckpt: Checkpoint, teacher: Checkpoint, more: Iterable[str] = ()
) -> list[str]:
    """Tokens of the student, and `more`, that the teacher does not know."""
    ours, theirs = (
        set(Tokenizer.load(place.path).inner.get_vocab(with_added_tokens=True))
        for place in (ckpt, teacher)
    )
    missing = (ours | set(more)) - theirs
    if not missing:
        return []
    return [
        f"the teacher's vocabulary lacks {listed(missing)}: it should have all tokens of the "
        "student's"
    ]


def listed(names: set[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
