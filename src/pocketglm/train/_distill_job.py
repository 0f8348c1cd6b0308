"""Distilling a classifier: the student with what it is compared by, its rows, and its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketglm.errors import UsageError
from pocketglm.model.encoder import Encoder
from pocketglm.model.layers import init_weights
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._augment import changed_copies
from pocketglm.train._distill_loss import hidden_distance, relation_distance, soft_targets
from pocketglm.train._encoder_job import EncoderJob
from pocketglm.train._rows import pad, tokenize
from pocketglm.train._taps import Features, tapped, taps, width_of
from pocketglm.train._teacher import Outputs, Teacher
from pocketglm.train.loop import Batch, EpochRows, Loss, Rows


@dataclass(frozen=True, slots=True)
class Terms:
    """What the loss is made of.

    alpha: weight of the soft term; 1 - alpha is that of the labels. reverse: the soft term is
    KL(student || teacher). pairs: student layer -> teacher
    layer, whose features are compared. heads: relations of so many parts of a width.
    """

    alpha: float
    temperature: float
    features: Features = "none"
    feature_weight: float = 1.0
    pairs: Mapping[int, int] = field(default_factory=dict)
    heads: int = 1
    label_smoothing: float = 0.0
    reverse: bool = False

    @property
    def asks(self) -> bool:
        """Whether there is anything that the teacher is needed for."""
        return self.alpha > 0 or (self.features != "none" and self.feature_weight > 0)


def projections(
    places: Sequence[nn.Module], widths: Sequence[int], terms: Terms, seed: int
) -> nn.ModuleList:
    """New layers from the student's hidden states to `widths`; none where they are equal."""
    generator, layers = torch.Generator().manual_seed(seed), nn.ModuleList()
    if terms.features != "hidden":
        return layers
    for place, width in zip(places, widths, strict=True):
        own = width_of(place)
        layer = nn.Identity() if own == width else nn.Linear(own, width, bias=False)
        init_weights(layer, generator, std=own**-0.5)
        layers.append(layer)
    return layers


class Pupil(nn.Module):
    """A student whose inner states can be compared with a teacher's."""

    def __init__(self, student: Encoder, terms: Terms, widths: Sequence[int], seed: int) -> None:
        """widths: of the teacher's features, one a tap of the student's."""
        super().__init__()
        self.student = student
        self._places = taps(student, terms.features, list(terms.pairs)) if terms.asks else []
        self.projections = projections(self._places, widths, terms, seed)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """ids, mask [B, S] -> logits [B, C] and features [B, S, W] each, as wide as the teacher's
        where they are hidden states."""
        logits, found = tapped(self._places, lambda: self.student(ids, mask))
        if len(self.projections):
            found = [layer(x) for layer, x in zip(self.projections, found, strict=True)]
        return logits, found


def distillation_loss(terms: Terms) -> Loss:
    """Of a Pupil: alpha * T^2 * KL + (1 - alpha) * cross-entropy + weight * features, summed over
    the rows; the features' terms are means over the pairs of layers."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, found = model(batch["ids"], batch["mask"])
        weight = torch.tensor(float(len(logits)), device=logits.device)
        hard = F.cross_entropy(
            logits.float(),
            batch["labels"],
            reduction="none",
            label_smoothing=terms.label_smoothing,
        )
        total = (1 - terms.alpha) * (hard * batch["hard"]).sum()
        if terms.alpha:
            soft = soft_targets(logits, batch["soft"], terms.temperature, reverse=terms.reverse)
            total = total + terms.alpha * soft.sum()
        if found:
            rows = _feature_loss(found, batch, terms)
            total = total + terms.feature_weight * (rows * batch["aligned"]).sum()
        return total, weight

    return loss


def _feature_loss(found: Sequence[Tensor], batch: Batch, terms: Terms) -> Tensor:
    """[B]; of relations, the sum over query, key and value."""
    mask = batch["mask"]
    parts = []
    for number, ours in enumerate(found):
        theirs = batch[f"features-{number}"]
        if terms.features == "hidden":
            parts.append(hidden_distance(ours, theirs, mask))
        else:
            parts.append(relation_distance(ours, theirs, mask, terms.heads))
    return torch.stack(parts).sum(0) / len(terms.pairs)


# --- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows with all that the loss needs. `hard`: weight of the label [N]."""

    ids: list[npt.NDArray[np.int32]]
    targets: npt.NDArray[np.int64]
    hard: npt.NDArray[np.float32]
    aligned: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None
    outputs: Outputs | None


@dataclass(frozen=True)
class Lessons:
    """The training rows of a student, epoch by epoch.

    texts: the training texts. copies: changed copies of each. unlabelled: further texts that only
    the teacher says something about. An epoch has the texts themselves, the next copy of them, and
    the next of the unlabelled ones, as many as there are texts.
    """

    job: EncoderJob
    tokenizer: Tokenizer
    texts: Sequence[str]
    teacher: Teacher | None
    copies: int = 0
    share: float = 0.0
    unlabelled: Sequence[str] = ()

    def rows(self) -> Rows | EpochRows:
        """As `train` takes them.

        Raises:
            UsageError: features are compared, and the tokenizers cut a row into unequal numbers
                of tokens.
        """
        first = self._part(self.texts, self.job.tokens.ids, "the training rows")
        odd = np.flatnonzero(first.aligned == 0)
        if len(odd) and first.outputs is not None and first.outputs.features:
            row = int(odd[0])
            raise UsageError(
                f"features: {len(odd)} training rows have other numbers of tokens for the teacher, "
                f"the first {first.outputs.lengths[row]} instead of {len(first.ids[row])}: "
                f"{self.texts[row][:60]!r}",
                "set features to none, or distill from a teacher with the same tokenizer",
            )
        if not (self.copies or self.unlabelled):
            return _rows([first], self.job.pad_id)

        def epoch(number: int) -> Rows:
            parts = [first]
            if self.copies:
                parts.append(self._copy(number % self.copies))
            if self.unlabelled:
                parts.append(self._unlabelled(number))
            return _rows(parts, self.job.pad_id)

        return epoch

    def _unlabelled(self, epoch: int) -> _Part:
        """The next piece of the unlabelled texts, all pieces of one size."""
        size = min(len(self.unlabelled), len(self.texts))
        pieces = len(self.unlabelled) // size
        order = np.random.default_rng(0).permutation(len(self.unlabelled))
        chosen = order[epoch % pieces * size :][:size]
        texts = [self.unlabelled[number] for number in chosen]
        ids = tokenize(self.tokenizer, texts, self.job.max_length).ids
        what = f"piece {epoch % pieces + 1} of {pieces} of the unlabelled texts"
        part = self._part(texts, ids, what)
        part.hard[:] = 0
        return replace(part, targets=np.zeros(size, np.int64))

    def _copy(self, number: int) -> _Part:
        """Changed texts. A label counts where the teacher gives it too: who knows what the text
        means now. Without a teacher every label counts."""
        texts = changed_copies(self.texts, number, self.share)
        ids = tokenize(self.tokenizer, texts, self.job.max_length).ids
        part = self._part(texts, ids, f"copy {number + 1} of {self.copies}")
        if part.logits is not None:
            part.hard[:] = part.logits.argmax(1) == part.targets
        return part

    def _part(self, texts: Sequence[str], ids: list[npt.NDArray[np.int32]], what: str) -> _Part:
        outputs = None if self.teacher is None else self.teacher.outputs(texts, what)
        aligned = np.ones(len(ids), np.float32)
        logits = None
        if self.teacher is not None and outputs is not None:
            order = [self.teacher.labels.index(label) for label in self.job.labels]
            logits = np.asarray(outputs.logits)[:, order]
            aligned[outputs.lengths != [len(row) for row in ids]] = 0
        hard = np.ones(len(ids), np.float32)
        return _Part(ids, self.job.targets, hard, aligned, logits, outputs)


def _rows(parts: Sequence[_Part], pad_id: int) -> Rows:
    """All rows of the parts, one part after the other."""
    ids = [row for part in parts for row in part.ids]
    targets, hard, aligned = (
        torch.from_numpy(np.concatenate([getattr(part, name) for part in parts]))
        for name in ("targets", "hard", "aligned")
    )
    logits = [part.logits for part in parts if part.logits is not None]
    soft = torch.from_numpy(np.concatenate(logits)) if logits else None
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])

    def collate(rows: npt.NDArray[np.int64]) -> Batch:
        batch = pad(ids, rows, pad_id)
        chosen = torch.from_numpy(rows)
        batch |= {"labels": targets[chosen], "hard": hard[chosen], "aligned": aligned[chosen]}
        if soft is not None:
            batch["soft"] = soft[chosen]
        owners = np.searchsorted(starts, rows, "right") - 1
        outputs = [
            (found, int(row - starts[owner]))
            for row, owner in zip(rows, owners, strict=True)
            if (found := parts[owner].outputs) is not None
        ]
        if outputs:
            batch |= _features(outputs, batch["ids"].shape[1])
        return batch

    return Rows(np.array([len(row) for row in ids], np.int64), collate)


def _features(rows: Sequence[tuple[Outputs, int]], width: int) -> dict[str, Any]:
    """The teacher's features of some rows, padded with zeros or cut to `width` tokens."""
    batch = {}
    for number, feature in enumerate(rows[0][0].features):
        values = np.zeros((len(rows), width, feature.shape[1]), np.float16)
        for place, (outputs, row) in enumerate(rows):
            tokens = outputs.tokens(number, row)[:width]
            values[place, : len(tokens)] = tokens
        batch[f"features-{number}"] = torch.from_numpy(values)
    return batch
