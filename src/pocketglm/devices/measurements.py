"""What others published of models on devices: `measurements.yaml`, read and checked."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from pocketglm.contracts import Config
from pocketglm.devices.profile import Name, Positive, Source, all_profiles

FILE = Path(__file__).parent / "measurements.yaml"
Count = Annotated[int, Field(ge=1)]


class Model(Config):
    """Shape of a measured model. parameters: all; embedding: of them, those of a token table that
    is only looked up (0 where the head shares it, which reads all of it for every token).
    kv_bytes_per_token: of an fp16 cache. prompt_parameters: those that every token of a prompt
    passes through (without the head, and without layers that only the last token needs).
    """

    kind: Literal["decoder", "encoder"]
    parameters: Positive
    embedding: Annotated[float, Field(ge=0)]
    layers: Count
    hidden_size: Count
    kv_bytes_per_token: Annotated[float, Field(ge=0)] = 0
    prompt_parameters: Positive | None = None
    source: str


class Point(Config):
    """One published row. bits: of the weights that are not in the table. activations: the form of
    the inputs of linear layers. prompt, generated: tokens; context: positions of the cache. nodes:
    operators of the converted graph. file_mb, embedding_mb (of the file, what is only looked up),
    peak_memory_mb: decimal MB. Speeds in tokens a second, times in milliseconds, watts of the whole
    board at the wall while it answers. mapped: part of the file was never in memory, so
    peak_memory_mb may lie below file_mb. Null: not published.
    """

    device: Name
    model: str
    bits: Literal[2, 3, 4, 5, 6, 8, 16, 32]
    activations: Literal["float", "int8", "int16"] | None = None
    runtime: str
    unit: Literal["cpu", "gpu", "npu"]
    threads: Count | None = None
    prompt: Count | None = None
    generated: Count | None = None
    context: Count | None = None
    nodes: Count | None = None
    prefill_per_second: Positive | None = None
    decode_per_second: Positive | None = None
    first_token_ms: Positive | None = None
    latency_ms: Positive | None = None
    load_ms: Positive | None = None
    file_mb: Positive | None = None
    embedding_mb: Positive | None = None
    peak_memory_mb: Positive | None = None
    mapped: bool = False
    watts: Positive | None = None
    kind: Literal["measured", "vendor"]
    source: str
    note: str = ""


class Unlinked(Config):
    """A source without an address. unlinked: why."""

    title: str
    unlinked: str


class Measurements(Config):
    sources: dict[str, Source | Unlinked]
    models: dict[str, Model]
    points: list[Point]

    @model_validator(mode="after")
    def _known(self) -> Measurements:
        """Every device, model and source that is named is there."""
        for what, wanted, known in (
            ("device", {point.device for point in self.points}, set(all_profiles())),
            ("model", {point.model for point in self.points}, set(self.models)),
            (
                "source",
                {point.source for point in self.points}
                | {model.source for model in self.models.values()},
                set(self.sources),
            ),
        ):
            if wanted - known:
                raise ValueError(f"no such {what}: {', '.join(sorted(wanted - known))}")
        return self


@cache
def published() -> Measurements:
    """All of `measurements.yaml`."""
    return Measurements.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))
