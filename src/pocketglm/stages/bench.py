"""`bench`: latency, throughput, load time and peak memory of one model, in a fresh process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pocketglm.artifacts.checkpoint import Checkpoint, model_folder
from pocketglm.artifacts.export import is_export, read_export
from pocketglm.artifacts.schemas import BenchResult
from pocketglm.contracts import Reporter, Silent
from pocketglm.errors import UsageError
from pocketglm.stages import _device
from pocketglm.stages._measure import Worker

_SLICE = 1.0  # seconds of sustained load between two progress reports


def bench(
    path: Path,
    *,
    batch: int = 1,
    tokens: int = 32,
    threads: int | None = None,
    runs: int = 200,
    warmup: int = 10,
    duration: float | None = None,
    reporter: Reporter | None = None,
) -> BenchResult:
    """Measure a checkpoint or an export on random ids [batch, tokens].

    With `duration` (seconds) the load is sustained instead of `runs` calls, and the result also
    tells the p50 of the first and the last third: a device that heats up gets slower.

    Raises:
        UsageError: a number that is not positive, or no such folder.
        InputError: the folder cannot be opened, or takes fewer tokens.
        WorkError: the measuring process died.
    """
    reporter = reporter or Silent()
    asked = {"batch": batch, "tokens": tokens, "runs": runs, "duration": duration}
    for name, value in asked.items():
        if value is not None and value <= 0:
            raise UsageError(f"--{name} must be positive, got {value}", "give a larger number")
    folder = model_folder(path)
    size = export_bytes(folder) if is_export(folder) else Checkpoint.open(folder).nbytes
    with Worker(folder, batch, tokens, threads) as worker:
        worker.run(warmup)
        if duration is None:
            times = _by_count(worker, runs, reporter)
        else:
            times = _by_time(worker, duration, reporter)
        peak = worker.close()
    values = np.asarray(times)
    third = max(len(values) // 3, 1)
    return BenchResult(
        path=str(path),
        runtime=worker.runtime,
        threads=worker.used_threads,
        batch=batch,
        tokens=tokens,
        runs=len(times),
        p50_ms=float(np.percentile(values, 50)),
        p99_ms=float(np.percentile(values, 99)),
        mean_ms=float(values.mean()),
        per_second=batch * 1e3 / float(values.mean()),
        load_ms=worker.load_ms,
        peak_rss_bytes=peak,
        size_bytes=size,
        device=_device.describe(),
        first_third_p50_ms=float(np.median(values[:third])) if duration else None,
        last_third_p50_ms=float(np.median(values[-third:])) if duration else None,
    )


def export_bytes(folder: Path) -> int:
    """Bytes of all files of an export, `export.json` not counted."""
    return sum(entry.bytes for entry in read_export(folder).files.values())


def _by_count(worker: Worker, runs: int, reporter: Reporter) -> list[float]:
    times: list[float] = []
    while len(times) < runs:
        times += worker.run(min(25, runs - len(times)))
        reporter.progress("bench", len(times), runs, f"p50 {np.median(times):.2f} ms")
    return times


def _by_time(worker: Worker, duration: float, reporter: Reporter) -> list[float]:
    times: list[float] = []
    left, total = duration, max(round(duration), 1)
    while left > 0:
        times += worker.run(1, min(_SLICE, left))
        left -= _SLICE
        done = min(round(duration - max(left, 0)), total)
        reporter.progress("sustained load", done, total, f"p50 {np.median(times):.2f} ms")
    return times
