"""`docs/choosing.md`: the decision table as Markdown, from what `advise` says of each device."""

from __future__ import annotations

from collections.abc import Sequence

from pocketglm.artifacts.schemas import AdviceRow, AdviseResult
from pocketglm.devices.profile import all_profiles
from pocketglm.devices.recipes import recipe_book
from pocketglm.report._advice import TASK_TITLES, Sources, judged_time, limits, megabytes, span
from pocketglm.report.markdown import cell
from pocketglm.stages.advise import advise
from pocketglm.stages.choosing import Advice, Choice, DeviceClass, choose, classes, nobody_knows

REFERENCE = "snapdragon-8-gen-3"  # the phone class of the reference article's table
NONE = "none: an edge node"
_MODELS = ("autoglm-tiny", "autoglm-mini", "autoglm-base")


def reference() -> tuple[AdviseResult, list[AdviceRow]]:
    """Of the reference's three models each recipe once, on the CPU of such a phone."""
    result = advise(REFERENCE, task="lm")
    found: dict[tuple[str, str], AdviceRow] = {}
    for row in sorted(result.rows, key=lambda row: not row.available):
        if row.model in _MODELS and row.unit == "cpu":
            found.setdefault((row.model, row.recipe), row)
    order = list(recipe_book().recipes)
    rows = sorted(
        found.values(), key=lambda row: (_MODELS.index(row.model), order.index(row.recipe))
    )
    return result, rows


def markdown(advice: Advice, note: str) -> str:
    """The whole page. note: stands below the title."""
    groups, sources = classes(), Sources()
    chosen = {
        (group.title, task): choose(advice, task, group)
        for group in groups
        for task in recipe_book().tasks
    }
    parts = [
        f"# Which model suits which device\n\n{note}\n{_intro()}",
        "## By task and device class\n\n" + _decision(groups, chosen),
        *(_task(task, groups, chosen, advice, sources) for task in recipe_book().tasks),
        "## By device\n\n" + _devices(advice),
        _reference(sources),
    ]
    notes = "".join(f"* {cell(line)}\n" for line in sources.lines())
    return "\n".join(parts) + f"\n## Where the losses were measured\n\n{notes}"


def _intro() -> str:
    return (
        "What fits where, by `pocketglm advise`: sizes are counted, times and memory are predicted "
        "from the devices' data sheets by a model that was fitted to published measurements "
        "([cost-model.md](cost-model.md)); nothing was run on these devices. Ranges hold four of "
        "five devices. Memory is judged by the upper end of its range, times by their middle.\n\n"
        "Of what fits and what this version can make, a model whose accuracy on the task was "
        "measured comes first, then a recipe whose loss was, the larger model, the smaller loss "
        "and the shorter time. With your own limits or your own model:\n\n"
        "    pocketglm advise --device pixel-6 --task lm --max-latency-ms 500 --max-memory-mb 600\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _decision(groups: Sequence[DeviceClass], chosen: dict[tuple[str, str], Choice]) -> str:
    tasks = list(recipe_book().tasks)
    rows = []
    for group in groups:
        cells = [cell(group.title)]
        for task in tasks:
            row = chosen[group.title, task].row
            cells.append(cell(row.title) if row else NONE)
        rows.append(cells)
    return _table(["devices", *(f"`{task}`" for task in tasks)], rows)


def _task(
    task: str,
    groups: Sequence[DeviceClass],
    chosen: dict[tuple[str, str], Choice],
    advice: Advice,
    sources: Sources,
) -> str:
    any_result = advice[groups[0].devices[0], task]
    encoder = any_result.judged == "text"
    head = ["devices", "model and recipe", "plan", "file", "memory", "time"]
    head += [] if encoder else ["tokens/s"]
    rows = []
    for group in groups:
        choice = chosen[group.title, task]
        row = choice.row
        if row is None:
            rows.append([cell(group.title), f"none: {cell(choice.reason)}", *[""] * len(head)])
            continue
        rows.append(
            [
                cell(group.title),
                f"{cell(row.title)}, {row.runtime} {row.unit}",
                f"`{row.plan}`" if row.plan else "none needed",
                megabytes(row.file_mb),
                span(row.memory_mb, "MB"),
                span(judged_time(row, any_result), "ms"),
                *([] if encoder else [span(row.tokens_per_second)]),
                cell(sources.losses(row)),
                cell(all_profiles()[choice.weakest].title),
            ]
        )
    return (
        f"## `{task}`: {TASK_TITLES.get(task, task).lower()}\n\n"
        f"Limits: {cell(limits(any_result))}. Figures are of the device of the class on which it "
        "takes longest.\n\n"
        + _table([*head, "loses", "that device"], rows)
        + _left_out(chosen, task)
    )


def _left_out(chosen: dict[tuple[str, str], Choice], task: str) -> str:
    """Devices that no table counts, because nobody published what a prediction needs."""
    names = sorted(
        name for (_, of), choice in chosen.items() if of == task for name in choice.unknown
    )
    if not names:
        return ""
    listed = ", ".join(f"`{name}`" for name in names)
    return f"\nNot counted, since too little is known of them: {listed}.\n"


def _devices(advice: Advice) -> str:
    tasks = list(recipe_book().tasks)
    rows = []
    for name, profile in all_profiles().items():
        memory = profile.app_memory_mb
        cells = [
            f"`{name}`",
            cell(profile.title),
            f"{memory.value:,.0f} MB ({memory.kind})" if memory else "unknown",
        ]
        for task in tasks:
            result = advice[name, task]
            if result.best:
                cells.append(cell(result.best.title))
            elif nobody_knows(result):
                cells.append("unknown")
            else:
                cells.append(NONE)
        rows.append(cells)
    return _table(["name", "device", "an app gets", *(f"`{task}`" for task in tasks)], rows)


def _reference(sources: Sources) -> str:
    result, found = reference()
    rows = [
        [
            cell(row.title),
            f"{row.runtime} {row.unit}" + ("" if row.available else ", predicted only"),
            megabytes(row.file_mb),
            span(row.memory_mb, "MB"),
            span(row.first_token_ms, "ms"),
            span(row.tokens_per_second),
            cell(sources.losses(row)),
            row.fits if row.fits != "no" else f"no: {cell(row.reason)}",
        ]
        for row in found
    ]
    head = ["model", "runtime", "file", "memory", "first token", "tokens/s", "loses", "fits"]
    return (
        f"## Tiny, Mini and Base on {cell(result.device_title)}\n\n"
        f"Task `lm`: {cell(limits(result))}.\n\n" + _table(head, rows)
    )
