"""Try a model: the label with its score, the embedding, or the streamed answer, of a text."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from typer import Option

from pocketglm.artifacts.schemas import RunResult
from pocketglm.cli._chat import EXAMPLE, CommandParser, Conversation, Respond, Talk, grammar_of
from pocketglm.cli._common import Json, MaxLength, Threads, drop_output, write
from pocketglm.contracts import DecoderSession, EncoderSession, RunOptions
from pocketglm.errors import InputError, UsageError, as_lines
from pocketglm.generate import Sampling
from pocketglm.runtimes import open_session
from pocketglm.text.tokenizer import Tokenizer


def main(
    path: Annotated[Path, typer.Argument(help="Checkpoint or export folder.")],
    text: Annotated[
        str | None,
        typer.Argument(
            help="The text; without it, lines of stdin; on a terminal, a conversation.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int | None, Option(min=1, help="Encoder: how many labels to print (default 3).")
    ] = None,
    max_length: MaxLength = None,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="Decoder: longest answer in tokens (default 256).")
    ] = None,
    temperature: Annotated[
        float | None, Option(min=0.0, help="Decoder: 0 (default) takes the likeliest token.")
    ] = None,
    top_p: Annotated[
        float | None, Option(help="Decoder: draw from the likeliest tokens of this sum (1).")
    ] = None,
    seed: Annotated[int | None, Option(min=0, help="Decoder: of the drawing (0).")] = None,
    system: Annotated[
        str | None, Option(help="Decoder: the system message.", show_default=False)
    ] = None,
    raw: Annotated[
        bool, Option("--raw", help="Decoder: continue the text, without chat template or grammar.")
    ] = False,
    context: Annotated[
        int | None, Option(min=1, help="Decoder: tokens of its cache (default: all it can hold).")
    ] = None,
    runtime: Annotated[
        str | None, Option(help="Another runtime that reads the export, such as genai.")
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Print the label with its score, the embedding, or the answer, of TEXT."""
    text = _one_text(text) if json else text
    drawing = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    drawing |= {"seed": seed}
    given = {key: value for key, value in drawing.items() if value is not None}
    sampling = Sampling(**given)  # type: ignore[arg-type]
    session = open_session(path, RunOptions(threads=threads, context=context), runtime)
    respond: Respond
    try:
        if session.info.kind == "encoder":
            _refuse(path, "an encoder", **drawing, system=system, raw=raw or None, context=context)
            respond = Labels(cast(EncoderSession, session), path, top or 3, max_length, json)
        else:
            _refuse(path, "a decoder", top=top, max_length=max_length)
            decoder, grammar = cast(DecoderSession, session), None if raw else grammar_of(path)
            if grammar:
                _refuse(path, "a command parser; --raw writes freely", **drawing, system=system)
                respond = CommandParser(decoder, path, grammar, json)
            else:
                talk = Conversation(decoder, path, sampling, raw=raw, system=system)
                respond = Talk(talk, json, stated=max_new_tokens is not None)
        _respond(respond, text)
    except BrokenPipeError:
        drop_output()
    finally:
        session.close()


def _one_text(text: str | None) -> str:
    """With --json: the text, or the only line of stdin that has any."""
    if text is not None:
        return text
    lines = [] if sys.stdin.isatty() else list(itertools.islice(_lines(), 2))
    if not lines:
        raise UsageError("--json needs one text", f"{EXAMPLE} --json")
    if len(lines) > 1:
        raise UsageError(
            "--json prints exactly one object, stdin has several lines",
            "give one line at a time, or leave --json out",
        )
    return lines[0]


def _refuse(path: Path, what: str, **options: Any) -> None:
    """Options that mean nothing for this model."""
    names = [f"--{key.replace('_', '-')}" for key, value in options.items() if value is not None]
    if names:
        raise UsageError(f"{', '.join(names)} means nothing here: {path} is {what}", "leave it out")


def _respond(respond: Respond, text: str | None) -> None:
    """To one text, to each line of stdin by itself, or in a conversation on a terminal.

    Neither an error nor Ctrl-C ends a conversation.
    """
    if text is not None:
        respond(text)
        return
    if not sys.stdin.isatty():
        for line in _lines():
            respond.reset()
            respond(line)
        return
    _tell("/reset begins anew, Ctrl-C stops an answer, Ctrl-D ends\n")
    while True:
        try:
            _tell("> ")
            line = sys.stdin.readline()
            if not line:
                _tell("\n")
                return
            if line.strip() == "/reset":
                respond.reset()
            elif line.strip():
                respond(line.rstrip("\n"))
        except KeyboardInterrupt:
            _tell("\n")
        except InputError as error:
            _tell(as_lines(error.message, error.hint))


def _lines() -> Iterator[str]:
    """Lines of stdin that have any text."""
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def _tell(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


# --- encoders ------------------------------------------------------------------------------------


class Labels:
    """Prints an encoder's result for a text."""

    def __init__(
        self, session: EncoderSession, path: Path, top: int, max_length: int | None, json: bool
    ) -> None:
        self._session, self._path, self._json = session, path, json
        self._top, self._max_length = top, max_length
        self._tokenizer = Tokenizer.load(path)

    def __call__(self, text: str) -> None:
        if not text.strip():
            raise UsageError("the text is empty", EXAMPLE)
        result = answer(
            self._session, self._tokenizer, self._path, text, self._top, self._max_length
        )
        write(result, self._json, lambda: show(result))

    def reset(self) -> None:
        """Nothing: each text is by itself."""


def answer(
    session: EncoderSession,
    tokenizer: Tokenizer,
    path: Path,
    text: str,
    top: int,
    max_length: int | None,
) -> RunResult:
    """One text through an open session."""
    info = session.info
    limit = min(max_length or info.max_length, info.max_length)
    encoded = tokenizer.encode([text], limit)
    if encoded.truncated:
        cut = len(tokenizer.inner.encode(text).ids) - encoded.ids.shape[1]
        _tell(f"the text is longer than {limit} tokens: its last {cut} were cut\n")
    start = time.perf_counter()
    row = session.logits(encoded.ids, encoded.mask)[0].astype(np.float64)
    milliseconds = 1e3 * (time.perf_counter() - start)
    base = RunResult(path=str(path), runtime=info.runtime, text=text, milliseconds=milliseconds)
    if info.output != "logits":
        return base.model_copy(update={"embedding": row.tolist()})
    scores = np.exp(row - row.max())
    scores /= scores.sum()
    best = np.argsort(-scores, kind="stable")[:top]
    ranked = [{"label": info.labels[i], "score": float(scores[i])} for i in best]
    return base.model_copy(
        update={"label": ranked[0]["label"], "score": ranked[0]["score"], "top": ranked}
    )


def show(result: RunResult) -> None:
    """The answer as a person reads it."""
    if result.embedding is not None:
        head = ", ".join(f"{v:.4f}" for v in result.embedding[:8])
        print(f"[{head}, ...] ({len(result.embedding)} values, {result.milliseconds:.1f} ms)")
        return
    others = ", ".join(f"{t['label']} {t['score']:.3f}" for t in result.top[1:])
    rest = f"   (then {others})" if others else ""
    print(f"{result.label} {result.score:.3f}{rest}")


SPEC = main
