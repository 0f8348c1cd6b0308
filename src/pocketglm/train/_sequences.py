"""Token rows of a decoder, the loss at chosen positions, and the scores of validation rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pocketglm.contracts import Metric
from pocketglm.eval._stats import ratio_metric
from pocketglm.model.decoder import Decoder
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._rows import pad
from pocketglm.train.loop import Batch

Row = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]
_LOGITS = 1 << 25  # values computed at a time: 128 MiB in float32
_SHORT = 128  # tokens
_WIDTHS, COUNTS = 4, 64  # steps of a batch's S and P
IGNORED = -100  # a target that does not count
_TOKENS = 8192  # of a validation batch


@dataclass(frozen=True)
class Sequences:
    """Rows of token ids. The loss counts the tokens from number `starts[row]` (1 or more) on.

    choices: of these only those that are one of `choices` [C], ascending; `targets` are then
    numbers in it, and the model chooses among them alone.
    """

    ids: Sequence[Row]
    starts: Numbers
    pad_id: int
    choices: Numbers | None = None

    @cached_property
    def lengths(self) -> Numbers:
        """Tokens of each row, [N]."""
        return np.array([len(row) for row in self.ids], np.int64)

    def collate(self, rows: Numbers) -> Batch:
        """`ids` [B, S]: all but the last token of each row, padded on the right. `places` [P]: the
        positions in it, counted over the flattened rows, after which the tokens `targets` [P] come;
        filled up with targets of -100, which do not count.

        S and P are rounded up: every new shape costs oneDNN a compilation and about a megabyte, in
        all 15 % of the time of a small model, and gigabytes.
        """
        batch = pad(self.ids, rows, self.pad_id)
        ids, mask = batch["ids"].numpy(), batch["mask"].numpy()
        counts = (np.arange(1, ids.shape[1]) >= self.starts[rows][:, None]) & (mask[:, 1:] == 1)
        chosen = {}
        if self.choices is not None:
            counts &= np.isin(ids[:, 1:], self.choices)
            chosen["choices"] = torch.from_numpy(self.choices)
        targets = ids[:, 1:][counts]
        if self.choices is not None:
            targets = np.searchsorted(self.choices, targets)
        width, longest = ids.shape[1] - 1, int(self.lengths.max()) - 1
        more = max(min(-width % _WIDTHS, longest - width), 0)
        row, column = np.nonzero(counts)
        fill = (0, -len(targets) % COUNTS)
        return {
            "ids": torch.from_numpy(np.pad(ids[:, :-1], ((0, 0), (0, more)))),
            "places": torch.from_numpy(np.pad(row * (width + more) + column, fill)),
            "targets": torch.from_numpy(np.pad(targets, fill, constant_values=IGNORED)),
            **chosen,
        }


def encode_prompts(
    tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = True
) -> list[list[int]]:
    """`Tokenizer.encode_prompt` for many texts."""
    begin: list[int] = []
    if special:
        whole, plain = tokenizer.encode_prompt("a"), tokenizer.encode_prompt("a", special=False)
        begin = whole[: len(whole) - len(plain)]
    found = tokenizer.inner.encode_batch_fast(list(texts), add_special_tokens=False)
    return [begin + row.ids for row in found]


def quick_attention(ids: Tensor) -> AbstractContextManager[None]:
    """The kernel to train with on rows `ids` [B, S].

    PyTorch's fused attention is slow at training short rows in bf16 on CPUs: of 16 tokens it takes
    five times as long, of 128 1.3 times; from 256 on it is faster.
    """
    plain = ids.shape[1] <= _SHORT and not ids.is_cuda and torch.is_autocast_enabled("cpu")
    chosen: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
    return chosen


def positions_at_once(decoder: Decoder) -> int:
    """Of how many positions the logits fit into memory."""
    return max(_LOGITS // decoder.spec.vocab_size, 1)


class NextToken(nn.Module):
    """A decoder whose output is the summed loss at chosen positions.

    The head, most of a small model's work, sees those positions only, and not more of them at once
    than memory allows.
    """

    def __init__(self, decoder: Decoder, smoothing: float = 0.0) -> None:
        super().__init__()
        self.decoder = decoder
        self.smoothing = smoothing

    def forward(self, batch: Batch) -> Tensor:
        """A batch of `Sequences.collate` -> the sum over its places, float32."""
        hidden = self.hidden(batch["ids"])[batch["places"]]
        return self.summed(hidden, batch["targets"], batch.get("choices"), self.smoothing)

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head sees of ids [B, S], flattened: [B * S, H]."""
        with quick_attention(ids):
            return self.decoder.hidden(ids).flatten(0, 1)

    def summed(
        self,
        hidden: Tensor,
        targets: Tensor,
        choices: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> Tensor:
        """The loss of hidden states [P, H]; targets and choices as in `Sequences`."""
        loss = partial(self._loss, choices=choices, smoothing=smoothing)
        size = positions_at_once(self.decoder)
        if choices is not None or len(hidden) <= size:
            return loss(hidden, targets)
        parts = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
        losses = [checkpoint(loss, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum()

    def _loss(
        self, hidden: Tensor, targets: Tensor, choices: Tensor | None, smoothing: float
    ) -> Tensor:
        logits = self.decoder.logits(hidden, choices)
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)


@dataclass(frozen=True, slots=True)
class RowScores:
    """By row: the summed negative log-likelihood in nats, tokens guessed right, and tokens, [N];
    `first`: 1 where the first of them was guessed right."""

    nll: npt.NDArray[np.float64]
    hits: Numbers
    tokens: Numbers
    first: Numbers


@torch.inference_mode()
def score_rows(decoder: Decoder, rows: Sequences) -> RowScores:
    """Score every row, each token after the true ones before it (teacher forcing)."""
    device = decoder.tokens.weight.device
    nll, hits, tokens, first = np.zeros(len(rows.ids)), *np.zeros((3, len(rows.ids)), np.int64)
    size = positions_at_once(decoder)
    for numbers in _batches(rows.lengths):
        batch = {name: value.to(device) for name, value in rows.collate(numbers).items()}
        places, targets = batch["places"], batch["targets"]
        hidden = decoder.hidden(batch["ids"]).flatten(0, 1)[places]
        owners = numbers[(places // batch["ids"].shape[1]).cpu().numpy()]
        for start in range(0, len(places), size):
            logits = decoder.logits(hidden[start : start + size], batch.get("choices"))
            truth, owner = targets[start : start + size], owners[start : start + size]
            loss = F.cross_entropy(logits, truth, reduction="none").double().cpu().numpy()
            right = (logits.argmax(1) == truth).cpu().numpy()
            np.add.at(nll, owner, loss)
            np.add.at(hits, owner, right)
            real = (truth != IGNORED).cpu().numpy()
            new = real & (np.diff(owner, prepend=-1) != 0) & (tokens[owner] == 0)
            first[owner[new]] = right[new]
            np.add.at(tokens, owner, real)
    return RowScores(nll, hits, tokens, first)


def _batches(lengths: Numbers) -> Iterator[Numbers]:
    """Row numbers in batches of about `_TOKENS`, rows of like length together."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= _TOKENS:
            stop += 1
        yield order[start:stop]
        start = stop


def token_mean(found: RowScores) -> Metric:
    """Nats per token; its interval resamples the rows."""
    tokens = found.tokens.astype(np.float64)
    return ratio_metric(found.nll, tokens, n=int(found.tokens.sum()), unit="nats/token")
