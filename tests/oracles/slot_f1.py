"""Slot precision, recall and F1 from BIO tags, by position, as the CoNLL script counts entities."""

from __future__ import annotations

from collections.abc import Sequence


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(name, first, last) of each tagged piece."""
    found = set()
    index = 0
    while index < len(tags):
        if tags[index].startswith("B-"):
            name, last = tags[index][2:], index
            while last + 1 < len(tags) and tags[last + 1] == f"I-{name}":
                last += 1
            found.add((name, index, last))
        index += 1
    return found


def slot_scores(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> tuple[float, float, float]:
    """(precision, recall, F1) over all rows."""
    right = wanted = given = 0
    for true, said in zip(gold, predicted, strict=True):
        a, b = spans(true), spans(said)
        right, wanted, given = right + len(a & b), wanted + len(a), given + len(b)
    precision, recall = right / given, right / wanted
    return precision, recall, 2 * precision * recall / (precision + recall)
