"""The only training loop: any model, any rows, any loss; one process or many.

Built on accelerate, which places the model and averages gradients (CPU, GPU, many of them). AdamW
(Loshchilov and Hutter 2019, no decay on biases and norms), linear warm-up then cosine to zero, a
learning-rate multiplier for the head, gradient clipping, early stopping, best weights kept.

Three decisions make a run repeatable, and its processes agree:
* The order of rows depends on (seed, epoch) and the random numbers of a step on (seed, step, rank)
  alone. So a resumed run draws what an uninterrupted one would have drawn, and no generator state
  has to be stored. A loss that draws random numbers must draw them from torch.
* A loss is returned as a sum and a weight (rows, or tokens). Both are summed over all processes
  before the division, so uneven shards give the gradient of the whole batch.
* The first process alone reads the clock and scores the model; the others are told. So learning
  rates and the decision to stop are functions of shared values, and the replicas stay equal.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from pocketglm.contracts import Config, Reporter, Silent
from pocketglm.errors import WorkError, require
from pocketglm.train._batches import epoch_batches, shard
from pocketglm.train._optim import (
    Precision,
    accelerator,
    clock,
    interrupt_held,
    parameter_groups,
    rate,
    uses_bf16,
)

CHECKPOINT = "training.pt"
Batch = dict[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]
Evaluate = Callable[[nn.Module], float]


class LoopConfig(Config):
    """How to train. `batch_size` counts the rows of all processes together.

    warmup: share of the steps. clip: largest gradient norm. patience: epochs without a better
    validation score before it stops. minutes: time budget of the whole loop (of several processes
    the first one's counts); the cosine reaches zero when it is used up, however fast the machine
    turns out to be. head_multiplier: for the layers that `is_head` names.
    """

    epochs: float = Field(5, gt=0)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    head_multiplier: float = Field(10.0, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    patience: int = Field(2, ge=1)
    seed: int = Field(0, ge=0)
    precision: Precision = "auto"
    minutes: float | None = Field(None, gt=0)


@dataclass(frozen=True, slots=True)
class Rows:
    """Training rows: their lengths [N] (for the buckets), and a batch from row numbers."""

    lengths: npt.NDArray[np.int64]
    collate: Callable[[npt.NDArray[np.int64]], Batch]


# Rows that differ from epoch to epoch (augmentation): a function of the epoch's number alone, each
# time with the same number of rows.
EpochRows = Callable[[int], Rows]


@dataclass(frozen=True, slots=True)
class LoopResult:
    """`losses`: one per step. `scores`: (step, validation score). `seconds` over all resumes."""

    steps: int
    epochs: float
    best_epoch: int
    best_score: float | None
    losses: list[float]
    scores: list[tuple[int, float]]
    precision: str
    seconds: float


@dataclass
class _State:
    """What a resumed run continues from, besides weights and optimizer."""

    step: int = 0
    evaluated: int = 0  # the step of the last evaluation
    best_step: int = 0
    best: float = -math.inf
    worse: int = 0  # evaluations since the best one
    seconds: float = 0.0
    evaluation_seconds: float | None = None
    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)


def train(
    model: nn.Module,
    rows: Rows | EpochRows,
    loss_fn: Loss,
    config: LoopConfig,
    work: Path,
    *,
    evaluate: Evaluate | None = None,
    is_head: Callable[[str], bool] = lambda name: False,
    checkpoint_seconds: float = 60.0,
    reporter: Reporter | None = None,
) -> LoopResult:
    """Train `model` in place; it ends with the best weights, on the CPU, in eval mode.

    Parameters that need no gradient stay as they are, and are neither copied nor saved.
    loss_fn returns the summed loss of a batch and its weight, both scalars. evaluate returns a
    score, higher is better; it runs after each epoch, in one process. `work/training.pt` is
    written atomically after each epoch, every `checkpoint_seconds`, and on Ctrl-C; where it
    exists, training continues from it. The caller removes it.

    Raises:
        MissingExtraError: accelerate is not installed.
        WorkError: the loss is not a finite number.
    """
    run = _Run(model, rows, loss_fn, config, work, evaluate, is_head, reporter or Silent())
    run.load()
    saved = time.monotonic()
    try:
        while True:
            if run.evaluation_is_due():
                run.evaluate()
                run.save()
                saved = time.monotonic()
            if run.is_finished():
                break
            run.step()
            if time.monotonic() - saved >= checkpoint_seconds:
                run.save()
                saved = time.monotonic()
    except KeyboardInterrupt:
        run.save()
        raise
    return run.finish()


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        model: nn.Module,
        rows: Rows | EpochRows,
        loss_fn: Loss,
        config: LoopConfig,
        work: Path,
        evaluate: Evaluate | None,
        is_head: Callable[[str], bool],
        reporter: Reporter,
    ) -> None:
        self.accelerator = accelerator()
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.bf16 = uses_bf16(config.precision, self.device)
        optimizer = torch.optim.AdamW(
            parameter_groups(
                model, config.learning_rate, config.head_multiplier, config.weight_decay, is_head
            ),
            lr=config.learning_rate,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.plain: nn.Module = self.accelerator.unwrap_model(self.model)
        self.rows_of = rows
        self.rows = rows if isinstance(rows, Rows) else rows(0)
        self.loss_fn, self.config, self.score_of = loss_fn, config, evaluate
        self.file = work / CHECKPOINT
        self.reporter: Reporter = reporter if self.accelerator.is_main_process else Silent()
        self.per_epoch = math.ceil(len(self.rows.lengths) / config.batch_size)
        self.total = math.ceil(self.per_epoch * config.epochs)
        self.budget = None if config.minutes is None else self._shared(config.minutes * 60)
        self.state = _State()
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.order: tuple[int, list[npt.NDArray[np.int64]]] = (-1, [])
        self.began, self.first_step = time.monotonic(), 0
        self.time_used = 0.0  # share of the budget, the same in all processes

    # --- how far it is ---------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Seconds of training in this process, earlier runs included."""
        return self.state.seconds + time.monotonic() - self.began

    def _shared(self, value: float) -> float:
        """The first process's value, in all of them; every process has to call it."""
        if self.world == 1:
            return value
        broadcast = require("accelerate.utils", extra="train").broadcast
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(broadcast(tensor, from_process=0))

    def _look_at_the_clock(self) -> None:
        """Renew `time_used`, counting the evaluation that is still to come."""
        if self.budget is None:
            return
        last = self.state.evaluation_seconds
        reserve = 0.1 * self.budget if last is None else last
        self.time_used = self._shared(self.elapsed() / max(self.budget - reserve, 1e-9))

    def is_finished(self) -> bool:
        """All steps done, the time used up (after one step at least), or no more improvement.

        Reads no clock: all processes, and two calls in a row, come to the same answer.
        """
        state = self.state
        stale = self.score_of is not None and state.worse >= self.config.patience
        return state.step >= self.total or stale or (state.step > 0 and self.time_used >= 1.0)

    def evaluation_is_due(self) -> bool:
        state = self.state
        if state.step == state.evaluated:
            return False
        return state.step % self.per_epoch == 0 or self.is_finished()

    # --- work ------------------------------------------------------------------------------------

    def step(self) -> None:
        """One optimizer step on one global batch."""
        state, config = self.state, self.config
        epoch, index = divmod(state.step, self.per_epoch)
        if self.order[0] != epoch:
            if not isinstance(self.rows_of, Rows) and epoch:
                self.rows = self.rows_of(epoch)
            batches = epoch_batches(self.rows.lengths, config.batch_size, config.seed, epoch)
            self.order = (epoch, batches)
        seeds = np.random.SeedSequence([config.seed, state.step, self.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        whole = self.order[1][index]
        mine = shard(whole, self.rank, self.world)
        batch = self.rows.collate(mine if len(mine) else whole[:1])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            total, weight = self.loss_fn(self.model, batch)
        if not len(mine):  # a process without rows still takes part in the gradient exchange
            total, weight = total * 0.0, weight * 0.0
        sums = torch.stack([total.detach().float(), weight.detach().float()])
        sums = self.accelerator.reduce(sums, reduction="sum") if self.world > 1 else sums
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss):
            self._diverged(loss)
        self.accelerator.backward(total * (self.world / sums[1]).to(total.dtype))
        self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        self._look_at_the_clock()
        progress = max((state.step + 0.5) / self.total, self.time_used)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate(progress, config.warmup)
        with interrupt_held():
            self.optimizer.step()
            state.step += 1
            state.losses.append(loss)
        self.optimizer.zero_grad(set_to_none=True)
        self._report(progress)

    def _diverged(self, loss: float) -> None:
        if self.accelerator.is_main_process:
            self.file.unlink(missing_ok=True)
        raise WorkError(
            f"the training loss is {loss} at step {self.state.step}",
            f"lower the learning rate (it was {self.config.learning_rate:g}) "
            "or train with precision fp32",
        )

    def _report(self, progress: float) -> None:
        done = self.state.step
        seconds = (time.monotonic() - self.began) / (done - self.first_step)
        total = self.total if self.budget is None else max(done, round(done / min(progress, 1)))
        recent = self.state.losses[-20:]
        note = f"loss {sum(recent) / len(recent):.3f} · eta {clock(seconds * (total - done))}"
        self.reporter.progress("train", done, total, note)

    def evaluate(self) -> None:
        """Score the weights, and keep them if they are the best so far."""
        state = self.state
        if self.score_of is None:
            state.evaluated = state.step
            return
        began, score = time.monotonic(), 0.0
        if self.accelerator.is_main_process:
            self.plain.eval()
            with torch.inference_mode():
                score = float(self.score_of(self.plain))
        score, seconds = self._shared(score), self._shared(time.monotonic() - began)
        weights = {n: t.to("cpu", copy=True) for n, t in self._learned().items()}
        with interrupt_held():
            state.evaluated = state.step
            state.evaluation_seconds = seconds
            state.scores.append((state.step, score))
            state.worse += 1
            if score > state.best:
                state.best, state.best_step, state.worse = score, state.step, 0
                self.best_weights = weights
        self._look_at_the_clock()
        epoch = state.step / self.per_epoch
        self.reporter.say(f"epoch {epoch:.3g}: validation {score:.4f} (best {state.best:.4f})")

    def _learned(self) -> dict[str, torch.Tensor]:
        """The weights that training changes, by name."""
        parameters = self.plain.named_parameters()
        return {name: p.detach() for name, p in parameters if p.requires_grad}

    # --- checkpoint ------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint; a reader sees the old one or the new one, both whole."""
        if not self.accelerator.is_main_process:
            return
        now = time.monotonic()
        self.state.seconds += now - self.began
        self.began, self.first_step = now, self.state.step
        value = {
            "state": asdict(self.state),
            "model": self._learned(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best_weights,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(CHECKPOINT + ".partial")
        try:
            with partial.open("wb") as stream:
                torch.save(value, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, self.file)
        finally:
            partial.unlink(missing_ok=True)

    def load(self) -> None:
        """Continue from the checkpoint, if there is one."""
        self.accelerator.wait_for_everyone()
        if not self.file.is_file():
            return
        value = torch.load(self.file, map_location=self.device, weights_only=True)
        self.state = _State(**value["state"])
        self.plain.load_state_dict(value["model"], strict=False)
        self.optimizer.load_state_dict(value["optimizer"])
        self.best_weights = value["best"]
        self.began, self.first_step = time.monotonic(), self.state.step
        self._look_at_the_clock()
        self.reporter.say(f"resuming at step {self.state.step} of {self.total}")

    def finish(self) -> LoopResult:
        """Leave the best weights in the model."""
        state = self.state
        if self.best_weights is not None:
            self.plain.load_state_dict(self.best_weights, strict=False)
        self.plain.to("cpu").eval()
        best_step = state.best_step or state.step
        return LoopResult(
            steps=state.step,
            epochs=state.step / self.per_epoch,
            best_epoch=math.ceil(best_step / self.per_epoch),
            best_score=state.best if state.scores else None,
            losses=list(state.losses),
            scores=[(int(step), float(score)) for step, score in state.scores],
            precision="bf16" if self.bf16 else "fp32",
            seconds=self.elapsed(),
        )
