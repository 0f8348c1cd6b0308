"""What a fine-tuning run is asked for, and what a task has to bring to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.contracts import DataOptions, Metric
from pocketglm.errors import UsageError
from pocketglm.model.hf import max_length_of
from pocketglm.model.spec import Pooling
from pocketglm.train.loop import EpochRows, LoopConfig, Loss, Rows


class FinetuneConfig(LoopConfig):
    """What to train on and how.

    learning_rate: the default suits encoders of MiniLM's width; BERT-base wants about 5e-5.
    max_length: tokens per text, None = what the task finds best. minutes: time budget of the whole
    run. limit: rows of training, and of validation, at most. dropout: None = the checkpoint's own
    (decoders have none). lora: rank of the adapters, None = train the whole model; lora_alpha:
    their scale times the rank, None = twice the rank.

    Encoders alone: pooling: None = the checkpoint's (mean where it states none). class_weights:
    weigh each label by the inverse of its share. head_multiplier: for the new layers; those that
    come trained with the checkpoint learn at the body's rate.

    Commands alone, anew in each epoch: slot_swap: share of the rows that get other values of the
    same slots, seen with the same intent. made_up: share of the slots' values that become made-up
    words; of the other words a tenth of it. Weights of losses on the text: early_intent: of telling
    the intent after each of its tokens; text_loss: of telling the next one.
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
    dropout: float | None = Field(None, ge=0, lt=1)
    lora: int | None = Field(None, ge=1)
    lora_alpha: float | None = Field(None, gt=0)
    slot_swap: float = Field(0.0, ge=0, le=1)
    made_up: float = Field(0.0, ge=0, le=1)
    early_intent: float = Field(0.0, ge=0)
    text_loss: float = Field(0.0, ge=0)

    @property
    def options(self) -> DataOptions:
        """The data part, for the readers."""
        return DataOptions(
            self.data, self.text_column, self.label_column, self.oos_label, self.limit
        )


class Job(Protocol):
    """A model, its rows as numbers, and what they have to say to the loop and the record.

    `trainee` is what the loop trains, `model` the model inside. `fresh`: names of `trainee`'s
    parameters that no one has trained yet begin so. `settings`: what the task chose, for the
    lineage.
    """

    @property
    def trainee(self) -> nn.Module: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def fresh(self) -> tuple[str, ...]: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def score_name(self) -> str: ...

    def rows(self) -> Rows | EpochRows:
        """The training rows."""

    def loss(self, config: FinetuneConfig) -> Loss:
        """The loss that `trainee` minimizes."""

    def score(self, trainee: nn.Module) -> float:
        """On the validation rows; higher is better."""

    def finish(self) -> None:
        """Turn the trained `model` into what `save` will store."""

    def metrics(self) -> Mapping[str, Metric]:
        """Of the finished `model` on the validation rows, the most important one first."""

    def save(self, folder: Path, source: Checkpoint, manifest: Manifest) -> None:
        """Write the checkpoint; `manifest` lacks what only the task knows."""


def length_limit(ckpt: Checkpoint, asked: int | None) -> int:
    """The most tokens that a row may have.

    Raises:
        UsageError: `asked` is more.
    """
    limit = max_length_of(ckpt)
    if asked is not None and asked > limit:
        raise UsageError(
            f"--max-length {asked} is more than this model's {limit} tokens",
            f"use {limit} or less",
        )
    return limit
