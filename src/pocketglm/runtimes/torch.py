"""Opens a checkpoint with PyTorch on the CPU: the reference that exports are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import Floats, Ids, RunOptions, Runtime, Session, SessionInfo
from pocketglm.errors import UsageError
from pocketglm.model.cache import KVCache
from pocketglm.model.decoder import Decoder
from pocketglm.model.hf import (
    eos_ids_of,
    is_decoder,
    labels_of,
    load_decoder,
    load_encoder,
    max_length_of,
)
from pocketglm.model.inputs import cache_scales, input_grids
from pocketglm.ops.fake_quant import quantized_inputs
from pocketglm.runtimes._cores import usable_cores
from pocketglm.runtimes._text import Text, check_tokens, context_of


class TorchSession:
    """An open encoder; quantized weights were dequantized to float32 when it was opened.

    Inputs that a layer quantizes on a fixed grid (static) are rounded to it, as every runtime
    will; the dynamic forms differ from runtime to runtime, here they stay float.
    """

    def __init__(self, ckpt: Checkpoint, options: RunOptions) -> None:
        self._path = ckpt.path
        self._model = load_encoder(ckpt)
        self._grids = input_grids(ckpt, self._model)
        self._threads = options.threads or usable_cores()
        spec = self._model.spec
        self.info = SessionInfo(
            runtime="torch",
            output="logits" if spec.head == "classification" else "sentence_embedding",
            labels=tuple(labels_of(ckpt)),
            max_length=max_length_of(ckpt),
            pooling=spec.pooling,
            activation="static" if self._grids else "none",
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
        rounded = quantized_inputs(self._model, self._grids)
        with torch.inference_mode(), _threads(self._threads), rounded:
            out = self._model(_tensor(ids), _tensor(mask))
        result: Floats = out.numpy()
        return result

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._model


class TorchDecoderSession(Text):
    """An open decoder in float32, its cache as the checkpoint says; forks share its weights."""

    def __init__(self, model: Decoder, cache: KVCache, info: SessionInfo) -> None:
        self._model, self._cache, self.info = model, cache, info

    @classmethod
    def open(cls, ckpt: Checkpoint, options: RunOptions) -> TorchDecoderSession:
        """Load the weights; quantized ones are dequantized.

        Raises:
            UsageError: a context that is longer than the model has positions.
            CheckpointError: as `load_decoder`.
        """
        model = load_decoder(ckpt)
        model.cache_scales = cache_scales(ckpt)
        spec = model.spec
        info = SessionInfo(
            runtime="torch",
            output="logits",
            kind="decoder",
            max_length=context_of(
                spec.max_position_embeddings, options.context, ckpt.path, exported=False
            ),
            threads=options.threads or usable_cores(),
            vocab_size=spec.vocab_size,
            bos_id=spec.bos_id,
            eos_ids=eos_ids_of(ckpt),
            scores="all",
        )
        return cls(model, model.new_cache(1, info.max_length), info)

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return int(self._cache.lengths[0])

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Append one or more tokens; the logits after the last one, float32 [V].

        Raises:
            UsageError: no token, one outside the vocabulary, or more than the cache can hold.
        """
        tokens = check_tokens(ids, self.length, self.info)
        with torch.inference_mode(), _threads(self.info.threads):
            out = self._model.prefill(_tensor(tokens[None]), None, self._cache)
        result: Floats = out[0].numpy()
        return result

    def _forget(self, count: int) -> None:
        self._cache.rewind(count)

    def fork(self) -> TorchDecoderSession:
        """A session with a copy of the text so far; it shares the weights."""
        return TorchDecoderSession(self._model, self._cache.fork(), self.info)

    def score(self, ids: Sequence[int]) -> Floats:
        """Logits float32 [S, V] at every position of a text of its own.

        Raises:
            UsageError: as `prefill`.
        """
        tokens = check_tokens(ids, 0, self.info)
        with torch.inference_mode(), _threads(self.info.threads):
            out = self._model(_tensor(tokens[None]))
        result: Floats = out[0].numpy()
        return result

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._model, self._cache


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


def open_checkpoint(path: Path, options: RunOptions) -> Session:
    """Open a checkpoint folder (see `load_encoder` and `load_decoder` for the errors)."""
    ckpt = Checkpoint.open(path)
    if is_decoder(ckpt):
        return TorchDecoderSession.open(ckpt, options)
    return TorchSession(ckpt, options)


SPEC = Runtime(
    summary="PyTorch on the CPU, for checkpoints",
    open=open_checkpoint,
)
