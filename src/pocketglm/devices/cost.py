"""What a model costs on a device, before it is run: predictions with intervals.

    predict(workload, device, runtime, unit="cpu", threads=None) -> Prediction

Seconds come from `roofline.py`, its shares of the peak from `cost.yaml`, which
`python docs/cost_model.py` fits to the published rows of `measurements.yaml`. An interval is as
wide as the fit's errors on devices it had not seen. What no published row supports is null, and
`notes` says why.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from pocketglm.contracts import Config
from pocketglm.devices.machine import machine_of
from pocketglm.devices.profile import DeviceProfile
from pocketglm.devices.roofline import Rates, Unit, Workload, prompt_seconds, token_seconds
from pocketglm.errors import UsageError, nearest

__all__ = ["Interval", "Prediction", "Workload", "predict"]

FILE = Path(__file__).parent / "cost.yaml"
RUNTIMES = ("onnx", "litert", "executorch", "coreml", "gguf", "mnn", "qnn")
MB = 1e6


class Interval(Config):
    """A prediction, and the range that holds nine of ten devices (see docs/cost-model.md)."""

    value: float
    low: float
    high: float


class Prediction(Config):
    """Times in ms, speeds in tokens a second, memory in decimal MB, energy in joules (one text, or
    a whole answer). first_token_ms: prompt and one token. latency_ms: an encoder's text, a
    decoder's whole answer. Null: nothing published supports it; `notes` says what is missing.
    """

    load_ms: Interval | None = None
    first_token_ms: Interval | None = None
    tokens_per_second: Interval | None = None
    prefill_per_second: Interval | None = None
    latency_ms: Interval | None = None
    peak_memory_mb: Interval | None = None
    energy_j: Interval | None = None
    notes: list[str] = []


class Linear(Config):
    """`fixed + slope * size`: memory (MB from MB) or load time (seconds from MB)."""

    fixed: Annotated[float, Field(ge=0)]
    slope: Annotated[float, Field(ge=0)]


class Constants(Config):
    """`cost.yaml`. Keys of rates, memory and load: `runtime/unit`, and `unit` for a runtime that
    has no row of its own. watts: by device kind. spread: by quantity, factor of the interval.
    """

    rates: dict[str, Rates] = {}
    memory: dict[str, Linear] = {}
    load: dict[str, Linear] = {}
    watts: dict[str, float] = {}
    spread: dict[str, float] = {}


@cache
def constants() -> Constants:
    """The fitted constants; all empty where they were never fitted."""
    if not FILE.is_file():
        return Constants()
    return Constants.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def predict(
    workload: Workload,
    device: DeviceProfile,
    runtime: str,
    unit: Unit = "cpu",
    threads: int | None = None,
) -> Prediction:
    """Cost of `workload` on a unit of a device. threads: of the CPU; null: all but small cores.

    Raises:
        UsageError: no such runtime.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"unknown runtime '{runtime}'", nearest(runtime, RUNTIMES))
    fitted = constants()
    machine, why = machine_of(device, unit, threads)
    rates = fitted.rates.get(f"{runtime}/{unit}") or fitted.rates.get(unit)
    if machine is None or rates is None:
        return Prediction(notes=[why or f"nothing published of {runtime} on a {unit}"])
    prompt = prompt_seconds(workload, machine, rates)
    token = token_seconds(workload, machine, rates)
    if workload.kind == "encoder":
        return Prediction(latency_ms=_around(prompt * 1e3, fitted.spread.get("encoder")))
    return Prediction(
        first_token_ms=_around((prompt + token) * 1e3, fitted.spread.get("prefill")),
        prefill_per_second=_around(workload.prompt / prompt, fitted.spread.get("prefill")),
        tokens_per_second=_around(1 / token, fitted.spread.get("decode")),
        latency_ms=_around(
            (prompt + workload.generated * token) * 1e3, fitted.spread.get("decode")
        ),
    )


def _around(value: float, factor: float | None) -> Interval | None:
    """The interval of a value whose error is a factor; null without one."""
    if factor is None:
        return None
    return Interval(value=value, low=value / factor, high=value * factor)
