"""How a compression step trains: the loop's settings, described for `docs/extensions.md`."""

from __future__ import annotations

from pydantic import Field

from pocketglm.contracts import Config
from pocketglm.train._optim import Precision
from pocketglm.train.loop import LoopConfig


class StepTraining(Config):
    """The settings of `LoopConfig` but the seed, which is the plan's. No epochs: no training."""

    epochs: float = Field(10, ge=0, description="passes over the training rows; 0: no training")
    batch_size: int = Field(32, ge=1, description="rows of a step")
    learning_rate: float = Field(3e-4, gt=0, description="the highest one")
    head_multiplier: float = Field(
        10.0, gt=0, description="factor of the learning rate for layers that begin untrained"
    )
    warmup: float = Field(
        0.1, ge=0, lt=1, description="share of the steps until the learning rate is highest"
    )
    weight_decay: float = Field(0.01, ge=0, description="of matrices, by AdamW")
    clip: float = Field(1.0, gt=0, description="largest norm of a gradient")
    patience: int = Field(
        2, ge=1, description="epochs without a better validation score before it stops"
    )
    minutes: float | None = Field(None, gt=0, description="time limit of the training; None = none")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="None = the checkpoint's own (decoders have none)"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the labels' term")
    precision: Precision = Field(
        "auto", description="auto = bf16 where the hardware multiplies it natively, else fp32"
    )

    def loop(self, seed: int) -> LoopConfig:
        """For `train.loop.train`; there are epochs."""
        settings = {name: getattr(self, name) for name in LoopConfig.model_fields if name != "seed"}
        return LoopConfig(**settings, seed=seed)
