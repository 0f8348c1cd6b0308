"""What the user asks for, made definite, and held against a prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from pocketglm.artifacts.schemas import LimitResult
from pocketglm.contracts import Config
from pocketglm.devices.cost import Interval, Prediction
from pocketglm.devices.profile import DeviceProfile
from pocketglm.devices.recipes import TaskNeeds, recipe_book
from pocketglm.errors import UsageError

Name = Literal["memory", "latency", "speed", "accuracy", "context"]
OPTIONS: dict[Name, str] = {
    "memory": "--max-memory-mb",
    "latency": "--max-latency-ms",
    "speed": "--min-tokens-per-second",
    "accuracy": "--min-accuracy",
    "context": "--context",
}


class Wanted(Config):
    """The user's limits; null: the task's own. min_accuracy: percent, or a fraction up to 1."""

    max_latency_ms: float | None = None
    max_memory_mb: float | None = None
    min_accuracy: float | None = None
    min_tokens_per_second: float | None = None
    context: int | None = None
    prompt: int | None = None
    new_tokens: int | None = None
    runtime: str | None = None


class Request(Config):
    """What is asked of a model, settled. min_accuracy: percent. memory_mb: null: unknown."""

    task: str
    needs: TaskNeeds
    prompt: int
    new_tokens: int
    context: int
    memory_mb: float | None
    app_memory_mb: float | None
    max_latency_ms: float
    min_tokens_per_second: float | None
    min_accuracy: float | None
    notes: list[str] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Check:
    """One limit and one prediction. ok None: unknown. words: the rest of a sentence that begins
    with the model's name, or what is unknown. need: the limit that would let it pass.
    """

    name: Name
    ok: bool | None
    sure: bool
    words: str
    need: float | None = None


def settle(wanted: Wanted, task: str, device: DeviceProfile) -> Request:
    """The request, with the task's defaults and the device's memory.

    Raises:
        UsageError: a value that cannot be, or two that contradict each other.
    """
    needs = recipe_book().tasks[task]
    _check_values(wanted, needs, task)
    prompt = wanted.prompt or needs.prompt
    new = needs.generated if wanted.new_tokens is None else wanted.new_tokens
    context = wanted.context or max(needs.context, prompt + new if needs.context else 0)
    if wanted.context and prompt + new > wanted.context:
        raise UsageError(
            f"--context {wanted.context} holds no prompt of {prompt} and {new} new tokens: they "
            f"are {prompt + new - wanted.context} too many",
            f"use --context {prompt + new} or more, or a smaller --prompt or --new-tokens",
        )
    app = device.app_memory_mb.value if device.app_memory_mb else None
    memory, notes = wanted.max_memory_mb or app, []
    if memory is None:
        notes.append(f"what an app may use on {device.title} is not known: give --max-memory-mb")
    elif app is not None and memory > app:
        notes.append(
            f"--max-memory-mb {memory:g} is more than an app gets there: {app:,.0f} MB are used"
        )
        memory = app
    accuracy = wanted.min_accuracy
    return Request(
        task=task,
        needs=needs,
        prompt=prompt,
        new_tokens=new,
        context=context,
        memory_mb=memory,
        app_memory_mb=app,
        max_latency_ms=wanted.max_latency_ms or needs.max_latency_ms,
        min_tokens_per_second=wanted.min_tokens_per_second or needs.min_tokens_per_second,
        min_accuracy=accuracy * 100 if accuracy is not None and accuracy <= 1 else accuracy,
        notes=notes,
    )


def _check_values(wanted: Wanted, needs: TaskNeeds, task: str) -> None:
    for name, value in wanted.model_dump(exclude={"runtime"}).items():
        option = f"--{name.replace('_', '-')}"
        if value is None or (name == "new_tokens" and value == 0):
            continue
        if not math.isfinite(value) or value <= 0:
            raise UsageError(f"{option} {value:g}: should be a number above 0")
    if wanted.min_accuracy is not None and wanted.min_accuracy > 100:
        raise UsageError(
            f"--min-accuracy {wanted.min_accuracy:g}: nothing is right more than 100 % of the time",
            "give percent, 92.5, or a fraction, 0.925",
        )
    if wanted.min_accuracy is not None and task == "lm":
        raise UsageError(
            "--min-accuracy: task 'lm' has no accuracy; its models are compared by perplexity",
            "leave it out, or use --task command",
        )
    if needs.kind == "encoder":
        for name in ("context", "new_tokens", "min_tokens_per_second"):
            if getattr(wanted, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')}: task '{task}' is an encoder's, which writes no "
                    "text",
                    "leave it out, or use --task command or lm",
                )


def limits_of(request: Request, wanted: Wanted) -> list[LimitResult]:
    """The limits with where they are from."""
    needs = request.needs
    yours = "asked for"
    found = []
    if request.memory_mb is not None:
        set_by = wanted.max_memory_mb is not None and request.memory_mb == wanted.max_memory_mb
        words = yours if set_by else "what one app gets on the device"
        found.append(LimitResult(name="memory", value=request.memory_mb, unit="MB", words=words))
    words = f"{needs.limit_words} ({_author(needs.limit_from)})"
    found.append(
        LimitResult(
            name="latency",
            value=request.max_latency_ms,
            unit="ms",
            words=yours if wanted.max_latency_ms else words,
        )
    )
    if request.min_tokens_per_second is not None:
        own = f"{needs.speed_words} ({_author(needs.speed_from)})" if needs.speed_from else ""
        found.append(
            LimitResult(
                name="speed",
                value=request.min_tokens_per_second,
                unit="tokens/s",
                words=yours if wanted.min_tokens_per_second else own,
            )
        )
    if request.min_accuracy is not None:
        found.append(
            LimitResult(name="accuracy", value=request.min_accuracy, unit="%", words=yours)
        )
    return found


def _author(source: str) -> str:
    """'Nielsen 1993', of a source whose title begins with who wrote it."""
    found = recipe_book().sources[source]
    return f"{found.title.split(',')[0]} {found.date[:4]}"


def judged(request: Request, prediction: Prediction) -> Interval | None:
    """The latency that the task is judged by."""
    if request.needs.judged == "first token":
        return prediction.first_token_ms
    return prediction.latency_ms


def checks(
    request: Request,
    prediction: Prediction,
    file_mb: float,
    positions: int,
    accuracy: float | None,
) -> list[Check]:
    """Each limit against one prediction."""
    found = [_memory(request, prediction, file_mb), _latency(request, prediction)]
    if request.context > positions or (not request.context and request.prompt > positions):
        asked = request.context or request.prompt
        reason = f"has {positions:,} positions, {asked:,} are asked for"
        found.insert(0, Check("context", False, True, reason, positions))
    minimum, speed = request.min_tokens_per_second, prediction.tokens_per_second
    if minimum is not None and speed is not None:
        reason = f"writes {speed.value:.2g} tokens a second, the limit is {minimum:g}"
        found.append(
            Check("speed", speed.value >= minimum, speed.low >= minimum, reason, speed.value)
        )
    if request.min_accuracy is not None:
        found.append(_accuracy(request, accuracy))
    return found


def _memory(request: Request, prediction: Prediction, file_mb: float) -> Check:
    """By the upper end: an app that takes too much is ended, not slowed down."""
    need, limit = prediction.peak_memory_mb, request.memory_mb
    where = "an app here gets" if limit == request.app_memory_mb else "the limit is"
    if need is None and limit is not None and file_mb > limit:
        reason = f"needs {size_words(file_mb)} for its weights alone, {where} "
        return Check("memory", False, True, reason + size_words(limit))
    if need is None:
        return Check("memory", None, False, "its memory cannot be predicted")
    if limit is None:
        return Check("memory", None, False, "what an app may use there is not known", need.high)
    ok = need.high <= limit
    at = f" at {_tokens(request.context)} context" if request.context else ""
    needs = f"needs {size_words(need.value)}"
    if need.value <= limit:
        needs = f"may need {size_words(need.high)}"
    reason = f"{needs}{at}, {where} {size_words(limit)}"
    return Check("memory", ok, True, reason, need.high)


def _latency(request: Request, prediction: Prediction) -> Check:
    """By the value; where the limit is inside of the range, it is not sure."""
    need, limit = judged(request, prediction), request.max_latency_ms
    if need is None:
        why = prediction.notes[0] if prediction.notes else "nothing published supports it"
        return Check("latency", None, False, f"its speed cannot be predicted: {why}")
    of = {
        "text": f"for a text of {request.prompt} tokens",
        "answer": f"for a prompt of {request.prompt} and an answer of {request.new_tokens} tokens",
        "first token": f"to the first token after a prompt of {request.prompt}",
    }[request.needs.judged]
    reason = f"takes {need.value:,.0f} ms {of}, the limit is {limit:,.0f} ms"
    return Check("latency", need.value <= limit, need.high <= limit, reason, need.value)


def _accuracy(request: Request, accuracy: float | None) -> Check:
    if accuracy is None:
        reason = f"its accuracy on {request.task} is not measured: train it and prove it"
        return Check("accuracy", None, False, reason)
    limit = request.min_accuracy or 0.0
    reason = f"gets {accuracy:.2f} %, the limit is {limit:g} %"
    return Check("accuracy", accuracy >= limit, True, reason, accuracy)


def size_words(mb: float) -> str:
    """Decimal: '23 MB', '0.95 GB', '2.4 GB'."""
    if mb < 100:
        return f"{mb:.0f} MB"
    digits = f"{mb / 1000:.2f}" if mb < 995 else f"{mb / 1000:.1f}"
    return f"{digits.rstrip('0').rstrip('.') if '.' in digits else digits} GB"


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)
