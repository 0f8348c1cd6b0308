"""Which delegates a device has, from its profile."""

from __future__ import annotations

from collections.abc import Mapping

from pocketglm.checks._rules import Rules, Scalar, all_rules
from pocketglm.devices.profile import DeviceProfile


def delegates(target: str, profile: DeviceProfile) -> dict[str, tuple[Rules, str]]:
    """Of a target's exports: name -> rules, and what they run on. Of an NPU or GPU that no runtime
    is known to reach there is none.
    """
    found = {}
    for name, rules in all_rules().items():
        if rules.target == target and (unit := _unit(rules, profile)):
            found[name] = rules, unit
    return found


def _unit(rules: Rules, profile: DeviceProfile) -> str:
    """The part of the device that these rules are for; '' if it has none."""
    where, soc = rules.where, profile.soc.value
    api = profile.levels.android_api
    if profile.os not in where.os or not (not where.soc or soc.startswith(tuple(where.soc))):
        return ""
    if where.api is not None and (api is None or not where.api.holds(api.value)):
        return ""
    if not where.accelerator:
        return f"CPU of the {soc}" if rules.runs_on == "cpu" else soc
    for kind in where.accelerator:  # the first is the one that it is meant for
        for accelerator in profile.accelerators:
            reached = accelerator.runtimes.value if accelerator.runtimes else []
            if accelerator.kind == kind and (
                not where.runtimes or set(reached) & set(where.runtimes)
            ):
                return accelerator.name
    return ""


def facts(profile: DeviceProfile) -> Mapping[str, Scalar]:
    """What rules may ask of a device: os, api (Android's level), coreml (specification version)."""
    levels = profile.levels
    known = {"api": levels.android_api, "coreml": levels.coreml}
    return {"os": profile.os} | {name: f.value for name, f in known.items() if f is not None}
