"""The decision table: for each task and class of devices, what fits on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketglm.artifacts.schemas import AdviceRow, AdviseResult
from pocketglm.devices.profile import all_profiles
from pocketglm.devices.recipes import recipe_book
from pocketglm.stages.advise import advise

_TIERS = {
    "low": "Low-end",
    "mid": "Mid-range",
    "high": "Upper-range",
    "flagship": "Flagship",
    "board": "Board,",
    "edge": "Edge box or laptop,",
}
_SYSTEMS = {"android": "Android", "ios": "iPhone", "linux": "Linux", "macos": "macOS"}
Advice = Mapping[tuple[str, str], AdviseResult]  # (device, task)


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """Devices of one tier and system."""

    title: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """row: the first of the ranking that fits on every device of the class, as predicted for the
    `weakest`, where it takes longest; None: nothing does, because of `reason` on the weakest.
    unknown: devices that nothing can be predicted for.
    """

    task: str
    devices: DeviceClass
    weakest: str
    row: AdviceRow | None
    reason: str
    unknown: tuple[str, ...]


def every_advice() -> dict[tuple[str, str], AdviseResult]:
    """What `advise` says of each device and task, with the tasks' own limits, of what this version
    can make.
    """
    return {
        (device, task): advise(device, task=task, predicted=False)
        for device in all_profiles()
        for task in recipe_book().tasks
    }


def classes() -> list[DeviceClass]:
    """In the order of `_TIERS`."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, profile in all_profiles().items():
        found.setdefault((profile.tier, profile.os), []).append(name)
    order = [(tier, system) for tier in _TIERS for system in _SYSTEMS if (tier, system) in found]
    return [
        DeviceClass(f"{_TIERS[tier]} {_SYSTEMS[system]}", tuple(found[tier, system]))
        for tier, system in order
    ]


def choose(advice: Advice, task: str, devices: DeviceClass) -> Choice:
    """The row of a class in the decision table of a task."""
    known: list[str] = []
    unknown: list[str] = []
    for name in devices.devices:
        (unknown if nobody_knows(advice[name, task]) else known).append(name)
    fitting = {name: _fitting(advice[name, task]) for name in known}
    weakest = min(known or unknown, key=lambda name: (len(fitting.get(name, {})), name))
    for key in fitting.get(weakest, {}):
        if all(key in rows for rows in fitting.values()):
            slowest = max(known, key=lambda name: (_time(fitting[name][key]), name))
            return Choice(task, devices, slowest, fitting[slowest][key], "", tuple(unknown))
    result = advice[weakest, task]
    if not known:
        return Choice(task, devices, weakest, None, "nothing is known of them", tuple(unknown))
    reason = result.hints[0] if result.hints else "no model fits on all of them"
    return Choice(task, devices, weakest, None, reason, tuple(unknown))


def nobody_knows(result: AdviseResult) -> bool:
    """Whether nothing fits because of what is not known of the device."""
    made = [row for row in result.rows if row.available]
    return not result.fits and any(row.fits == "unknown" for row in made)


def _fitting(result: AdviseResult) -> dict[tuple[str, str, str, str], AdviceRow]:
    """What fits and can be made, ranked."""
    return {
        (row.model, row.recipe, row.runtime, row.unit): row
        for row in result.rows
        if row.available and row.fits in ("yes", "probably")
    }


def _time(row: AdviceRow) -> float:
    return row.latency_ms.value if row.latency_ms else 0.0
