"""Try a model: the label with its score, or the embedding, of a text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from pocketglm.artifacts.schemas import RunResult
from pocketglm.cli._common import Json, MaxLength, Threads, emit
from pocketglm.contracts import EncoderSession, RunOptions
from pocketglm.errors import UsageError
from pocketglm.runtimes import open_encoder
from pocketglm.text.tokenizer import Tokenizer


def main(
    path: Annotated[Path, typer.Argument(help="Checkpoint or export folder.")],
    text: Annotated[
        str | None, typer.Argument(help="The text; without it, lines of stdin.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many labels to print.")] = 3,
    max_length: MaxLength = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Print the label with its score, or the embedding, of TEXT."""
    if text is None and json and not sys.stdin.isatty():
        text = next(_lines(), None)
    if text is None and json:
        raise UsageError("--json needs one text", 'for example: run PATH "set an alarm" --json')
    session = open_encoder(path, RunOptions(threads=threads))
    tokenizer = Tokenizer.load(path)
    try:
        for line in [text] if text is not None else _lines():
            if not line.strip():
                raise UsageError("the text is empty", 'for example: run PATH "set an alarm"')
            result = answer(session, tokenizer, path, line, top, max_length)
            emit(result, json, lambda result=result: show(result))  # type: ignore[misc]
    finally:
        session.close()


def _lines() -> Iterator[str]:
    """Lines of stdin; on a terminal a prompt, ended by Ctrl-D."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


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
    encoded = tokenizer.encode([text], min(max_length or info.max_length, info.max_length))
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
