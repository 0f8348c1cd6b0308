"""How advice reads, in words and numbers: shared by the Markdown page and the HTML page."""

from __future__ import annotations

from pocketglm.artifacts.schemas import AdviceRow, AdviseResult, RangeResult
from pocketglm.devices.recipes import recipe_book

TASK_TITLES = {
    "intent": "Intent recognition",
    "embed": "Sentence embeddings",
    "command": "Commands to actions",
    "lm": "Text, streamed",
}


def number(value: float) -> str:
    """'1,240', '38', '4.7', '0.87': two significant digits at least."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def span(value: RangeResult | None, unit: str = "") -> str:
    """'840-1,020 MB'."""
    if value is None:
        return "unknown"
    low, high = number(value.low), number(value.high)
    return f"{low if low == high else f'{low}-{high}'} {unit}".rstrip()


def megabytes(value: float) -> str:
    """'23 MB', '1,473 MB'."""
    return f"{number(value)} MB"


def judged_time(row: AdviceRow, result: AdviseResult) -> RangeResult | None:
    """The time that the task's limit is about."""
    return row.first_token_ms if result.judged == "first token" else row.latency_ms


def limits(result: AdviseResult) -> str:
    """'at most 1,000 ms to the first token; at least 5 tokens/s', without the device's memory."""
    what = {
        "text": f"for a text of {result.prompt} tokens",
        "answer": f"for a prompt of {result.prompt} tokens and an answer of {result.new_tokens}",
        "first token": f"to the first token after a prompt of {result.prompt}",
    }[result.judged]
    parts = []
    for limit in result.limits:
        if limit.name == "latency":
            parts.append(f"at most {number(limit.value)} ms {what} ({limit.words})")
        elif limit.name == "speed":
            parts.append(f"at least {number(limit.value)} tokens a second ({limit.words})")
    if result.context:
        parts.append(f"a cache for {result.context:,} tokens")
    return "; ".join(parts)


class Sources:
    """Footnotes: where the losses are from, numbered as they come."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str | None]] = []

    def losses(self, row: AdviceRow) -> str:
        """'0.09 points of in-scope accuracy (-0.04 to 0.22) [1]'; 'not measured'."""
        recipe = recipe_book().recipes.get(row.recipe)
        if recipe is not None and recipe.baseline:
            return "nothing: the baseline"
        if not row.losses:
            return "not measured"
        said = []
        for loss in row.losses:
            note = (f"{loss.model} on {loss.data}: {loss.source}", loss.address)
            if note not in self.found:
                self.found.append(note)
            words = f"{loss.value:.2g} {'points of' if loss.unit == 'points' else '% more'} "
            ends = f" ({loss.low:g} to {loss.high:g})" if loss.low is not None else ""
            said.append(f"{words}{loss.metric}{ends} [{self.found.index(note) + 1}]")
        return "; ".join(said)

    def lines(self) -> list[str]:
        """One a footnote."""
        return [
            f"[{index}] {text}" + (f", {address}" if address else "")
            for index, (text, address) in enumerate(self.found, 1)
        ]
