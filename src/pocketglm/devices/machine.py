"""From a device's profile to what one of its units could do at best."""

from __future__ import annotations

import re

from pocketglm.devices.profile import Cores, DeviceProfile
from pocketglm.devices.roofline import Machine, Unit

# 128-bit vector pipes of a core, by its name; x86 cores are counted in the same 128-bit pipes.
PIPES = (
    (r"oryon|cortex-x|\bc1-(ultra|premium)|firestorm|avalanche|everest|performance|p-core", 4.0),
    (r"avx-?512|zen 5|lion|sapphire|golden", 8.0),
    (r"avx2|zen|skymont|redwood|raptor", 4.0),
    (r"cortex-a5|c1-nano|silver", 1.0),
)
OTHER_PIPES = 2.0
# Multiply-adds of one pipe in a cycle: of 8-bit integers, by the instructions, and of floats.
PLAIN, DOT, MATRIX = 4.0, 16.0, 32.0
FLOAT = 4.0
# SME2's matrix unit: operations a cycle of the fastest core, one unit a device.
SME_INTEGER, SME_FLOAT = 900.0, 450.0
THREADS = 4  # what mobile runtimes take by themselves
# Accelerators whose TOPS nobody published: operations a byte of bandwidth in 2023, and growth.
INTENSITY = {"gpu": 280.0, "npu": 590.0}
GROWTH, YEAR = 1.2, 2023
NARROW = 4.0  # of the integer rate, as it is advertised, to that on 16-bit floats
STREAM = 0.75  # share of the peak bandwidth that a plain stream usually reaches


def pipes(core: Cores) -> float:
    """Vector pipes of one core; 2 where its name says nothing."""
    name = core.name.lower()
    return next((count for pattern, count in PIPES if re.search(pattern, name)), OTHER_PIPES)


def bandwidth(device: DeviceProfile) -> float | None:
    """Bytes a second: the peak, or what a measured stream makes of it if that is less."""
    peak = device.bandwidth_gbs and device.bandwidth_gbs.value
    stream = device.bandwidth_measured_gbs and device.bandwidth_measured_gbs.value / STREAM
    known = [rate for rate in (peak, stream) if rate]
    return min(known) * 1e9 if known else None


def machine_of(
    device: DeviceProfile, unit: Unit, threads: int | None = None
) -> tuple[Machine | None, str]:
    """The machine, or null and why there is none."""
    rate = bandwidth(device)
    if rate is None:
        return None, f"the memory bandwidth of {device.title} is unknown"
    if unit != "cpu":
        return _accelerator(device, unit, rate)
    if device.cores is None:
        return None, f"the cores of {device.title} are unknown"
    isa = device.isa
    matrix = isa.i8mm is not None and isa.i8mm.value
    dot = any(one is not None and one.value for one in (isa.dotprod, isa.vnni))
    each = MATRIX if matrix else DOT if dot else PLAIN
    cores = device.cores.value
    used = cycles(cores, threads or THREADS)
    matrices = max(core.ghz for core in cores) * 1e9 if isa.sme2 and isa.sme2.value else 0.0
    return Machine(
        bandwidth=rate,
        integer=2 * each * used + SME_INTEGER * matrices,
        floating=2 * FLOAT * used + SME_FLOAT * matrices,
    ), ""


def cycles(cores: list[Cores], threads: int) -> float:
    """Vector-pipe cycles a second of the cores that `threads` threads sit on, fastest first."""
    left, total = threads, 0.0
    for core in sorted(cores, key=lambda one: -one.ghz * pipes(one)):
        taken = min(left, core.count)
        total += taken * core.ghz * 1e9 * pipes(core)
        left -= taken
    return total


def _accelerator(device: DeviceProfile, unit: Unit, rate: float) -> tuple[Machine | None, str]:
    """TOPS where they are published; a GPU's or NPU's usual operations per byte where not."""
    found = [one for one in device.accelerators if one.kind == unit]
    if not found:
        return None, f"{device.title} lists no {unit}"
    tops = [one.tops.value for one in found if one.tops is not None]
    year = device.year.value if device.year is not None else YEAR
    integer = tops[0] * 1e12 if tops else rate * INTENSITY[unit] * GROWTH ** (year - YEAR)
    return Machine(bandwidth=rate, integer=integer, floating=integer / NARROW), ""
