"""Fitting memory, load time and power to the published rows: the small parts of the cost model.

    peak memory   weights * (1 + slope) + cache + fixed + work * scores   (none below zero)
    load          fixed + file / rate
    power         the middle of the published watts of such a device and unit

Weights plus cache is what has to be there, so a prediction is never less. `scores` are the
attention scores of an encoder's text in fp32; a decoder's prompt goes through in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated

import numpy as np
from pydantic import Field

from pocketglm.contracts import Config
from pocketglm.devices.fit import Array, chip, numeric, row_weights, solve, workload_of
from pocketglm.devices.measurements import Measurements, Point
from pocketglm.devices.profile import DeviceProfile
from pocketglm.devices.roofline import Workload

Amount = Annotated[float, Field(ge=0)]
MB = 1e6
HEAD_SIZE = 64  # of an encoder's attention, to count its heads by
MEMORY_PRIOR = {"slope": 0.1, "fixed_decoder": 400.0, "fixed_encoder": 15.0, "work": 8.0}
MEMORY_DEVIATIONS = {"slope": 1.0, "fixed": 0.7, "work": 0.7}
MEMORY_NOISE = 0.15
LOAD_PRIOR = {"fixed": 0.02, "rate": 500.0}  # seconds, MB a second
LOAD_DEVIATIONS, LOAD_NOISE = {"fixed": 2.0, "rate": 1.5}, 0.5


class Memory(Config):
    """Constants of peak memory. slope: of the weights, beyond themselves. fixed: MB. work: buffers
    of an encoder's scores that live at once.
    """

    slope: Amount
    fixed: Amount
    work: Amount = 0


class Load(Config):
    """Constants of load time. fixed: seconds. rate: MB of the file a second."""

    fixed: Amount
    rate: Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Size:
    """One published size as the fit sees it. value: MB, seconds or watts."""

    point: Point
    chip: str
    kind: str
    workload: Workload
    value: float


def scores_mb(workload: Workload) -> float:
    """Attention scores of one layer of an encoder, fp32, in MB."""
    if workload.kind == "decoder":
        return 0.0
    heads = max(1.0, workload.hidden_size / HEAD_SIZE)
    return 4.0 * heads * workload.prompt**2 / MB


def cache_mb(workload: Workload) -> float:
    """The cache at all its positions, in MB."""
    return workload.kv_bytes_per_token * workload.positions / MB


def counted_mb(workload: Workload) -> float:
    """Weights and cache in MB: what needs no guess."""
    return workload.weight_bytes / MB + cache_mb(workload)


def memory_mb(workload: Workload, memory: Memory) -> float:
    """Peak memory of a process that holds the model and answers."""
    weights = workload.weight_bytes / MB
    return (
        weights * (1 + memory.slope)
        + cache_mb(workload)
        + memory.fixed
        + memory.work * scores_mb(workload)
    )


def load_seconds(workload: Workload, load: Load) -> float:
    """From the file to a runtime that can answer."""
    return load.fixed + workload.weight_bytes / MB / load.rate


def sizes_of(
    published: Measurements,
    profiles: dict[str, DeviceProfile],
    figure: Callable[[Point], float | None],
) -> list[Size]:
    """Rows that have a figure; `figure` says which."""
    return [
        Size(
            point=point,
            chip=chip(profiles[point.device]),
            kind=profiles[point.device].kind,
            workload=workload_of(point, published.models[point.model]),
            value=value,
        )
        for point in published.points
        if (value := figure(point)) is not None
    ]


def memory_figure(point: Point) -> float | None:
    """Null where a part of the file was never in memory, or the row is the article's."""
    return None if point.mapped or point.source == "article" else point.peak_memory_mb


def load_figure(point: Point) -> float | None:
    return None if point.load_ms is None else point.load_ms / 1e3


def fit_memory(sizes: Sequence[Size]) -> dict[str, Memory]:
    """By `kind/runtime/unit`, and `kind` for runtimes without a row."""
    names = sorted({_memory_key(size) for size in sizes})
    kinds = sorted({size.workload.kind for size in sizes})
    keys = [*kinds, *names]
    place = {key: 2 * index for index, key in enumerate(keys)}
    work = 2 * len(keys)
    own = [place[_memory_key(size)] for size in sizes]
    wide = [place[size.workload.kind] for size in sizes]
    fixed = np.array([MEMORY_PRIOR[f"fixed_{size.workload.kind}"] for size in sizes])
    weights = np.array([size.workload.weight_bytes / MB for size in sizes])
    cache = np.array([cache_mb(size.workload) for size in sizes])
    scores = np.array([scores_mb(size.workload) for size in sizes])
    measured = np.log([size.value for size in sizes])
    each = row_weights([(size.point.device, size.point.source) for size in sizes])
    deviations = np.array(
        [MEMORY_DEVIATIONS["slope"], MEMORY_DEVIATIONS["fixed"]] * len(keys)
        + [MEMORY_DEVIATIONS["work"]]
    )

    def errors(at: Array) -> Array:
        slope = MEMORY_PRIOR["slope"] * np.exp(at[wide] + at[own])
        rest = fixed * np.exp(at[np.add(wide, 1)] + at[np.add(own, 1)])
        rest = rest + MEMORY_PRIOR["work"] * np.exp(at[work]) * scores
        found = np.log(weights * (1 + slope) + cache + rest)
        return np.asarray(each * (found - measured) / MEMORY_NOISE)

    at = solve(numeric(errors), deviations)
    found: dict[str, Memory] = {}
    for key in keys:
        kind = key.split("/")[0]
        shift = at[place[kind] : place[kind] + 2].copy()
        if key != kind:
            shift += at[place[key] : place[key] + 2]
        found[key] = Memory(
            slope=float(MEMORY_PRIOR["slope"] * np.exp(shift[0])),
            fixed=float(MEMORY_PRIOR[f"fixed_{kind}"] * np.exp(shift[1])),
            work=float(MEMORY_PRIOR["work"] * np.exp(at[work])) if kind == "encoder" else 0,
        )
    return found


def _memory_key(size: Size) -> str:
    return f"{size.workload.kind}/{size.point.runtime}/{size.point.unit}"


def memory_of(found: dict[str, Memory], kind: str, runtime: str, unit: str) -> Memory | None:
    return found.get(f"{kind}/{runtime}/{unit}") or found.get(kind)


def fit_load(sizes: Sequence[Size]) -> dict[str, Load]:
    """By unit: too few rows to tell the runtimes apart."""
    found: dict[str, Load] = {}
    for unit in sorted({size.point.unit for size in sizes}):
        rows = [size for size in sizes if size.point.unit == unit]
        files = np.array([size.workload.weight_bytes / MB for size in rows])
        measured = np.log([size.value for size in rows])
        each = row_weights([(size.point.device, size.point.source) for size in rows])

        def errors(
            at: Array, files: Array = files, measured: Array = measured, each: Array = each
        ) -> Array:
            fixed, rate = LOAD_PRIOR["fixed"] * np.exp(at[0]), LOAD_PRIOR["rate"] * np.exp(at[1])
            return np.asarray(each * (np.log(fixed + files / rate) - measured) / LOAD_NOISE)

        at = solve(numeric(errors), np.array([LOAD_DEVIATIONS["fixed"], LOAD_DEVIATIONS["rate"]]))
        found[unit] = Load(
            fixed=float(LOAD_PRIOR["fixed"] * np.exp(at[0])),
            rate=float(LOAD_PRIOR["rate"] * np.exp(at[1])),
        )
    return found


def fit_watts(sizes: Sequence[Size]) -> dict[str, float]:
    """By `device kind/unit`: the middle of the devices' middles."""
    by: dict[str, dict[str, list[float]]] = {}
    for size in sizes:
        devices = by.setdefault(f"{size.kind}/{size.point.unit}", {})
        devices.setdefault(size.point.device, []).append(size.value)
    return {
        key: median(median(values) for values in devices.values()) for key, devices in by.items()
    }
