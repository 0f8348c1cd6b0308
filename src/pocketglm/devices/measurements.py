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
    kv_bytes_per_token: of an fp16 cache.
    """

    kind: Literal["decoder", "encoder"]
    parameters: Positive
    embedding: Annotated[float, Field(ge=0)]
    layers: Count
    hidden_size: Count
    kv_bytes_per_token: Annotated[float, Field(ge=0)] = 0
    source: str


class Point(Config):
    """One published row. bits: of the weights that are not in the table. activations: the form of
    the inputs of linear layers. prompt, generated, context: tokens. file_mb, peak_memory_mb:
    decimal MB. Speeds in tokens a second, times in milliseconds. Null: not published.
    """

    device: Name
    model: str
    bits: Literal[2, 3, 4, 8, 16, 32]
    activations: Literal["float", "int8", "int16"] | None = None
    runtime: str
    unit: Literal["cpu", "gpu", "npu"]
    threads: Count | None = None
    prompt: Count | None = None
    generated: Count | None = None
    prefill_per_second: Positive | None = None
    decode_per_second: Positive | None = None
    first_token_ms: Positive | None = None
    latency_ms: Positive | None = None
    load_ms: Positive | None = None
    file_mb: Positive | None = None
    peak_memory_mb: Positive | None = None
    energy_j: Positive | None = None
    kind: Literal["measured", "vendor"]
    source: str
    note: str = ""


class Measurements(Config):
    sources: dict[str, Source]
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
                {item.source for item in (*self.points, *self.models.values())},
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
