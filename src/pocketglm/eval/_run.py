"""Texts through a Session: numpy in, numpy out, order kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import EncoderSession, Floats, Reporter, Silent
from pocketglm.text.tokenizer import Tokenizer

_BATCH = 32


def logits_of(
    session: EncoderSession,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_length: int | None = None,
    batch_size: int | None = None,
    reporter: Reporter | None = None,
    label: str = "eval",
) -> Floats:
    """The session's output for each text, [N, C] float32, in the order of `texts`.

    max_length: None = the model's. batch_size: None = 32, but 1 for a model that quantizes its
    activations per tensor: there the other rows of a batch change a row's result, and on the
    device a text comes alone.
    """
    if batch_size is None:
        batch_size = 1 if session.info.activation == "dynamic_tensor" else _BATCH
    limit = min(max_length or session.info.max_length, session.info.max_length)
    # Texts of about equal length share a batch: less padding to compute.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    reporter = reporter or Silent()
    result: Floats | None = None
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        encoded = tokenizer.encode([texts[row] for row in rows], limit)
        values = session.logits(encoded.ids, encoded.mask)
        if result is None:
            result = np.empty((len(texts), values.shape[1]), np.float32)
        result[rows] = values
        reporter.progress(label, start + len(rows), len(texts))
    return np.empty((0, 0), np.float32) if result is None else result


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Row-wise probabilities [N, C], in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    result: npt.NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return result
