"""What `run` does with a decoder: a conversation whose answers stream, or commands to actions."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pocketglm.artifacts.export import is_export, read_export
from pocketglm.artifacts.manifest import CommandGrammar, read_manifest
from pocketglm.artifacts.schemas import RunResult
from pocketglm.cli._common import write
from pocketglm.contracts import DecoderSession
from pocketglm.data.frames import action
from pocketglm.errors import UsageError
from pocketglm.eval.command import parse
from pocketglm.generate import Generation, Sampling, TextStream, generate
from pocketglm.text.chat import read_template, render
from pocketglm.text.frame import FrameTokens
from pocketglm.text.tokenizer import Tokenizer

EXAMPLE = 'for example: run PATH "set an alarm"'


class Respond(Protocol):
    """Prints a model's response to one text."""

    def __call__(self, text: str) -> None: ...

    def reset(self) -> None:
        """Forget the texts before."""


class Conversation:
    """What was said so far, in the session's text.

    With the folder's chat template every question sees the answers before it; without one (or with
    `raw`) each text is continued by itself, as the tokenizer writes it.

    Raises:
        UsageError: `system` where there is no template that could carry it.
        CheckpointError: the folder's tokenizer or template cannot be read.
    """

    def __init__(
        self,
        session: DecoderSession,
        path: Path,
        sampling: Sampling,
        *,
        raw: bool = False,
        system: str | None = None,
    ) -> None:
        self.session, self.path, self.sampling = session, path, sampling
        self._tokenizer = Tokenizer.load(path)
        self._template = None if raw else read_template(path)
        if system is not None and self._template is None:
            reason = "--raw leaves the chat template out" if raw else f"{path} has no chat template"
            raise UsageError(
                f"--system has no place: {reason}", "write it into the text, or leave it out"
            )
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._known: list[int] = []  # the session's text
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self._said: list[dict[str, str]] = []

    def prompt(self, text: str) -> list[int]:
        """The tokens of the whole conversation with a new question.

        Raises:
            UsageError: it is empty, or leaves no room for an answer.
            CheckpointError: the chat template fails to render.
        """
        if not text.strip():
            raise UsageError("the text is empty", EXAMPLE)
        if self._template is None:
            ids = self._tokenizer.encode_prompt(text)
        else:
            messages = [*self._system, *self._said, {"role": "user", "content": text}]
            names: dict[str, Any] = dict(self._tokenizer.special_tokens)
            ids = self._tokenizer.encode_prompt(
                render(self._template, messages, **names), special=False
            )
        limit = self.session.info.max_length
        if len(ids) >= limit:
            whole = " with what was said before" if self._said else ""
            raise UsageError(
                f"the prompt has {len(ids)} tokens{whole}, the context holds {limit}: there is no "
                "room for an answer",
                "/reset begins a new conversation"
                if self._said
                else "shorten it, or use a model or export with a longer context",
            )
        return ids

    def ask(self, text: str) -> Answer:
        """Begin an answer; see `prompt` for the errors."""
        return Answer(self, text, self.prompt(text))

    def _begin(self, ids: list[int]) -> Generation:
        """Keep what the session's text has in common with the prompt; the last token is new."""
        shared = 0
        for mine, wanted in zip(self._known, ids[:-1], strict=False):
            if mine != wanted:
                break
            shared += 1
        self.session.rewind(self.session.length - shared)
        return generate(self.session, ids[shared:], self.sampling)

    def _end(self, ids: list[int], question: str, answer: str) -> None:
        self._known = ids[: self.session.length]
        if self._template is not None:
            self._said += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]


class Answer:
    """One answer; iterating gives its text in pieces, as they come.

    `text` is what came so far; an answer that is left early stays part of the conversation.
    """

    def __init__(self, conversation: Conversation, question: str, ids: list[int]) -> None:
        self._conversation, self._question, self._ids = conversation, question, ids
        self.prompt_tokens, self.text = len(ids), ""
        self.generation = conversation._begin(ids)

    @property
    def room(self) -> int:
        """Tokens that the context has left for the answer."""
        return self._conversation.session.info.max_length - self.prompt_tokens

    def __iter__(self) -> Iterator[str]:
        stream, ids = TextStream(self._conversation._tokenizer), list(self._ids)
        try:
            for token in self.generation:
                ids.append(token)
                if piece := stream.add(token):
                    self.text += piece
                    yield piece
            if piece := stream.flush():
                self.text += piece
                yield piece
        finally:
            self._conversation._end(ids, self._question, self.text)

    def result(self) -> RunResult:
        """The finished answer."""
        generation, conversation = self.generation, self._conversation
        return RunResult(
            path=str(conversation.path),
            runtime=conversation.session.info.runtime,
            text=self._question,
            answer=self.text,
            prompt_tokens=self.prompt_tokens,
            new_tokens=generation.new_tokens,
            finish=generation.finish,
            prefill_per_second=generation.prefill_per_second,
            decode_per_second=generation.decode_per_second,
            first_token_ms=1e3 * generation.first_token_seconds,
            milliseconds=1e3 * generation.seconds,
        )

    def cost(self) -> str:
        """What it cost, in one line."""
        generation, sampling = self.generation, self._conversation.sampling
        ends = {
            "stop": "end of text",
            "length": f"stopped at --max-new-tokens {sampling.max_new_tokens}",
            "context": f"stopped: the context of {self.prompt_tokens + self.room} tokens is full",
            None: "interrupted",
        }
        prefill, decode = generation.prefill_per_second, generation.decode_per_second
        return (
            f"[{self.prompt_tokens} prompt tokens{f' at {prefill:.0f}/s' if prefill else ''}, "
            f"first token after {1e3 * generation.first_token_seconds:.0f} ms; "
            f"{generation.new_tokens} new tokens{f' at {decode:.1f}/s' if decode else ''}; "
            f"{ends[generation.finish]}]"
        )


class Talk:
    """Prints each answer as it comes, and its cost on stderr.

    stated: the user asked for this many new tokens, and shall know if there is no room for them.
    """

    def __init__(self, conversation: Conversation, json: bool, *, stated: bool) -> None:
        self._conversation, self._json, self._stated = conversation, json, stated

    def __call__(self, text: str) -> None:
        answer = self._conversation.ask(text)
        wanted = self._conversation.sampling.max_new_tokens
        if self._stated and wanted > answer.room:
            sys.stderr.write(
                f"the context of {answer.prompt_tokens + answer.room} tokens has room for "
                f"{answer.room} new ones beside the prompt's {answer.prompt_tokens}, "
                f"--max-new-tokens asks for {wanted}\n"
            )
        try:
            for piece in answer:
                if not self._json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        finally:
            if not self._json:
                sys.stdout.write("\n")
                sys.stdout.flush()
                sys.stderr.write(answer.cost() + "\n")
        if self._json:
            write(answer.result(), True, lambda: None)

    def reset(self) -> None:
        self._conversation.reset()


class CommandParser:
    """Prints the action of each command."""

    def __init__(
        self, session: DecoderSession, path: Path, grammar: CommandGrammar, json: bool
    ) -> None:
        self._session, self._path, self._json = session, path, json
        self._tokens = FrameTokens(grammar, Tokenizer.load(path))

    def __call__(self, text: str) -> None:
        if not text.strip():
            raise UsageError("the text is empty", EXAMPLE)
        info = self._session.info
        limit = info.max_length
        needed = self._tokens.length(text)
        if needed > limit:
            raise UsageError(
                f"the command and its answer have {needed} tokens, the context holds {limit}",
                "shorten it, or use a model or export with a longer context",
            )
        start = time.perf_counter()
        found = parse(self._session, self._tokens, text)
        result = RunResult(
            path=str(self._path),
            runtime=info.runtime,
            text=text,
            intent=found.intent,
            slots=[{"name": name, "value": value} for name, value in found.slots],
            action=action(found.intent, found.slots),
            prompt_tokens=len(self._tokens.prompt(text)),
            milliseconds=1e3 * (time.perf_counter() - start),
        )
        write(result, self._json, lambda: print(result.action))

    def reset(self) -> None:
        """Nothing: each command is by itself."""


def grammar_of(path: Path) -> CommandGrammar | None:
    """The intents and slots of a model that was trained for commands; None: it was not."""
    return (read_export(path) if is_export(path) else read_manifest(path)).command
