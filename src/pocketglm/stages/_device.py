"""What machine a number was measured on; goes into every benchmark and proof."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import psutil

from pocketglm.artifacts.manifest import tool_versions
from pocketglm.runtimes._cores import usable_cores

# Instruction sets that decide the speed of small models, as /proc/cpuinfo names them.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",  # Arm dot product
    "i8mm",
    "sve",
)


def describe(*packages: str) -> dict[str, str]:
    """CPU, cores, instruction sets, memory, system, and versions: ours, Python's, `packages`'."""
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    total = os.cpu_count() or 1
    memory = psutil.virtual_memory().total / 1e9
    return {
        "cpu": info.get("model name") or _cpu_name(),
        "cores": f"{usable_cores()} of {total} usable",
        "isa": " ".join(flag for flag in _FLAGS if flag in flags) or platform.machine(),
        "memory": f"{memory:.1f} GB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **tool_versions(*packages),
    }


def short(device: dict[str, str], threads: int) -> str:
    """One line for a claim: 'AMD EPYC 9R14, 2 threads, Linux 6.8.0 x86_64'."""
    return f"{device['cpu']}, {threads} thread{'s' if threads != 1 else ''}, {device['system']}"


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty on other systems."""
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return {}
    first = file.read_text(errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs if value.strip()}


def _cpu_name() -> str:
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine() or "unknown CPU"
