"""One option for each part of a model under a budget: which parts are worth their bytes.

A multiple-choice knapsack. Each part begins with its smallest option and takes the steps along the
lower convex hull of its options (bytes, loss), the greatest saving of loss per byte first, as long
as they fit. If parts of steps could be taken, that would be the least loss there is (Sinha &
Zoltners 1979, "The Multiple-Choice Knapsack Problem"): `bound`. The sum of the losses is above the
least by the saving of one step at most, the first one that did not fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Option:
    """What a part takes and costs in this form."""

    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """chosen: the number of each part's option. bound: no choice within the budget loses less."""

    chosen: tuple[int, ...]
    nbytes: int
    loss: float
    bound: float


@dataclass(frozen=True, slots=True)
class _Step:
    part: int
    option: int
    nbytes: int
    saved: float


def hull(options: Sequence[Option]) -> list[int]:
    """The options of one part that are worth considering, the smallest first: each saves loss, and
    less of it per byte than the one before.
    """
    order = sorted(range(len(options)), key=lambda n: (options[n].nbytes, options[n].loss))
    kept: list[int] = []
    for number in order:
        if kept and options[number].loss >= options[kept[-1]].loss:
            continue
        while len(kept) > 1 and _rate(options, kept[-2], kept[-1]) <= _rate(
            options, kept[-2], number
        ):
            kept.pop()
        kept.append(number)
    return kept


def _rate(options: Sequence[Option], small: int, large: int) -> float:
    """Loss saved per byte."""
    a, b = options[small], options[large]
    return (a.loss - b.loss) / (b.nbytes - a.nbytes)


def allocate_options(parts: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """The options, by number, of all parts together within `budget` bytes.

    Raises:
        ValueError: the smallest options together take more.
    """
    hulls = [hull(options) for options in parts]
    chosen = [kept[0] for kept in hulls]
    nbytes = sum(options[n].nbytes for options, n in zip(parts, chosen, strict=True))
    loss = sum(options[n].loss for options, n in zip(parts, chosen, strict=True))
    if nbytes > budget:
        raise ValueError(f"the smallest options take {nbytes} bytes of {budget}")
    bound, whole = loss, True
    for step in _steps(parts, hulls):
        fits = nbytes + step.nbytes <= budget
        if whole:
            bound -= step.saved * (1.0 if fits else (budget - nbytes) / step.nbytes)
        whole = whole and fits
        if fits and _follows(hulls[step.part], chosen[step.part], step.option):
            chosen[step.part] = step.option
            nbytes, loss = nbytes + step.nbytes, loss - step.saved
    return Allocation(tuple(chosen), nbytes, loss, bound)


def _steps(parts: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> list[_Step]:
    """All steps along the hulls, the most loss saved per byte first."""
    steps = []
    for part, (options, kept) in enumerate(zip(parts, hulls, strict=True)):
        for small, large in itertools.pairwise(kept):
            a, b = options[small], options[large]
            steps.append(_Step(part, large, b.nbytes - a.nbytes, a.loss - b.loss))
    return sorted(steps, key=lambda step: -step.saved / step.nbytes)


def _follows(kept: Sequence[int], now: int, option: int) -> bool:
    """Whether the option is the next one on a part's hull."""
    return kept.index(option) == kept.index(now) + 1
