"""Opens a checkpoint with PyTorch on the CPU: the reference that exports are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import Floats, Ids, RunOptions, Runtime, SessionInfo
from pocketglm.errors import UsageError
from pocketglm.model.hf import labels_of, load_encoder, max_length_of
from pocketglm.runtimes._cores import usable_cores


class TorchSession:
    """An open encoder; quantized weights were dequantized to float32 when it was opened."""

    def __init__(self, path: Path, options: RunOptions) -> None:
        ckpt = Checkpoint.open(path)
        self._path = path
        self._model = load_encoder(ckpt)
        self._threads = options.threads or usable_cores()
        spec = self._model.spec
        self.info = SessionInfo(
            runtime="torch",
            output="logits" if spec.head == "classification" else "sentence_embedding",
            labels=tuple(labels_of(ckpt)),
            max_length=max_length_of(ckpt),
            pooling=spec.pooling,
            threads=self._threads,
        )

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """ids [B, S], mask [B, S] of 0/1 -> float32 [B, C].

        Raises:
            UsageError: an id is outside the vocabulary, or a row is longer than the positions.
        """
        rows = self._model.spec.vocab_size
        if ids.size and not 0 <= ids.min() <= ids.max() < rows:
            worst = int(ids.max() if ids.max() >= rows else ids.min())
            raise UsageError(
                f"token id {worst} is outside the vocabulary of {self._path} ({rows} ids)",
                "the tokenizer belongs to another model: use this model's tokenizer.json",
            )
        with torch.inference_mode(), _threads(self._threads):
            out = self._model(_tensor(ids), _tensor(mask))
        result: Floats = out.numpy()
        return result

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._model


def _tensor(array: Ids) -> torch.Tensor:
    # A copy where torch would refuse or warn: other integers, or memory that is read-only.
    return torch.from_numpy(np.require(array, np.int64, ["C", "W"]))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch's thread count is the process's: set it for one call, then put it back."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_checkpoint(path: Path, options: RunOptions) -> TorchSession:
    """Open a checkpoint folder (see `load_encoder` for the errors)."""
    return TorchSession(path, options)


SPEC = Runtime(
    summary="PyTorch on the CPU, for checkpoints",
    open=open_checkpoint,
)
