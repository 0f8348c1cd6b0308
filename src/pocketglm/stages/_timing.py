"""Two models against each other on one machine: interleaved latencies, memory, load times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import Reporter
from pocketglm.stages._measure import Worker

Values = npt.NDArray[np.float64]
PROCESSES = 6  # fresh processes per model for memory and load time; the fewest for an interval
_CALLS = 5  # in each of them; the first already allocates what all need
_ROUND_MS = 250.0


@dataclass(frozen=True, slots=True)
class Timings:
    """One model's measurements: `rounds` are lists of latencies in ms, one per pair; memory in
    bytes and load times in ms, one per fresh process."""

    rounds: Sequence[Sequence[float]]
    peaks: Sequence[int]
    loads: Sequence[float]

    @property
    def samples(self) -> Values:
        """All latencies in ms, in the order measured."""
        return np.concatenate([np.asarray(r, np.float64) for r in self.rounds])

    @property
    def medians(self) -> Values:
        """Median latency of each round in ms."""
        return np.array([np.median(r) for r in self.rounds])


def interleave(
    baseline: Path,
    candidate: Path,
    tokens: int,
    threads: int,
    pairs: int,
    reporter: Reporter,
) -> tuple[Timings, Timings]:
    """Time both models, batch 1, in alternating rounds (A B, B A, A B, ...), so that a drift of
    the machine meets both alike; then load each in turn in fresh processes for memory."""
    paths = (baseline, candidate)
    rounds: tuple[list[list[float]], list[list[float]]] = ([], [])
    peaks: tuple[list[int], list[int]] = ([], [])
    loads: tuple[list[float], list[float]] = ([], [])
    with Worker(baseline, 1, tokens, threads) as a, Worker(candidate, 1, tokens, threads) as b:
        workers = (a, b)
        calls = []
        for worker in workers:
            typical = float(np.median(worker.run(10)[3:]))
            calls.append(int(np.clip(_ROUND_MS / typical, 10, 100)))
        for pair in range(pairs):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                rounds[which].append(workers[which].run(calls[which]))
            a_ms, b_ms = (float(np.median(r[-1])) for r in rounds)
            reporter.progress("speed", pair + 1, pairs, f"{a_ms:.2f} / {b_ms:.2f} ms")
    for done in range(PROCESSES):
        for which in (0, 1) if done % 2 == 0 else (1, 0):
            with Worker(paths[which], 1, tokens, threads) as worker:
                worker.run(_CALLS)
                loads[which].append(worker.load_ms)
                peaks[which].append(worker.close())
        reporter.progress("memory", done + 1, PROCESSES)
    first, second = (Timings(rounds[i], peaks[i], loads[i]) for i in (0, 1))
    return first, second
