"""What a decoder can learn from a command's text, beside the marks of its answer.

The intent is one mark of a row's ten or so, so a small data set says little about it. Two more
losses on the text itself, both summed over its tokens, with weights:

* `early_intent`: the intent is told after every token of the text, not at its end alone; after Qin
  et al. 2019, "A Stack-Propagation Framework with Token-Level Intent Detection for Spoken Language
  Understanding", arXiv:1909.02188.
* `text_loss`: the next token of the text is told; after Rei 2017, "Semi-supervised Multitask
  Learning for Sequence Labeling", arXiv:1704.07156.

They change nothing of how the model is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pocketglm.model.decoder import Decoder
from pocketglm.train._sequences import COUNTS, IGNORED, NextToken, Numbers, Sequences
from pocketglm.train.loop import Batch


@dataclass(frozen=True)
class PromptRows:
    """Command rows with the places in their text. intents: token ids of the intents, ascending."""

    rows: Sequences
    intents: Numbers

    def collate(self, numbers: Numbers) -> Batch:
        """A batch of `Sequences.collate` and, as there, `text_places` [T]: after all tokens of the
        text but its last one; the tokens that come there, `text_targets` [T]; and the row's intent,
        a number among the ids `intents` [I]: `intent_targets` [T]."""
        batch = self.rows.collate(numbers)
        ids, starts = batch["ids"].numpy(), self.rows.starts[numbers]
        row, column = np.nonzero(np.arange(ids.shape[1]) < starts[:, None] - 1)
        first = np.array([self.rows.ids[n][s] for n, s in zip(numbers, starts, strict=True)])
        # The token after the text is the line break, which tells nothing.
        within = column < starts[row] - 2
        following = np.where(within, ids[row, column + 1], IGNORED)
        found = {
            "text_places": (row * ids.shape[1] + column, 0),
            "text_targets": (following, IGNORED),
            "intent_targets": (np.searchsorted(self.intents, first)[row], IGNORED),
        }
        more = {
            name: torch.from_numpy(
                np.pad(values, (0, -len(row) % COUNTS), constant_values=fill).astype(np.int64)
            )
            for name, (values, fill) in found.items()
        }
        return batch | more | {"intents": torch.from_numpy(self.intents)}


class CommandLoss(NextToken):
    """The loss at an answer's marks, and those at its text with their weights."""

    def __init__(self, decoder: Decoder, early_intent: float = 0.0, text_loss: float = 0.0) -> None:
        super().__init__(decoder)
        self.early_intent, self.text_loss = early_intent, text_loss

    def forward(self, batch: Batch) -> Tensor:
        """A batch of `PromptRows.collate` (without a weight, of `Sequences.collate`) -> float32."""
        hidden = self.hidden(batch["ids"])
        total = self.summed(
            hidden[batch["places"]], batch["targets"], batch.get("choices"), self.smoothing
        )
        if self.early_intent:
            seen, intents = hidden[batch["text_places"]], batch["intents"]
            early = self.summed(seen, batch["intent_targets"], intents, self.smoothing)
            total = total + self.early_intent * early
        if self.text_loss:
            seen = hidden[batch["text_places"]]
            total = total + self.text_loss * self.summed(seen, batch["text_targets"])
        return total
