"""One step of a plan by a method that sees the whole model; and what every step is measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import (
    MANIFEST,
    Step,
    digest_file,
    tool_versions,
    write_json,
)
from pocketglm.contracts import WORK, Metric, ModelMethod, StepContext
from pocketglm.errors import UsageError
from pocketglm.model.hf import check_tensors, is_decoder, labels_of
from pocketglm.ops.stored import parameter_counts
from pocketglm.stages._memory import Ceiling, megabytes
from pocketglm.stages._step import stored_bytes, upstream_config
from pocketglm.stages.plan import PlanStep
from pocketglm.train.finetune import validate

SCORE = "validation_"  # before a metric's name in a step's effect
# Bytes a parameter: weights, gradients, the optimizer's two moments, the best weights, the teacher.
_TRAINING = 24
_SPARE = 1 << 30  # activations, rows, what the allocator keeps
_SCORING = 4, 384 << 20  # bytes a parameter, and of logits and activations
SCORED = 1 << 30  # bytes up to which a step that works in pieces is scored with the whole model


@dataclass(frozen=True, slots=True)
class ModelJob:
    """One step on one checkpoint, whose digest is `parent`."""

    step: PlanStep
    spec: ModelMethod
    ckpt: Checkpoint
    parent: str
    context: StepContext
    ceiling: Ceiling

    def run(self, folder: Path) -> None:
        """Write the step's checkpoint into `folder`; continues from `folder / WORK`."""
        if self.spec.memory is None:
            needed = _TRAINING * sum(parameter_counts(self.ckpt).values()) + _SPARE
            self.ceiling.require(needed, "the whole model in training")
        else:
            needed = self.spec.memory(self.step.config, self.ckpt, self.context)
            self.ceiling.require(needed, f"{self.step.method}'s own work")
        scored = not self.spec.in_parts or scoring_bytes(self.ckpt) <= SCORED
        if self.context.rows is not None and scored:
            self.ceiling.require(scoring_bytes(self.ckpt), "the whole model, to score it")
        (folder / WORK).mkdir(exist_ok=True)
        effect = self.spec.run(self.step.config, self.ckpt, folder, self.context)
        after = Checkpoint.open(folder)
        check_tensors(after)
        if self.ckpt.manifest.cache and not after.manifest.cache:
            self.context.reporter.say(
                f"{self.step.method} changes keys and values: the cache is float again, put "
                "quantize_kv after it"
            )
        lineage = Step(
            method=self.step.method,
            settings=self.step.settings,
            seed=self.context.seed,
            parent=self.parent,
            versions=tool_versions("torch"),
            effect={
                **effect,
                "bytes_before": float(stored_bytes(self.ckpt)),
                "bytes_after": float(stored_bytes(after)),
            },
        )
        manifest = after.manifest.model_copy(
            update={"request": "", "lineage": [*self.ckpt.manifest.lineage, lineage]}
        )
        write_json(folder / "config.json", upstream_config(after, manifest))
        write_json(folder / MANIFEST, manifest)


def scoring_bytes(ckpt: Checkpoint) -> int:
    """Bytes that `add_score` needs at most: the model in float32, and a batch."""
    each, batch = _SCORING
    return each * sum(parameter_counts(ckpt).values()) + batch


def input_digests(paths: Sequence[Path]) -> list[Any]:
    """What the files and folders that a method's settings name contain.

    Raises:
        UsageError: one does not exist.
    """
    found: list[Any] = []
    for place in paths:
        if place.is_dir():
            found.append(Checkpoint.open(place).digest())
        elif place.is_file():
            found.append(digest_file(place))
        else:
            raise UsageError(f"{place} does not exist", "check the path in the plan")
    return found


def add_score(folder: Path, context: StepContext, most: int | None = None) -> None:
    """Add parameters and validation scores to the effect of the checkpoint's last step.

    most: bytes up to which scoring may need memory; a larger model is not scored.
    """
    ckpt = Checkpoint.open(folder)
    effect = {"parameters": float(sum(parameter_counts(ckpt).values()))}
    if most is not None and scoring_bytes(ckpt) > most:
        context.reporter.say(
            f"not scored: the whole model would need {megabytes(scoring_bytes(ckpt))}; use eval"
        )
    else:
        for name, metric in scores(ckpt, context).items():
            effect[SCORE + name] = float(f"{metric.value:.6g}")
    steps = ckpt.manifest.lineage
    last = steps[-1].model_copy(update={"effect": {**steps[-1].effect, **effect}})
    manifest = ckpt.manifest.model_copy(update={"lineage": [*steps[:-1], last]})
    write_json(folder / MANIFEST, manifest)


def scores(ckpt: Checkpoint, context: StepContext) -> dict[str, Metric]:
    """The metrics on the validation rows; none without rows or for a model not trained for them."""
    if context.rows is None or context.data is None or context.task is None:
        return {}
    if context.task == "intent":
        able = set(labels_of(ckpt)) == {row.label for row in context.rows.train}
    else:
        able = is_decoder(ckpt) and (context.task == "lm" or ckpt.manifest.command is not None)
    if not able:
        context.reporter.say(f"not scored: the model is not trained for {context.task} yet")
        return {}
    return validate(ckpt, context.task, context.data, context.rows)
