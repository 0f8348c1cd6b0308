"""What every session checks before it takes tokens. Torch-free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocketglm.contracts import Floats, Ids, SessionInfo
from pocketglm.errors import UsageError


def context_of(limit: int, asked: int | None, path: Path, *, exported: bool = True) -> int:
    """Tokens of prompt and answer together: `asked`, or all that the model at `path` allows.

    Raises:
        UsageError: more than the model allows.
    """
    if asked is not None and not 0 < asked <= limit:
        raise UsageError(
            f"a context of {asked} tokens was asked for, {path} holds {limit}",
            f"use --context {limit} or less"
            + (f", or export again with --max-length {asked}" if exported else ""),
        )
    return asked or limit


def check_rows(ids: Ids, info: SessionInfo) -> None:
    """Rows of tokens [B, S] for an encoder's export.

    Raises:
        UsageError: an id is outside the vocabulary, or a row is longer than the positions.
    """
    if ids.shape[1] > info.max_length:
        raise UsageError(
            f"{ids.shape[1]} tokens in a row, the file was exported for at most {info.max_length}",
            f"cut the text, or export again with --max-length {ids.shape[1]} or more",
        )
    if info.vocab_size and ids.size and not 0 <= ids.min() <= ids.max() < info.vocab_size:
        worst = int(ids.max() if ids.max() >= info.vocab_size else ids.min())
        raise UsageError(
            f"token id {worst} is outside the model's vocabulary ({info.vocab_size} ids)",
            "the tokenizer belongs to another model: use the export's tokenizer.json",
        )


def row_length(mask: Ids) -> int:
    """Tokens of a row [S] without the padding on its right; one of a row that is all padding."""
    return int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 1


def check_tokens(ids: Sequence[int], length: int, info: SessionInfo) -> Ids:
    """`ids` as int64 [S], to be appended to a text of `length` tokens.

    Raises:
        UsageError: there is none, one is outside the vocabulary, or the text would be too long.
    """
    tokens = np.asarray(ids, np.int64).reshape(-1)
    if not tokens.size:
        raise UsageError("there is no token to continue from", "give at least one")
    if not 0 <= tokens.min() <= tokens.max() < info.vocab_size:
        worst = int(tokens.max() if tokens.max() >= info.vocab_size else tokens.min())
        raise UsageError(
            f"token id {worst} is outside the model's vocabulary ({info.vocab_size} ids)",
            "the tokenizer belongs to another model: use this model's tokenizer.json",
        )
    if length + tokens.size > info.max_length:
        raise UsageError(
            f"{length + tokens.size} tokens of text, the cache holds {info.max_length}",
            "shorten the text, ask for fewer new tokens, or open the model with a larger context",
        )
    return tokens


class Text(ABC):
    """What is the same in every decoder session, see `contracts.DecoderSession`."""

    info: SessionInfo

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of the text so far."""

    @abstractmethod
    def prefill(self, ids: Sequence[int]) -> Floats:
        """Append one or more tokens; the logits after the last one, float32 [V].

        Raises:
            UsageError: no token, one outside the vocabulary, or more than the cache can hold.
        """

    @abstractmethod
    def _forget(self, count: int) -> None:
        """Drop the last `count` tokens, of which there are as many."""

    def step(self, token: int) -> Floats:
        """`prefill` of one token."""
        return self.prefill([token])

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens.

        Raises:
            UsageError: the text has fewer.
        """
        if not 0 <= count <= self.length:
            raise UsageError(
                f"cannot rewind {count} tokens, the text has {self.length}", "rewind fewer tokens"
            )
        self._forget(count)


class CachedText(Text):
    """A session whose cache holds the text, so that only its length has to be known."""

    _length = 0

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return self._length

    def _forget(self, count: int) -> None:
        self._length -= count
