"""What fine-tuning reads: train and validation rows, checked, counted and tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pocketglm.contracts import DataOptions, Reporter
from pocketglm.data.readers import Example, read_split
from pocketglm.errors import DataError
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train.loop import Batch

_CHUNK = 1024
_UNKNOWN_LIMIT = 0.05
_IMBALANCE_LIMIT = 10
_LEAST = 64


@dataclass(frozen=True, slots=True)
class Tokens:
    """Texts as token ids, one array a row; the rest counts over all of them."""

    ids: list[npt.NDArray[np.int32]]
    truncated: int
    unknown: int
    tokens: int

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, [N]."""
        return np.array([len(row) for row in self.ids], np.int64)


def read_rows(options: DataOptions) -> tuple[list[Example], list[Example]]:
    """Train and validation rows; of a single file, a tenth each is held out for them and for test.

    Raises:
        DataError: no rows, fewer than two labels, or validation labels that training has not.
    """
    train = read_split(options, "train", training=True)
    validation = read_split(options, "validation", training=True)
    labels = {row.label for row in train}
    if options.path.is_file():  # a rare label may have been held out whole: give it back
        train += [row for row in validation if row.label not in labels]
        validation = [row for row in validation if row.label in labels]
        labels = {row.label for row in train}
    if len(labels) < 2:
        raise DataError(
            f"the training rows have {len(labels)} label(s) ({', '.join(sorted(labels))}), "
            "a classifier needs at least 2",
            "does --label-column name the right column?",
            path=options.path,
        )
    if not validation:
        raise DataError(
            "there are no validation rows", "add some: early stopping needs them", path=options.path
        )
    unseen = sorted({row.label for row in validation} - labels)
    if unseen:
        shown = ", ".join(repr(label) for label in unseen[:5])
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        raise DataError(
            f"{len(unseen)} label(s) in validation that training never shows: {shown}{more}",
            "add training rows for them, or drop the validation rows",
            path=options.path,
        )
    return train, validation


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> Tokens:
    """Token ids of each text, cut to `max_length`."""
    ids: list[npt.NDArray[np.int32]] = []
    truncated = unknown = tokens = 0
    for start in range(0, len(texts), _CHUNK):
        part = tokenizer.encode(texts[start : start + _CHUNK], max_length)
        lengths = part.mask.sum(axis=1)
        ids += [row[:n].astype(np.int32) for row, n in zip(part.ids, lengths, strict=True)]
        truncated += part.truncated
        unknown += part.unknown
        tokens += part.tokens
    return Tokens(ids, truncated, unknown, tokens)


def choose_length(lengths: npt.NDArray[np.int64], limit: int) -> int:
    """Longest row to train with: the 99.5th percentile, rounded up to 8, `limit` at most.

    At least 64: batches are padded to their own longest row, so a generous limit costs nothing,
    and the model's users will not keep to the lengths of its training texts.
    """
    typical = int(np.percentile(lengths, 99.5, method="higher"))
    return min(limit, max(_LEAST, -(-typical // 8) * 8))


def pad(
    ids: Sequence[npt.NDArray[np.int32]], rows: npt.NDArray[np.int64] | Sequence[int], pad_id: int
) -> Batch:
    """`ids` and `mask` [B, S] int64 of the given rows, padded on the right to the longest."""
    chosen = [ids[row] for row in rows]
    width = max(len(row) for row in chosen)
    batch = np.full((len(chosen), width), pad_id, np.int64)
    mask = np.zeros((len(chosen), width), np.int64)
    for number, row in enumerate(chosen):
        batch[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return {"ids": torch.from_numpy(batch), "mask": torch.from_numpy(mask)}


def describe(
    train: Sequence[Example],
    validation: Sequence[Example],
    tokens: Tokens,
    max_length: int,
    reporter: Reporter,
) -> None:
    """Say what the data looks like, and warn of what usually goes wrong."""
    counts = Counter(row.label for row in train).most_common()
    (most, largest), (least, smallest) = counts[0], counts[-1]
    reporter.say(f"{len(train)} training rows, {len(validation)} validation, {len(counts)} labels")
    share = tokens.truncated / max(len(tokens.ids), 1)
    reporter.say(f"max length {max_length} tokens: {share:.2%} of the texts are cut")
    if largest > _IMBALANCE_LIMIT * smallest:
        reporter.say(
            f"warning: label '{most}' has {largest / smallest:.0f} times the rows of '{least}' "
            f"({largest} and {smallest}); consider --class-weights or more rows"
        )
    unknown = tokens.unknown / max(tokens.tokens, 1)
    if unknown > _UNKNOWN_LIMIT:
        reporter.say(
            f"warning: {unknown:.1%} of the tokens are unknown to this model's tokenizer; take a "
            "model made for this language, or train an own tokenizer (data/tokenizer_training.py)"
        )
