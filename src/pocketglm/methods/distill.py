"""Knowledge distillation: a student learns what a teacher says, beside the labels or instead.

loss = alpha * T^2 * KL(teacher || student, both divided by T) + (1 - alpha) * cross-entropy
(Hinton et al. 2015, https://arxiv.org/abs/1503.02531) + feature_weight * features. Features are
hidden states (a learned projection where widths differ) or MiniLMv2's relations
(https://arxiv.org/abs/2012.15828). With alpha 0 and no features it is plain fine-tuning; the
teacher is not even opened.

The student is the step's checkpoint as it is (healing), some of its layers, or a model of other
sizes. The teacher is the plan's input, or any folder. What it says about texts to a classifier is
kept in the step cache; a decoder's teacher runs beside the student, and its term is that of every
token which the labels' term counts.

Changed copies of the texts (`augment`) are scored by the teacher too. They depend on nothing but
the texts and the settings, so all seeds and students share the teacher's outputs. The label of a
changed text counts only where the teacher's best guess agrees with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import ModelMethod, StepContext
from pocketglm.errors import InputError
from pocketglm.methods import _distill_decoder, _distill_encoder
from pocketglm.methods._distill import DistillConfig
from pocketglm.model.hf import is_decoder
from pocketglm.model.sizes import SIZES


def _check(config: DistillConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if ckpt.manifest.schemes or "quantization_config" in ckpt.config:
        return ["it is quantized: distill first, then quantize; or train it with qat"]
    if context.rows is not None and not context.rows.train:
        return ["there are no training rows"]
    try:
        if is_decoder(ckpt):
            return _distill_decoder.reasons(config, ckpt, context)
        return _distill_encoder.reasons(config, ckpt, context)
    except InputError as error:
        return [f"{error.message}: {error.hint}" if error.hint else error.message]


def _predict(config: DistillConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    if is_decoder(ckpt):
        return _distill_decoder.predict(config, ckpt, context)
    return _distill_encoder.predict(config, ckpt, context)


def _run(
    config: DistillConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    if is_decoder(ckpt):
        return _distill_decoder.run(config, ckpt, folder, context)
    return _distill_encoder.run(config, ckpt, folder, context)


def _inputs(config: DistillConfig) -> Sequence[Path]:
    student = config.student if isinstance(config.student, str) else None
    named = [config.teacher, None if student in SIZES else student, *config.corpora]
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
