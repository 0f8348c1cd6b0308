"""What fine-tuning a decoder has in common, whatever its rows: loss, adapters, how it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import CommandGrammar, Manifest
from pocketglm.errors import CheckpointError
from pocketglm.model.decoder import Decoder
from pocketglm.model.hf import eos_ids_of, load_decoder, save_decoder
from pocketglm.ops.stored import precision_of
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._job import FinetuneConfig
from pocketglm.train._sequences import NextToken, RowScores, Sequences, score_rows
from pocketglm.train._vocabulary import learn_rows, settle_rows, with_rows
from pocketglm.train.loop import Batch, EpochRows, Loss, Rows
from pocketglm.train.lora import add_adapters, merge_adapters

_STORED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Source:
    """A decoder that is ready to learn, and its tokenizer. `dtype`: of the stored weights; `grown`:
    the tokenizer is not the checkpoint's any more."""

    model: Decoder
    tokenizer: Tokenizer
    eos_id: int
    dtype: torch.dtype
    grown: bool = False


def load_source(ckpt: Checkpoint, config: FinetuneConfig, names: Sequence[str] = ()) -> Source:
    """Load the decoder, with adapters and dropout as `config` says.

    names: special tokens that the task needs; those that the tokenizer has not are added to it and
    to the embedding (and head), where they begin as its mean with some noise.

    Raises:
        UsageError: the rank of the adapters is too large.
        CheckpointError: the checkpoint cannot be used, or names no end-of-text token.
    """
    tokenizer = Tokenizer.load(ckpt.path)
    eos = eos_ids_of(ckpt)
    if not eos:
        raise CheckpointError(
            f"{ckpt.path} names no end-of-text token, so it could not learn where an answer ends",
            "set eos_token_id in its generation_config.json",
        )
    dtype = _STORED.get(precision_of(ckpt), torch.float32)
    model = load_decoder(ckpt, body=dtype if config.lora else torch.float32)
    tokenizer.check_vocabulary(model.spec.vocab_size, ckpt.path)
    new = [name for name in names if tokenizer.inner.token_to_id(name) is None]
    first = tokenizer.size
    tokenizer.inner.add_special_tokens(new)
    if new:
        model = with_rows(model, first, tokenizer.size, config.seed)
    if config.lora:
        add_adapters(model, config.lora, config.lora_alpha, config.seed)
        if names:  # their rows must learn
            ids = tokenizer.inner.get_vocab()
            learn_rows(model, [ids[name] for name in names])
    if config.dropout:
        set_dropout(model, config.dropout)
    return Source(model, tokenizer, eos[0], dtype, bool(new))


def set_dropout(model: Decoder, share: float) -> None:
    """Dropout of the embeddings and of each residual branch, while it trains."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = share

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, share, module.training)

    model.tokens.register_forward_hook(drop)


@dataclass(frozen=True)
class DecoderJob:
    """The model, and the rows as tokens. A task adds `score`, `metrics` and `score_name`."""

    source: Source
    train: Sequences
    held_out: Sequences
    settings: Mapping[str, Any]
    command: CommandGrammar | None = None
    trainee: NextToken = field(init=False)

    fresh = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "trainee", NextToken(self.source.model))

    @property
    def model(self) -> Decoder:
        return self.source.model

    def rows(self) -> Rows | EpochRows:
        return Rows(self.train.lengths, self.train.collate)

    def loss(self, config: FinetuneConfig) -> Loss:
        """Next-token cross-entropy, summed over the tokens that count."""
        self.trainee.smoothing = config.label_smoothing

        def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            return model(batch), (batch["targets"] >= 0).sum().float()

        return cross_entropy

    def score_rows(self) -> RowScores:
        """Of the validation rows."""
        return score_rows(self.model, self.held_out)

    def finish(self) -> None:
        """Turn the model into what will be stored: adapters merged, weights rounded."""
        merge_adapters(self.model)
        settle_rows(self.model)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.to(self.source.dtype))

    def save(self, folder: Path, source: Checkpoint, manifest: Manifest) -> None:
        manifest = manifest.model_copy(
            update={"max_length": source.manifest.max_length, "command": self.command}
        )
        save_decoder(self.model, folder, source=source, manifest=manifest, dtype=self.source.dtype)
        if self.source.grown:
            self.source.tokenizer.inner.save(str(folder / "tokenizer.json"))
