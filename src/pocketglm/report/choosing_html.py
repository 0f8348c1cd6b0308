"""`docs/choosing.html`: the decision table with plots. One file; no script, no request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pocketglm.artifacts.schemas import AdviceRow, RangeResult
from pocketglm.devices.profile import all_profiles
from pocketglm.devices.recipes import recipe_book
from pocketglm.report import svg
from pocketglm.report._advice import TASK_TITLES, Sources, judged_time, limits, megabytes, span
from pocketglm.report._markup import esc, section
from pocketglm.report.choosing import NONE, reference
from pocketglm.stages.choosing import Advice, Choice, choose, classes

_STYLE = Path(__file__).with_name("style.css")
_PLOTTED = "int4"  # the recipe whose sizes are drawn: what a phone's memory is asked for
_CSS = {"yes": "pass", "probably": "inconclusive", "unknown": "stated", "no": "fail"}
_WORDS = {"yes": "fits", "probably": "probably", "unknown": "unknown", "no": "does not fit"}
_MORE = """\
.pick thead th + th, .pick td { text-align: left; } .pick td { white-space: normal; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 16px; }
.plots figure p { color: var(--mute); font-size: 14px; margin: -4px 0 10px; }
.wide-table { overflow-x: auto; } .key.pass { background: var(--pass); }
.key.inconclusive { background: var(--inconclusive); } .key.fail { background: var(--fail); }
.legend .key { margin-left: 14px; } .legend .key:first-child { margin-left: 0; }
@media (max-width: 820px) { .pick td { text-align: right; } }
"""


def html(advice: Advice) -> str:
    """The whole page as one string."""
    tasks = list(recipe_book().tasks)
    chosen = {task: [choose(advice, task, group) for group in classes()] for task in tasks}
    sources = Sources()
    body = [
        _hero(advice),
        _decision(tasks, chosen),
        *(_task(task, chosen[task], advice, sources) for task in tasks),
        _memory_and_speed(advice, chosen["lm"]),
        _reference(),
        _notes(sources),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="color-scheme" content="light dark">\n'
        "<title>Which model suits which device</title>\n"
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}{_MORE}</style>\n</head>\n<body>\n"
        + "".join(body)
        + '<footer class="wrap">Made by docs/generate.py from what `pocketglm advise` says. MB is '
        "10<sup>6</sup> bytes. The same tables are in choosing.md.</footer>\n</body>\n</html>\n"
    )


def _hero(advice: Advice) -> str:
    devices = {device for device, _ in advice}
    return (
        '<div class="hero stated"><div class="wrap"><p class="eyebrow">PocketGLM</p>'
        "<h1>Which model suits which device</h1>"
        f'<p class="lead">Predicted for {len(devices)} phones, boards and computers; nothing was '
        "run on them.</p>"
        '<p class="about">Sizes are counted. Memory and time are predicted from data sheets by a '
        "model that was fitted to published measurements. Memory is judged by the upper end of its "
        "range, since an app that takes too much is ended; times by their middle.</p></div></div>\n"
    )


def _table(css: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text; on a narrow screen every row becomes a block."""
    heads = "".join(f'<th scope="col">{esc(name)}</th>' for name in head)
    body = ""
    for first, *cells in rows:
        tds = "".join(
            f'<td data-label="{esc(name)}">{esc(text)}</td>'
            for name, text in zip(head[1:], cells, strict=True)
        )
        body += f'<tr><th scope="row">{esc(first)}</th>{tds}</tr>'
    return (
        f'<table class="claims {css}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    )


def _decision(tasks: Sequence[str], chosen: dict[str, list[Choice]]) -> str:
    rows = []
    for index, group in enumerate(classes()):
        picked = [chosen[task][index].row for task in tasks]
        rows.append([group.title, *(row.title if row else NONE for row in picked)])
    return section(
        "The answer",
        "The first of the ranking that fits on every device of the class: what was measured before "
        "what was not, the larger model, the smaller loss, the shorter time.",
        _table("pick", ["Devices", *(TASK_TITLES.get(task, task) for task in tasks)], rows),
    )


def _task(task: str, choices: Sequence[Choice], advice: Advice, sources: Sources) -> str:
    result = advice[choices[0].devices.devices[0], task]
    rows, bars = [], []
    for choice in choices:
        row = choice.row
        if row is None:
            rows.append([choice.devices.title, NONE, *["\u2013"] * 3, choice.reason])
            continue
        time = judged_time(row, result)
        rows.append(
            [
                choice.devices.title,
                row.title,
                row.plan or "no plan needed",
                span(row.memory_mb, "MB"),
                span(time, "ms"),
                sources.losses(row),
            ]
        )
        bars += _bar(choice.devices.title, time, _CSS[row.fits])
    head = ["Devices", "Model and recipe", "Plan", "Memory", "Time", "Loses"]
    limit = next(one.value for one in result.limits if one.name == "latency")
    plot = _figure(
        "Time on the slowest device of each class",
        "",
        svg.ranges(f"time-{task}", f"Time, {task}", "ms", bars, limit) if bars else "",
    )
    said = limits(result)
    return section(
        TASK_TITLES.get(task, task),
        f"{said[0].upper()}{said[1:]}.",
        _table("pick", head, rows) + f'<div class="plots" style="margin-top:16px">{plot}</div>',
    )


def _bar(label: str, value: RangeResult | None, css: str) -> list[svg.Range]:
    if value is None:
        return []
    return [svg.Range(label, value.value, value.low, value.high, css)]


def _figure(title: str, note: str, plot: str) -> str:
    caption = f"<figcaption><b>{esc(title)}</b></figcaption>"
    words = f"<p>{esc(note)}</p>" if note else ""
    return f"<figure>{caption}{words}{plot}</figure>" if plot else ""


def _memory_and_speed(advice: Advice, choices: Sequence[Choice]) -> str:
    """For the weakest device of each class, what each size of the family needs in INT4."""
    figures = []
    for index, choice in enumerate(choices):
        result = advice[choice.weakest, "lm"]
        first: dict[str, AdviceRow] = {}  # of each size, on the runtime that is ranked first
        for row in result.rows:
            if row.recipe == _PLOTTED and row.available and row.memory_mb is not None:
                first.setdefault(row.model, row)
        rows = list(first.values())
        if not rows:
            continue
        title = all_profiles()[choice.weakest].title
        rows.sort(key=lambda row: row.parameters)
        for name, what, unit, of in (
            ("memory", "Memory", "MB", _of_memory),
            ("latency", "First token", "ms", _of_first),
            ("speed", "Speed", "tokens/s", _of_speed),
        ):
            limit = next((one.value for one in result.limits if one.name == name), None)
            bars = [
                bar
                for row in rows
                for bar in _bar(_size(row), of(row), _side(of(row), name, limit))
            ]
            plot = svg.ranges(f"{name}-{index}", f"{what} on {title}", unit, bars, limit)
            figures.append(_figure(what, f"{choice.devices.title}: {title}", plot))
    key = (
        '<p class="legend"><i class="key pass"></i>keeps the limit<i class="key inconclusive"></i>'
        'probably<i class="key fail"></i>does not</p>'
    )
    return section(
        "Memory and speed against the limits",
        "Streamed text, the family in INT4 (groups of 32), on the slowest device of each class and "
        "the runtime that is ranked first there. "
        "The axes are logarithmic. Memory is that for a cache of 2,048 tokens.",
        f'{key}<div class="plots">{"".join(figures)}</div>',
    )


def _of_memory(row: AdviceRow) -> RangeResult | None:
    return row.memory_mb


def _of_first(row: AdviceRow) -> RangeResult | None:
    return row.first_token_ms


def _of_speed(row: AdviceRow) -> RangeResult | None:
    return row.tokens_per_second


def _size(row: AdviceRow) -> str:
    title = recipe_book().recipes[row.recipe].title
    return row.title.removesuffix(title).strip()


def _side(value: RangeResult | None, name: str, limit: float | None) -> str:
    """The colour of a range in the plot of one limit; as `advise` judges."""
    if value is None or limit is None:
        return "stated"
    if name == "memory":
        return "fail" if value.high > limit else "pass"
    middle, worst = value.value, value.high
    if name == "speed":
        middle, worst, limit = -value.value, -value.low, -limit
    return "fail" if middle > limit else "inconclusive" if worst > limit else "pass"


def _reference() -> str:
    result, found = reference()
    rows = [
        [
            row.title,
            f"{row.runtime} {row.unit}" + ("" if row.available else " (predicted only)"),
            megabytes(row.file_mb),
            span(row.memory_mb, "MB"),
            span(row.first_token_ms, "ms"),
            span(row.tokens_per_second),
            _WORDS[row.fits],
        ]
        for row in found
    ]
    head = ["Model", "Runtime", "File", "Memory", "First token", "Tokens/s", "Verdict"]
    return section(
        f"Tiny, Mini and Base on {result.device_title}",
        "The phone class of the reference's own table, which found Tiny and Mini fit and Base too "
        "large.",
        _table("pick", head, rows),
    )


def _notes(sources: Sources) -> str:
    items = "".join(f"<li>{esc(line)}</li>" for line in sources.lines())
    return section(
        "Where the losses were measured",
        "On the models and data named, not on yours: `pocketglm prove` measures yours.",
        f'<ol class="steps">{items}</ol>',
    )
