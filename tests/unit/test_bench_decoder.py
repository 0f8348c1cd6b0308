"""`bench` with decoders: prompt and new tokens apart, at a stated context, in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chat_decoder import save_chat_decoder
from tiny_encoder import save_tiny

from pocketglm.artifacts.schemas import BenchResult
from pocketglm.cli._main import main
from pocketglm.contracts import Ids, RunOptions
from pocketglm.errors import InputError, UsageError
from pocketglm.runtimes import open_decoder
from pocketglm.stages._measure import Load, Worker, timed_text
from pocketglm.stages.bench import bench
from pocketglm.stages.export import export


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save_chat_decoder(folder / "ckpt", "qwen3")
    assert export(folder / "ckpt", ["onnx"], folder / "out").targets[0].ok
    return folder


@pytest.mark.parametrize(
    ("path", "runtime"), [("ckpt", None), ("out/onnx", None), ("out/onnx", "genai")]
)
def test_prompt_and_new_tokens_are_measured_apart(
    path: str, runtime: str | None, world: Path
) -> None:
    result = bench(
        world / path, tokens=24, new_tokens=16, runs=3, warmup=1, threads=1, runtime=runtime
    )
    expected = runtime or ("torch" if path == "ckpt" else "onnx")
    assert (result.kind, result.runtime, result.threads) == ("decoder", expected, 1)
    assert (result.tokens, result.new_tokens, result.runs, result.batch) == (24, 16, 3, 1)
    assert 0 < result.p50_ms <= result.p99_ms
    assert result.per_second == pytest.approx(1e3 / result.mean_ms)
    assert result.prefill_ms
    assert result.prefill_per_second == pytest.approx(24e3 / result.prefill_ms)
    assert result.load_ms > 0
    assert result.peak_rss_bytes > 10_000_000
    files = [f for f in (world / path).rglob("*") if f.is_file() and f.name != "export.json"]
    assert result.size_bytes == sum(f.stat().st_size for f in files)


def test_an_encoder_has_none_of_it(tmp_path: Path) -> None:
    result = bench(save_tiny(tmp_path / "m"), tokens=4, runs=2, warmup=1, threads=1)
    assert (result.kind, result.new_tokens, result.prefill_ms) == ("encoder", None, None)
    with pytest.raises(UsageError, match=r"--new-tokens: .* is an encoder"):
        bench(tmp_path / "m", new_tokens=4)


def test_each_text_is_of_the_stated_length(world: Path) -> None:
    session = open_decoder(world / "ckpt", RunOptions(threads=1))
    lengths: list[tuple[int, int]] = []
    inner = session.prefill

    def seen(ids: list[int]) -> object:
        lengths.append((session.length, len(ids)))
        return inner(ids)

    session.prefill = seen  # type: ignore[method-assign, assignment]
    ids: Ids = np.arange(10, dtype=np.int64)
    prompts, steps = timed_text(session, ids, 6, 2, 0.0)
    assert (len(prompts), len(steps)) == (2, 8)
    assert lengths == [(0, 6), (6, 1), (7, 1), (8, 1), (9, 1)] * 2
    assert min(*prompts, *steps) > 0


def test_sustained_load(world: Path) -> None:
    result = bench(world / "out/onnx", tokens=8, new_tokens=8, warmup=1, threads=1, duration=1.2)
    assert result.runs > 3
    assert result.first_third_p50_ms
    assert result.last_third_p50_ms


def test_a_worker_without_steps_times_prompts(world: Path) -> None:
    with Worker(world / "out/onnx", 1, 8, 1) as worker:
        assert len(worker.run(3)) == 3
        assert worker.texts(2)[1] == []
        assert worker.close() > 0


def test_more_than_the_context(world: Path) -> None:
    with pytest.raises(InputError, match="context of 64 tokens, asked for 128 and 64") as error:
        bench(world / "out/onnx")
    assert "--tokens 32 --new-tokens 16" in error.value.hint


@pytest.mark.parametrize("wrong", [{"new_tokens": 0}, {"tokens": -1}, {"batch": 2}])
def test_bad_numbers(world: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        bench(world / "ckpt", **wrong)  # type: ignore[arg-type]


def test_the_processs_arguments_come_back() -> None:
    for load in (
        Load(Path("m")),
        Load(Path("m"), 2, 9),
        Load(Path("m"), 1, 9, 3, 4),
        Load(Path("m"), 1, 9, None, 4, "genai"),
    ):
        assert Load.read(load.arguments) == load
    assert Load.read(["m", "2", "9"]) == Load(Path("m"), 2, 9)


def test_the_command(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", str(world / "out/onnx"), "--tokens", "8", "--new-tokens", "8",
               "--runs", "2", "--threads", "1"]  # fmt: skip
    for more in ([], ["--json", "--runtime", "genai"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert stop.value.code == 0
    table, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
    result = BenchResult.model_validate_json(line)
    assert (result.runtime, result.new_tokens) == ("genai", 8)
    assert json.loads(line)["kind"] == "decoder"
    for words in ("prompt tokens per second", "new token p99", "8 to 16 tokens", "peak memory"):
        assert words in table
