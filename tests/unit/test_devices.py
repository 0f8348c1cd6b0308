"""Device profiles: every file, its sources, slips in its figures, and `pocketglm devices`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocketglm.artifacts.schemas import DevicesResult
from pocketglm.cli._main import main
from pocketglm.devices.profile import (
    PROFILES,
    Cores,
    DeviceProfile,
    Figure,
    all_profiles,
    figures,
    find_profile,
    load_profile,
)
from pocketglm.errors import UsageError

KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
FILES = sorted(PROFILES.glob("*.yaml"))
# By Arm's manuals: cores without the dot product; cores with it, but without i8mm; with both.
PLAIN = ("A53", "A72", "A73")
DOTPROD = ("A55", "A75", "A76", "A78", "A78AE", "X1", "A14", "Firestorm", "Icestorm")
I8MM = ("A510", "A520", "A710", "A715", "A720", "X2", "X3", "X4", "X925", "Oryon")
I8MM_APPLE = ("A15", "A16", "A17", "A18", "A19")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == code
    done = capsys.readouterr()
    return done.out, done.err


def slips(profile: DeviceProfile) -> list[str]:
    """What cannot be right in a profile."""
    found = []

    def check(what: str, value: float | None, low: float, high: float) -> None:
        if value is not None and not low <= value <= high:
            found.append(f"{what}: {value}")

    ram = profile.memory_gb.value if profile.memory_gb else 1e9
    peak = profile.bandwidth_gbs.value if profile.bandwidth_gbs else 600
    for what, one, low, high in (
        ("memory_gb", profile.memory_gb, 1, 512),
        ("app_memory_mb", profile.app_memory_mb, 200, ram * 1000 - 1),
        ("app_memory_entitled_mb", profile.app_memory_entitled_mb, 200, ram * 1000 - 1),
        ("bandwidth_gbs", profile.bandwidth_gbs, 3, 600),
        ("bandwidth_measured_gbs", profile.bandwidth_measured_gbs, 1, peak),
        ("year", profile.year, 2015, 2026),
        ("android_api", profile.levels.android_api, 28, 40),
        ("nnapi", profile.levels.nnapi, 27, 35),
        ("coreml", profile.levels.coreml, 4, 12),
    ):
        check(what, one.value if one else None, low, high)
    clusters = profile.cores.value if profile.cores else []
    check("cores", sum(one.count for one in clusters) if clusters else None, 1, 24)
    for cluster in clusters:
        check(f"clock of {cluster.name}", cluster.ghz, 0.5, 6)
    for unit in profile.accelerators:
        check(f"TOPS of {unit.name}", unit.tops.value if unit.tops else None, 1, 300)
    has = {key: flag.value for key, flag in profile.isa if flag}
    for name in (one.name for one in clusters):
        words = set(re.findall(r"[A-Za-z]+\d*[A-Z]*", name.replace("Cortex-", "")))
        i8mm = bool(words & set(I8MM if "Apple" not in name else I8MM_APPLE))
        dotprod = i8mm or bool(words & set(DOTPROD))
        if not (dotprod or words & set(PLAIN)):
            continue
        if has.get("dotprod", dotprod) is not dotprod or has.get("i8mm", i8mm) is not i8mm:
            found.append(f"ISA of {name}")
    return found


def figure(value: Any) -> Figure[Any]:
    return Figure(value=value, kind="vendor", source="pi4")


def written(folder: Path, **changes: Any) -> Path:
    """A good profile with some keys changed, as a file."""
    data = yaml.safe_load((PROFILES / "raspberry-pi-4.yaml").read_text(encoding="utf-8"))
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump({**data, **changes}), encoding="utf-8")
    return file


def test_names_and_aliases_are_kebab_case_and_unique() -> None:
    known = all_profiles()
    names = [*known, *(alias for one in known.values() for alias in one.aliases)]
    assert len(known) == len(FILES) >= 35
    assert len(set(names)) == len(names)
    assert all(KEBAB.fullmatch(name) for name in names)


def test_every_kind_of_device_is_there() -> None:
    known = all_profiles()
    for system in ("android", "ios"):
        tiers = {one.tier for one in known.values() if one.os == system}
        assert {"mid", "high", "flagship"} <= tiers
    assert {one.tier for one in known.values()} == {
        *("low", "mid", "high", "flagship", "board", "edge")
    }
    assert {"raspberry-pi-4", "raspberry-pi-5", "jetson-orin-nano", "edge-2-core"} <= set(known)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_profile(file: Path) -> None:
    profile = load_profile(file)
    assert not slips(profile)
    assert profile.memory_gb is not None
    assert profile.app_memory_mb is not None
    assert {one.source for one in figures(profile)} == set(profile.sources)
    keys = re.findall(r"^  ([\w-]+):$", file.read_text().partition("sources:")[2], re.MULTILINE)
    assert len(keys) == len(set(keys)) == len(profile.sources)  # YAML keeps the last of two


def test_slips_are_seen() -> None:
    good = find_profile("raspberry-pi-4")[1]
    cores = [Cores(name="Cortex-A72", count=4, ghz=18)]
    dotprod = good.isa.model_copy(update={"dotprod": figure(True)})
    for key, value in (
        ("bandwidth_gbs", figure(12800)),
        ("bandwidth_measured_gbs", figure(13)),
        ("app_memory_mb", figure(4000)),
        ("memory_gb", figure(4096)),
        ("cores", figure(cores)),
        ("isa", dotprod),
    ):
        assert len(slips(good.model_copy(update={key: value}))) == 1, key


def test_alias_name_and_file() -> None:
    assert find_profile("snapdragon-8-gen-3")[0] == "xiaomi-14"
    assert find_profile(" SM8650 ")[0] == "xiaomi-14"
    assert find_profile("Raspberry Pi 5")[0] == "raspberry-pi-5"
    assert find_profile(str(PROFILES / "pixel-6.yaml"))[1] == all_profiles()["pixel-6"]


def test_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "devices", "xiaomi-41", "--json", code=2)
    error = json.loads(out)["error"]
    assert "unknown device 'xiaomi-41'" in error["message"]
    assert "xiaomi-14" in error["hint"]
    assert "xiaomi-14" in err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"year": {"value": 2019, "kind": "vendor"}}, r"year\.source: Field required"),
        ({"year": {"value": 2019, "kind": "vendor", "source": "x"}}, "no such source: x"),
        ({"year": {"value": 2019, "kind": "guessed", "source": "pi4"}}, r"year\.kind"),
        ({"year": None}, r"sources of nothing: \['pi4-launch'\]"),
        ({"aliases": ["BCM_2711"]}, r"aliases\.0"),
        ({"colour": "green"}, "colour: Extra inputs are not permitted"),
        ({"soc": None}, "soc: "),
    ],
)
def test_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as error:
        load_profile(written(tmp_path, **changes))
    assert "mine.yaml" in error.value.message


def test_unreadable(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for text in ("title: [", "just words"):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"mine\.yaml"):
            find_profile(str(file))
    with pytest.raises(UsageError, match=r"none\.yaml"):
        find_profile(str(tmp_path / "none.yaml"))


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    listed = DevicesResult.model_validate_json(run(capsys, "devices", "--json")[0])
    assert [one.name for one in listed.devices] == [file.stem for file in FILES]
    (one,) = DevicesResult.model_validate_json(run(capsys, "devices", "a18", "--json")[0]).devices
    assert (one.name, one.aliases) == ("iphone-16", ["a18"])
    assert one.app_memory_mb is not None
    assert one.app_memory_mb.source in one.sources
    schema = json.loads(run(capsys, "schema", "devices")[0])
    assert schema["required"] == ["devices"]


def test_words(capsys: pytest.CaptureFixture[str]) -> None:
    table = run(capsys, "devices")[0].splitlines()
    assert len(table) == len(FILES) + 1
    row = next(line for line in table if line.startswith("iphone-16-pro "))
    assert "8 GB" in row
    assert "dotprod i8mm sme2" in row
    text = run(capsys, "devices", "nothing-phone-2a")[0]
    assert "2 x Cortex-A715 2.8 GHz" in text
    assert "unknown: bandwidth_gbs" in text
    for source in all_profiles()["nothing-phone-2a"].sources.values():
        assert source.address in text


def test_the_files_are_in_the_package_and_the_verb_loads_no_torch() -> None:
    root = Path(__file__).parents[2]
    assert '"**/*.yaml"' in (root / "pyproject.toml").read_text()
    assert PROFILES.is_relative_to(root / "src" / "pocketglm")
    code = (
        "import sys\nfrom pocketglm.cli._main import main\n"
        "try:\n    main(['devices', 'xiaomi-14'])\n"
        "finally:\n    assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Snapdragon 8 Gen 3" in done.stdout
