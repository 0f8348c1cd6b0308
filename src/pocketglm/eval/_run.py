"""Texts through a Session: numpy in, numpy out, order kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import EncoderSession, Floats, Reporter, Silent
from pocketglm.errors import UsageError
from pocketglm.text.tokenizer import Tokenizer

_BATCH = 32
# Some or all linear layers quantize their inputs with one scale for the whole batch.
_PER_BATCH = ("dynamic_tensor", "mixed")


@dataclass(frozen=True, slots=True)
class Outputs:
    """`values` [N, C] float32; `truncated`: how many of the texts were cut."""

    values: Floats
    truncated: int


def outputs_of(
    session: EncoderSession,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_length: int | None = None,
    batch_size: int | None = None,
    reporter: Reporter | None = None,
    label: str = "eval",
) -> Outputs:
    """The session's output for each text, in the order of `texts`.

    max_length: None = the model's. batch_size: None = 32, but 1 for a model that quantizes
    activations per tensor: there the other rows of a batch change a row's result, and on the
    device a text comes alone.

    Raises:
        UsageError: `max_length` is more than the model's.
    """
    if batch_size is None:
        batch_size = 1 if session.info.activation in _PER_BATCH else _BATCH
    limit = session.info.max_length if max_length is None else max_length
    if limit > session.info.max_length:
        raise UsageError(
            f"--max-length {limit} is more than this model's {session.info.max_length} tokens",
            f"use {session.info.max_length} or less",
        )
    # Texts of about equal length share a batch: less padding to compute.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    reporter = reporter or Silent()
    result: Floats | None = None
    truncated = 0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        encoded = tokenizer.encode([texts[row] for row in rows], limit)
        values = session.logits(encoded.ids, encoded.mask)
        if result is None:
            result = np.empty((len(texts), values.shape[1]), np.float32)
        result[rows] = values
        truncated += encoded.truncated
        reporter.progress(label, start + len(rows), len(texts))
    return Outputs(np.empty((0, 0), np.float32) if result is None else result, truncated)


def logits_of(
    session: EncoderSession,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_length: int | None = None,
    batch_size: int | None = None,
    reporter: Reporter | None = None,
    label: str = "eval",
) -> Floats:
    """The values of `outputs_of`, [N, C] float32."""
    return outputs_of(session, tokenizer, texts, max_length, batch_size, reporter, label).values


def say_truncated(share: float, reporter: Reporter) -> None:
    """Tell which share of the texts was cut, if any."""
    if share > 0:
        reporter.say(f"{share:.2%} of the texts are longer than the limit and were cut")


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Row-wise probabilities [N, C], in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    result: npt.NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return result
