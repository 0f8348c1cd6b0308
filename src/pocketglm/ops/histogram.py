"""A histogram of a stream of values in fixed memory, from which activation ranges are chosen.

The bins are 2^k wide and lie at whole multiples of their width. Where new values do not fit, k
grows: pairs of neighbours become one bin, exactly, because x / 2^k is exact. So the finished
histogram is that of all values at once: the order of the values, and how they were cut into
batches, change nothing. Memory is `bins` counts of 8 bytes, whatever the amount of data.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from pocketglm.errors import CheckpointError

BINS = 2048
_CHUNK = 1 << 17  # values that are binned at a time: bounds the temporary memory
_FINEST = -100  # the least k: values that are all 0 have no range

Counts = npt.NDArray[np.int64]


class Histogram:
    """Counts of values by bin: bin i holds x with floor(x / width) = start + i.

    The window covers 0 and all values, and more than half of its bins lie between the least and
    the greatest of them. low, high: the exact least and greatest value, or 0. name: for messages.
    """

    def __init__(self, name: str, bins: int = BINS) -> None:
        self.name, self.bins = name, bins
        self.low = self.high = 0.0
        self.start = 0
        self.counts: Counts = np.zeros(bins, np.int64)
        self._exponent = _FINEST

    @property
    def width(self) -> float:
        """Width of a bin, a power of two."""
        return float(2.0**self._exponent)

    @property
    def total(self) -> int:
        """How many values were added."""
        return int(self.counts.sum())

    def add(self, values: torch.Tensor) -> None:
        """Count values of any shape; floating point.

        Raises:
            CheckpointError: they hold NaN or infinity.
        """
        flat = values.detach().reshape(-1)
        if not len(flat):
            return
        low, high = (float(end) for end in flat.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CheckpointError(
                f"the values of '{self.name}' hold NaN or infinity",
                "the model's weights are damaged or overflow on this data: try an earlier "
                "checkpoint",
            )
        self._cover(low, high)
        for part in torch.split(flat, _CHUNK):
            bins = torch.floor(part.double() / self.width).long() - self.start
            self.counts += torch.bincount(bins, minlength=self.bins).numpy()

    def edges(self) -> npt.NDArray[np.float64]:
        """The ends of the bins, float64 [bins + 1]."""
        return (self.start + np.arange(self.bins + 1, dtype=np.float64)) * np.float64(self.width)

    def folded(self) -> Counts:
        """Counts of |x| by bin, int64 [bins]: bin i holds |x| from i to i + 1 widths."""
        index = self.start + np.arange(self.bins)
        folded = np.zeros(self.bins, np.int64)
        used = self.counts > 0
        np.add.at(folded, np.where(index < 0, -1 - index, index)[used], self.counts[used])
        return folded

    def _cover(self, low: float, high: float) -> None:
        """Widen the bins, and move the window, until it holds 0 and everything up to here."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = max(self._exponent, self._first_guess())
        while self._index(self.high, exponent) - self._index(self.low, exponent) >= self.bins:
            exponent += 1
        start = self._index(self.low, exponent)
        if (exponent, start) == (self._exponent, self.start):
            return
        used = np.flatnonzero(self.counts)
        moved = (used + self.start >> exponent - self._exponent) - start
        counts = np.zeros(self.bins, np.int64)
        np.add.at(counts, moved, self.counts[used])
        self.counts, self.start, self._exponent = counts, start, exponent

    def _first_guess(self) -> int:
        """A k that is a little too small for the range, or just right."""
        span = self.high - self.low
        return math.frexp(span / (self.bins + 1))[1] - 2 if span else _FINEST

    @staticmethod
    def _index(value: float, exponent: int) -> int:
        return math.floor(value / 2.0**exponent)
