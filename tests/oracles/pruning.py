"""Which weights and channels go, by sorting lists of Python floats; imports nothing of ours.

Han et al. 2015 (magnitude), Mishra et al. 2021 (N:M).
"""

from __future__ import annotations

from collections.abc import Sequence


def smallest(tensors: Sequence[Sequence[float]], count: int) -> list[list[bool]]:
    """The `count` smallest magnitudes of all tensors; of equal ones the first."""
    places = [(abs(v), i, j) for i, row in enumerate(tensors) for j, v in enumerate(row)]
    gone = {(i, j) for _, i, j in sorted(places)[:count]}
    return [[(i, j) in gone for j in range(len(row))] for i, row in enumerate(tensors)]


def n_of_m(row: Sequence[float], n: int, m: int) -> list[bool]:
    """All but the n greatest of every m neighbours; of equal ones the last go."""
    gone: list[bool] = []
    for start in range(0, len(row), m):
        group = row[start : start + m]
        order = sorted(range(m), key=lambda i: (-abs(group[i]), i))
        gone += [i in order[n:] for i in range(m)]
    return gone


def shares(
    scores: Sequence[Sequence[float]], total: int, multiple: int, floor: Sequence[int]
) -> list[int]:
    """One step after the other to the layer whose next `multiple` units have the best mean."""
    counts = list(floor)
    ranked = [sorted(layer, reverse=True) for layer in scores]
    while sum(counts) < total:
        offers = {
            layer: sum(values[counts[layer] : counts[layer] + multiple]) / multiple
            for layer, values in enumerate(ranked)
            if counts[layer] + multiple <= len(values)
        }
        counts[max(offers, key=lambda layer: offers[layer])] += multiple
    return counts
