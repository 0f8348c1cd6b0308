"""Device profiles: one YAML file a phone or board, every figure with where it is from.

    devices/profiles/NAME.yaml     NAME in kebab case; a file is all that a new device needs

A figure is `{value, kind, source}`, or null where nobody knows. `kind` says whether it was
measured, published by the vendor, or inferred from what the source says; `source` is a key of the
file's `sources`.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import yaml
from pydantic import Field, StringConstraints, ValidationError, model_validator

from pocketglm.contracts import Config
from pocketglm.errors import UsageError

T = TypeVar("T")
Kind = Literal["measured", "vendor", "inferred"]
Date = Annotated[str, StringConstraints(pattern=r"^\d{4}(-\d{2}(-\d{2})?)?$")]
Address = Annotated[str, StringConstraints(pattern=r"^https?://\S+$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Positive = Annotated[float, Field(gt=0)]

PROFILES = Path(__file__).parent / "profiles"


class Source(Config):
    """Where a figure is from. date: of the page, or of the day it was cited."""

    title: str
    address: Address
    date: Date


class Figure(Config, Generic[T]):
    """A value and where it is from. source: a key of the file's `sources`."""

    value: T
    kind: Kind
    source: str


class Cores(Config):
    """A cluster of equal cores. ghz: highest clock."""

    name: str
    count: Annotated[int, Field(ge=1)]
    ghz: Positive


class Isa(Config):
    """Instructions that integer kernels want; null: unknown. dotprod, i8mm, sme2: Arm's; vnni:
    x86's (AVX512-VNNI or AVX-VNNI).
    """

    dotprod: Figure[bool] | None = None
    i8mm: Figure[bool] | None = None
    sme2: Figure[bool] | None = None
    vnni: Figure[bool] | None = None


class Accelerator(Config):
    """A GPU or NPU. tops: INT8 operations, 1e12 a second. runtimes: which reach it, by our names
    and theirs (`litert`, `executorch-qnn`, `coreml`, ...).
    """

    name: str
    kind: Literal["gpu", "npu"]
    tops: Figure[Positive] | None = None
    runtimes: Figure[list[str]] | None = None


class Levels(Config):
    """Versions of what an app may call. android_api, nnapi: API levels of the Android that it was
    sold with (NNAPI is deprecated from 35 on). coreml: specification version of the newest iOS that
    it runs. litert: what of LiteRT runs there.
    """

    android_api: Figure[int] | None = None
    nnapi: Figure[int] | None = None
    coreml: Figure[int] | None = None
    litert: Figure[str] | None = None


class DeviceProfile(Config):
    """A phone, board or computer as it was sold. memory_gb: RAM, in GB as advertised.
    app_memory_mb: what one app may really use before the system ends it, decimal MB;
    app_memory_entitled_mb: with iOS's entitlement for more. bandwidth_gbs: of the RAM, peak, 1e9
    bytes a second; bandwidth_measured_gbs: what a program on the CPU reached.
    """

    title: str
    aliases: list[Name] = []
    kind: Literal["phone", "tablet", "board", "computer"]
    tier: Literal["low", "mid", "high", "flagship", "board", "edge"]
    os: Literal["android", "ios", "linux", "macos"]
    year: Figure[int] | None
    os_version: Figure[str] | None
    soc: Figure[str]
    cores: Figure[list[Cores]] | None
    isa: Isa
    memory_gb: Figure[Positive] | None
    app_memory_mb: Figure[Positive] | None
    app_memory_entitled_mb: Figure[Positive] | None = None
    bandwidth_gbs: Figure[Positive] | None
    bandwidth_measured_gbs: Figure[Positive] | None = None
    accelerators: list[Accelerator] = []
    levels: Levels
    sources: dict[str, Source]

    @model_validator(mode="after")
    def _sourced(self) -> DeviceProfile:
        """Every figure names a source of this file, and no source is idle."""
        named = {figure.source for figure in figures(self)}
        if named - set(self.sources):
            raise ValueError(f"no such source: {', '.join(sorted(named - set(self.sources)))}")
        if set(self.sources) - named:
            raise ValueError(f"sources of nothing: {sorted(set(self.sources) - named)}")
        return self


def figures(part: Any) -> list[Figure[Any]]:
    """All figures in a profile or a part of one."""
    if isinstance(part, Figure):
        return [part]
    if isinstance(part, Config):
        return [found for name in type(part).model_fields for found in figures(getattr(part, name))]
    if isinstance(part, list):
        return [found for one in part for found in figures(one)]
    return []


def load_profile(file: Path) -> DeviceProfile:
    """Read a profile.

    Raises:
        UsageError: it is no YAML, or not a profile; the message names the field.
    """
    try:
        return DeviceProfile.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the device profile {file}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the profile"
        raise UsageError(f"{file}: {where}: {first['msg']}") from None


@cache
def all_profiles() -> dict[str, DeviceProfile]:
    """By name, sorted."""
    return {file.stem: load_profile(file) for file in sorted(PROFILES.glob("*.yaml"))}


def find_profile(name: str) -> tuple[str, DeviceProfile]:
    """Name and profile of a device, by its name, an alias, or the path of a profile's file.

    Raises:
        UsageError: there is none; the hint has names that are near.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name).stem, load_profile(Path(name))
    known = all_profiles()
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower())
    by_alias = {alias: own for own, profile in known.items() for alias in profile.aliases}
    own = by_alias.get(wanted, wanted)
    if own not in known:
        near = difflib.get_close_matches(wanted, [*known, *by_alias], n=3, cutoff=0.5)
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"unknown device '{name}'", f"{guess}`pocketglm devices` lists all")
    return own, known[own]
