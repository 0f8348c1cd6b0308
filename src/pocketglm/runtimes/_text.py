"""What every decoder session checks before it takes tokens into its text. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocketglm.contracts import Ids, SessionInfo
from pocketglm.errors import UsageError


def context_of(limit: int, asked: int | None, path: Path) -> int:
    """Tokens of prompt and answer together: `asked`, or all that the model at `path` allows.

    Raises:
        UsageError: more than the model allows.
    """
    if asked is not None and not 0 < asked <= limit:
        raise UsageError(
            f"a context of {asked} tokens was asked for, {path} holds {limit}",
            f"use --context {limit} or less",
        )
    return asked or limit


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


def check_rewind(count: int, length: int) -> None:
    """Raises UsageError unless a text of `length` tokens has `count` to forget."""
    if not 0 <= count <= length:
        raise UsageError(
            f"cannot rewind {count} tokens, the text has {length}", "rewind fewer tokens"
        )
