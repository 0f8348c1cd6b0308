"""The baseline that a trained command model has to beat: the nearest training command.

Each text takes the intent of the training text that is most like it by the cosine of TF-IDF weights
(logarithmic term frequency, smoothed inverse document frequency; Manning, Raghavan and Schuetze
2008, "Introduction to Information Retrieval", chapter 6) over its words, pairs of words and 3 or 4
characters. Each slot of the neighbour gets the longest of the slot's training values that stands in
the text; if none does, what stands between the words that surround the neighbour's value.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pocketglm.data.frames import FrameRow, Span, occurrences
from pocketglm.errors import DataError
from pocketglm.text.frame import Frame, clean

# A word, a Chinese character, or another sign.
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+|[^\w\s]")
_CHARACTERS = (3, 4)

Weights = dict[str, float]


def nearest_frames(train: Sequence[FrameRow], texts: Sequence[str]) -> list[Frame]:
    """The frame of each text, by its nearest training command.

    Raises:
        DataError: there are no training commands.
    """
    if not train:
        raise DataError("no training command to be near to", "give at least one row")
    index = _Index([row.text for row in train])
    values: dict[tuple[str, str], set[str]] = {}
    for row in train:
        for name, value in row.frame.slots:
            values.setdefault((row.frame.intent, name), set()).add(value)
    longest_first = {key: sorted(v, key=lambda x: (-len(x), x)) for key, v in values.items()}
    frames = []
    for text in map(clean, texts):
        near = train[index.nearest(text)]
        frames.append(Frame(near.frame.intent, _slots(text, near, longest_first)))
    return frames


def _slots(
    text: str, near: FrameRow, values: Mapping[tuple[str, str], Sequence[str]]
) -> tuple[tuple[str, str], ...]:
    """The neighbour's slots with values of `text`, none of which overlap."""
    placed: list[tuple[Span, str]] = []
    unknown: list[tuple[Span, str]] = []

    def place(name: str, spans: Iterable[Span]) -> bool:
        for start, end in spans:
            if all(end <= a or b <= start for (a, b), _ in placed):
                placed.append(((start, end), name))
                return True
        return False

    for span, (name, _) in zip(near.spans, near.frame.slots, strict=True):
        known = (v for v in values[near.frame.intent, name] if v in text)
        if not place(name, (s for value in known for s in occurrences(text, value))):
            unknown.append((span, name))
    for span, name in unknown:
        place(name, _between(text, near.text, span))
    return tuple((name, text[a:b]) for (a, b), name in sorted(placed))


def _between(text: str, near: str, span: Span) -> Iterator[Span]:
    """The piece of `text` between the words that stand round `span` in `near`."""
    before, after = _WORD.findall(near[: span[0]]), _WORD.findall(near[span[1] :])
    starts = [end for _, end in occurrences(text, before[-1])] if before else [0]
    for start in starts:
        stops = [s for s, _ in occurrences(text, after[0]) if s > start] if after else [len(text)]
        for stop in stops[:1]:
            piece = text[start:stop]
            if piece.strip():
                left = start + len(piece) - len(piece.lstrip())
                yield left, left + len(piece.strip())


def _features(text: str) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    yield from (f"w {word}" for word in words)
    yield from (f"w {a} {b}" for a, b in pairwise(["", *words, ""]))
    line = f" {' '.join(words)} "
    for size in _CHARACTERS:
        yield from (f"c {line[i : i + size]}" for i in range(len(line) - size + 1))


class _Index:
    """Unit-length TF-IDF vectors of the training texts, by feature."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_features(text)) for text in texts]
        documents = Counter(feature for count in counts for feature in count)
        self._size = len(texts)
        self._rarity = {f: np.log((1 + self._size) / (1 + n)) + 1 for f, n in documents.items()}
        rows: dict[str, list[int]] = {}
        weights: dict[str, list[float]] = {}
        for number, count in enumerate(counts):
            for feature, weight in self._vector(count).items():
                rows.setdefault(feature, []).append(number)
                weights.setdefault(feature, []).append(weight)
        self._rows = {f: np.array(found, np.int64) for f, found in rows.items()}
        self._weights = {f: np.array(found, np.float64) for f, found in weights.items()}

    def _vector(self, count: Counter[str]) -> Weights:
        weights = {
            feature: float((1 + np.log(times)) * self._rarity[feature])
            for feature, times in count.items()
            if feature in self._rarity
        }
        length = sum(weight * weight for weight in weights.values()) ** 0.5
        return {feature: weight / length for feature, weight in weights.items()}

    def nearest(self, text: str) -> int:
        """The number of the training text that is most like `text`; the first one of equals."""
        likeness: npt.NDArray[np.float64] = np.zeros(self._size)
        for feature, weight in self._vector(Counter(_features(text))).items():
            likeness[self._rows[feature]] += weight * self._weights[feature]
        return int(likeness.argmax())
