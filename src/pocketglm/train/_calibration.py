"""Rows of a task as a model sees them, to look at activations: formed as `train` forms them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import Ids, StepContext
from pocketglm.data.frames import grammar_of
from pocketglm.data.texts import TextRow
from pocketglm.errors import CheckpointError, InputError
from pocketglm.eval.lm import WINDOW
from pocketglm.model.hf import eos_ids_of, is_decoder, max_length_of
from pocketglm.text import chat
from pocketglm.text.frame import FrameTokens
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._command_job import encode_frames
from pocketglm.train._lm_job import text_sequences
from pocketglm.train._rows import tokenize
from pocketglm.train._sequences import Row

BATCH = 512  # tokens of a batch, unless one row has more
_LINES = 8  # texts that are joined at first


def calibration_reasons(ckpt: Checkpoint, context: StepContext) -> list[str]:
    """Why the rows cannot be shown to this model, from its tokenizer and a few of them."""
    if context.rows is None:
        return []
    if is_decoder(ckpt) == (context.task not in ("lm", "command")):
        kind = "a decoder" if is_decoder(ckpt) else "an encoder"
        return [f"it is {kind}, the task is {context.task}: give rows of a task that it can do"]
    stored = Checkpoint.open(ckpt.path)
    if (stored.config, stored.manifest) != (ckpt.config, ckpt.manifest):
        return []  # of a step that has not run yet: its tokenizer may become another one
    try:
        return [] if calibration_rows(ckpt, context, 1) else ["there are no training rows"]
    except InputError as error:
        return [f"{error.message}: {error.hint}" if error.hint else error.message]


def calibration_rows(ckpt: Checkpoint, context: StepContext, tokens: int) -> list[Row]:
    """Training rows, drawn by the seed until they have `tokens` tokens (or all); the last is cut.

    Of a decoder without the last token, which the model predicts but does not see; plain texts are
    joined to windows, each from a text drawn on.

    Raises:
        CheckpointError: the tokenizer cannot be used, or lacks the marks of commands.
    """
    found: list[Row] = []
    for row in _drawn(ckpt, context):
        if tokens <= 0:
            break
        if len(row := row[:tokens]):
            found.append(row)
            tokens -= len(row)
    return found


def batches_of(rows: Sequence[Row]) -> list[Ids]:
    """Token ids [B, S]: rows of one length together, so that none is padded."""
    batches = []
    for length in sorted({len(row) for row in rows}):
        same = [row for row in rows if len(row) == length]
        count = max(BATCH // length, 1)
        parts = (same[start : start + count] for start in range(0, len(same), count))
        batches += [np.stack(part).astype(np.int64) for part in parts]
    return batches


def _drawn(ckpt: Checkpoint, context: StepContext) -> Iterator[Row]:
    rows: Sequence[Any] = context.rows.train if context.rows else []
    order = np.random.default_rng(context.seed).permutation(len(rows)).tolist()
    tokenizer, limit = Tokenizer.load(ckpt.path), max_length_of(ckpt)
    if not is_decoder(ckpt):
        for number in order:
            yield from tokenize(tokenizer, [rows[number].text], limit).ids
    elif context.task == "command":
        tokens = FrameTokens(grammar_of(rows), tokenizer)
        for number in order:
            row = encode_frames(tokens, [rows[number]]).ids[0]
            if len(row) <= limit:
                yield row[:-1]
    else:
        eos = eos_ids_of(ckpt)
        if not eos:
            raise CheckpointError(
                f"{ckpt.path} names no end-of-text token, which joins texts",
                "set eos_token_id in its generation_config.json",
            )
        template, length = chat.read_template(ckpt.path), min(limit, WINDOW)
        for number in order:
            yield _window(tokenizer, eos[0], rows, number, length, template)


def _window(
    tokenizer: Tokenizer,
    eos: int,
    rows: Sequence[TextRow],
    first: int,
    length: int,
    template: str | None,
) -> Row:
    """A window that begins with text number `first`, or that row of source and target."""
    count = 1 if rows[first].prompt is not None else _LINES
    while True:
        part = rows[first : first + count]
        if count > 1:  # joined are the plain ones alone
            part = [row for row in part if row.prompt is None]
        ids = text_sequences(tokenizer, eos, part, length, template)[0].ids
        if count == 1 or len(ids) > 1 or first + count >= len(rows):
            if not ids:
                return np.empty(0, np.int32)
            return ids[0][:length] if count > 1 else ids[0][:-1]
        count *= 2
