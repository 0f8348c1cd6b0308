"""Which rows make up which batch: length buckets, seeded, and one rank's share of a batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_POOL = 50  # batches that are sorted by length together: little padding, still random


def epoch_batches(
    lengths: npt.NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """Row numbers of every batch of one epoch, a function of the arguments alone.

    Rows are shuffled, sorted by length within pools of 50 batches, and the batches shuffled again.
    Every row occurs once; only the last batch of the last pool may be smaller.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    batches: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(order), _POOL * batch_size):
        pool = order[start : start + _POOL * batch_size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def shard(batch: npt.NDArray[np.int64], rank: int, world: int) -> npt.NDArray[np.int64]:
    """The rows of a global batch that process `rank` of `world` computes; may be empty."""
    return batch[rank::world]
