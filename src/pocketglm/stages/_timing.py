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
_TEXTS_MS = 500.0  # a round of prompts and new tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """One model's measurements: `rounds` are lists of latencies in ms, one per pair; memory in
    bytes and load times in ms, one per fresh process.

    Of a decoder `rounds` are those of one new token each, and `prompts` those of whole prompts.
    """

    rounds: Sequence[Sequence[float]]
    peaks: Sequence[int]
    loads: Sequence[float]
    prompts: Sequence[Sequence[float]] = ()

    @property
    def samples(self) -> Values:
        """All latencies in ms, in the order measured."""
        return np.concatenate([np.asarray(r, np.float64) for r in self.rounds])

    @property
    def medians(self) -> Values:
        """Median latency of each round in ms."""
        return np.array([np.median(r) for r in self.rounds])

    @property
    def prompt_medians(self) -> Values:
        """Median latency of each round's prompts in ms."""
        return np.array([np.median(r) for r in self.prompts])


def interleave(
    baseline: Path,
    candidate: Path,
    tokens: int,
    threads: int,
    pairs: int,
    reporter: Reporter,
    new_tokens: int = 0,
) -> tuple[Timings, Timings]:
    """Time both models, batch 1, in alternating rounds (A B, B A, A B, ...), so that a drift of
    the machine meets both alike; then load each in turn in fresh processes for memory.

    tokens: of a text, or of a decoder's prompt, after which it writes `new_tokens`.
    """
    paths = (baseline, candidate)
    rounds: tuple[list[list[float]], list[list[float]]] = ([], [])
    prompts: tuple[list[list[float]], list[list[float]]] = ([], [])
    peaks: tuple[list[int], list[int]] = ([], [])
    loads: tuple[list[float], list[float]] = ([], [])
    with (
        Worker(baseline, 1, tokens, threads, new_tokens) as a,
        Worker(candidate, 1, tokens, threads, new_tokens) as b,
    ):
        workers = (a, b)
        calls = [_warm(worker) for worker in workers]
        for pair in range(pairs):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                whole, steps = workers[which].texts(calls[which])
                rounds[which].append(steps or whole)
                if steps:
                    prompts[which].append(whole)
            a_ms, b_ms = (float(np.median(r[-1])) for r in rounds)
            reporter.progress("speed", pair + 1, pairs, f"{a_ms:.2f} / {b_ms:.2f} ms")
    for done in range(PROCESSES):
        for which in (0, 1) if done % 2 == 0 else (1, 0):
            with Worker(paths[which], 1, tokens, threads, new_tokens) as worker:
                worker.texts(1 if new_tokens else _CALLS)
                loads[which].append(worker.load_ms)
                peaks[which].append(worker.close())
        reporter.progress("memory", done + 1, PROCESSES)
    first, second = (Timings(rounds[i], peaks[i], loads[i], prompts[i]) for i in (0, 1))
    return first, second


def _warm(worker: Worker) -> int:
    """Run it a few times; how many calls make a round."""
    if worker.new_tokens:
        worker.texts(1)
        whole, steps = worker.texts(1)
        return int(np.clip(_TEXTS_MS / (sum(whole) + sum(steps)), 1, 20))
    typical = float(np.median(worker.texts(10)[0][3:]))
    return int(np.clip(_ROUND_MS / typical, 10, 100))
