"""The cost model: published rows, roofline, fit, intervals, this machine."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from oracles import roofline as oracle
from pydantic import ValidationError

from pocketglm.artifacts.schemas import DevicesResult
from pocketglm.cli._main import main
from pocketglm.devices import cost, fit, fit_sizes, here, leave_out
from pocketglm.devices.cost import Workload, constants, predict
from pocketglm.devices.machine import STREAM, machine_of
from pocketglm.devices.measurements import FILE, Measurements, Unlinked, published
from pocketglm.devices.profile import Cores, DeviceProfile, Figure, all_profiles
from pocketglm.devices.roofline import Machine, Rates, prompt_seconds, token_seconds
from pocketglm.errors import UsageError

ROOT = Path(__file__).parents[2]
DECODER = Workload(
    kind="decoder",
    parameters=98e6,
    table_parameters=10e6,
    layers=12,
    hidden_size=640,
    weight_bytes=110e6,
    read_bytes=99e6,
    kv_bytes_per_token=7680,
    bits=8,
    activations="int8",
    prompt=64,
    generated=32,
)
ENCODER = Workload(
    kind="encoder",
    parameters=22e6,
    table_parameters=11e6,
    layers=6,
    hidden_size=384,
    weight_bytes=88e6,
    read_bytes=44e6,
    bits=32,
    activations="float",
    prompt=48,
)


def figure(value: Any) -> Figure[Any]:
    return Figure(value=value, kind="measured", source="a")


def changed(device: DeviceProfile, **parts: Any) -> DeviceProfile:
    return device.model_copy(update=parts)


@cache
def first_rows() -> dict[str, Any]:
    """`measurements.yaml` with its first three rows."""
    raw: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8").split("  # et-2929")[0])
    return {**raw, "points": raw["points"][:3]}


# --- published rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["device", "model", "source"])
def test_a_row_names_what_is_there(what: str) -> None:
    raw = copy.deepcopy(first_rows())
    raw["points"][1][what] = "never-heard-of"
    with pytest.raises(ValidationError, match=f"no such {what}: never-heard-of"):
        Measurements.model_validate(raw)


def test_the_published_rows_are_many_and_of_many() -> None:
    points = published().points
    assert len(points) >= 50
    assert len({point.device for point in points}) >= 10
    assert {"gguf", "executorch", "litert", "mnn", "onnx", "coreml", "qnn"} <= {
        point.runtime for point in points
    }
    kinds = {published().models[point.model].kind for point in points}
    assert kinds == {"encoder", "decoder"}
    unlinked = [key for key, one in published().sources.items() if isinstance(one, Unlinked)]
    assert unlinked == sorted(
        ["article", "own-decoder", "own-encoder", "own-memory", "own-readme", "own-shape"]
    )


def test_memory_of_a_row_holds_its_file_unless_the_file_is_mapped() -> None:
    short = [
        point
        for point in published().points
        if point.file_mb and point.peak_memory_mb and not point.mapped
        if point.peak_memory_mb < point.file_mb
    ]
    assert short == []


# --- the physics --------------------------------------------------------------------------------


def test_the_roofline_agrees_with_an_oracle() -> None:
    machine = Machine(bandwidth=40e9, integer=900e9, floating=120e9)
    rates = Rates(
        memory=0.6, gemv=0.3, gemm=0.15, gemm_float=0.4, cache=1.5, whole=False, node_s=2e-5
    )
    same = {"bandwidth": 40e9, "memory": 0.6, "node": 2e-5}
    prompt = oracle.one_pass(
        tokens=64, body=88e6, layers=12, width=640, causal=True, read=99e6, nodes=14 * 12,
        peak=900e9, share=0.15, **same,
    )  # fmt: skip
    assert prompt_seconds(DECODER, machine, rates) == pytest.approx(prompt, rel=1e-12)
    text = oracle.one_pass(
        tokens=48, body=11e6, layers=6, width=384, causal=False, read=44e6, nodes=14 * 6,
        peak=120e9, share=0.4, **same,
    )  # fmt: skip
    assert prompt_seconds(ENCODER, machine, rates) == pytest.approx(text, rel=1e-12)

    def token(cached: list[int], cache: float = 1.5) -> float:
        return oracle.one_token(
            body=88e6, read=99e6, kv=7680, cached=cached, nodes=14 * 12, peak=900e9, share=0.3,
            cache=cache, **same,
        )  # fmt: skip

    mean = token([64, 96])  # positions at both ends of the answer
    assert token_seconds(DECODER, machine, rates) == pytest.approx(mean, rel=1e-12)
    whole = rates.model_copy(update={"whole": True})
    longer = DECODER.model_copy(update={"context": 512})
    assert token_seconds(longer, machine, whole) == pytest.approx(token([512]), rel=1e-12)
    assert token_seconds(longer, machine, rates) == pytest.approx(mean, rel=1e-12)
    headless = DECODER.model_copy(update={"prompt_parameters": 70e6, "nodes": 200})
    assert prompt_seconds(headless, machine, rates) == pytest.approx(
        oracle.one_pass(
            tokens=64,
            body=70e6,
            layers=12,
            width=640,
            causal=True,
            read=99e6,
            nodes=200,
            peak=900e9,
            share=0.15,
            **same,
        ),
        rel=1e-12,
    )


def test_the_machine_of_a_hand_made_device_agrees_with_an_oracle() -> None:
    phone = all_profiles()["xiaomi-14"]
    clusters = [
        Cores(name="Cortex-X4", count=1, ghz=3.0),
        Cores(name="Cortex-A720", count=2, ghz=2.5),
        Cores(name="Cortex-A520", count=4, ghz=2.0),
    ]
    device = changed(phone, cores=figure(clusters), bandwidth_gbs=figure(50.0))
    plain = [(4.0, 1, 3.0), (2.0, 2, 2.5), (1.0, 4, 2.0)]
    for threads, used in ((None, 4), (1, 1), (3, 3), (64, 7)):
        machine, why = machine_of(device, "cpu", threads)
        assert machine is not None
        assert why == ""
        assert machine.bandwidth == 50e9
        assert machine.integer == pytest.approx(oracle.peak_of_cores(plain, used, 32))
        assert machine.floating == pytest.approx(oracle.peak_of_cores(plain, used, 4))
    dot = device.isa.model_copy(update={"i8mm": None})
    none = device.isa.model_copy(update={"i8mm": figure(False), "dotprod": figure(False)})
    matrix = device.isa.model_copy(update={"sme2": figure(True)})
    peaks = []
    for isa in (none, dot, device.isa, matrix):
        machine, _ = machine_of(changed(device, isa=isa), "cpu")
        assert machine is not None
        peaks.append(machine.integer)
    assert peaks == sorted(set(peaks))
    assert peaks[1] == pytest.approx(4 * peaks[0])


def test_bandwidth_is_the_least_of_peak_and_stream() -> None:
    pi = all_profiles()["raspberry-pi-4"]
    machine, _ = machine_of(pi, "cpu")
    assert machine is not None
    assert pi.bandwidth_measured_gbs is not None
    assert machine.bandwidth == pytest.approx(pi.bandwidth_measured_gbs.value / STREAM * 1e9)
    machine, why = machine_of(changed(pi, bandwidth_gbs=None, bandwidth_measured_gbs=None), "cpu")
    assert machine is None
    assert "bandwidth of Raspberry Pi 4" in why
    machine, why = machine_of(changed(pi, cores=None), "cpu")
    assert machine is None
    assert "cores" in why
    machine, why = machine_of(pi, "npu")
    assert machine is None
    assert "lists no npu" in why


def test_published_tops_are_taken() -> None:
    laptop = all_profiles()["lunar-lake-288v"]
    machine, _ = machine_of(laptop, "npu")
    assert machine is not None
    assert machine.integer == 48e12
    assert machine.floating == 12e12


@pytest.mark.parametrize(
    "wrong", [{"table_parameters": 98e6}, {"read_bytes": 111e6}, {"bits": 7}, {"prompt": 0}]
)
def test_a_workload_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Workload.model_validate({**DECODER.model_dump(), **wrong})


# --- predictions --------------------------------------------------------------------------------


def cases() -> list[tuple[str, str, str, Workload]]:
    return [
        (name, runtime, unit, workload)
        for name, device in all_profiles().items()
        for unit in ("cpu", *{one.kind for one in device.accelerators})
        for runtime, workload in itertools.product(cost.RUNTIMES, (DECODER, ENCODER))
    ]


def test_every_interval_holds_its_value_and_memory_the_model() -> None:
    seen = 0
    for name, runtime, unit, workload in cases():
        found = predict(workload, all_profiles()[name], runtime, unit)  # type: ignore[arg-type]
        for key in type(found).model_fields:
            one = getattr(found, key)
            if isinstance(one, cost.Interval):
                assert 0 < one.low <= one.value <= one.high, (name, runtime, unit, key)
                seen += 1
        if found.peak_memory_mb is not None:
            cached = workload.kv_bytes_per_token * workload.positions
            assert found.peak_memory_mb.low * 1e6 >= workload.weight_bytes + cached
        if None in (found.latency_ms, found.load_ms, found.energy_j, found.peak_memory_mb):
            assert found.notes
    assert seen > 1000


def test_more_bandwidth_is_never_slower_and_more_bytes_never_faster() -> None:
    def latency(device: DeviceProfile, workload: Workload, runtime: str) -> float:
        found = predict(workload, device, runtime).latency_ms
        assert found is not None
        return found.value

    for name, runtime in itertools.product(("xiaomi-14", "raspberry-pi-5"), cost.RUNTIMES):
        device = all_profiles()[name]
        assert device.bandwidth_gbs is not None
        for workload in (DECODER, ENCODER):
            wider = changed(device, bandwidth_gbs=figure(2 * device.bandwidth_gbs.value))
            assert latency(wider, workload, runtime) < latency(device, workload, runtime)
            heavier = workload.model_copy(
                update={"read_bytes": workload.weight_bytes, "parameters": 120e6}
            )
            assert latency(device, heavier, runtime) > latency(device, workload, runtime)
        far = DECODER.model_copy(update={"context": 4096})
        # their exports read all of a cache of fixed size
        slower = runtime in ("litert", "executorch", "coreml")
        assert (latency(device, far, runtime) > latency(device, DECODER, runtime)) == slower
        few = predict(DECODER, device, runtime, threads=1).prefill_per_second
        all_ = predict(DECODER, device, runtime).prefill_per_second
        assert few is not None
        assert all_ is not None
        assert few.value < all_.value


def test_parts_add_up() -> None:
    found = predict(DECODER, all_profiles()["raspberry-pi-5"], "gguf")
    assert found.first_token_ms is not None
    assert found.tokens_per_second is not None
    assert found.prefill_per_second is not None
    assert found.latency_ms is not None
    assert found.energy_j is not None
    prompt, token = 64e3 / found.prefill_per_second.value, 1e3 / found.tokens_per_second.value
    assert found.first_token_ms.value == pytest.approx(prompt + token)
    assert found.latency_ms.value == pytest.approx(prompt + 32 * token)
    watts = constants().watts["board/cpu"]
    assert found.energy_j.value == pytest.approx(found.latency_ms.value * watts / 1e3)


def test_what_nothing_supports_is_null_and_says_why() -> None:
    phone = all_profiles()["xiaomi-14"]
    found = predict(DECODER, phone, "onnx")
    assert found.load_ms is None
    assert found.energy_j is None
    assert any("no load time" in note for note in found.notes)
    assert any("watts of a phone's cpu" in note for note in found.notes)
    found = predict(DECODER, phone, "coreml")
    assert any("nobody published times of coreml on a cpu" in note for note in found.notes)
    unseen, seen = found.tokens_per_second, predict(DECODER, phone, "gguf").tokens_per_second
    assert unseen is not None
    assert seen is not None
    assert unseen.high / unseen.value > seen.high / seen.value
    nothing = predict(DECODER, changed(phone, bandwidth_gbs=None), "gguf")
    assert nothing.latency_ms is None
    assert any("bandwidth" in note for note in nothing.notes)
    with pytest.raises(UsageError, match="unknown runtime 'tflite'"):
        predict(DECODER, phone, "tflite")


def test_without_constants_all_is_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cost, "FILE", tmp_path / "none.yaml")
    constants.cache_clear()
    try:
        for workload in (DECODER, ENCODER):
            found = predict(workload, all_profiles()["xiaomi-14"], "gguf", "npu")
            values = found.model_dump(exclude={"notes"}).values()
            assert set(values) == {None}
            assert len(found.notes) >= 3
    finally:
        constants.cache_clear()


def test_an_interval_that_says_nothing_is_null() -> None:
    rates = constants().rates
    wide = cost.Constants(rates=rates, spread={"decode": 2.0, "prefill": 99.0, "encoder": 99.0})
    assert wide.factor("decode", "cpu") == 2.0
    assert wide.factor("prefill", "cpu") is None
    assert wide.factor("memory", "cpu") is None


# --- the fit ------------------------------------------------------------------------------------


@cache
def some_rows() -> tuple[fit.Row, ...]:
    """Decode on CPUs through two runtimes: enough to fit, few enough to be fast."""
    return tuple(
        row
        for row in fit.rows_of(published(), all_profiles())
        if row.quantity == "decode"
        and row.point.unit == "cpu"
        and row.point.runtime in ("litert", "gguf")
    )


def test_the_fit_finds_planted_rates() -> None:
    """Rows whose times follow from known shares are predicted as they were made."""
    layout, offsets = fit.fit(some_rows())
    rng = np.random.default_rng(0)
    planted = offsets + rng.normal(0, 0.2, len(offsets)) * (layout.deviations > 0)
    times = fit.predicted_seconds(some_rows(), layout, planted)
    made = [
        dataclasses.replace(row, seconds=float(seconds))
        for row, seconds in zip(some_rows(), times, strict=True)
    ]
    again = fit.predicted_seconds(made, *fit.fit(made))
    assert np.median(np.abs(again / times - 1)) < 0.03
    assert np.max(np.abs(again / times - 1)) < 0.2


def test_the_fit_gives_what_predict_computes() -> None:
    """The constants of a fit, put into the formula, are the fit's own predictions."""
    layout, offsets = fit.fit(some_rows())
    seconds = fit.predicted_seconds(some_rows(), layout, offsets)
    for row, value in zip(some_rows(), seconds, strict=True):
        machine, _ = machine_of(all_profiles()[row.point.device], row.point.unit, row.point.threads)
        assert machine is not None
        rates = layout.rates(offsets, row.point.unit, row.point.runtime)
        assert token_seconds(row.workload, machine, rates) == pytest.approx(value, rel=1e-9)


def test_the_slopes_of_the_fit_are_right() -> None:
    rows = list(fit.rows_of(published(), all_profiles()))[::7]
    layout = fit.Layout([(row.point.runtime, row.point.unit) for row in rows])
    times = fit.Times(rows, layout)
    at = np.random.default_rng(1).normal(0, 0.3, len(layout.deviations))
    _, numeric = fit.numeric(lambda offsets: times(offsets)[0])(at)
    assert np.allclose(times(at)[1], numeric, atol=1e-5)


def test_a_chip_that_is_left_out_has_no_say_in_its_own_prediction() -> None:
    chip = "SM8650"
    wrong = [
        dataclasses.replace(row, seconds=row.seconds * 10) if row.chip == chip else row
        for row in some_rows()
    ]
    true, planted = (
        leave_out.time_errors(rows, lambda row: row.chip) for rows in (some_rows(), wrong)
    )
    own = [(a.predicted, b.predicted) for a, b in zip(true, planted, strict=True) if a.chip == chip]
    others = [
        (a.predicted, b.predicted) for a, b in zip(true, planted, strict=True) if a.chip != chip
    ]
    assert own
    assert all(a == b for a, b in own)
    assert all(a != b for a, b in others)


def test_devices_of_one_chip_are_left_out_together() -> None:
    profiles = all_profiles()
    assert fit.chip(profiles["oneplus-12"]) == fit.chip(profiles["galaxy-s24-ultra"])
    assert fit.chip(profiles["xiaomi-17"]) == fit.chip(profiles["galaxy-s26-ultra"])
    assert fit.chip(profiles["pixel-6"]) != fit.chip(profiles["pixel-8-pro"])


def errors_of(logs: dict[str, list[float]]) -> list[leave_out.Error]:
    row = some_rows()[0]
    return [
        leave_out.Error(row, "decode", "cpu", chip, float(np.exp(log)), 1.0)
        for chip, values in logs.items()
        for log in values
    ]


def test_the_interval_holds_its_share_with_every_chip_counting_the_same() -> None:
    logs = {f"c{place}": [0.1 * place] for place in range(1, 20)}
    few = leave_out.factor(errors_of(logs))
    assert few == pytest.approx(np.exp(1.6))  # 16 of 19: the least that is 0.8 * 20 / 19
    many = leave_out.factor(errors_of({**logs, "c1": [0.1] * 500}))
    assert many == pytest.approx(few)
    assert leave_out.factor(errors_of({"a": [0.5], "b": [-0.7]})) == pytest.approx(np.exp(0.7))


def test_coverage_is_measured_with_the_other_chips_only() -> None:
    logs = {f"c{place}": [0.1] for place in range(9)}
    inside = leave_out.covered(errors_of({**logs, "odd": [2.0]}))
    assert inside == [True] * 9 + [False]


def test_a_quantity_with_few_rows_on_a_unit_has_no_interval_of_its_own() -> None:
    many = errors_of({f"c{place}": [0.1, 0.2, 0.3] for place in range(6)})
    assert set(leave_out.spreads(many)) == {"decode", "decode/cpu"}
    assert set(leave_out.spreads(many[:6])) == {"decode"}


def test_peak_memory_follows_its_formula() -> None:
    memory = fit_sizes.Memory(slope=0.2, fixed=100, work=3)
    assert fit_sizes.memory_mb(DECODER, memory) == pytest.approx(110 * 1.2 + 7680 * 96 / 1e6 + 100)
    assert fit_sizes.memory_mb(ENCODER, memory) == pytest.approx(
        88 * 1.2 + 100 + 3 * 4 * 6 * 48**2 / 1e6
    )


def test_watts_are_the_middle_of_the_devices() -> None:
    sizes = fit_sizes.sizes_of(published(), all_profiles(), lambda point: point.watts)
    watts = fit_sizes.fit_watts(sizes)
    assert watts["board/cpu"] == pytest.approx((6 + 11.75) / 2, abs=0.2)
    assert leave_out.watts_factor(sizes)["watts"] == pytest.approx(11.75 / 6, rel=0.02)


# --- generated files ----------------------------------------------------------------------------


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cost_model", ROOT / "docs" / "cost_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost_model"] = module
    spec.loader.exec_module(module)
    return module


def test_the_constants_are_those_of_the_published_rows() -> None:
    """The rest of the generated files is compared by `make check`."""
    layout, offsets = fit.fit(fit.rows_of(published(), all_profiles()))
    for runtime, unit in layout.pairs:
        fitted = layout.rates(offsets, unit, runtime).model_dump()
        kept = constants().rates[f"{runtime}/{unit}"].model_dump()
        assert kept == pytest.approx(fitted, rel=0.02)
    text = (ROOT / "docs" / "cost-model.md").read_text(encoding="utf-8")
    assert f"{len(published().points)} published rows" in text


@pytest.mark.parametrize(
    ("old", "new", "equal"),
    [
        ("a 0.512 b", "a 0.513 b", True),
        ("a 0.512 b", "a 0.58 b", False),
        ("27 %", "28 %", True),
        ("27 %", "30 %", False),
        ("+0 %", "-0 %", True),
        ("a 1", "b 1", False),
        ("1e-05", "1.01e-05", True),
    ],
)
def test_generated_files_may_differ_in_the_last_digit_only(old: str, new: str, equal: bool) -> None:
    assert generator().same(old, new) is equal


# --- this machine -------------------------------------------------------------------------------

CPUINFO = {
    "x86": "model name\t: Some CPU\ncpu MHz\t\t: 2600.0\nflags\t\t: avx2 avx512f avx512_vnni\n",
    "plain": "model name\t: Old CPU\ncpu MHz\t\t: 2600.0\nflags\t\t: avx2\n",
    "arm": "processor\t: 0\nFeatures\t: asimddp i8mm sme2\n\nModel\t\t: Some Board\n",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("SECONDS", 0.0), ("ROUNDS", 1), ("COPY_MB", 1), ("LEAST_CACHES", 0),
        ("GEMM", 64), ("GEMV", 64),
    ):  # fmt: skip
        monkeypatch.setattr(here, name, value)


def system(tmp_path: Path, cpu: str) -> Path:
    (tmp_path / "cpuinfo").write_text(CPUINFO[cpu])
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n")
    (tmp_path / "memory.max").write_text("4096000000\n")
    (tmp_path / "memory.current").write_text("96000000\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    return tmp_path


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("cpu", "arch", "isa"),
    [
        ("x86", "x86_64", {"vnni": True}),
        ("plain", "x86_64", {"vnni": False}),
        ("arm", "aarch64", {"dotprod": True, "i8mm": True, "sme2": True}),
    ],
)
def test_this_machine_is_read_and_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpu: str, arch: str, isa: dict[str, bool]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: arch)
    folder = system(tmp_path, cpu)
    found = here.measure(folder, folder)
    assert {key: one.value for key, one in found.profile.isa if one is not None} == isa
    assert found.profile.kind == ("board" if cpu == "arm" else "computer")
    assert found.profile.memory_gb is not None
    assert found.profile.memory_gb.value == 4.1  # the container's, not the machine's 8
    assert found.profile.app_memory_mb is not None
    assert found.profile.app_memory_mb.value == 4000
    assert found.rates.cores == 1
    assert min(found.rates.bandwidth_gbs, found.rates.gemv_gflops, found.rates.gemm_gflops) > 0
    assert found.profile.bandwidth_measured_gbs is not None
    machine, why = machine_of(found.profile, "cpu")
    assert machine is not None or "cores" in why


@pytest.mark.usefixtures("quick")
def test_devices_here(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["devices", *arguments])
        assert stop.value.code == code
        return capsys.readouterr().out

    found = DevicesResult.model_validate_json(run("--here", "--json"))
    assert [one.name for one in found.devices] == ["here"]
    assert found.rates is not None
    assert found.rates["bandwidth_gbs"]
    assert "gemm gflops" in run("--here")
    assert "do not go together" in run("pixel-6", "--here", "--json", code=2)
    assert DevicesResult.model_validate_json(run("pixel-6", "--json")).rates is None


@pytest.mark.usefixtures("quick")
def test_a_machine_that_tells_nothing_is_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = here.measure(tmp_path, tmp_path)
    assert found.profile.memory_gb is None
    assert found.rates.gemm_int8_gops is None
    assert found.rates.bandwidth_gbs > 0


def test_the_best_round_counts() -> None:
    work: Callable[[int], None] = lambda _: None  # noqa: E731
    assert here._best(work, 2) < 1


def test_the_interval_of_memory_is_of_what_is_not_counted() -> None:
    row = some_rows()[0]
    errors = [
        leave_out.Error(row, "memory", "cpu", chip, predicted, 1000.0, beyond=200.0)
        for chip, predicted in (("a", 1100.0), ("b", 940.0))
    ]
    assert [error.miss for error in errors] == pytest.approx([0.5, 0.3])
    assert leave_out.factor(errors) == pytest.approx(0.5)
    share = constants().factor("memory", "cpu")
    found = predict(DECODER, all_profiles()["xiaomi-14"], "onnx").peak_memory_mb
    assert share is not None
    assert found is not None
    least = (DECODER.weight_bytes + DECODER.kv_bytes_per_token * DECODER.positions) / 1e6
    assert found.high - found.value == pytest.approx(share * (found.value - least))
    assert found.low == pytest.approx(max(least, 2 * found.value - found.high))
