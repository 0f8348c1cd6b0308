"""`bench` and the measuring process, on a tiny real checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_encoder import save_tiny

from pocketglm.artifacts.manifest import Manifest
from pocketglm.contracts import ExportOptions, Silent
from pocketglm.errors import InputError, UsageError, WorkError
from pocketglm.model.encoder import init_encoder, with_classifier
from pocketglm.model.hf import save_encoder
from pocketglm.model.spec import EncoderSpec
from pocketglm.stages import _device
from pocketglm.stages._measure import Worker, sample
from pocketglm.stages._memory import peak_rss
from pocketglm.stages.bench import bench
from pocketglm.stages.export import export


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    spec = EncoderSpec(50, 16, 2, 4, 24, max_position_embeddings=32)
    model = with_classifier(init_encoder(spec, 1), 3, "mean", seed=2)
    save_encoder(model, folder, source=None, labels=["a", "b", "c"], manifest=Manifest())
    return folder


class Told(Silent):
    def __init__(self) -> None:
        self.last = (0, 0)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total
        self.last = (done, total)


def test_bench_measures_a_checkpoint(tiny: Path) -> None:
    told = Told()
    result = bench(tiny, batch=2, tokens=8, threads=1, runs=40, warmup=2, reporter=told)
    assert (result.runtime, result.threads, result.runs) == ("torch", 1, 40)
    assert (result.batch, result.tokens) == (2, 8)
    assert 0 < result.p50_ms <= result.p99_ms
    assert result.per_second == pytest.approx(2000 / result.mean_ms)
    assert result.load_ms > 0
    assert result.size_bytes == sum(f.stat().st_size for f in tiny.rglob("*") if f.is_file())
    assert result.first_third_p50_ms is None
    assert {"cpu", "cores", "memory", "system"} <= result.device.keys()
    assert all(result.device.values())
    assert told.last == (40, 40)


def test_bench_tells_the_threads_that_the_session_has(tmp_path: Path) -> None:
    folder, options = save_tiny(tmp_path / "ckpt", max_length=16), ExportOptions(threads=3)
    assert export(folder, ["onnx"], tmp_path / "out", options=options).targets[0].ok
    path = tmp_path / "out" / "onnx"
    assert bench(path, tokens=4, runs=2, warmup=1).threads == 3  # as export.json says
    assert bench(path, tokens=4, runs=2, warmup=1, threads=2).threads == 2


def test_sustained_load_tells_first_and_last_third(tiny: Path) -> None:
    told = Told()
    result = bench(tiny, tokens=4, threads=1, warmup=1, duration=1.2, reporter=told)
    assert result.runs > 3
    assert result.first_third_p50_ms
    assert result.last_third_p50_ms
    assert told.last == (1, 1)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"tokens": 0}, {"runs": 0}, {"duration": 0.0}])
def test_numbers_must_be_positive(tiny: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
        bench(tiny, **wrong)  # type: ignore[arg-type]


def test_an_error_of_the_process_arrives_with_its_hint(tiny: Path) -> None:
    with pytest.raises(InputError, match="at most 32 tokens, asked for 33") as caught:
        bench(tiny, tokens=33)
    assert caught.value.exit_code == 2
    assert "--tokens 32" in caught.value.hint


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        bench(tmp_path / "nothing")


def test_a_killed_process_is_a_work_error(tiny: Path) -> None:
    with Worker(tiny, 1, 4, 1) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkError, match="ended with code -9"):
            worker.run(3)


def test_a_crash_tells_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "export.json").mkdir()  # unreadable in a way that nobody foresaw
    with pytest.raises((InputError, WorkError)), Worker(tmp_path):
        pass


def test_the_peak_is_that_of_the_process_and_not_of_its_parent() -> None:
    ballast = np.ones(50_000_000)  # 400 MB here, none of it there
    code = "from pocketglm.stages._memory import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10_000_000 < int(done.stdout) < ballast.nbytes < peak_rss()


def test_the_process_speaks_only_json(tiny: Path) -> None:
    command = [sys.executable, "-m", "pocketglm.stages._measure", str(tiny), "1", "4", "1"]
    done = subprocess.run(command, input='{"runs": 2}\n', capture_output=True, text=True)
    ready, times, end = (json.loads(line) for line in done.stdout.splitlines())
    assert (ready["runtime"], ready["threads"]) == ("torch", 1)
    assert set(ready) == {"runtime", "threads", "load_ms"}
    assert len(times["ms"]) == 2
    assert end["peak_rss"] > 0
    assert done.returncode == 0


def test_the_measuring_process_can_run_without_torch() -> None:
    code = "import sys, pocketglm.stages._measure; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sample_stays_in_the_vocabulary(tiny: Path) -> None:
    ids, mask = sample(tiny, 3, 200)
    assert ids.shape == mask.shape == (3, 200)
    assert ids.min() >= 0
    assert ids.max() == 49
    assert mask.all()


def test_device_in_one_line() -> None:
    line = _device.short({"cpu": "C", "system": "S"}, 1)
    assert line == "C, 1 thread, S"
    assert "2 threads" in _device.short({"cpu": "C", "system": "S"}, 2)
    assert _device.describe("numpy")["numpy"] == np.__version__
