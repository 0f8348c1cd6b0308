"""What `advise` may propose, and what each is known to cost: `recipes.yaml`, read and checked."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from pocketglm.contracts import Config
from pocketglm.devices.profile import Positive, Source

FILE = Path(__file__).parent / "recipes.yaml"
Kind = Literal["encoder", "decoder"]
Count = Annotated[int, Field(ge=1)]
Bits = Literal[4, 8, 16, 32]


class TaskNeeds(Config):
    """What is asked of a model, unless the user says otherwise. prompt, generated, context: tokens.

    judged: what `max_latency_ms` is about: a `text` (encoder), the whole `answer`, or the `first
    token` of one that is read while it is written, at `min_tokens_per_second`.
    """

    kind: Kind
    prompt: Count
    generated: Annotated[int, Field(ge=0)] = 0
    context: Annotated[int, Field(ge=0)] = 0
    judged: Literal["text", "answer", "first token"]
    max_latency_ms: Positive
    limit_from: str
    limit_words: str
    min_tokens_per_second: Positive | None = None
    speed_from: str | None = None
    speed_words: str = ""


class RuntimeFacts(Config):
    """A runtime as far as advice goes; see `recipes.yaml`."""

    title: str
    os: list[Literal["android", "ios", "linux", "macos"]]
    kinds: list[Kind]
    cache_bytes: Literal[1, 2, 4]
    reaches: list[str]
    dynamic: bool = True


class EncoderShape(Config):
    """A published encoder, as `EncoderSpec` has its sizes."""

    title: str
    vocab_size: Count
    hidden_size: Count
    num_layers: Count
    num_heads: Count
    intermediate_size: Count
    num_labels: Count
    source: str


class Evidence(Config):
    """Where a figure is from: a `page` of this repository, made by `command`, or a `source`."""

    data: str
    row: str
    page: str | None = None
    command: str | None = None
    source: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Evidence:
        if (self.page is None) == (self.source is None):
            raise ValueError("name either a page of ours or a source")
        if (self.page is None) != (self.command is None):
            raise ValueError("a page of ours goes with the command that made it")
        return self

    @property
    def ours(self) -> bool:
        return self.page is not None


class Accuracy(Evidence):
    """What a float model scores, in percent."""

    task: str
    model: str
    metric: str
    value: Annotated[float, Field(ge=0, le=100)]


class Loss(Evidence):
    """What a recipe cost a model: `drop` in points with its 95 % interval, or two figures.

    `before` and `after` are percent (points are lost), or perplexities (percent are).
    """

    task: str
    metric: str
    drop: float | None = None
    low: float | None = None
    high: float | None = None
    before: Positive | None = None
    after: Positive | None = None
    model: str
    parameters: Positive

    @model_validator(mode="after")
    def _figures(self) -> Loss:
        if (self.before is None) != (self.after is None) or (self.drop is None) == (
            self.before is None
        ):
            raise ValueError("give `drop`, or `before` and `after`")
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval has two ends")
        low, drop, high = self.low, self.drop, self.high
        if None not in (low, drop, high) and not float(low or 0) <= (drop or 0) <= float(high or 0):
            raise ValueError(f"drop {drop} is outside of {low}..{high}")
        return self

    @property
    def unit(self) -> Literal["points", "%"]:
        return "%" if self.metric == "perplexity" else "points"

    @property
    def value(self) -> float:
        """Points of a score that go, or percent that come onto a perplexity."""
        if self.drop is not None:
            return self.drop
        before, after = self.before or 1.0, self.after or 1.0
        return 100 * (after / before - 1) if self.unit == "%" else before - after

    @property
    def counted(self) -> float:
        """`value`, or 0 where the interval holds 0: nothing was lost that one could measure."""
        return 0.0 if self.low is not None and self.low <= 0 else max(self.value, 0.0)


class Structure(Config):
    """What becomes of a model before its weights are quantized. layers, vocabulary: of the result.
    ffn: share of the FFN channels that goes. removes, top_k: as in `methods/tiny.py`.
    """

    layers: Count | None = None
    vocabulary: Count | None = None
    ffn: Annotated[float, Field(gt=0, lt=1)] | None = None
    removes: Annotated[float, Field(gt=0, lt=1)] | None = None
    top_k: Count | None = None


class Recipe(Config):
    """One way to make a model smaller; see `recipes.yaml`. tasks: it is for; empty: any."""

    title: str
    summary: str
    plan: str | None = None
    kinds: list[Kind]
    tasks: list[str] = []
    runtimes: list[str]
    bits: Bits
    group_size: Literal[32, 64, 128] | None = None
    table_bits: Bits
    table_group: Literal[32, 64, 128] | None = None
    activations: Literal["float", "int8"]
    baseline: bool = False
    rows: bool = False
    structure: Structure | None = None
    losses: list[Loss] = []

    def losses_of(self, task: str, parameters: float) -> list[Loss]:
        """Those of a task, of the model that is nearest in size; empty: nobody measured it."""
        of_task = [loss for loss in self.losses if loss.task == task]
        if not of_task:
            return []
        gap = min(abs(math.log(loss.parameters / parameters)) for loss in of_task)
        return [loss for loss in of_task if abs(math.log(loss.parameters / parameters)) <= gap]


class Recipes(Config):
    tasks: dict[str, TaskNeeds]
    runtimes: dict[str, RuntimeFacts]
    encoders: dict[str, EncoderShape]
    accuracies: list[Accuracy]
    recipes: dict[str, Recipe]
    sources: dict[str, Source]

    @model_validator(mode="after")
    def _known(self) -> Recipes:
        """Every source, task and runtime that is named is there, and no source is idle."""
        losses = [loss for recipe in self.recipes.values() for loss in recipe.losses]
        sources = {
            *(loss.source for loss in losses),
            *(accuracy.source for accuracy in self.accuracies),
            *(shape.source for shape in self.encoders.values()),
            *(needs.limit_from for needs in self.tasks.values()),
            *(needs.speed_from for needs in self.tasks.values()),
        } - {None}
        tasks = {
            *(loss.task for loss in losses),
            *(accuracy.task for accuracy in self.accuracies),
            *(task for recipe in self.recipes.values() for task in recipe.tasks),
        }
        runtimes = {name for recipe in self.recipes.values() for name in recipe.runtimes}
        for what, wanted, known in (
            ("source", sources, set(self.sources)),
            ("task", tasks, set(self.tasks)),
            ("runtime", runtimes, set(self.runtimes)),
        ):
            if wanted - known:
                raise ValueError(f"no such {what}: {', '.join(sorted(map(str, wanted - known)))}")
        if set(self.sources) - sources:
            raise ValueError(f"sources of nothing: {sorted(set(self.sources) - sources)}")
        return self


@cache
def recipe_book() -> Recipes:
    """All of `recipes.yaml`."""
    return Recipes.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))
