"""Where nothing fits: which limit to change, to what, and for which model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pocketglm.artifacts.schemas import AdviceRow
from pocketglm.stages._advice_limits import OPTIONS, Check, Name, Request, size_words

EDGE = "or let an edge node serve it: the device sends the text and shows the answer"
Found = Sequence[tuple[AdviceRow, Sequence[Check]]]
_LEAST: tuple[Name, ...] = ("memory", "latency")  # limits that are raised; the others are lowered


def hints_of(request: Request, found: Found) -> list[str]:
    """One sentence for each limit whose change alone lets a model fit; then the edge node."""
    hints = []
    for name in OPTIONS:
        row, check = _nearest(found, name)
        if row is None or check is None or check.need is None:
            continue
        hints.append(_hint(request, name, row, check.need))
    if not hints:
        hints.append(_several(request, found))
    return [*hints, EDGE]


def _nearest(found: Found, name: Name) -> tuple[AdviceRow | None, Check | None]:
    """Of the rows that only this limit excludes, the one that misses it least."""
    only = [
        (row, failed[0])
        for row, checks in found
        if len(failed := [check for check in checks if check.ok is not True]) == 1
        and failed[0].name == name
        and failed[0].need is not None
    ]
    if not only:
        return None, None
    sign = 1 if name in _LEAST else -1
    return min(only, key=lambda pair: (not pair[0].available, sign * (pair[1].need or 0.0)))


def _hint(request: Request, name: Name, row: AdviceRow, need: float) -> str:
    with_it = f"{row.title} with {row.runtime} would fit"
    if name == "memory":
        app = request.app_memory_mb
        if app is not None and need > app:
            return (
                f"another device: {row.title} needs {size_words(need)}, an app here gets "
                f"{size_words(app)}"
            )
        return f"give {OPTIONS[name]} {_up(need)}: {with_it}"
    if name == "latency":
        return f"allow {OPTIONS[name]} {_up(need)}: {with_it}"
    value = f"{need:.0f}" if name == "context" else f"{_down(need):g}"
    return f"lower {OPTIONS[name]} to {value}: {with_it}"


def _several(request: Request, found: Found) -> str:
    """No single limit: all that the row needs that misses the fewest; or what nobody knows."""
    failing = [(row, [c for c in checks if c.ok is not True]) for row, checks in found]
    row, failed = min(
        failing,
        key=lambda pair: (
            any(check.need is None for check in pair[1]),
            len(pair[1]),
            not pair[0].available,
            pair[0].parameters,
        ),
    )
    if any(check.need is None for check in failed):
        return (
            f"describe the device yourself (--device FILE.yaml): {row.reason}"
            if row.fits == "unknown"
            else f"choose another model: {row.reason}"
        )
    parts = [_hint(request, check.name, row, check.need or 0.0) for check in failed]
    return f"{'; and '.join(part.split(': ')[0] for part in parts)}: {row.title} would fit"


def _up(value: float) -> str:
    """Rounded up to two significant digits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step - 1e-9) * step:g}"


def _down(value: float) -> float:
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.floor(value / step + 1e-9) * step
