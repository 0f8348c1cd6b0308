"""Language modelling: how well a decoder predicts real text, and how far it is from a baseline.

* `perplexity`: exp of `nll`, the mean negative log-likelihood in nats per token.
* `bits_per_byte`: the same in bits per UTF-8 byte of the texts (an end of text is one byte more):
  comparable between tokenizers.
* against a baseline, on the same tokens: `kl`, the mean Kullback-Leibler divergence from the
  baseline's next-token distribution to the model's in nats per token, and `flip_rate`, the share of
  tokens before which the likeliest next token differs.

Plain texts are joined, an end-of-text token after each, as in training; windows of W tokens move by
W/2, so that a token has at least W/2 tokens before it (but for the first W). What is counted once:
every token but the first one and those that the tokenizer puts before each text. Rows of source and
target stand alone: the prompt is the source in the chat template, or the source and a line break;
the target and its end count. The mean is over all tokens; intervals resample the texts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import (
    DataOptions,
    DecoderSession,
    Floats,
    Ids,
    Metric,
    Reporter,
    Scores,
    Task,
)
from pocketglm.data.texts import TextRow, read_text_rows
from pocketglm.errors import DataError, UsageError
from pocketglm.eval._stats import ratio_metric
from pocketglm.text import chat
from pocketglm.text.tokenizer import Tokenizer

WINDOW = 512  # tokens, where the model has room for as many: logits of more need much memory
LAST_ONLY_TOKENS = 4096  # counted by default where a file computes one token's logits at a time
_VALUES = 1 << 22  # logits that are handled in float64 at a time
_NOBODY = -1

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens, and the text [n] whose score each counts for (-1: none)."""

    ids: Ids
    owners: Ids


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of all texts. `totals`: how many each has, [N]; `cut`: texts that were cut."""

    windows: list[Window]
    totals: Values
    cut: int


@dataclass(frozen=True, slots=True)
class TokenScores:
    """By counted token: its text, nats, and next to a baseline the divergence, whether the
    likeliest token differs, and the baseline's nats.
    """

    owners: Ids
    nll: Values
    kl: Values
    flips: Values
    baseline_nll: Values


def score(
    folder: Path,
    session: DecoderSession,
    tokenizer: Tokenizer,
    options: DataOptions,
    max_length: int | None,
    reporter: Reporter,
) -> Scores:
    """Perplexity of the test texts of `options.path`.

    max_length: tokens of a window, None = `WINDOW` or as many as the model allows.

    Raises:
        UsageError: `max_length` is more than the model's.
        DataError: the data cannot be used, or has no token to predict.
    """
    return _score(folder, session, None, tokenizer, options, max_length, reporter)


def against(
    folder: Path,
    session: DecoderSession,
    baseline: DecoderSession,
    tokenizer: Tokenizer,
    options: DataOptions,
    max_length: int | None,
    reporter: Reporter,
) -> Scores:
    """`score`, and divergence and flip rate from the baseline on the same tokens.

    Raises:
        UsageError: as `score`; the models' vocabularies have different sizes.
        DataError: as `score`.
    """
    ours, theirs = session.info.vocab_size, baseline.info.vocab_size
    if ours != theirs:
        raise UsageError(
            f"the model has {ours} token ids, the baseline {theirs}: their predictions cannot be "
            "compared",
            "take a baseline with the same tokenizer, such as the checkpoint it was made from",
        )
    return _score(folder, session, baseline, tokenizer, options, max_length, reporter)


def _score(
    folder: Path,
    session: DecoderSession,
    baseline: DecoderSession | None,
    tokenizer: Tokenizer,
    options: DataOptions,
    max_length: int | None,
    reporter: Reporter,
) -> Scores:
    sessions = [session] if baseline is None else [session, baseline]
    limit = min(s.info.max_length for s in sessions)
    if max_length is not None and max_length > limit:
        raise UsageError(
            f"--max-length {max_length} is more than this model's {limit} tokens",
            f"use {limit} or less",
        )
    length = max_length or min(limit, WINDOW)
    capped = options.limit is None and any(s.info.scores == "last" for s in sessions)
    rows = read_text_rows(options, "test")
    if capped:
        rows = random.Random(0).sample(rows, len(rows))
    tokens = windows_of(rows, tokenizer, session.info.eos_ids, length, folder)
    windows = tokens.windows
    if capped:
        windows = _first_tokens(windows, LAST_ONLY_TOKENS)
    if not windows:
        raise DataError(
            "the texts hold no token to predict", "give longer texts", path=options.path
        )
    found = _measure(session, baseline, windows, reporter)
    end = bool(session.info.eos_ids)
    sizes = np.array([len(row.text.encode()) + end for row in rows], np.float64)
    scores = lm_scores(found, tokens.totals, sizes, compared=baseline is not None)
    notes = [
        f"{len(found.nll):,} tokens of {len(np.unique(found.owners)):,} texts; windows of "
        f"{length} tokens that move by {_stride(length)}"
    ]
    if capped and len(found.nll) == LAST_ONLY_TOKENS:
        notes.append(
            f"this export computes one token at a time, so only {LAST_ONLY_TOKENS:,} tokens were "
            "scored; --limit N scores the tokens of N texts"
        )
    for note in notes:
        reporter.say(note)
    return replace(scores, truncated=tokens.cut / len(rows), notes=notes)


# --- tokens --------------------------------------------------------------------------------------


def _stride(length: int) -> int:
    return max(length // 2, 1)


def windows_of(
    rows: Sequence[TextRow],
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    length: int,
    folder: Path,
) -> Tokens:
    """Windows of at most `length` + 1 tokens, the last of which is only predicted.

    Raises:
        DataError: a text is not Unicode.
        CheckpointError: the chat template in `folder` fails to render.
    """
    end = list(eos_ids[:1])
    before = tokenizer.encode_prompt("a")
    special = len(before) - len(tokenizer.encode_prompt("a", special=False))
    template = chat.read_template(folder)
    windows: list[Window] = []
    ids, owners, totals, cut = [], [], np.zeros(len(rows)), 0
    for number, row in enumerate(rows):
        if row.prompt is None:
            tokens = tokenizer.encode_prompt(row.text) + end
            ids += tokens
            totals[number] = len(tokens) - special
            owners += [_NOBODY] * special + [number] * (len(tokens) - special)
            continue
        start = _prompt(tokenizer, row.prompt, template)
        target = tokenizer.encode_prompt(row.text, special=False) + end
        totals[number] = len(target)
        cut += len(start) + len(target) > length + 1
        target = target[:length]
        start = start[-(length + 1 - len(target)) :]
        marks = [_NOBODY] * len(start) + [number] * len(target)
        windows.append(Window(np.array(start + target, np.int64), np.array(marks, np.int64)))
    stream = _slide(np.array(ids, np.int64), np.array(owners, np.int64), length)
    return Tokens([*stream, *windows], totals, cut)


def _prompt(tokenizer: Tokenizer, source: str, template: str | None) -> list[int]:
    if template is None:
        return tokenizer.encode_prompt(f"{source}\n")
    names: dict[str, Any] = dict(tokenizer.special_tokens)
    text = chat.render(template, [{"role": "user", "content": source}], **names)
    return tokenizer.encode_prompt(text, special=False)


def _slide(ids: Ids, owners: Ids, length: int) -> Iterator[Window]:
    """Each token but the first is counted in the first window that holds it."""
    done = 1
    for start in range(0, len(ids), _stride(length)):
        stop = min(start + length + 1, len(ids))
        if stop <= done:
            return
        marks = owners[start:stop].copy()
        marks[: done - start] = _NOBODY
        if (marks != _NOBODY).any():
            yield Window(ids[start:stop], marks)
        done = stop


def _first_tokens(windows: Sequence[Window], count: int) -> list[Window]:
    """The windows up to the token that is counted as number `count`."""
    kept: list[Window] = []
    for window in windows:
        places = np.flatnonzero(window.owners != _NOBODY)[:count]
        kept.append(Window(window.ids[: places[-1] + 1], window.owners[: places[-1] + 1]))
        count -= len(places)
        if not count:
            break
    return kept


# --- scores --------------------------------------------------------------------------------------


def _measure(
    session: DecoderSession,
    baseline: DecoderSession | None,
    windows: Sequence[Window],
    reporter: Reporter,
) -> TokenScores:
    parts: list[TokenScores] = []
    for number, window in enumerate(windows, 1):
        places = np.flatnonzero(window.owners != _NOBODY)
        inputs = [int(token) for token in window.ids[:-1]]
        logits = session.score(inputs)[places - 1]
        other = None if baseline is None else baseline.score(inputs)[places - 1]
        found = token_scores(logits, window.ids[places], other)
        parts.append(TokenScores(window.owners[places], *found))
        reporter.progress("eval", number, len(windows))
    return TokenScores(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("owners", "nll", "kl", "flips", "baseline_nll")
        )
    )


def token_scores(
    logits: Floats, targets: Ids, baseline: Floats | None = None
) -> tuple[Values, Values, Values, Values]:
    """Of logits [N, V] before the tokens `targets` [N]: nats, and next to a baseline's logits the
    divergence from it in nats, 1 where the likeliest token differs, and the baseline's nats (else
    zeros); float64 [N].
    """
    count, size = logits.shape
    nll, kl, flips, baseline_nll = np.zeros((4, count))
    for start in range(0, count, max(_VALUES // size, 1)):
        part = slice(start, start + max(_VALUES // size, 1))
        chances = _log_softmax(logits[part])
        nll[part] = -np.take_along_axis(chances, targets[part, None], 1)[:, 0]
        if baseline is not None:
            true = _log_softmax(baseline[part])
            kl[part] = (np.exp(true) * (true - chances)).sum(axis=1)
            flips[part] = logits[part].argmax(axis=1) != baseline[part].argmax(axis=1)
            baseline_nll[part] = -np.take_along_axis(true, targets[part, None], 1)[:, 0]
    return nll, kl, flips, baseline_nll


def _log_softmax(logits: Floats) -> Values:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def lm_scores(
    found: TokenScores, totals: Values, sizes: Values, *, compared: bool = False
) -> Scores:
    """Metrics of scored tokens; `rows` holds how many `tokens` of each text were scored, and their
    means (NaN: none).

    totals, sizes: tokens and bytes of each text, [N]; a text of which some tokens are scored counts
    for that share of its bytes.
    """
    count = len(totals)
    tokens = np.bincount(found.owners, minlength=count).astype(np.float64)
    counted = tokens > 0
    total = int(tokens.sum())

    def per_row(values: Values) -> Values:
        summed: Values = np.bincount(found.owners, values, minlength=count).astype(np.float64)
        return summed

    def per_token(values: Values, unit: str) -> Metric:
        return ratio_metric(per_row(values)[counted], tokens[counted], n=total, unit=unit)

    nll = per_token(found.nll, "nats/token")
    bytes_scored = (sizes * tokens / np.maximum(totals, 1))[counted]
    bits = per_row(found.nll) / math.log(2)
    metrics = {
        "perplexity": Metric(
            *(_exp(nll.value), total, _exp(nll.low), _exp(nll.high)), unit="per token"
        ),
        "nll": nll,
        "bits_per_byte": ratio_metric(bits[counted], bytes_scored, n=total, unit="bits/byte"),
    }
    values = {"nll": found.nll}
    if compared:
        metrics["kl"] = per_token(found.kl, "nats/token")
        metrics["flip_rate"] = per_token(found.flips, "fraction")
        values |= {"kl": found.kl, "flip_rate": found.flips, "baseline_nll": found.baseline_nll}
    means = {
        name: np.divide(per_row(v), tokens, out=np.full(count, np.nan), where=counted)
        for name, v in values.items()
    }
    return Scores(primary="perplexity", metrics=metrics, rows=means | {"tokens": tokens})


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


SPEC = Task(
    summary="language modelling: perplexity, bits per byte; KL and flips against a baseline",
    score=score,
    kind="decoder",
    against=against,
)
