"""How wrong the cost model is on chips it has not seen, and how wide its intervals must be.

For every chip (devices with the same one stand together, which is stricter than one device at a
time) the constants are fitted without its rows and predict them. An interval is a factor both ways:
the one that holds `HELD` of those errors, every chip counting the same. Whether such intervals hold
what they promise is measured with the factor taken from the other chips only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from pocketglm.devices.fit import Row, fit, predicted_seconds
from pocketglm.devices.fit_sizes import (
    Size,
    counted_mb,
    fit_load,
    fit_memory,
    load_seconds,
    memory_mb,
    memory_of,
)

HELD = 0.8
ENOUGH_ROWS, ENOUGH_CHIPS = 15, 5  # of a quantity on one unit, for an interval of its own


class Chipped(Protocol):
    @property
    def chip(self) -> str: ...


R = TypeVar("R", bound=Chipped)


@dataclass(frozen=True)
class Error:
    """A published figure and what a fit without its chip makes of it. quantity: as in the table.
    Figures of speeds in tokens a second, of times in ms, of memory in MB. beyond: the part of the
    prediction that is not counted but guessed, of which an error is a share (memory: what is not
    weights and cache); 0: all of it, and errors are factors.
    """

    row: Row | Size
    quantity: str
    unit: str
    chip: str
    predicted: float
    measured: float
    beyond: float = 0.0

    @property
    def miss(self) -> float:
        """How far off: a log of a factor, or a share of `beyond`."""
        if self.beyond:
            return abs(self.predicted - self.measured) / self.beyond
        return abs(float(np.log(self.predicted / self.measured)))

    def width(self, miss: float) -> float:
        """What makes an interval of such a miss: the factor, or the share."""
        return miss if self.beyond else float(np.exp(miss))

    @property
    def relative(self) -> float:
        return abs(self.predicted / self.measured - 1)


def _without(
    rows: Sequence[R], part: Callable[[R], Hashable], predict: Callable[[list[R], list[R]], Any]
) -> list[tuple[R, float]]:
    """Every row with what a fit says that has seen none of its part."""
    found: dict[int, float] = {}
    for left_out in sorted({part(row) for row in rows}, key=str):
        kept = [row for row in rows if part(row) != left_out]
        places = [place for place, row in enumerate(rows) if part(row) == left_out]
        values = predict(kept, [rows[place] for place in places])
        found.update(zip(places, map(float, values), strict=True))
    return [(row, found[place]) for place, row in enumerate(rows)]


def _seconds(kept: list[Row], left: list[Row]) -> Any:
    return predicted_seconds(left, *fit(kept))


def time_errors(rows: Sequence[Row], part: Callable[[Row], Hashable]) -> list[Error]:
    """Of times, each by a fit without its part (`lambda row: row.chip`, or the runtime)."""
    errors = []
    for row, seconds in _without(list(rows), part, _seconds):
        if not np.isfinite(seconds):
            continue
        amount = {"decode": 1.0, "prefill": float(row.workload.prompt)}.get(row.quantity)
        predicted, measured = (
            (seconds * 1e3, row.seconds * 1e3)
            if amount is None
            else (amount / seconds, amount / row.seconds)
        )
        errors.append(Error(row, row.quantity, row.point.unit, row.chip, predicted, measured))
    return errors


def memory_errors(sizes: Sequence[Size]) -> list[Error]:
    def predict(kept: list[Size], left: list[Size]) -> list[float]:
        fitted = fit_memory(kept)
        values = []
        for size in left:
            own = memory_of(fitted, size.workload.kind, size.point.runtime, size.point.unit)
            values.append(np.nan if own is None else memory_mb(size.workload, own))
        return values

    return [
        Error(
            size,
            "memory",
            size.point.unit,
            size.chip,
            value,
            size.value,
            beyond=value - counted_mb(size.workload),
        )
        for size, value in _without(list(sizes), lambda size: size.chip, predict)
        if np.isfinite(value)
    ]


def load_errors(sizes: Sequence[Size]) -> list[Error]:
    def predict(kept: list[Size], left: list[Size]) -> list[float]:
        fitted = fit_load(kept)
        return [
            load_seconds(size.workload, fitted[size.point.unit])
            if size.point.unit in fitted
            else np.nan
            for size in left
        ]

    return [
        Error(size, "load", size.point.unit, size.chip, value, size.value)
        for size, value in _without(list(sizes), lambda size: size.chip, predict)
        if np.isfinite(value)
    ]


def factor(errors: Sequence[Error], part: Callable[[Error], Hashable] = lambda e: e.chip) -> float:
    """The factor (or share of what is guessed) that holds `HELD` of the errors, every part (chip)
    counting the same; the largest error where the parts are too few to leave one out.
    """
    parts = [part(error) for error in errors]
    order = sorted(range(len(errors)), key=lambda place: errors[place].miss)
    share = 0.0
    wanted = HELD * (1 + 1 / len(set(parts)))
    for place in order:
        share += 1 / (parts.count(parts[place]) * len(set(parts)))
        if share >= wanted - 1e-9:
            break
    return errors[place].width(errors[place].miss)


def groups(errors: Sequence[Error]) -> dict[str, list[Error]]:
    """Errors by `quantity/unit` where there are enough, else by quantity alone."""
    found: dict[str, list[Error]] = {}
    for error in errors:
        found.setdefault(error.quantity, []).append(error)
        found.setdefault(f"{error.quantity}/{error.unit}", []).append(error)
    return {
        key: own
        for key, own in found.items()
        if "/" not in key
        or (len(own) >= ENOUGH_ROWS and len({error.chip for error in own}) >= ENOUGH_CHIPS)
    }


def spreads(errors: Sequence[Error]) -> dict[str, float]:
    """The interval's factor (memory: share) of every group."""
    return {key: factor(own) for key, own in sorted(groups(errors).items())}


def covered(errors: Sequence[Error]) -> list[bool]:
    """Whether every figure lies in the interval that the other chips' errors give."""
    inside = []
    for error in errors:
        others = [other for other in errors if other.chip != error.chip]
        found = spreads(others)
        wide = found.get(f"{error.quantity}/{error.unit}") or found.get(error.quantity)
        inside.append(wide is not None and error.width(error.miss) <= wide)
    return inside


def watts_factor(sizes: Sequence[Size]) -> dict[str, float]:
    """The largest ratio of two devices of a kind, on the same unit; nothing without two."""
    by: dict[str, dict[str, list[float]]] = {}
    for size in sizes:
        devices = by.setdefault(f"{size.kind}/{size.point.unit}", {})
        devices.setdefault(size.chip, []).append(size.value)
    ratios = [
        max(middles) / min(middles)
        for devices in by.values()
        if len(middles := [float(np.median(values)) for values in devices.values()]) > 1
    ]
    return {"watts": max(ratios)} if ratios else {}


def other_spreads(errors: Sequence[Error]) -> dict[str, float]:
    """Factors for a runtime that has no rows: of errors by fits without the row's runtime."""
    return {
        f"other/{key}": factor(own, lambda error: error.row.point.runtime)
        for key, own in sorted(groups(errors).items())
    }
