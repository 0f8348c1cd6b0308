"""One model in a process of its own: load time, latency of single calls, peak memory.

    python -m pocketglm.stages._measure PATH BATCH TOKENS [THREADS [NEW_TOKENS [RUNTIME]]]

The process opens the model, tells what it is, then answers one JSON line per line it reads:
`{"runs": k}` or `{"seconds": s}` -> latencies in ms; of a decoder, of the whole prompt and, as
`steps`, of each of NEW_TOKENS after it. THREADS 0: the model's default. At the end of its input it
tells its peak memory. `Worker` is the other side. Nothing here imports torch, so the peak of an
exported model is that of Python, the runtime and the model alone; a runtime that brings torch says
so in its `extra_memory`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np

from pocketglm.artifacts.checkpoint import read_json
from pocketglm.artifacts.export import is_export, read_export
from pocketglm.contracts import DecoderSession, EncoderSession, Ids, RunOptions, Runtime
from pocketglm.errors import (
    InputError,
    MissingExtraError,
    PocketError,
    UnsupportedError,
    UsageError,
    WorkError,
)
from pocketglm.runtimes import open_session, runtime_of
from pocketglm.stages._memory import peak_rss


def sample(path: Path, batch: int, tokens: int) -> tuple[Ids, Ids]:
    """Random ids of the model's vocabulary and a full mask, both [batch, tokens]."""
    size = read_export(path).vocab_size if is_export(path) else 0
    size = size or int(read_json(path / "config.json").get("vocab_size", 2))
    ids = np.random.default_rng(0).integers(0, size, (batch, tokens), np.int64)
    return ids, np.ones_like(ids)


def timed(session: EncoderSession, ids: Ids, mask: Ids, runs: int, seconds: float) -> list[float]:
    """Milliseconds of each call: at least `runs` calls, and going on for `seconds`."""
    out: list[float] = []
    end = time.perf_counter() + seconds
    while len(out) < runs or time.perf_counter() < end:
        start = time.perf_counter()
        session.logits(ids, mask)
        out.append((time.perf_counter() - start) * 1e3)
    return out


def timed_text(
    session: DecoderSession, ids: Ids, prompt: int, runs: int, seconds: float
) -> tuple[list[float], list[float]]:
    """Milliseconds of each prompt, the first `prompt` of `ids`, and of each step over the others:
    at least `runs` texts, and going on for `seconds`."""
    tokens = ids.tolist()
    prompts: list[float] = []
    steps: list[float] = []
    end = time.perf_counter() + seconds
    while len(prompts) < runs or time.perf_counter() < end:
        session.rewind(session.length)
        start = time.perf_counter()
        session.prefill(tokens[:prompt])
        prompts.append((time.perf_counter() - start) * 1e3)
        for token in tokens[prompt:]:
            start = time.perf_counter()
            session.step(token)
            steps.append((time.perf_counter() - start) * 1e3)
    return prompts, steps


@dataclass(frozen=True, slots=True)
class Load:
    """What is measured: `batch` texts of `tokens`, of a decoder one prompt of `tokens` and
    `new_tokens` steps after it. threads: None = the model's default; runtime: None = its own."""

    path: Path
    batch: int = 1
    tokens: int = 32
    threads: int | None = None
    new_tokens: int = 0
    runtime: str | None = None

    @property
    def arguments(self) -> list[str]:
        """For the process."""
        numbers = (self.batch, self.tokens, self.threads or 0, self.new_tokens)
        return [str(self.path), *map(str, numbers), *([self.runtime] if self.runtime else [])]

    @classmethod
    def read(cls, arguments: list[str]) -> Load:
        """From the process's arguments; those left out have their defaults."""
        path, *rest = arguments
        runtime = rest[4] if len(rest) > 4 else None
        batch, tokens, threads, new = (
            int(value) for value in (*rest[:4], *("1", "32", "0", "0")[len(rest) :])
        )
        return cls(Path(path), batch, tokens, threads or None, new, runtime)


def serve(load: Load, answers: IO[str]) -> None:
    """The process's whole life; see the module's docstring."""

    def answer(**value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    runtime = runtime_of(load.path, load.runtime)
    _check_real(load, runtime)
    if runtime.prepare:
        runtime.prepare()
    start = time.perf_counter()
    session = open_session(load.path, RunOptions(threads=load.threads), load.runtime)
    load_ms = (time.perf_counter() - start) * 1e3
    _check_room(load, session.info.max_length)
    ids, mask = sample(load.path, load.batch, load.tokens + load.new_tokens)
    answer(runtime=session.info.runtime, threads=session.info.threads, load_ms=load_ms)
    for line in sys.stdin:
        asked = json.loads(line)
        runs, seconds = int(asked.get("runs", 1)), float(asked.get("seconds", 0.0))
        if session.info.kind == "encoder":
            answer(ms=timed(cast(EncoderSession, session), ids, mask, runs, seconds))
        else:
            decoder = cast(DecoderSession, session)
            prompts, steps = timed_text(decoder, ids[0], load.tokens, runs, seconds)
            answer(ms=prompts, steps=steps)
    session.close()
    answer(peak_rss=peak_rss())


def _check_real(load: Load, runtime: Runtime) -> None:
    if runtime.emulated:
        raise UnsupportedError(
            f"{load.path} is computed here by its runtime's reference evaluator",
            ["its speed and memory say nothing about the device"],
            "measure on a device that has this runtime; eval and predict work here",
        )


def _check_room(load: Load, limit: int) -> None:
    if load.tokens + load.new_tokens <= limit:
        return
    if load.new_tokens:
        raise UsageError(
            f"{load.path} has a context of {limit} tokens, asked for {load.tokens} and "
            f"{load.new_tokens} new ones",
            f"for example --tokens {max(limit // 2, 1)} --new-tokens {max(limit // 4, 1)}",
        )
    raise UsageError(
        f"{load.path} takes at most {limit} tokens, asked for {load.tokens}",
        f"use --tokens {limit} or fewer",
    )


def main(arguments: list[str]) -> int:
    """Entry of the process; an error is told as JSON and in the exit code."""
    # Libraries print to stdout; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve(Load.read(arguments), answers)
    except PocketError as error:
        told = {"message": error.message, "hint": error.hint, "code": error.exit_code}
        answers.write(json.dumps({"error": told}) + "\n")
        answers.flush()
        return error.exit_code
    return 0


# --- the other side ----------------------------------------------------------------------------


@dataclass
class Worker:
    """A model held open in a fresh process. `close` returns the process's peak memory.

    path: an export or checkpoint folder. Latencies in milliseconds, memory in bytes.
    threads: what to ask for, None = the model's default; used_threads: what the session has.
    new_tokens, asked: of a decoder, steps after each prompt; the runtime to open it with.
    """

    path: Path
    batch: int = 1
    tokens: int = 32
    threads: int | None = None
    new_tokens: int = 0
    asked: str | None = None
    runtime: str = ""
    used_threads: int = 0
    load_ms: float = 0.0
    _process: subprocess.Popen[str] = field(init=False, repr=False)
    _asks: IO[str] = field(init=False, repr=False)
    _answers: IO[str] = field(init=False, repr=False)
    _errors: IO[str] = field(init=False, repr=False)

    def __enter__(self) -> Worker:
        load = Load(self.path, self.batch, self.tokens, self.threads, self.new_tokens, self.asked)
        command = [sys.executable, "-m", "pocketglm.stages._measure", *load.arguments]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )
        self._asks = cast(IO[str], self._process.stdin)
        self._answers = cast(IO[str], self._process.stdout)
        try:
            ready = self._read()
        except BaseException:
            self._kill()
            raise
        self.runtime = str(ready["runtime"])
        self.used_threads = int(ready["threads"])
        self.load_ms = float(ready["load_ms"])
        return self

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def run(self, runs: int = 1, seconds: float = 0.0) -> list[float]:
        """Latencies of at least `runs` calls, going on for `seconds`; of a decoder, of prompts.

        Raises:
            WorkError: the process died.
        """
        return self.texts(runs, seconds)[0]

    def texts(self, runs: int = 1, seconds: float = 0.0) -> tuple[list[float], list[float]]:
        """As `run`, and beside it the latencies of a decoder's steps."""
        with contextlib.suppress(BrokenPipeError):  # it died; reading tells why
            self._asks.write(json.dumps({"runs": runs, "seconds": seconds}) + "\n")
            self._asks.flush()
        told = self._read()
        prompts, steps = ([float(value) for value in told.get(key, [])] for key in ("ms", "steps"))
        return prompts, steps

    def close(self) -> int:
        """End the process and return its peak resident memory in bytes."""
        self._asks.close()
        peak = int(self._read()["peak_rss"])
        self._process.wait()
        return peak

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kill()

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise WorkError(
                f"the measuring process of {self.path} ended with code {code}"
                + (f": {said[-1]}" if said else ""),
                "is there enough memory? try it alone: pocketglm run " + str(self.path),
            )
        value: dict[str, Any] = json.loads(line)
        if "error" in value:
            told = value["error"]
            kinds: dict[int, type[PocketError]] = {2: InputError, 3: MissingExtraError}
            raise kinds.get(told["code"], WorkError)(told["message"], told["hint"])
        return value

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._asks, self._answers, self._errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
