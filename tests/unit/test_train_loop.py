"""The training loop: what it computes, resume after a kill, several processes, stopping."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pocketglm.errors import WorkError
from pocketglm.train._batches import epoch_batches, shard
from pocketglm.train._optim import clock, parameter_groups, rate, uses_bf16
from pocketglm.train.loop import CHECKPOINT, Batch, LoopConfig, LoopResult, Rows, train

WORKER = Path(__file__).with_name("train_worker.py")
WORKER_NAMES: dict[str, Any] = runpy.run_path(str(WORKER))
ROWS: int = WORKER_NAMES["ROWS"]
CONFIG: LoopConfig = WORKER_NAMES["CONFIG"]
accuracy: Callable[[nn.Module], float] = WORKER_NAMES["accuracy"]
cross_entropy = WORKER_NAMES["cross_entropy"]
digest: Callable[[nn.Module], str] = WORKER_NAMES["digest"]
problem: Callable[[], tuple[Rows, torch.Tensor]] = WORKER_NAMES["problem"]
launch_two: Callable[..., str] = WORKER_NAMES["launch_two"]
run: Callable[..., tuple[nn.Module, LoopResult]] = WORKER_NAMES["run"]
tiny: Callable[[float], nn.Module] = WORKER_NAMES["Tiny"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only slow down tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Notes:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[int, int, str]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        self.steps.append((done, total, note))


def test_batches_hold_every_row_once_and_rows_of_like_length() -> None:
    lengths = np.random.default_rng(3).integers(1, 100, 403)
    batches = epoch_batches(lengths, 8, seed=0, epoch=0)
    assert len(batches) == 51
    assert sorted(np.concatenate(batches).tolist()) == list(range(403))
    spread = [int(np.ptp(lengths[batch])) for batch in batches]
    assert np.median(spread) < 10  # a random batch of 8 spreads over about 78
    firsts = [int(batch[0]) for batch in batches]
    assert firsts == [int(b[0]) for b in epoch_batches(lengths, 8, seed=0, epoch=0)]
    assert firsts != [int(b[0]) for b in epoch_batches(lengths, 8, seed=0, epoch=1)]
    assert firsts != [int(b[0]) for b in epoch_batches(lengths, 8, seed=1, epoch=0)]
    averages = [float(lengths[batch].mean()) for batch in batches]
    assert abs(np.corrcoef(averages, np.arange(51))[0, 1]) < 0.5  # not from short to long


def test_shards_are_the_batch() -> None:
    batch = np.arange(7)
    parts = [shard(batch, rank, 3) for rank in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(7))
    assert len(shard(batch[:1], 1, 2)) == 0


def test_rate_rises_then_falls_to_zero() -> None:
    assert [rate(p, 0.1) for p in (0.0, 0.05, 0.1)] == [0.0, 0.5, 1.0]
    assert rate(0.55, 0.1) == pytest.approx(0.5)
    assert rate(1.0, 0.1) == pytest.approx(0.0)
    assert rate(1.7, 0.1) == pytest.approx(0.0)  # never rises again
    assert rate(0.0, 0.0) == 1.0


def test_parameter_groups() -> None:
    groups = parameter_groups(tiny(0.0), 0.01, 3.0, 0.5, lambda name: name.startswith("head."))
    found = {
        (g["initial_lr"], g["weight_decay"]): sorted(p.ndim for p in g["params"]) for g in groups
    }
    assert found == {
        (0.01, 0.5): [2],  # embedding
        (0.01, 0.0): [1, 1],  # norm
        (0.03, 0.5): [2],  # head
        (0.03, 0.0): [1],
    }


def test_precision_follows_the_hardware() -> None:
    cpu = torch.device("cpu")
    native = any(torch.cpu.get_capabilities().get(n) for n in ("avx512_bf16", "amx_bf16"))
    assert uses_bf16("auto", cpu) == native
    assert uses_bf16("bf16", cpu)
    assert not uses_bf16("fp32", cpu)
    assert not uses_bf16("auto", torch.device("mps"))


def test_clock() -> None:
    assert [clock(s) for s in (-1, 44.6, 80, 7500)] == ["0s", "45s", "1m20s", "2h05m"]


def test_it_computes_what_plain_torch_computes(tmp_path: Path) -> None:
    """The same steps written out with torch alone, at the same order of rows."""
    model, result = run(tmp_path, dropout=0.0)
    mine = tiny(0.0)
    rows, _ = problem()
    head: list[nn.Parameter] = []
    body: list[nn.Parameter] = []
    for name, parameter in mine.named_parameters():
        (head if name.startswith("head.") else body).append(parameter)
    optimizers = [
        torch.optim.AdamW([p], lr=1.0, weight_decay=0.01 if p.ndim > 1 else 0.0)
        for p in (*body, *head)
    ]
    losses, scores, best, step = [], [], (-1.0, ""), 0
    for epoch in range(3):
        for batch in epoch_batches(rows.lengths, 5, 0, epoch):
            total, weight = cross_entropy(mine, rows.collate(batch))
            mine.zero_grad()
            (total / weight).backward()
            nn.utils.clip_grad_norm_(mine.parameters(), 1.0)
            for optimizer, multiplier in zip(optimizers, [1] * 3 + [3] * 2, strict=True):
                factor = rate((step + 0.5) / 24, 0.1)
                optimizer.param_groups[0]["lr"] = 0.01 * multiplier * factor
                optimizer.step()
            losses.append((total / weight).item())
            step += 1
        scores.append((step, accuracy(mine)))
        if scores[-1][1] > best[0]:
            weights = torch.cat([p.detach().flatten() for p in mine.parameters()]).clone()
            best = (scores[-1][1], str(epoch + 1))
    assert result.losses == pytest.approx(losses, abs=1e-5)
    assert result.scores == scores
    assert (result.best_score, result.best_epoch) == (best[0], int(best[1]))
    final = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(final, weights, atol=1e-5)  # the best weights, not the last
    assert (result.steps, result.epochs, result.precision) == (24, 3.0, "fp32")
    assert not model.training


def test_the_loss_goes_down_in_both_precisions(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        config = CONFIG.model_copy(update={"epochs": 12, "precision": precision})
        work = tmp_path / precision
        result = train(tiny(0.0), problem()[0], cross_entropy, config, work)
        assert np.mean(result.losses[-8:]) < 0.7 * np.mean(result.losses[:8])
        assert result.best_score is None
        assert result.precision == precision


def test_kill_9_then_resume_gives_the_same_weights(tmp_path: Path) -> None:
    whole, uninterrupted = run(tmp_path / "whole")
    work = tmp_path / "killed"
    # Killed in step 12: epoch 2 of 3, not at its start; dropout draws random numbers.
    command = [sys.executable, str(WORKER), str(work), str(tmp_path / "none"), "12"]
    killed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (work / CHECKPOINT).is_file()
    resumed, result = run(work)
    assert result.losses == uninterrupted.losses
    assert result.scores == uninterrupted.scores
    assert digest(resumed) == digest(whole)
    again, _ = run(work)  # a finished run has nothing left to do
    assert digest(again) == digest(whole)


def test_two_processes_follow_the_loss_curve_of_one(tmp_path: Path) -> None:
    _, alone = run(tmp_path / "one", dropout=0.0)
    launch_two(WORKER, tmp_path / "two", tmp_path / "result.json", "0", "0.0")
    both = json.loads((tmp_path / "result.json.0").read_text())
    assert both["processes"] == 2
    assert len(both["losses"]) == 24
    assert both["losses"] == pytest.approx(alone.losses, abs=1e-5)


def test_two_processes_share_one_time_budget(tmp_path: Path) -> None:
    """The second one believes in twice the minutes; only the first one's clock counts."""
    launch_two(WORKER, tmp_path / "two", tmp_path / "result", "0", "0.0", "0.02")
    first, second = (json.loads((tmp_path / f"result.{rank}").read_text()) for rank in (0, 1))
    assert first["processes"] == 2
    assert len(first["rates"]) > 1
    for shared in ("rates", "losses", "scores", "weights"):
        assert first[shared] == second[shared], shared
    assert first["scores"][-1][0] == len(first["rates"])  # the last weights were scored
    assert 0.5 < first["seconds"] < 10  # asked for 1.2


@pytest.mark.parametrize("where", ["evaluate", "loss", "optimizer"])
def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path: Path, where: str) -> None:
    whole, uninterrupted = run(tmp_path / "whole")
    model, calls = tiny(0.1), 0

    def interrupt_on(call: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)

    def loss(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if where == "loss":
            interrupt_on(10)
        return cross_entropy(module, batch)  # type: ignore[no-any-return]

    def evaluate(module: nn.Module) -> float:
        if where == "evaluate":
            interrupt_on(2)
        return accuracy(module)

    hook = register_optimizer_step_pre_hook(
        lambda *_: interrupt_on(10) if where == "optimizer" else None
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            train(
                model,
                problem()[0],
                loss,
                CONFIG,
                tmp_path / "work",
                evaluate=evaluate,
                is_head=lambda name: name.startswith("head."),
            )
    finally:
        hook.remove()
    resumed, result = run(tmp_path / "work")
    assert result.losses == uninterrupted.losses
    assert digest(resumed) == digest(whole)


def test_it_stops_when_validation_no_longer_improves(tmp_path: Path) -> None:
    scores = iter([0.5, 0.7, 0.6, 0.7, 0.9])
    kept: list[str] = []

    def evaluate(model: nn.Module) -> float:
        kept.append(digest(model))
        return next(scores)

    config = CONFIG.model_copy(update={"epochs": 9, "patience": 2})
    model, notes = tiny(0.0), Notes()
    rows = problem()[0]
    result = train(model, rows, cross_entropy, config, tmp_path, evaluate=evaluate, reporter=notes)
    assert (result.steps, result.best_epoch, result.best_score) == (32, 2, 0.7)
    assert digest(model) == kept[1]
    done, total, note = notes.steps[-1]
    assert (done, total) == (32, 72)
    assert note.startswith("loss ")
    assert " · eta " in note
    assert notes.lines[1] == "epoch 2: validation 0.7000 (best 0.7000)"


class Clock:
    """Stands in for `time` in the loop: it moves when told, and by `tick` when read."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now


def test_a_time_budget_ends_the_run_and_the_cosine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 1 s and an evaluation 3 s of a minute; an epoch is 8 steps."""
    clock = Clock()
    monkeypatch.setattr("pocketglm.train.loop.time", clock)
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )

    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        clock.now += 1
        return cross_entropy(model, batch)  # type: ignore[no-any-return]

    def evaluate(model: nn.Module) -> float:
        clock.now += 3
        return accuracy(model)

    config = CONFIG.model_copy(update={"epochs": 100_000, "minutes": 1.0, "patience": 100_000})
    try:
        result = train(tiny(0.0), problem()[0], loss, config, tmp_path, evaluate=evaluate)
    finally:
        hook.remove()
    assert result.seconds == 60
    assert [step for step, _ in result.scores] == [8, 16, 24, 32, 40, 42]
    # A tenth is kept free for the first evaluation, then what the last one took.
    used = [(s + 1 + 3 * (s // 8)) / (54 if s < 8 else 57) for s in range(42)]
    assert rates == pytest.approx([0.01 * rate(share, 0.1) for share in used])
    assert rates[-1] == 0


@pytest.mark.parametrize("tick", [0.7, 1.0, 1.1, 1.3, 1.7])
def test_the_last_weights_are_scored_when_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tick: float
) -> None:
    monkeypatch.setattr("pocketglm.train.loop.time", Clock(tick))
    config = CONFIG.model_copy(update={"epochs": 100_000, "minutes": 1.0, "patience": 100_000})
    result = train(tiny(0.0), problem()[0], cross_entropy, config, tmp_path, evaluate=accuracy)
    assert result.scores[-1][0] == result.steps


def test_part_of_an_epoch(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 0.5})
    result = train(tiny(0.0), problem()[0], cross_entropy, config, tmp_path, evaluate=accuracy)
    assert (result.steps, result.epochs, result.best_epoch) == (4, 0.5, 1)
    assert result.scores[0][0] == 4


def test_a_diverging_loss_is_an_error_without_a_checkpoint(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        total, weight = cross_entropy(model, batch)
        return total * math.inf, weight

    with pytest.raises(WorkError, match="training loss is inf at step 0") as caught:
        train(tiny(0.0), problem()[0], loss, CONFIG, tmp_path)
    assert "lower the learning rate (it was 0.01)" in caught.value.hint
    assert not list(tmp_path.iterdir())
