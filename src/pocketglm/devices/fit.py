"""Fitting the cost model's times to the published rows: few parameters, in log space.

Every share of a runtime on a unit is `PRIOR * exp(unit's offset + runtime's offset)`; the offsets
are drawn to zero (`WIDE`, `NARROW`), so that a runtime with few rows stays near its unit. Rows of
one device and one source count together as the root of their number, a large error linearly
(Huber). What may be left out, `docs/cost_model.py` leaves out: it fits once more for every chip,
and an interval is as wide as the errors on chips that a fit had not seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocketglm.devices.machine import machine_of
from pocketglm.devices.measurements import Measurements, Model, Point
from pocketglm.devices.profile import DeviceProfile
from pocketglm.devices.roofline import Rates, Terms, Unit, Workload, prompt_terms, token_terms

Array: TypeAlias = NDArray[np.float64]
Places: TypeAlias = NDArray[np.int64]
Quantity = Literal["decode", "prefill", "encoder"]

# Bits of a weight in a file, scales included, where a row does not give the file's size.
GGUF_BITS = {2: 3.35, 3: 3.9, 4: 4.85, 5: 5.7, 6: 6.6, 8: 8.5, 16: 16.0, 32: 32.0}
OTHER_BITS = {2: 2.5, 3: 3.5, 4: 4.5, 5: 5.5, 6: 6.5, 8: 8.2, 16: 16.0, 32: 32.0}
PROMPT, GENERATED = 128, 128  # tokens where a row does not say
SHORT = 32  # prompts shorter than this time the paging-in of the file: not fitted
WHOLE = ("litert",)  # runtimes that read all of a cache of fixed size

SHARES = ("memory", "gemv", "gemm", "gemm_float", "cache", "node_s")
PRIOR: dict[str, dict[str, float]] = {
    "cpu": {"memory": 0.5, "gemv": 0.2, "gemm": 0.1, "gemm_float": 0.3, "cache": 1, "node_s": 5e-6},
    "gpu": {"memory": 0.5, "gemv": 0.1, "gemm": 0.1, "gemm_float": 0.1, "cache": 1, "node_s": 1e-5},
    "npu": {"memory": 0.5, "gemv": 0.1, "gemm": 0.1, "gemm_float": 0.1, "cache": 1, "node_s": 5e-6},
}
# Deviations, in logs, of a unit's and of a runtime's offset.
WIDE = {"memory": 0.25, "gemv": 1.0, "gemm": 1.0, "gemm_float": 1.0, "cache": 0.7, "node_s": 1.0}
NARROW = {"memory": 0.2, "gemv": 0.4, "gemm": 0.4, "gemm_float": 0.4, "cache": 0.4, "node_s": 0.4}
NOISE, HUBER = 0.25, 1.5  # a row's usual error in logs; errors beyond so many of it count linearly
STEPS, STILL = 200, 1e-10


@dataclass(frozen=True)
class Row:
    """One published time as the fit sees it. seconds: of a token, or of one pass."""

    point: Point
    quantity: Quantity
    chip: str
    workload: Workload
    terms: Terms
    seconds: float

    @property
    def share(self) -> str:
        """Which share its operations get."""
        if self.quantity == "decode":
            return "gemv"
        return "gemm" if self.workload.integer else "gemm_float"


def chip(profile: DeviceProfile) -> str:
    """What devices share that are left out together: the maker's part number, or the chip."""
    part = re.search(r"SM\d{4}", profile.soc.value)
    return part.group(0) if part else profile.soc.value


def file_bytes(point: Point, model: Model) -> float:
    """Size of the file; by its bits where the row does not give it."""
    if point.file_mb is not None:
        return point.file_mb * 1e6
    bits = (GGUF_BITS if point.runtime == "gguf" else OTHER_BITS)[point.bits]
    return model.parameters * bits / 8


def workload_of(point: Point, model: Model) -> Workload:
    """A row's workload."""
    whole = file_bytes(point, model)
    table = model.embedding * (whole / model.parameters)
    if point.embedding_mb is not None:
        table = point.embedding_mb * 1e6
    return Workload(
        kind=model.kind,
        parameters=model.parameters,
        table_parameters=model.embedding,
        layers=model.layers,
        hidden_size=model.hidden_size,
        weight_bytes=whole,
        read_bytes=whole - table,
        kv_bytes_per_token=model.kv_bytes_per_token,
        bits=point.bits,
        activations=point.activations or "float",
        prompt=point.prompt or PROMPT,
        generated=0 if model.kind == "encoder" else point.generated or GENERATED,
        context=point.context or 0,
        nodes=point.nodes,
        prompt_parameters=model.prompt_parameters,
    )


def _times(point: Point, kind: str, prompt: int) -> list[tuple[Quantity, float]]:
    """Published times of a row, in seconds: of a token, of the prompt, of a text."""
    found: list[tuple[Quantity, float]] = []
    token = 1 / point.decode_per_second if point.decode_per_second is not None else 0.0
    if token:
        found.append(("decode", token))
    if prompt < SHORT:
        return found
    if point.prefill_per_second is not None:
        found.append(("prefill", prompt / point.prefill_per_second))
    elif point.first_token_ms is not None and point.prompt is not None:
        found.append(("prefill", point.first_token_ms / 1e3 - token))
    if point.latency_ms is not None and point.prompt is not None and kind == "encoder":
        found.append(("encoder", point.latency_ms / 1e3))
    return [(quantity, seconds) for quantity, seconds in found if seconds > 0]


def rows_of(published: Measurements, profiles: dict[str, DeviceProfile]) -> list[Row]:
    """What of the published rows can be fitted."""
    rows: list[Row] = []
    for point in published.points:
        profile, model = profiles[point.device], published.models[point.model]
        machine, _ = machine_of(profile, point.unit, point.threads)
        if machine is None:
            continue
        workload = workload_of(point, model)
        prompt = prompt_terms(workload, machine)
        token = token_terms(workload, machine, point.runtime in WHOLE)
        rows += [
            Row(
                point=point,
                quantity=quantity,
                chip=chip(profile),
                workload=workload,
                terms=token if quantity == "decode" else prompt,
                seconds=seconds,
            )
            for quantity, seconds in _times(point, model.kind, workload.prompt)
        ]
    return rows


class Layout:
    """Where the offsets of every share stand in the vector that is fitted."""

    def __init__(self, pairs: Sequence[tuple[str, Unit]]) -> None:
        self.pairs = sorted(set(pairs))
        self.units: list[Unit] = sorted({unit for _, unit in self.pairs})
        self._keys: list[tuple[str, Unit, str]] = [
            ("", unit, share) for unit in self.units for share in SHARES
        ] + [(*pair, share) for pair in self.pairs for share in SHARES]
        self._place: dict[tuple[str, str, str], int] = {
            key: place for place, key in enumerate(self._keys)
        }
        self.deviations = np.array(
            [(NARROW if runtime else WIDE)[share] for runtime, _, share in self._keys]
        )

    def place(self, runtime: str, unit: str, share: str) -> int:
        """Of a runtime's offset; of the unit's own with an empty name, or one without rows."""
        return self._place.get((runtime, unit, share), self._place["", unit, share])

    def rates(self, offsets: Array, unit: Unit, runtime: str = "") -> Rates:
        """Of a runtime on a unit; without a runtime: the unit's own."""
        found: dict[str, Any] = {"whole": runtime in WHOLE}
        for share in SHARES:
            offset = offsets[self.place("", unit, share)]
            if (runtime, unit) in self.pairs:
                offset += offsets[self.place(runtime, unit, share)]
            found[share] = float(PRIOR[unit][share] * np.exp(offset))
        return Rates(**found)


class Times:
    """Predicted log seconds of rows as a function of the offsets, and their slopes. A runtime that
    the layout has no rows of gets its unit's shares.
    """

    def __init__(self, rows: Sequence[Row], layout: Layout) -> None:
        terms = np.array([row.terms for row in rows], dtype=np.float64).T
        self._weights, self._cache, self._operations, self._calls = terms
        self._cache = self._cache * [row.quantity == "decode" for row in rows]
        self._size = len(layout.deviations)
        self._columns = {
            "work": self._column(rows, [row.share for row in rows], layout),
            **{
                share: self._column(rows, [share] * len(rows), layout)
                for share in ("memory", "cache", "node_s")
            },
        }

    @staticmethod
    def _column(
        rows: Sequence[Row], shares: Sequence[str], layout: Layout
    ) -> tuple[Array, Places, Places, Array]:
        """Log of the prior, places of both offsets, and whether the runtime has its own."""
        keys = [
            (row.point.runtime, row.point.unit, share)
            for row, share in zip(rows, shares, strict=True)
        ]
        wide = np.array([layout.place("", unit, share) for _, unit, share in keys])
        own = np.array([layout.place(*key) for key in keys])
        prior = np.log([PRIOR[unit][share] for _, unit, share in keys])
        return prior, wide, own, (own != wide).astype(np.float64)

    def __call__(self, offsets: Array) -> tuple[Array, Array]:
        """Log seconds, and their slopes by offset."""
        value = {
            name: np.exp(prior + offsets[wide] + has * offsets[own])
            for name, (prior, wide, own, has) in self._columns.items()
        }
        cache = value["cache"] * self._cache / value["memory"]
        moved = self._weights / value["memory"] + cache
        work = self._operations / value["work"]
        nodes = self._calls * value["node_s"]
        seconds = moved + work + nodes
        slopes = np.zeros((len(seconds), self._size))
        each = np.arange(len(seconds))
        for name, part in (
            ("memory", -moved),
            ("cache", cache),
            ("work", -work),
            ("node_s", nodes),
        ):
            _, wide, own, has = self._columns[name]
            slopes[each, wide] += part / seconds
            slopes[each, own] += has * part / seconds
        return np.log(seconds), slopes


Errors: TypeAlias = Callable[[Array], tuple[Array, Array]]


def numeric(errors: Callable[[Array], Array]) -> Errors:
    """Errors with their slopes by differences; for functions of a few offsets."""

    def both(at: Array) -> tuple[Array, Array]:
        found = errors(at)
        moved = at + 1e-6 * np.eye(len(at))
        return found, np.stack([(errors(one) - found) / 1e-6 for one in moved], axis=1)

    return both


def solve(errors: Errors, deviations: Array) -> Array:
    """Offsets that make the errors (in units of their usual size) least, Huber's way, with a normal
    prior of `deviations` about zero: Gauss-Newton with damping.
    """

    def loss(at: Array, found: Array) -> float:
        size = np.abs(found)
        robust = np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2))
        return float(robust.sum() + ((at / deviations) ** 2).sum() / 2)

    offsets, damping = np.zeros(len(deviations)), 1e-2
    found, slopes = errors(offsets)
    now = loss(offsets, found)
    for _ in range(STEPS):
        robust = np.minimum(1.0, HUBER / np.maximum(np.abs(found), 1e-12))
        hessian = slopes.T @ (robust[:, None] * slopes) + np.diag(deviations**-2)
        gradient = slopes.T @ (robust * found) + offsets / deviations**2
        step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
        after_found, after_slopes = errors(offsets - step)
        after = loss(offsets - step, after_found)
        if after >= now:
            damping *= 4
            if damping > 1e8:
                break
            continue
        offsets, damping = offsets - step, damping / 3
        found, slopes = after_found, after_slopes
        if now - after < STILL * now:
            break
        now = after
    return offsets


def row_weights(keys: Sequence[tuple[str, ...]]) -> Array:
    """Weights of errors, so that rows of one key count together as the root of their number."""
    counts = Counter(keys)
    return np.array([counts[key] ** -0.25 for key in keys])


def fit(rows: Sequence[Row]) -> tuple[Layout, Array]:
    """Layout and offsets that fit the rows."""
    layout = Layout([(row.point.runtime, row.point.unit) for row in rows])
    times = Times(rows, layout)
    measured = np.log([row.seconds for row in rows])
    weights = row_weights([(row.point.device, row.point.source, row.quantity) for row in rows])
    weights = weights / NOISE

    def errors(offsets: Array) -> tuple[Array, Array]:
        found, slopes = times(offsets)
        return weights * (found - measured), weights[:, None] * slopes

    return layout, solve(errors, layout.deviations)


def predicted_seconds(rows: Sequence[Row], layout: Layout, offsets: Array) -> Array:
    """Of the rows, by fitted offsets; nan for a unit that the fit had no rows of."""
    known = [row for row in rows if row.point.unit in layout.units]
    seconds = np.full(len(rows), np.nan)
    if known:
        found = np.exp(Times(known, layout)(offsets)[0])
        seconds[[row.point.unit in layout.units for row in rows]] = found
    return seconds
