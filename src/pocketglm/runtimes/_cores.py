"""How many cores this process may use: its affinity and its container's quota."""

from __future__ import annotations

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: "<microseconds or max> <period>"


def usable_cores(quota: Path = _QUOTA) -> int:
    """At least 1; never more than the process's affinity or the cgroup's CPU quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = count or 1
    try:
        limit, period = quota.read_text().split()
        return max(1, min(count, int(limit) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return count
