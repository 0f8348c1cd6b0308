"""What a model costs on a device, before it is run: predictions with intervals.

    predict(workload, device, runtime, unit="cpu", threads=None) -> Prediction

Seconds come from `roofline.py`, memory from `fit_sizes.py`, their constants from `cost.yaml`, which
`python docs/cost_model.py` fits to the published rows of `measurements.yaml`. An interval is as
wide as the errors of such fits on chips that they had not seen (docs/cost-model.md). What no
published row supports is null, and `notes` says why.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field

from pocketglm.contracts import Config
from pocketglm.devices.fit_sizes import (
    Load,
    Memory,
    counted_mb,
    load_seconds,
    memory_mb,
    memory_of,
)
from pocketglm.devices.machine import machine_of
from pocketglm.devices.profile import DeviceProfile
from pocketglm.devices.roofline import Rates, Unit, Workload, prompt_seconds, token_seconds
from pocketglm.errors import UsageError, nearest

__all__ = ["Constants", "Interval", "Prediction", "Workload", "constants", "predict"]

FILE = Path(__file__).parent / "cost.yaml"
RUNTIMES = ("onnx", "litert", "executorch", "coreml", "gguf", "mnn", "qnn")
# Runtimes whose exports have a cache of fixed size and read all of it for a token. (Published rows
# of ExecuTorch are of exports with its own attention operator, which reads what is filled.)
WHOLE_CACHE = ("litert", "executorch", "coreml")
USELESS = 10.0  # an interval of more than such a factor both ways says nothing: null
MB = 1e6
Factor = Annotated[float, Field(gt=0)]


class Interval(Config):
    """A prediction, and the range that holds four of five devices (docs/cost-model.md)."""

    value: float
    low: float
    high: float

    def __add__(self, other: Interval) -> Interval:
        return Interval(
            value=self.value + other.value, low=self.low + other.low, high=self.high + other.high
        )

    def times(self, by: float) -> Interval:
        """Of `by` such amounts."""
        return Interval(value=self.value * by, low=self.low * by, high=self.high * by)

    def rate(self, amount: float) -> Interval:
        """Of an amount in this time: an amount a second."""
        return Interval(value=amount / self.value, low=amount / self.high, high=amount / self.low)


class Prediction(Config):
    """Times in ms, speeds in tokens a second, memory in decimal MB, energy in joules (one text, or
    a whole answer). first_token_ms: prompt and one token. latency_ms: an encoder's text, a
    decoder's whole answer. peak_memory_mb: with all of the file in memory; a runtime that maps it
    may need less. Null: nothing published supports it; `notes` says what is missing.
    """

    load_ms: Interval | None = None
    first_token_ms: Interval | None = None
    tokens_per_second: Interval | None = None
    prefill_per_second: Interval | None = None
    latency_ms: Interval | None = None
    peak_memory_mb: Interval | None = None
    energy_j: Interval | None = None
    notes: list[str] = []


class Constants(Config):
    """`cost.yaml`. rates: by `runtime/unit`, and `unit` for a runtime that has no row of its own.
    memory: by `kind/runtime/unit`, and `kind`. load: by unit. watts: by `device kind/unit`. spread:
    by `quantity/unit` or quantity, the interval's factor both ways (memory: the share of what is
    beyond weights and cache); `other/...` for a runtime without rows.
    """

    rates: dict[str, Rates] = {}
    memory: dict[str, Memory] = {}
    load: dict[str, Load] = {}
    watts: dict[str, float] = {}
    spread: dict[str, Factor] = {}

    def factor(self, quantity: str, unit: str, known: bool = True) -> float | None:
        """The interval's factor; null where nothing was published, or it would say nothing."""
        found = self.spread.get(f"{quantity}/{unit}") or self.spread.get(quantity)
        if found is None:
            return None
        if not known:
            other = self.spread.get(f"other/{quantity}/{unit}") or self.spread.get(
                f"other/{quantity}"
            )
            found = max(found, other or found)
        return found if found <= USELESS else None


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
    """Cost of `workload` on a unit of a device. threads: of the CPU; null: four, as runtimes take.

    Raises:
        UsageError: no such runtime.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"unknown runtime '{runtime}'", nearest(runtime, RUNTIMES))
    fitted = constants()
    notes: list[str] = []
    times = _times(fitted, workload, device, runtime, unit, threads, notes)
    return Prediction(
        **times,
        load_ms=_load(fitted, workload, unit, notes),
        peak_memory_mb=_memory(fitted, workload, runtime, unit, notes),
        energy_j=_energy(fitted, times.get("latency_ms"), device, unit, notes),
        notes=notes,
    )


def _times(
    fitted: Constants,
    workload: Workload,
    device: DeviceProfile,
    runtime: str,
    unit: Unit,
    threads: int | None,
    notes: list[str],
) -> dict[str, Interval]:
    """Latency and speeds, as far as they are supported."""
    machine, why = machine_of(device, unit, threads)
    known = f"{runtime}/{unit}" in fitted.rates
    rates = fitted.rates.get(f"{runtime}/{unit}") or fitted.rates.get(unit)
    if machine is None or rates is None:
        notes.append(why or f"no times: nobody published any on a {unit}")
        return {}
    if not known:
        notes.append(
            f"nobody published times of {runtime} on a {unit}: those of other runtimes taken, and "
            "the interval is wide enough for them"
        )
    rates = rates.model_copy(update={"whole": runtime in WHOLE_CACHE})
    prompt = prompt_seconds(workload, machine, rates) * 1e3
    if workload.kind == "encoder":
        latency = _around(prompt, fitted.factor("encoder", unit, known))
        if latency is None:
            notes.append(f"no latency: too little is published of encoders on a {unit}")
            return {}
        return {"latency_ms": latency}
    first = _around(prompt, fitted.factor("prefill", unit, known))
    token = _around(
        token_seconds(workload, machine, rates) * 1e3, fitted.factor("decode", unit, known)
    )
    found: dict[str, Interval] = {}
    if token is not None:
        found["tokens_per_second"] = token.rate(1e3)
    if first is not None:
        found["prefill_per_second"] = first.rate(workload.prompt * 1e3)
    if token is not None and first is not None:
        found["first_token_ms"] = first + token
        found["latency_ms"] = first + token.times(workload.generated)
    else:
        notes.append(f"some times are null: what is published on a {unit} differs too much")
    return found


def _load(fitted: Constants, workload: Workload, unit: Unit, notes: list[str]) -> Interval | None:
    load = fitted.load.get(unit)
    factor = fitted.factor("load", unit)
    if load is None or factor is None:
        notes.append("no load time: the few published ones differ by more than a model explains")
        return None
    return _around(load_seconds(workload, load) * 1e3, factor)


def _memory(
    fitted: Constants, workload: Workload, runtime: str, unit: Unit, notes: list[str]
) -> Interval | None:
    """Never less than the weights and the cache; what is beyond them is what may be wrong."""
    memory = memory_of(fitted.memory, workload.kind, runtime, unit)
    share = fitted.factor("memory", unit)
    if memory is None or share is None:
        notes.append(f"no peak memory: too little is published of {workload.kind}s on a {unit}")
        return None
    value, least = memory_mb(workload, memory), counted_mb(workload)
    margin = share * (value - least)
    return Interval(value=value, low=max(value - margin, least), high=value + margin)


def _energy(
    fitted: Constants,
    latency: Interval | None,
    device: DeviceProfile,
    unit: Unit,
    notes: list[str],
) -> Interval | None:
    """Watts that such devices draw, times the time."""
    watts = _around(fitted.watts.get(f"{device.kind}/{unit}", 0.0), fitted.factor("watts", unit))
    if latency is None or watts is None or not watts.value:
        if latency is not None:
            notes.append(f"no energy: nobody published watts of a {device.kind}'s {unit}")
        return None
    return Interval(
        value=latency.value * watts.value / 1e3,
        low=latency.low * watts.low / 1e3,
        high=latency.high * watts.high / 1e3,
    )


def _around(value: float, factor: float | None) -> Interval | None:
    """The interval of a value whose error is a factor; null without one."""
    if factor is None:
        return None
    return Interval(value=value, low=value / factor, high=value * factor)
