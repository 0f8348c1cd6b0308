"""The device profiles: memory, bandwidth, instructions and accelerators, each with its source."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pocketglm.artifacts.schemas import DeviceResult, DevicesResult
from pocketglm.cli._common import Json, emit
from pocketglm.devices.here import measure
from pocketglm.devices.profile import DeviceProfile, Figure, all_profiles, find_profile
from pocketglm.errors import UsageError

_HEADER = ["device", "tier", "SoC", "RAM", "app", "GB/s", "ISA", "accelerators"]
_TIERS = ("flagship", "high", "mid", "low", "edge", "board")
_UNITS = {
    "memory_gb": ("RAM", "GB"),
    "app_memory_mb": ("memory of one app", "MB"),
    "app_memory_entitled_mb": ("with the entitlement", "MB"),
    "bandwidth_gbs": ("bandwidth, peak", "GB/s"),
    "bandwidth_measured_gbs": ("bandwidth, reached", "GB/s"),
}


def main(
    name: Annotated[
        str | None, typer.Argument(help="A device, a SoC, or the path of a profile's file.")
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="This machine, read and measured.")] = False,
    json: Json = False,
) -> None:
    """List the devices whose profiles PocketGLM has; with NAME, all that is known of one."""
    if here and name is not None:
        raise UsageError("a name and --here do not go together")
    machine = measure() if here else None
    if machine is not None:
        found = {"here": machine.profile}
    else:
        found = all_profiles() if name is None else dict([find_profile(name)])
    result = DevicesResult(
        devices=[_result(own, profile) for own, profile in found.items()],
        rates=machine and machine.rates.model_dump(),
    )

    def words() -> None:
        if machine is not None:
            _describe("here", machine.profile)
            print("\nmeasured")
            _print([[key.replace("_", " "), _plain(value)] for key, value in machine.rates])
        elif name is None:
            _print([_HEADER, *(_row(*item) for item in sorted(found.items(), key=_order))])
        else:
            _describe(*next(iter(found.items())))

    emit(result, json, words)


def _result(name: str, profile: DeviceProfile) -> DeviceResult:
    return DeviceResult.model_validate({"name": name, **profile.model_dump()})


def _order(item: tuple[str, DeviceProfile]) -> tuple[int, str]:
    return _TIERS.index(item[1].tier), item[0]


def _row(name: str, profile: DeviceProfile) -> list[str]:
    return [
        name,
        profile.tier,
        profile.soc.value.partition(" (")[0],
        _number(profile.memory_gb, " GB"),
        _number(profile.app_memory_mb, " GB", 1000),
        _number(profile.bandwidth_gbs, ""),
        " ".join(n for n, figure in profile.isa if figure and figure.value) or "-",
        ", ".join(one.name for one in profile.accelerators) or "-",
    ]


def _number(figure: Figure[Any] | None, unit: str, scale: float = 1) -> str:
    return "?" if figure is None else f"{round(figure.value / scale, 1):g}{unit}"


def _print(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def _describe(name: str, profile: DeviceProfile) -> None:
    """Every figure with its kind and the key of its source; then the sources."""
    print(
        f"{profile.title} ({', '.join([name, *profile.aliases])}): {profile.tier}, {profile.os}\n"
    )
    _print([[what, text, figure.kind, figure.source] for what, text, figure in _figures(profile)])
    unknown = [what for what, value in _unknown(profile) if value is None]
    if unknown:
        print(f"\nunknown: {', '.join(unknown)}")
    print("\nsources")
    for key, source in profile.sources.items():
        print(f"  {key} ({source.date}): {source.title}\n    {source.address}")


def _figures(profile: DeviceProfile) -> list[tuple[str, str, Figure[Any]]]:
    """What, its value in words, and the figure."""
    found: list[tuple[str, str, Figure[Any] | None]] = [
        ("SoC", profile.soc.value, profile.soc),
        *((k.replace("_", " "), "", getattr(profile, k)) for k in ("year", "os_version")),
    ]
    if profile.cores:
        clusters = [f"{c.count} x {c.name} {c.ghz:g} GHz" for c in profile.cores.value]
        found += [("cores" if i == 0 else "", c, profile.cores) for i, c in enumerate(clusters)]
    found += [
        (what, f"{getattr(profile, key).value:g} {unit}" if getattr(profile, key) else "", figure)
        for key, (what, unit) in _UNITS.items()
        for figure in (getattr(profile, key),)
    ]
    found += [(key, "", figure) for key, figure in profile.isa]
    for one in profile.accelerators:
        found.append((f"{one.name}: TOPS", "", one.tops))
        found.append((f"{one.name}: runtimes", "", one.runtimes))
    found += [(key.replace("_", " "), "", figure) for key, figure in profile.levels]
    return [(what, text or _plain(figure.value), figure) for what, text, figure in found if figure]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else f"{value}"


def _unknown(profile: DeviceProfile) -> list[tuple[str, Any]]:
    """What a device of this system has, and may be null."""
    wanted = {"android": ("android_api", "nnapi", "litert"), "ios": ("coreml", "litert")}
    isa = ("dotprod", "i8mm", "sme2") if not profile.isa.vnni else ("vnni",)
    return [
        *((key, getattr(profile, key)) for key in ("cores", "memory_gb", "app_memory_mb")),
        ("bandwidth_gbs", profile.bandwidth_gbs),
        *((key, getattr(profile.isa, key)) for key in isa),
        *((key, getattr(profile.levels, key)) for key in wanted.get(profile.os, ("litert",))),
        *((f"TOPS of {one.name}", one.tops) for one in profile.accelerators),
        *((f"runtimes of {one.name}", one.runtimes) for one in profile.accelerators),
    ]


SPEC = main
