"""This machine as a device: its figures read from the system or measured, in a few seconds.

    measure() -> Here        profile and rates
    here() -> DeviceProfile  the profile alone, for `cost.predict`

Bandwidth is that of a copy by all allowed cores over arrays that no cache holds; the products are
fp32 through numpy and int8 through ONNX Runtime (null without it). Busy cores lower all of them.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.contracts import Config
from pocketglm.devices.profile import Cores, DeviceProfile, Figure, Isa, Levels, Source
from pocketglm.runtimes._cores import usable_cores

SOURCE = "here"
COPY_MB, LEAST_CACHES = 96, 4  # of one array a core; and not less than so many last-level caches
GEMM, GEMV = 1024, 4096  # edges of the matrices
SECONDS, ROUNDS = 0.4, 6  # of each figure, at least
GB = 1e9
FLAGS = {"dotprod": "asimddp", "i8mm": "i8mm", "sme2": "sme2", "vnni": "avx512_vnni avx_vnni"}


class MeasuredRates(Config):
    """cores: allowed. bandwidth_gbs: bytes read and written. The rest: 1e9 operations a second of
    all cores together, a multiply-add as two; null: not measured.
    """

    cores: int
    bandwidth_gbs: float
    gemv_gflops: float
    gemm_gflops: float
    gemm_int8_gops: float | None
    load_average: float


class Here(Config):
    """profile: as of a published device. rates: what was measured for it."""

    profile: DeviceProfile
    rates: MeasuredRates


def here() -> DeviceProfile:
    """Profile of this machine."""
    return measure().profile


def measure(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Here:
    """Profile of this machine, with what was measured."""
    count = usable_cores(groups / "cpu.max")
    load = os.getloadavg()[0]
    cpu = _read(proc / "cpuinfo")
    flags = set(re.findall(r"\S+", " ".join(re.findall(r"(?:flags|Features)\s*:(.*)", cpu))))
    rates = MeasuredRates(
        cores=count,
        bandwidth_gbs=_short(_bandwidth(count)),
        gemv_gflops=_short(_gemv(count)),
        gemm_gflops=_short(_gemm(count)),
        gemm_int8_gops=_gemm_int8(count),
        load_average=round(load, 1),
    )
    memory = _memory_gb(proc, groups)
    x86 = platform.machine().lower() in ("x86_64", "amd64")

    def has(key: str) -> Figure[bool] | None:
        wanted = key == "vnni"
        if not flags or wanted != x86:
            return None
        return _figure(bool(flags & set(FLAGS[key].split())))

    name = _first(r"model name\s*:\s*(.+)", cpu) or platform.processor() or platform.machine()
    model = _first(r"Model\s*:\s*(.+)", cpu)  # of a board
    width = " (AVX-512)" if "avx512f" in flags else " (AVX2)" if "avx2" in flags else ""
    ghz = _ghz(cpu)
    profile = DeviceProfile(
        title=f"This machine ({model or name}, {count} cores)",
        kind="board" if model else "computer",
        tier="board" if model else "edge",
        os="macos" if platform.system() == "Darwin" else "linux",
        year=None,
        os_version=_figure(f"{platform.system()} {platform.release()}"),
        soc=_figure(name),
        cores=_figure([Cores(name=name + width, count=count, ghz=ghz)]) if ghz else None,
        isa=Isa(dotprod=has("dotprod"), i8mm=has("i8mm"), sme2=has("sme2"), vnni=has("vnni")),
        memory_gb=_figure(round(memory[0], 1)) if memory else None,
        app_memory_mb=_figure(round(memory[1] * 1e3)) if memory else None,
        bandwidth_gbs=None,
        bandwidth_measured_gbs=_figure(rates.bandwidth_gbs),
        levels=Levels(),
        sources={
            SOURCE: Source(
                title=f"Read from /proc and measured, load average {rates.load_average} before",
                address="https://docs.kernel.org/filesystems/proc.html",
                date=date.today().isoformat(),
            )
        },
    )
    return Here(profile=profile, rates=rates)


def _figure(value: Any) -> Figure[Any]:
    return Figure(value=value, kind="measured", source=SOURCE)


def _short(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1).strip() if found else ""


def _ghz(cpu: str) -> float | None:
    """The highest clock that the system names."""
    limit = _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")).strip()
    if limit.isdecimal():
        return int(limit) / 1e6
    clocks = [float(mhz) for mhz in re.findall(r"cpu MHz\s*:\s*([\d.]+)", cpu)]
    return round(max(clocks) / 1e3, 2) if clocks else None


def _memory_gb(proc: Path, groups: Path) -> tuple[float, float] | None:
    """All memory and what is free of it, in GB; the container's limit where that is less."""
    text = _read(proc / "meminfo")
    total = _first(r"MemTotal:\s*(\d+) kB", text)
    free = _first(r"MemAvailable:\s*(\d+) kB", text)
    if not total or not free:
        return None
    limit = _read(groups / "memory.max").strip()
    most = int(limit) if limit.isdecimal() else float("inf")
    used = _read(groups / "memory.current").strip()
    left = most - (int(used) if used.isdecimal() else 0)
    return min(int(total) * 1024, most) / GB, min(int(free) * 1024, left) / GB


def _cache_bytes() -> int:
    """The largest cache of the first core."""
    sizes = [
        int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 0)
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := _read(file).strip())[:-1].isdecimal()
    ]
    return max(sizes, default=0)


def _best(work: Callable[[int], None], count: int) -> float:
    """Seconds of the fastest round in which every core does `work` (its number as argument)."""
    least = float("inf")
    with ThreadPoolExecutor(count) as pool:
        until, rounds = time.perf_counter() + SECONDS, 0
        while rounds < ROUNDS or time.perf_counter() < until:
            start = time.perf_counter()
            list(pool.map(work, range(count)))
            least, rounds = min(least, time.perf_counter() - start), rounds + 1
    return least


def _bandwidth(count: int) -> float:
    size = max(COPY_MB << 20, LEAST_CACHES * _cache_bytes() // count)
    pairs = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(count)]

    def copy(core: int) -> None:
        np.copyto(pairs[core][1], pairs[core][0])

    return 2 * size * count / _best(copy, count) / GB


def _gemv(count: int) -> float:
    random = np.random.default_rng(0)
    pairs = [
        (random.random((GEMV, GEMV), np.float32), random.random(GEMV, np.float32))
        for _ in range(count)
    ]

    def product(core: int) -> None:
        pairs[core][0] @ pairs[core][1]

    return 2 * GEMV**2 * count / _best(product, count) / GB


def _gemm(count: int) -> float:
    matrix = np.random.default_rng(0).random((GEMM, GEMM), np.float32)

    def product(core: int) -> None:
        matrix @ matrix

    return 2 * GEMM**3 * count / _best(product, count) / GB


def _gemm_int8(count: int) -> float | None:
    """Through ONNX Runtime's MatMulInteger."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    kind = onnx.TensorProto
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
        "product",
        [onnx.helper.make_tensor_value_info("a", kind.UINT8, [GEMM, GEMM])],
        [onnx.helper.make_tensor_value_info("c", kind.INT32, [GEMM, GEMM])],
        [onnx.numpy_helper.from_array(np.ones((GEMM, GEMM), np.int8), "b")],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = {"a": np.ones((GEMM, GEMM), np.uint8)}
    seconds = _best(lambda _: session.run(None, inputs), 1)
    return _short(2 * GEMM**3 / seconds / GB)
