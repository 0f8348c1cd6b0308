"""Fine-tuning an encoder to recognize intents: a classifier over labelled texts.

The loss is cross-entropy with optional label smoothing (Szegedy et al. 2016) and balanced class
weights n / (classes * rows of the class).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.contracts import Metric, Reporter
from pocketglm.data.readers import Example
from pocketglm.eval.intent import intent_scores
from pocketglm.model.encoder import Encoder, with_classifier
from pocketglm.model.hf import labels_of, load_encoder, save_encoder
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._job import FinetuneConfig, length_limit
from pocketglm.train._rows import Tokens, choose_length, describe, pad, read_rows, tokenize
from pocketglm.train.loop import Batch, Loss, Rows
from pocketglm.train.lora import add_adapters, merge_adapters

_BATCH = 128  # rows of a validation batch


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Train and validation rows."""

    train: Sequence[Example]
    validation: Sequence[Example]

    @property
    def contents(self) -> list[Any]:
        """As `TaskRows.contents`."""
        return [[row.text, row.label] for row in (*self.train, *self.validation)]


@dataclass(frozen=True, slots=True)
class EncoderJob:
    """The model with its head, and the rows as numbers. `targets` and `truth` are label numbers."""

    model: Encoder
    fresh: tuple[str, ...]
    labels: list[str]
    max_length: int
    tokens: Tokens
    targets: npt.NDArray[np.int64]
    held_out: Tokens
    truth: npt.NDArray[np.int64]
    pad_id: int
    oos_label: str

    score_name = "accuracy"

    @property
    def trainee(self) -> Encoder:
        return self.model

    @property
    def settings(self) -> dict[str, Any]:
        return {"max_length": self.max_length}

    def rows(self) -> Rows:
        return Rows(self.tokens.lengths, self.collate)

    def collate(self, rows: npt.NDArray[np.int64]) -> Batch:
        """`ids`, `mask` [B, S] and `labels` [B]."""
        batch = pad(self.tokens.ids, rows, self.pad_id)
        return {**batch, "labels": torch.from_numpy(self.targets[rows])}

    def loss(self, config: FinetuneConfig) -> Loss:
        """Cross-entropy, summed over the rows."""
        counts = Counter(self.targets.tolist())
        weights = torch.ones(len(self.labels))
        if config.class_weights:
            for label, count in counts.items():
                weights[label] = len(self.targets) / (len(counts) * count)

        def cross_entropy(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            weight = weights.to(batch["labels"].device)
            logits = model(batch["ids"], batch["mask"])
            total = F.cross_entropy(
                logits.float(),
                batch["labels"],
                weight,
                reduction="sum",
                label_smoothing=config.label_smoothing,
            )
            return total, weight[batch["labels"]].sum()

        return cross_entropy

    def score(self, trainee: nn.Module) -> float:
        """Accuracy over all validation rows, out-of-scope ones too."""
        return float((self.predict(trainee) == self.truth).mean())

    def finish(self) -> None:
        merge_adapters(self.model)

    def metrics(self) -> Mapping[str, Metric]:
        gold = [self.labels[number] for number in self.truth]
        return intent_scores(gold, self.predict(self.model), self.labels, self.oos_label).metrics

    def predict(self, model: nn.Module) -> npt.NDArray[np.int64]:
        """Label numbers of the validation rows, [N]."""
        device = next(model.parameters()).device
        order = np.argsort(self.held_out.lengths, kind="stable")
        result = np.empty(len(order), np.int64)
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                rows = order[start : start + _BATCH]
                batch = pad(self.held_out.ids, rows, self.pad_id)
                logits = model(batch["ids"].to(device), batch["mask"].to(device))
                result[rows] = logits.argmax(dim=1).cpu().numpy()
        return result

    def save(self, folder: Path, source: Checkpoint, manifest: Manifest) -> None:
        manifest = manifest.model_copy(update={"max_length": self.max_length})
        save_encoder(self.model, folder, source=source, labels=self.labels, manifest=manifest)


def read_labelled(config: FinetuneConfig) -> LabelledRows:
    """The rows of a classifier.

    Raises:
        DataError: as `train._rows.read_rows`.
    """
    return LabelledRows(*read_rows(config.options))


def prepare_classifier(
    ckpt: Checkpoint, config: FinetuneConfig, rows: LabelledRows, reporter: Reporter
) -> EncoderJob:
    """Load the model, give it a head that fits the labels, and tokenize the rows.

    Raises:
        UsageError: `max_length` or the adapters' rank is more than the model has room for.
        CheckpointError: the checkpoint cannot be used.
    """
    tokenizer = Tokenizer.load(ckpt.path)
    model, labels, fresh = _classifier(ckpt, config, {row.label for row in rows.train})
    tokenizer.check_vocabulary(model.spec.vocab_size, ckpt.path)
    limit = length_limit(ckpt, config.max_length)
    texts = [row.text for row in rows.train]
    length = config.max_length or choose_length(tokenize(tokenizer, texts, limit).lengths, limit)
    tokens = tokenize(tokenizer, texts, length)
    describe(rows.train, rows.validation, tokens, length, reporter)
    if config.lora:
        add_adapters(model, config.lora, config.lora_alpha, config.seed)
        for name, parameter in model.named_parameters():
            if name.startswith(("classifier.", *fresh)):
                parameter.requires_grad_(True)
    if config.dropout is not None:
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = config.dropout
    number = {label: index for index, label in enumerate(labels)}
    return EncoderJob(
        model=model,
        fresh=fresh,
        labels=labels,
        max_length=length,
        tokens=tokens,
        targets=np.array([number[row.label] for row in rows.train], np.int64),
        held_out=tokenize(tokenizer, [row.text for row in rows.validation], length),
        truth=np.array([number[row.label] for row in rows.validation], np.int64),
        pad_id=tokenizer.pad_id,
        oos_label=config.oos_label,
    )


def _classifier(
    ckpt: Checkpoint, config: FinetuneConfig, labels: set[str]
) -> tuple[Encoder, list[str], tuple[str, ...]]:
    """The checkpoint's own classifier where it fits the labels, else a new head; its new layers."""
    model, known = load_encoder(ckpt), labels_of(ckpt)
    if set(known) == labels and config.pooling in (None, model.spec.pooling):
        return model, known, ()
    fresh = ("classifier.", "pooler.") if model.pooler is None else ("classifier.",)
    model = with_classifier(model, len(labels), config.pooling, config.seed)
    return model, sorted(labels), fresh
