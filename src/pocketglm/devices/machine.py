"""From a device's profile to what one of its units could do at best."""

from __future__ import annotations

import re

from pocketglm.devices.profile import Cores, DeviceProfile
from pocketglm.devices.roofline import Machine, Unit

# 128-bit vector pipes of a core, by its name; x86 cores are counted in the same 128-bit pipes.
PIPES = (
    (r"oryon|cortex-x|\bc1-(ultra|premium)|firestorm|avalanche|everest|performance|p-core", 4.0),
    (r"c1-pro|cortex-a7\d\d|lion|zen|golden|raptor|skymont|redwood", 4.0),
    (r"cortex-a7[2-9]|kryo|neoverse|icestorm|blizzard|sawtooth|efficiency|e-core", 2.0),
    (r"cortex-a5|cortex-a5\d\d|c1-nano|silver", 1.0),
)
SMALL = r"cortex-a5|c1-nano|icestorm|blizzard|sawtooth|efficiency|silver"
# Multiply-adds of 8-bit integers that one pipe does in a cycle, by the instructions it has.
PLAIN, DOT, MATRIX = 4.0, 16.0, 32.0
FLOAT = 4.0


def pipes(core: Cores) -> float:
    """Vector pipes of one core; 2 where its name says nothing."""
    name = core.name.lower()
    return next((count for pattern, count in PIPES if re.search(pattern, name)), 2.0)


def machine_of(
    device: DeviceProfile, unit: Unit, threads: int | None = None
) -> tuple[Machine | None, str]:
    """The machine, or null and why there is none."""
    if device.bandwidth_gbs is None:
        return None, f"the memory bandwidth of {device.title} is unknown"
    bandwidth = device.bandwidth_gbs.value * 1e9
    if unit != "cpu":
        return _accelerator(device, unit, bandwidth)
    if device.cores is None:
        return None, f"the cores of {device.title} are unknown"
    isa = device.isa
    matrix = isa.i8mm is not None and isa.i8mm.value
    dot = any(one is not None and one.value for one in (isa.dotprod, isa.vnni))
    each = MATRIX if matrix else DOT if dot else PLAIN
    used = cycles(device.cores.value, threads)
    return Machine(bandwidth=bandwidth, integer=2 * each * used, floating=2 * FLOAT * used), ""


def cycles(cores: list[Cores], threads: int | None = None) -> float:
    """Vector-pipe cycles a second of the cores that `threads` threads sit on, fastest first; null:
    every core but the small ones (all, where all are small).
    """
    big = [core for core in cores if not re.search(SMALL, core.name.lower())] or cores
    left = threads or sum(core.count for core in big)
    total = 0.0
    for core in sorted(cores, key=lambda one: -one.ghz * pipes(one)):
        taken = min(left, core.count)
        total += taken * core.ghz * 1e9 * pipes(core)
        left -= taken
    return total


def _accelerator(device: DeviceProfile, unit: Unit, bandwidth: float) -> tuple[Machine | None, str]:
    """TOPS where they are known; a GPU's or NPU's usual operations per byte where not."""
    found = [one for one in device.accelerators if one.kind == unit]
    if not found:
        return None, f"{device.title} lists no {unit}"
    tops = [one.tops.value for one in found if one.tops is not None]
    if not tops:
        return None, f"nobody says how fast the {unit} of {device.title} is"
    return Machine(bandwidth=bandwidth, integer=tops[0] * 1e12, floating=tops[0] * 1e12 / 4), ""
