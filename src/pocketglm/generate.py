"""L1: token by token out of an open decoder: sampling, stop ids, constraints, streamed text.

Nucleus (top-p) sampling: Holtzman et al. 2020, arXiv:1904.09751, section 3.1. One random number a
sampled token from numpy's generator, so a seed gives the same text on every runtime as far as
their logits agree. Torch-free.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import DecoderSession, Floats, Ids
from pocketglm.errors import UsageError, WorkError
from pocketglm.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "context"]
_BROKEN = "\ufffd"  # what bytes that are no whole character decode to
_WINDOW, _KEPT = 32, 8  # tokens that a TextStream decodes again, at most and after a cut


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest one.

    top_p: only the likeliest tokens whose probabilities reach this sum are drawn from.

    Raises:
        UsageError: a value outside of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1"),
            (
                math.isfinite(self.temperature) and self.temperature >= 0,
                "temperature",
                self.temperature,
                "0 (the likeliest token) or more",
            ),
            (0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1"),
            (self.seed >= 0, "seed", self.seed, "0 or more"),
        )
        for right, name, value, wanted in checks:
            if not right:
                raise UsageError(f"{name} {value} should be {wanted}", "change the option")


_GREEDY = Sampling()


class Constraint(Protocol):
    """What may be written, token by token; used for one text."""

    def allowed(self) -> Ids | None:
        """Token ids that may come next; None: any; none at all: the text is complete."""

    def advance(self, token: int) -> None:
        """`token` was written."""


class Generation(Iterator[int]):
    """The tokens of one answer as they come, and, at its end, what became of it.

    finish: "stop" (an end-of-text token or the constraint's end), "length" (`max_new_tokens`) or
    "context" (prompt and answer fill the cache); None before the end. Times are in seconds, without
    those that the caller spends between two tokens. The session's text is then prompt and answer,
    but for the answer's last tokens, whose logits nobody needed.
    """

    def __init__(
        self,
        session: DecoderSession,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        constraint: Constraint | None,
    ) -> None:
        self.prompt_tokens, self.new_tokens = len(prompt_ids), 0
        self.finish: Finish | None = None
        self.seconds, self.first_token_seconds = 0.0, 0.0
        self._first = (0, 0.0)  # tokens and seconds of the first call, the prompt's
        self._later = 0  # tokens appended by the calls after it
        self._random = np.random.default_rng(sampling.seed)
        self._tokens = self._generate(session, list(prompt_ids), sampling, constraint)

    def __next__(self) -> int:
        start, before = time.perf_counter(), self.new_tokens
        try:
            return next(self._tokens)
        finally:
            self.seconds += time.perf_counter() - start
            if not before:
                self.first_token_seconds = self.seconds

    @property
    def prefill_per_second(self) -> float | None:
        """Prompt tokens per second; None: the model was not asked."""
        tokens, seconds = self._first
        return tokens / seconds if tokens else None

    @property
    def decode_per_second(self) -> float | None:
        """Tokens per second after the prompt; None: there was no step."""
        return self._later / (self.seconds - self._first[1]) if self._later else None

    def _generate(
        self,
        session: DecoderSession,
        waiting: list[int],
        sampling: Sampling,
        constraint: Constraint | None,
    ) -> Iterator[int]:
        """`waiting`: tokens that the session does not have yet; logits are asked for when needed,
        so a run of tokens without a choice is appended in one call."""
        while True:
            allowed = constraint.allowed() if constraint else None
            if allowed is not None and len(allowed) == 0:
                self.finish = "stop"
            elif self.new_tokens == sampling.max_new_tokens:
                self.finish = "length"
            elif session.length + len(waiting) == session.info.max_length:
                self.finish = "context"
            if self.finish:
                return
            if allowed is not None and len(allowed) == 1:
                token = int(allowed[0])
            else:
                token = choose(self._append(session, waiting), sampling, self._random, allowed)
                waiting = []
            if token in session.info.eos_ids:
                self.finish = "stop"
                return
            if constraint:
                constraint.advance(token)
            waiting.append(token)
            self.new_tokens += 1
            yield token

    def _append(self, session: DecoderSession, tokens: list[int]) -> Floats:
        start = time.perf_counter()
        logits = session.step(tokens[0]) if len(tokens) == 1 else session.prefill(tokens)
        if self._first[0]:
            self._later += len(tokens)
        else:
            self._first = (len(tokens), time.perf_counter() - start)
        return logits


def generate(
    session: DecoderSession,
    prompt_ids: Sequence[int],
    sampling: Sampling = _GREEDY,
    constraint: Constraint | None = None,
) -> Generation:
    """Append the prompt to the session's text and write on; see `Generation`.

    Raises:
        UsageError: the prompt is empty, or longer than what is left of the cache.
        WorkError: while iterating: the model's logits are not finite.
    """
    limit, length = session.info.max_length, session.length + len(prompt_ids)
    if not len(prompt_ids):
        raise UsageError("there is no token to continue from", "give a text")
    if length > limit:
        raise UsageError(
            f"the prompt makes the text {length} tokens long, the context holds {limit}",
            "shorten it, or use a model or an export with a longer context",
        )
    return Generation(session, prompt_ids, sampling, constraint)


def choose(
    logits: Floats, sampling: Sampling, random: np.random.Generator, allowed: Ids | None = None
) -> int:
    """The next token by logits [V]; of `allowed` ids alone where they are given.

    Raises:
        WorkError: the logits are not finite.
    """
    values = logits if allowed is None else logits[allowed]
    if not np.isfinite(values.max()):
        raise WorkError(
            "the model's logits are not finite numbers",
            "its weights are broken or overflow: check them with pocketglm inspect and eval",
        )
    if sampling.temperature == 0:
        index = int(values.argmax())
    else:
        chances = distribution(values, sampling.temperature, sampling.top_p).cumsum()
        index = int(np.searchsorted(chances, random.random() * chances[-1], side="right"))
        index = min(index, int(np.searchsorted(chances, chances[-1])))  # where rounding reaches 1
    return index if allowed is None else int(allowed[index])


def distribution(logits: Floats, temperature: float, top_p: float) -> npt.NDArray[np.float64]:
    """Probabilities float64 [V] of softmax(logits / temperature) in its nucleus; sum 1.

    The nucleus is the shortest list of the likeliest tokens whose sum is at least `top_p`; of
    equally likely ones those with smaller ids come first.
    """
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    with np.errstate(over="ignore"):  # of a tiny temperature: to minus infinity, as it should
        scaled /= temperature
    chances: npt.NDArray[np.float64] = np.exp(scaled)
    chances /= chances.sum()
    if top_p == 1:
        return chances
    # All tokens below this together have less than 1 - top_p: sorting the others is enough.
    likely = np.flatnonzero(chances >= (1 - top_p) / len(chances))
    likely = likely[np.argsort(-chances[likely], kind="stable")]
    count = int(np.searchsorted(chances[likely].cumsum(), top_p)) + 1
    nucleus = np.zeros_like(chances)
    nucleus[likely[:count]] = chances[likely[:count]]
    nucleus /= nucleus.sum()
    return nucleus


class TextStream:
    """Token ids in, the text that they add out; bytes of an incomplete character wait."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of their text that were given out

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often "" within a character."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # A character has up to 4 bytes; a tokenizer decodes the first 1 to 3 to as many signs.
        held = min(len(text) - len(text.rstrip(_BROKEN)), 3)
        piece = text[self._shown : len(text) - held]
        self._shown += len(piece)
        if not held and len(self._ids) > _WINDOW:
            tail = self._tokenizer.decode(self._ids[-_KEPT:])
            if text.endswith(tail):  # else it begins within a character: next time
                self._ids, self._shown = self._ids[-_KEPT:], len(tail)
        return piece

    def flush(self) -> str:
        """What still waits, at the end of the text."""
        text = self._tokenizer.decode(self._ids)
        piece, self._shown = text[self._shown :], len(text)
        return piece
