"""A tiny training problem, run by the tests in their own process or in others (see `main`).

    train_worker.py WORK RESULT [KILL_AT]

trains in WORK and writes losses and a digest of the final weights to RESULT; KILL_AT: the process
kills itself with SIGKILL while it computes that step.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

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


def run(work: Path, kill_at: int | None = None, dropout: float = 0.1) -> tuple[Tiny, LoopResult]:
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
        CONFIG,
        work,
        evaluate=accuracy,
        is_head=lambda name: name.startswith("head."),
        checkpoint_seconds=0.0,
    )
    return model, result


def digest(model: nn.Module) -> str:
    """sha256 over the weights."""
    data = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(data).hexdigest()


def main(work: str, result: str, kill_at: str = "0", dropout: str = "0.1") -> None:
    model, answer = run(Path(work), int(kill_at) or None, float(dropout))
    if os.environ.get("RANK", "0") == "0":
        value = {
            "losses": answer.losses,
            "weights": digest(model),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        }
        Path(result).write_text(json.dumps(value))


if __name__ == "__main__":
    main(*sys.argv[1:])
