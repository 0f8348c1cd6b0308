"""Fine-tuning a decoder on texts: next-token cross-entropy.

Plain texts are joined, each with an end-of-text token, and cut into windows of `max_length` tokens;
a window begins with the last token of the one before, so every token but the very first is
predicted once. A row of source and target is not joined: its prompt is the source in the model's
chat template (as `run` writes it) or, without one, the source and a line break; the loss counts
the target and the end-of-text token. A prompt that leaves no room for its target loses its
beginning, a target that is too long its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import Metric, Reporter
from pocketglm.data.texts import TextRow, read_text_rows
from pocketglm.errors import DataError
from pocketglm.eval.lm import WINDOW
from pocketglm.text import chat
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._decoder_job import DecoderJob, load_source
from pocketglm.train._job import FinetuneConfig, length_limit
from pocketglm.train._sequences import Row, Sequences, encode_prompts, score_rows, token_mean


@dataclass(frozen=True, slots=True)
class LmRows:
    """Train and validation rows."""

    train: Sequence[TextRow]
    validation: Sequence[TextRow]

    @property
    def contents(self) -> list[Any]:
        """As `TaskRows.contents`."""
        return [[row.text, row.prompt] for row in (*self.train, *self.validation)]


def read_lm(config: FinetuneConfig) -> LmRows:
    """Train and validation rows; of a single file, a tenth each is held out for them and for test.

    Raises:
        DataError: as `data.texts.read_text_rows`, or there are no rows to validate with.
    """
    train = read_text_rows(config.options, "train", training=True)
    validation = read_text_rows(config.options, "validation", training=True)
    if not validation:
        raise DataError(
            "there are no validation rows", "add some: early stopping needs them", path=config.data
        )
    return LmRows(train, validation)


@dataclass(frozen=True)
class LmJob(DecoderJob):
    """Windows of text."""

    score_name = "log-likelihood"

    def score(self, trainee: nn.Module) -> float:
        """Nats per validation token, negative."""
        found = score_rows(self.model, self.held_out)
        return -float(found.nll.sum() / found.tokens.sum())

    def metrics(self) -> Mapping[str, Metric]:
        nll = token_mean(self.score_rows())
        return {
            "perplexity": Metric(
                _exp(nll.value), nll.n, _exp(nll.low), _exp(nll.high), "per token"
            ),
            "nll": nll,
        }


def prepare_lm(ckpt: Checkpoint, config: FinetuneConfig, rows: LmRows, reporter: Reporter) -> LmJob:
    """Load the model and tokenize the rows.

    Raises:
        UsageError: `max_length` is more than the model has positions, or a rank is too large.
        CheckpointError: the checkpoint cannot be used.
    """
    limit = length_limit(ckpt, config.max_length)
    length = config.max_length or min(limit, WINDOW)
    source = load_source(ckpt, config)
    template = chat.read_template(ckpt.path)
    names = source.tokenizer, source.eos_id
    train, cut = text_sequences(*names, rows.train, length, template)
    held_out, _ = text_sequences(*names, rows.validation, length, template)
    tokens = int((train.lengths - train.starts).sum())
    reporter.say(
        f"{len(rows.train)} training texts, {len(rows.validation)} validation; {tokens:,} tokens "
        f"to learn from in {len(train.ids)} rows of at most {length}, {cut} of them cut"
    )
    return LmJob(source=source, train=train, held_out=held_out, settings={"max_length": length})


def text_sequences(
    tokenizer: Tokenizer, eos: int, rows: Sequence[TextRow], length: int, template: str | None
) -> tuple[Sequences, int]:
    """The rows as tokens, and how many of source and target were cut."""
    plain = [row.text for row in rows if row.prompt is None]
    ids: list[Row] = []
    if plain:
        joined = np.concatenate(
            [np.array([*row, eos], np.int32) for row in encode_prompts(tokenizer, plain)]
        )
        ids = [joined[start : start + length + 1] for start in range(0, len(joined) - 1, length)]
    starts, cut = [1] * len(ids), 0
    pairs = [row for row in rows if row.prompt is not None]
    prompts = _prompts(tokenizer, [row.prompt or "" for row in pairs], template)
    targets = tokenizer.inner.encode_batch_fast(
        [row.text for row in pairs], add_special_tokens=False
    )
    for prompt, encoded in zip(prompts, targets, strict=True):
        target = [*encoded.ids, eos]
        cut += len(prompt) + len(target) > length + 1
        target = target[:length]
        prompt = prompt[-(length + 1 - len(target)) :]
        ids.append(np.array(prompt + target, np.int32))
        starts.append(len(prompt))
    return Sequences(ids, np.array(starts, np.int64), tokenizer.pad_id), cut


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _prompts(tokenizer: Tokenizer, sources: list[str], template: str | None) -> list[list[int]]:
    if template is None:
        return encode_prompts(tokenizer, [f"{source}\n" for source in sources])
    messages = ([{"role": "user", "content": source}] for source in sources)
    names: dict[str, Any] = dict(tokenizer.special_tokens)
    texts = [chat.render(template, message, **names) for message in messages]
    return encode_prompts(tokenizer, texts, special=False)
