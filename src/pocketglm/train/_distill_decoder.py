"""Distilling a decoder: the soft term at every position whose token the labels' term counts.

The teacher runs beside the student. Its logits are not kept on disk as a classifier's are: a
vocabulary of values for each token of the training texts (32,000 tokens in float32: 128 KB a
token, 128 GB a million), and the few largest alone would make another loss.

KL(student || teacher) at the tokens of the training texts: MiniLLM, Gu et al. 2024,
https://arxiv.org/abs/2306.08543, which has the student write the texts; here they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pocketglm.model.decoder import Decoder
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._distill_job import Terms, projections
from pocketglm.train._distill_loss import soft_targets
from pocketglm.train._sequences import NextToken, positions_at_once, quick_attention
from pocketglm.train._taps import tapped, taps, width_of
from pocketglm.train.loop import Batch


@dataclass(frozen=True, slots=True)
class Shared:
    """The tokens that both models know, by the student's numbers [C] and the teacher's [C].

    number: the student's id -> the teacher's [V]; ids that are no token stay what they are.
    same: the ids are equal, and both models have as many.
    """

    ours: Tensor
    theirs: Tensor
    number: Tensor
    same: bool


def shared_tokens(student: Tokenizer, teacher: Tokenizer, sizes: tuple[int, int]) -> Shared:
    """sizes: rows of the student's and the teacher's embedding."""
    known = teacher.inner.get_vocab(with_added_tokens=True)
    pairs = sorted(
        (number, known[token])
        for token, number in student.inner.get_vocab(with_added_tokens=True).items()
        if token in known
    )
    ours, theirs = (torch.tensor(numbers) for numbers in zip(*pairs, strict=True))
    number = torch.arange(sizes[0]).clamp(max=sizes[1] - 1)
    number[ours] = theirs
    same = sizes[0] == sizes[1] and bool((ours == theirs).all())
    return Shared(ours, theirs, number, same)


class DecoderPupil(NextToken):
    """A student whose output is the summed loss at chosen positions.

    The teacher is no part of the module: it does not learn, and is not saved.
    """

    def __init__(
        self, student: Decoder, teacher: Decoder, terms: Terms, shared: Shared, seed: int
    ) -> None:
        super().__init__(student, terms.label_smoothing)
        self._teacher = (teacher.eval().requires_grad_(False),)
        self._terms, self._shared = terms, shared
        self._places = taps(student, terms.features, list(terms.pairs))
        self._shown = taps(teacher, terms.features, list(terms.pairs.values()))
        widths = [width_of(place) for place in self._shown]
        self.projections = projections(self._places, widths, terms, seed)

    def forward(self, batch: Batch) -> Tensor:
        """A batch of `Sequences.collate` -> the sum over its places, float32."""
        ids, places, targets = batch["ids"], batch["places"], batch["targets"]
        teacher, shared = self._teacher[0].to(ids.device), self._shared
        with quick_attention(ids):
            hidden, states = tapped(self._places, lambda: self.decoder.hidden(ids))
            with torch.no_grad():
                known = ids if shared.same else shared.number.to(ids.device)[ids]
                truth, shown = tapped(self._shown, lambda: teacher.hidden(known))
        hidden, truth = hidden.flatten(0, 1)[places], truth.flatten(0, 1)[places]
        choices = batch.get("choices")
        size = positions_at_once(self.decoder)
        if choices is not None or len(hidden) <= size:
            total = self._terms_of(hidden, truth, targets, choices)
        else:
            split = (torch.split(values, size) for values in (hidden, truth, targets))
            parts = zip(*split, strict=True)
            losses = [
                checkpoint(self._terms_of, *part, None, use_reentrant=False) for part in parts
            ]
            total = torch.stack(losses).sum()
        if states:
            total = total + self._terms.feature_weight * self._distance(states, shown, batch)
        return total

    def _terms_of(
        self, hidden: Tensor, truth: Tensor, targets: Tensor, choices: Tensor | None
    ) -> Tensor:
        """Labels and soft targets of positions [P], summed over those that count."""
        alpha = self._terms.alpha
        logits = self.decoder.logits(hidden, choices)
        smoothing = self.smoothing
        hard = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        if not alpha:
            return hard
        with torch.no_grad():
            theirs = self._teacher[0].logits(truth, self._numbers(choices, hidden.device))
        if choices is None and not self._shared.same:
            logits = logits[:, self._shared.ours.to(logits.device)]
        terms = self._terms
        soft = soft_targets(logits, theirs, terms.temperature, reverse=terms.reverse)
        return (1 - alpha) * hard + alpha * (soft * (targets >= 0)).sum()

    def _numbers(self, choices: Tensor | None, device: torch.device) -> Tensor | None:
        """The tokens among which the teacher chooses, by its own numbers; None: all."""
        if self._shared.same:
            return choices
        chosen = self._shared.theirs if choices is None else self._shared.number[choices.cpu()]
        return chosen.to(device)

    def _distance(self, states: Sequence[Tensor], shown: Sequence[Tensor], batch: Batch) -> Tensor:
        """Mean squared difference of hidden states, summed over the places that count; the mean
        of the pairs of layers."""
        places = batch["places"][batch["targets"] >= 0]
        total = torch.zeros((), device=places.device)
        for layer, ours, theirs in zip(self.projections, states, shown, strict=True):
            found = layer(ours.flatten(0, 1)[places]).float()
            wanted = theirs.flatten(0, 1)[places].float()
            total = total + (found - wanted).square().mean(-1).sum()
        return total / len(self.projections)


def token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of a DecoderPupil; its weight is the number of tokens that count."""
    return model(batch), (batch["targets"] >= 0).sum().float()
