"""Are a file's integers the checkpoint's? Read back by the contract tests' own format readers.

Names and fusions differ from file to file (a target may write query, key and value as one matrix,
or order rows as its runtime wants them), so weights are looked for row by row: integers, scales and
zero points of a row of the checkpoint must be a row of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "contract")]

import test_targets as readers  # noqa: E402  (found by the line above)

Array = npt.NDArray[Any]


def equal(checkpoint: Path, file: Path, target: str) -> tuple[int, int]:
    """How many of the checkpoint's quantized weights the file holds, of how many."""
    wanted = readers.stored_in_checkpoint(checkpoint)
    found = {row for triple in readers.READERS[target](file).values() for row in _rows(*triple)}
    held = sum(all(row in found for row in _rows(*triple)) for triple in wanted.values())
    return held, len(wanted)


def _rows(q: Array, scales: Array, zeros: Array | None) -> Iterator[bytes]:
    """One digest a row. A format may repeat a scale for each of its own blocks."""
    columns = q.shape[1]
    wide = np.repeat(scales.astype(np.float32), columns // scales.shape[1], axis=1)
    offsets = (
        np.zeros_like(q) if zeros is None else np.repeat(zeros, columns // zeros.shape[1], axis=1)
    )
    for row, scale, offset in zip(q.astype(np.int8), wide, offsets.astype(np.int8), strict=True):
        yield blake2b(row.tobytes() + scale.tobytes() + offset.tobytes(), digest_size=16).digest()
