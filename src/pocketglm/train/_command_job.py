"""Fine-tuning a decoder to write commands as frames; `text/frame.py` says how they are written.

A row is prompt and answer. The loss counts the marks alone, and the model chooses among marks: the
words of an answer are given when it is used, too. The marks become tokens of the model.

Slot swapping, an augmentation: in each epoch a share of the training rows get other values of the
same slots, drawn from the training rows of the same language and intent; a quarter of these are
made of two.
Words may become made-up ones (`_made_up.py`). What such a row says is a function of the seed, the
epoch and its number.

Validation is by teacher forcing: a row is an exact match if the model's first choice among all
marks is right at every one, each after the true ones. Greedy decoding would write the same, at many
times the cost; that it chooses among the marks of its intent can only make it better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import CommandGrammar
from pocketglm.contracts import Metric, Reporter
from pocketglm.data.frames import FrameRow, grammar_of, read_frames
from pocketglm.errors import DataError
from pocketglm.eval._stats import mean_metric
from pocketglm.text.frame import Frame, FrameTokens, intent_mark, is_boundary, mark_names, words
from pocketglm.train._decoder_job import DecoderJob, load_source
from pocketglm.train._job import FinetuneConfig, length_limit
from pocketglm.train._made_up import MadeUp
from pocketglm.train._prompt_loss import CommandLoss, PromptRows
from pocketglm.train._sequences import Sequences, score_rows, token_mean
from pocketglm.train.loop import EpochRows, Rows

_MIXED = 0.25  # share of new values that are made of two

Pool = Mapping[tuple[str, str, str], Sequence[str]]


@dataclass(frozen=True, slots=True)
class CommandRows:
    """Train and validation rows."""

    train: Sequence[FrameRow]
    validation: Sequence[FrameRow]

    @property
    def contents(self) -> list[Any]:
        """As `TaskRows.contents`."""
        rows = (*self.train, *self.validation)
        return [[row.text, row.frame.intent, row.frame.slots, row.language] for row in rows]


def read_commands(config: FinetuneConfig) -> CommandRows:
    """Train and validation rows; of a single file, a tenth each is held out for them and for test.

    Raises:
        DataError: as `data.frames.read_frames`, or there are no rows to validate with.
    """
    train = read_frames(config.options, "train", training=True)
    validation = read_frames(config.options, "validation", training=True)
    if not validation:
        raise DataError(
            "there are no validation rows", "add some: early stopping needs them", path=config.data
        )
    return CommandRows(train, validation)


@dataclass(frozen=True)
class CommandJob(DecoderJob):
    """`texts`: the training rows that fit; `share` of them get other slot values in an epoch.
    `made_up`: see `MadeUp`; `early_intent` and `text_loss`: weights, see `_prompt_loss.py`.
    """

    tokens: FrameTokens = field(kw_only=True)
    texts: Sequence[FrameRow] = ()
    share: float = 0.0
    made_up: float = 0.0
    early_intent: float = 0.0
    text_loss: float = 0.0
    seed: int = 0

    score_name = "exact match"

    def __post_init__(self) -> None:
        loss = CommandLoss(self.source.model, self.early_intent, self.text_loss)
        object.__setattr__(self, "trainee", loss)

    def rows(self) -> Rows | EpochRows:
        if not self.share and not self.made_up:
            return self._batches(self.train)
        pool = slot_values(self.texts)
        inventor = MadeUp(self.tokens, self.texts, self.made_up) if self.made_up else None

        def of_epoch(epoch: int) -> Rows:
            rng = np.random.default_rng([self.seed, epoch])
            chosen = rng.random(len(self.texts)) < self.share
            rows = [
                swapped(row, pool, rng) if swap else row
                for row, swap in zip(self.texts, chosen, strict=True)
            ]
            made = encode_frames(
                self.tokens, rows, (lambda row: inventor.words(row, rng)) if inventor else None
            )
            # A new value may be longer than the old one: such a row stays as it was.
            ids, starts = list(made.ids), made.starts.copy()
            for number in np.flatnonzero(made.lengths > self.settings["max_length"]):
                ids[number], starts[number] = self.train.ids[number], self.train.starts[number]
            made = replace(made, ids=ids, starts=starts)
            return self._batches(made)

        return of_epoch

    def _batches(self, rows: Sequences) -> Rows:
        if not self.early_intent and not self.text_loss:
            return Rows(rows.lengths, rows.collate)
        intents = [self.tokens.id[intent_mark(name)] for name in self.tokens.grammar.intents]
        return Rows(rows.lengths, PromptRows(rows, np.sort(intents)).collate)

    def score(self, trainee: nn.Module) -> float:
        """Share of exact matches; between equal ones, the share of right tokens decides."""
        found = score_rows(self.model, self.held_out)
        tokens = float(found.hits.sum() / found.tokens.sum())
        return float((found.hits == found.tokens).mean()) + tokens / (2 * len(found.tokens))

    def metrics(self) -> Mapping[str, Metric]:
        found = self.score_rows()
        return {
            "exact_match": mean_metric((found.hits == found.tokens).astype(np.float64)),
            "intent_accuracy": mean_metric(found.first.astype(np.float64)),
            "nll": token_mean(found),
        }


def prepare_command(
    ckpt: Checkpoint, config: FinetuneConfig, rows: CommandRows, reporter: Reporter
) -> CommandJob:
    """Load the model and tokenize the rows; those that are too long are left out, and counted. So
    are validation rows with an intent or a slot that no training row shows.

    Raises:
        UsageError: `max_length` is more than the model has positions, or a rank is too large.
        CheckpointError: the checkpoint cannot be used.
        DataError: no row is left.
    """
    longest = length_limit(ckpt, config.max_length)
    limit = config.max_length or longest
    grammar = grammar_of(rows.train)
    source = load_source(ckpt, config, mark_names(grammar))
    tokens = FrameTokens(grammar, source.tokenizer)
    known = [row for row in rows.validation if _can_write(grammar, row.frame)]
    if not known:
        raise DataError(
            "no validation row has an intent and slots that training shows",
            "add training rows for them",
            path=config.data,
        )
    texts, train = _fitting(tokens, rows.train, limit, config)
    _, held_out = _fitting(tokens, known, limit, config)
    slots = {name for names in grammar.intents.values() for name in names}
    reporter.say(
        f"{len(rows.train)} training rows, {len(rows.validation)} validation, "
        f"{len(grammar.intents)} intents, {len(slots)} slots"
    )
    if unknown := len(rows.validation) - len(known):
        reporter.say(
            f"{unknown} validation rows have an intent, or a slot of it, that no training row has: "
            "left out"
        )
    dropped = len(rows.train) - len(texts), len(known) - len(held_out.ids)
    reporter.say(
        f"longest row {train.lengths.max()} tokens of {limit}: "
        f"{dropped[0]} training and {dropped[1]} validation rows are too long and left out"
    )
    return CommandJob(
        source=source,
        train=train,
        held_out=held_out,
        settings={"max_length": limit},
        command=grammar,
        tokens=tokens,
        texts=texts,
        share=config.slot_swap,
        made_up=config.made_up,
        early_intent=config.early_intent,
        text_loss=config.text_loss,
        seed=config.seed,
    )


def _can_write(grammar: CommandGrammar, frame: Frame) -> bool:
    names = grammar.intents.get(frame.intent)
    return names is not None and all(name in names for name, _ in frame.slots)


def _fitting(
    tokens: FrameTokens, rows: Sequence[FrameRow], limit: int, config: FinetuneConfig
) -> tuple[list[FrameRow], Sequences]:
    every = encode_frames(tokens, rows)
    kept = np.flatnonzero(every.lengths <= limit)
    if not len(kept):
        raise DataError(
            f"all {len(rows)} rows are longer than {limit} tokens (the shortest has "
            f"{every.lengths.min()})",
            "raise --max-length, or start from a model with more positions",
            path=config.data,
        )
    ids = [every.ids[number] for number in kept]
    return [rows[n] for n in kept], replace(every, ids=ids, starts=every.starts[kept])


def encode_frames(
    tokens: FrameTokens,
    rows: Sequence[FrameRow],
    words_of: Callable[[FrameRow], list[list[int]]] | None = None,
) -> Sequences:
    """Rows as tokens; the marks of the answer count. words_of: other tokens for a row's words."""
    ids, starts = [], np.empty(len(rows), np.int64)
    for number, row in enumerate(rows):
        made = words_of(row) if words_of else None
        prompt = tokens.prompt(row.text, made)
        answer = tokens.answer(row.text, row.frame, row.spans, made)
        ids.append(np.array([*prompt, *answer], np.int32))
        starts[number] = len(prompt)
    return Sequences(ids, starts, 0, np.sort(tokens.marks))


# --- slot swapping -------------------------------------------------------------------------------


def slot_values(rows: Sequence[FrameRow]) -> Pool:
    """The distinct values of each (language, intent, slot name), sorted.

    By intent, since a value often tells it: of two intents with a slot `object_type` one has movie
    times there, and the other one albums.
    """
    values: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        for name, value in row.frame.slots:
            values.setdefault((row.language, row.frame.intent, name), set()).add(value)
    return {key: sorted(found) for key, found in values.items()}


def _other(values: Sequence[str], rng: np.random.Generator) -> str:
    """One of the values; now and then the beginning of one and the end of another."""
    first, second = (values[int(n)] for n in rng.integers(len(values), size=2))
    head, tail = words(first), words(second)
    if rng.random() >= _MIXED or len(head) + len(tail) < 3:  # two single words make no third value
        return first
    end, start = head[int(rng.integers(len(head)))][1], tail[int(rng.integers(len(tail)))][0]
    between = "" if is_boundary(first[end - 1] + second[start], 1) else " "
    return first[:end] + between + second[start:]


def swapped(row: FrameRow, pool: Pool, rng: np.random.Generator) -> FrameRow:
    """`row` with other values of its slots, in text and frame; the row itself where a value would
    grow together with the word next to it."""
    text, slots, spans, last = "", [], [], 0
    for (start, stop), (name, _) in zip(row.spans, row.frame.slots, strict=True):
        value = _other(pool[row.language, row.frame.intent, name], rng)
        text += row.text[last:start]
        spans.append((len(text), len(text) + len(value)))
        text += value
        slots.append((name, value))
        last = stop
    text += row.text[last:]
    if not all(is_boundary(text, index) for span in spans for index in span):
        return row
    frame = Frame(row.frame.intent, tuple(slots))
    return replace(row, text=text, frame=frame, spans=tuple(spans))
