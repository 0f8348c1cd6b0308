"""A tiny training problem, run by the tests in their own process or in others (see `main`).

    train_worker.py WORK RESULT [KILL_AT [DROPOUT [MINUTES]]]

trains in WORK; each process writes losses, learning rates and a digest of the final weights to
RESULT.RANK. KILL_AT: the process kills itself with SIGKILL while it computes that step. MINUTES: a
time budget, which each process but the first believes to be larger.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pocketglm.train.loop import Batch, LoopConfig, LoopResult, Rows, train

ROWS = 36  # with batches of 5 the last one has a single row: one of two processes gets none
CONFIG = LoopConfig(
    epochs=3, batch_size=5, learning_rate=0.01, head_multiplier=3, precision="fp32", patience=9
)


class Tiny(nn.Module):
    """Mean of token embeddings, then a linear layer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tokens = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weight = mask[:, :, None].float()
        mean = (self.tokens(ids) * weight).sum(1) / weight.sum(1)
        logits: torch.Tensor = self.head(self.dropout(self.norm(mean)))
        return logits


def problem() -> tuple[Rows, torch.Tensor]:
    """Rows of 2 to 9 tokens; the label is the first token modulo 3."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 10, ROWS)
    ids = [rng.integers(0, 20, length) for length in lengths]
    labels = torch.tensor([int(row[0]) % 3 for row in ids])

    def collate(rows: Any) -> Batch:
        width = max(len(ids[row]) for row in rows)
        batch, mask = torch.zeros(len(rows), width).long(), torch.zeros(len(rows), width).long()
        for place, row in enumerate(rows):
            batch[place, : len(ids[row])] = torch.from_numpy(ids[row])
            mask[place, : len(ids[row])] = 1
        return {"ids": batch, "mask": mask, "labels": labels[torch.from_numpy(rows)]}

    return Rows(lengths, collate), labels


def cross_entropy(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(batch["ids"], batch["mask"])
    total = F.cross_entropy(logits, batch["labels"], reduction="sum")
    return total, torch.tensor(float(len(batch["labels"])))


def accuracy(model: nn.Module) -> float:
    rows, labels = problem()
    batch = rows.collate(np.arange(ROWS))
    return float((model(batch["ids"], batch["mask"]).argmax(1) == labels).float().mean())


def run(
    work: Path, kill_at: int | None = None, dropout: float = 0.1, config: LoopConfig = CONFIG
) -> tuple[Tiny, LoopResult]:
    model, calls = Tiny(dropout), 0

    def loss(module: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return cross_entropy(module, batch)

    result = train(
        model,
        problem()[0],
        loss,
        config,
        work,
        evaluate=accuracy,
        is_head=lambda name: name.startswith("head."),
        checkpoint_seconds=0.0,
    )
    return model, result


def launch_two(*command: object) -> str:
    """Run a script or `-m module` with its arguments in two processes; what they print."""
    # With --cpu, accelerate launch starts one process only (more would need mpirun).
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(launch, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed, _ = process.communicate(timeout=120)
        except BaseException:
            process.terminate()  # the launcher then ends its processes; kill would orphan them
            raise
    assert process.returncode == 0, printed
    return printed


def digest(model: nn.Module) -> str:
    """sha256 over the weights."""
    data = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(data).hexdigest()


def main(
    work: str, result: str, kill_at: str = "0", dropout: str = "0.1", minutes: str = "0"
) -> None:
    rank, config = int(os.environ.get("RANK", "0")), CONFIG
    if float(minutes):
        endless = {"epochs": 100_000, "patience": 100_000}
        config = config.model_copy(update={**endless, "minutes": float(minutes) * (1 + rank)})
    rates: list[float] = []
    register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    model, answer = run(Path(work), int(kill_at) or None, float(dropout), config)
    value = {
        "losses": answer.losses,
        "scores": answer.scores,
        "rates": rates,
        "weights": digest(model),
        "seconds": answer.seconds,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    Path(f"{result}.{rank}").write_text(json.dumps(value))


if __name__ == "__main__":
    main(*sys.argv[1:])
