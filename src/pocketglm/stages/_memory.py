"""`--max-memory`: what a conversion will need, said before the work, and a limit while it runs.

Estimates are upper ones, in bytes that are resident at once: what the process holds already, and
the largest set of buffers that the work holds together. The limit while running is checked between
pieces; it stops the work instead of the machine.
"""

from __future__ import annotations

import ctypes
import math
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from pocketglm.errors import MemoryCeilingError, UsageError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}
# Of glibc's malloc.h; what mallopt can set is at most half of a thread's heap.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _KEPT = -3, -1, 32 << 20
_ARENA_MAX = -8
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def parse_size(text: str | None) -> int | None:
    """Bytes of a size such as 800MB, 1.5 GB, 512MiB or 1000000; None stays None.

    Raises:
        UsageError: it is not a size, zero, or beyond all numbers.
    """
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip().lower())
    value = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0.0
    if not 1 <= value < math.inf:
        raise UsageError(
            f"--max-memory '{text}' is not a size", "for example 800MB, 1.5GB, or a count of bytes"
        )
    return int(value)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, for work that takes buffers of the same sizes again.

    Else each large one is mapped anew, and its pages are cleared: a third of the time of quantizing
    when it was measured. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform == "linux" and mallopt is not None:
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(option, _KEPT)
        mallopt(_ARENA_MAX, 1)  # a thread's own arena would give its memory back


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss(pid: int | None = None) -> int:
    """Most bytes that this process has had in memory at once; of another one (`pid`) where Linux
    tells it (VmHWM), elsewhere what it has now.

    `ru_maxrss` would start at the parent's peak on Linux, because exec keeps it.
    """
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if pid is not None:
        return int(psutil.Process(pid).memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The most bytes that this process may have in memory; None: no limit. `verb`: its work."""

    limit: int | None
    verb: str

    def require(self, buffers: int, what: str) -> None:
        """Refuse work that needs `buffers` bytes beside what the process holds now.

        Raises:
            MemoryCeilingError: it would not fit; the message says what it needs.
        """
        if self.limit is None:
            return
        held = resident()
        if held + buffers > self.limit:
            raise MemoryCeilingError(
                f"{self.verb} needs up to {megabytes(held + buffers)} here "
                f"({megabytes(held)} for the program, {megabytes(buffers)} for {what}), "
                f"--max-memory allows {megabytes(self.limit)}",
                f"give it --max-memory {megabytes(held + buffers).replace(' ', '')} or more",
            )

    def room(self) -> int | None:
        """Bytes that are left; None: no limit."""
        return None if self.limit is None else self.limit - resident()

    def check(self) -> None:
        """Stop work that has outgrown its limit.

        Raises:
            MemoryCeilingError: the process holds more.
        """
        if self.limit is not None and (held := resident()) > self.limit:
            raise MemoryCeilingError(
                f"{self.verb} holds {megabytes(held)}, --max-memory allows "
                f"{megabytes(self.limit)}: stopped",
                "give it more; please report it, since it was expected to fit",
            )


def megabytes(count: int) -> str:
    """Megabytes, rounded up."""
    return f"{-(-count // 10**6):,} MB".replace(",", "")
