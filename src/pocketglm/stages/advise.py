"""Which model suits a device: models, recipes, runtimes and units, held against limits.

Nothing is run. Sizes are counted from specs, `devices/cost.py` predicts memory and time, and
`devices/recipes.yaml` knows what a recipe was measured to cost.

Memory is judged by the upper end of its range, since an app that takes too much is ended; times by
their value, and a limit inside of the range makes the answer "probably". Ranked: what fits before
what does not; what this version can make first; then a model whose accuracy on the task was
measured, a recipe whose loss was, the larger float model, the smaller loss (up to a point, or a
percent of the perplexity, counts as none) and the shorter time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.schemas import AdviceRow, AdviseResult, LossResult, RangeResult
from pocketglm.devices.cost import Interval, Prediction, predict
from pocketglm.devices.profile import DeviceProfile, find_profile
from pocketglm.devices.recipes import Loss, RuntimeFacts, recipe_book
from pocketglm.devices.roofline import Unit, Workload
from pocketglm.errors import UsageError, nearest
from pocketglm.model.spec import DecoderSpec
from pocketglm.stages._advice_hints import hints_of
from pocketglm.stages._advice_limits import (
    OPTIONS,
    Check,
    Request,
    Wanted,
    checks,
    judged,
    limits_of,
    settle,
    size_words,
)
from pocketglm.stages._advice_models import (
    Made,
    commands,
    family,
    made_of,
    subject_of,
    task_of,
)

__all__ = ["Wanted", "advise"]

SMALL_LOSS = 1.0  # points, or percent of a perplexity: what a gate usually allows
_DEFAULT_TASK = "lm"
Fits = Literal["yes", "probably", "no", "unknown"]
# What exports of this version were never run on; what LiteRT's and Core ML's say of these is in
# delegate.json and compute.json.
_NOT_RUN = {
    *((runtime, unit) for runtime in ("litert", "executorch") for unit in ("gpu", "npu")),
    *(("coreml", unit) for unit in ("cpu", "gpu", "npu")),
}
_ORDER = {"yes": 0, "probably": 1, "unknown": 2, "no": 3}


@dataclass(frozen=True, slots=True)
class Judged:
    """A row, and what it was judged by. dense: parameters of the float model."""

    row: AdviceRow
    checks: tuple[Check, ...]
    time: float
    dense: int


def advise(
    device: str,
    *,
    task: str | None = None,
    checkpoint: Path | None = None,
    wanted: Wanted | None = None,
    predicted: bool = True,
) -> AdviseResult:
    """Ranked advice for a device, by its name, an alias or a profile's file.

    predicted: also for runtimes whose target this version does not have.

    Raises:
        UsageError: an unknown device, task or runtime; limits that cannot be, or that contradict
            each other.
        CheckpointError: the checkpoint cannot be read.
    """
    wanted = wanted or Wanted()
    book = recipe_book()
    for what, value, known in (
        ("task", task, list(book.tasks)),
        ("runtime", wanted.runtime, list(book.runtimes)),
    ):
        if value is not None and value not in known:
            raise UsageError(f"unknown {what} '{value}'", nearest(value, known))
    name, profile = find_profile(device)
    ckpt = Checkpoint.open(checkpoint) if checkpoint else None
    task = task or (task_of(ckpt) if ckpt else _DEFAULT_TASK)
    request = settle(wanted, task, profile)
    models = list(made_of(subject_of(ckpt, task), task)) if ckpt else family(task)
    routes = _routes(profile, request, wanted.runtime)
    if not predicted:
        routes = [(name, facts, unit) for name, facts, unit in routes if _offered(name, unit)]
    found = _judge(models, request, profile, routes)
    if wanted.max_memory_mb is not None:
        every = _judge(family(task), request, profile, routes) if ckpt else found
        _refuse_too_little(wanted.max_memory_mb, every)
    found.sort(key=_rank)
    rows = [one.row for one in found]
    fits = any(row.fits in ("yes", "probably") for row in rows)
    best = next((r for r in rows if r.available and r.fits in ("yes", "probably")), None)
    notes = [*request.notes, *_accelerator_notes(rows), *(best.notes if best else [])]
    if fits and best is None:
        targets = sorted({r.runtime for r in rows if r.fits in ("yes", "probably")})
        notes.append(f"what fits needs a target that is not in this version: {', '.join(targets)}")
    return AdviseResult(
        device=name,
        device_title=profile.title,
        task=task,
        checkpoint=str(checkpoint) if checkpoint else None,
        prompt=request.prompt,
        new_tokens=request.new_tokens,
        context=request.context,
        judged=request.needs.judged,
        app_memory_mb=request.app_memory_mb,
        limits=limits_of(request, wanted),
        fits=fits,
        best=best,
        rows=rows,
        hints=[] if fits else hints_of(request, [(one.row, one.checks) for one in found]),
        notes=notes,
    )


def _routes(
    device: DeviceProfile, request: Request, only: str | None
) -> list[tuple[str, RuntimeFacts, Unit]]:
    """The runtimes of the device, and the units that each reaches.

    Raises:
        UsageError: the runtime that was asked for does not run there, or not with such models.
    """
    found: list[tuple[str, RuntimeFacts, Unit]] = []
    for name, facts in recipe_book().runtimes.items():
        if device.os not in facts.os or request.needs.kind not in facts.kinds:
            continue
        units: list[Unit] = ["cpu"]
        for accelerator in device.accelerators:
            reached = accelerator.runtimes.value if accelerator.runtimes else []
            if set(reached) & set(facts.reaches) and accelerator.kind not in units:
                units.append(accelerator.kind)
        found += [(name, facts, unit) for unit in units]
    known = sorted({name for name, _, _ in found})
    if only is not None and only not in known:
        raise UsageError(
            f"--runtime {only}: not for {request.needs.kind}s on {device.title} ({device.os})",
            f"known there: {', '.join(known)}",
        )
    return [route for route in found if only in (None, route[0])]


def _offered(runtime: str, unit: Unit) -> bool:
    """Whether an export for it is written, and was run on such a unit."""
    return runtime in registry.names("targets") and (runtime, unit) not in _NOT_RUN


def _judge(
    models: Sequence[Made],
    request: Request,
    device: DeviceProfile,
    routes: Sequence[tuple[str, RuntimeFacts, Unit]],
) -> list[Judged]:
    return [
        _judged(made, request, device, name, facts, unit, _offered(name, unit))
        for made in models
        for name, facts, unit in routes
        if name in made.recipe.runtimes
        and not (unit == "npu" and made.recipe.bits == 32)  # NPUs have no such arithmetic
    ]


def _judged(
    made: Made,
    request: Request,
    device: DeviceProfile,
    runtime: str,
    facts: RuntimeFacts,
    unit: Unit,
    available: bool,
) -> Judged:
    prediction = predict(workload_of(made, request, facts), device, runtime, unit)
    losses = _losses(made, request.task)
    accuracy = _accuracy(made, request.task, losses)
    mb = made.size.file_bytes / 1e6
    positions = made.spec.max_position_embeddings
    found = checks(request, prediction, mb, positions, accuracy)
    if made.reason:
        found.insert(0, Check("context", False, True, made.reason))
    fits, reason = _verdict(made.words, found)
    able = available and not made.reason
    time = judged(request, prediction)
    row = AdviceRow(
        model=made.subject.name,
        recipe=made.key,
        title=made.words,
        runtime=runtime,
        unit=unit,
        parameters=made.size.parameters,
        file_mb=round(mb, 3),
        memory_mb=_range(prediction.peak_memory_mb),
        load_ms=_range(prediction.load_ms),
        first_token_ms=_range(prediction.first_token_ms),
        tokens_per_second=_range(prediction.tokens_per_second),
        latency_ms=_range(prediction.latency_ms),
        energy_j=_range(prediction.energy_j),
        losses=[_loss(loss) for loss in losses],
        accuracy=accuracy,
        fits=fits,
        reason=reason,
        exceeds=[check.name for check in found if check.ok is False],
        available=able,
        plan=made.recipe.plan,
        commands=commands(made, request.task, runtime, request.context) if able else [],
        notes=_notes(made, runtime, unit, available, prediction),
    )
    return Judged(row, tuple(found), time.value if time else math.inf, made.subject.parameters)


def workload_of(made: Made, request: Request, facts: RuntimeFacts) -> Workload:
    """What the cost model is asked. Parameters are those of a pass, see `Footprint.used`."""
    size, spec, recipe = made.size, made.spec, made.recipe
    cache, head = 0, 0
    if isinstance(spec, DecoderSpec):
        head = size.head  # only the last token of a prompt needs it
        each = made.subject.cache_bytes or facts.cache_bytes
        cache = 2 * each * spec.num_layers * spec.num_kv_heads * spec.head_dim
    return Workload(
        kind=request.needs.kind,
        parameters=size.used,
        table_parameters=size.table,
        layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        weight_bytes=size.file_bytes,
        read_bytes=size.read_bytes,
        kv_bytes_per_token=cache,
        bits=recipe.bits,
        activations=recipe.activations if facts.dynamic else "float",
        prompt=request.prompt,
        generated=request.new_tokens,
        context=request.context,
        prompt_parameters=size.used - size.table - head,
    )


def _verdict(words: str, found: Sequence[Check]) -> tuple[Fits, str]:
    """Whether it fits, and in one line why it does not."""
    failed = [check.words for check in found if check.ok is False]
    if failed:
        return "no", f"{words} {', and '.join(failed)}"
    unknown = [check.words for check in found if check.ok is None]
    if unknown:
        return "unknown", f"{words}: {', '.join(unknown)}"
    return ("yes" if all(check.sure for check in found) else "probably"), ""


def _losses(made: Made, task: str) -> list[Loss]:
    """The worst of each metric, of the measured model that is nearest in size."""
    worst: dict[str, Loss] = {}
    for loss in made.recipe.losses_of(task, float(made.size.used)):
        if loss.metric not in worst or loss.value > worst[loss.metric].value:
            worst[loss.metric] = loss
    return list(worst.values())


def _loss(loss: Loss) -> LossResult:
    source = recipe_book().sources[loss.source] if loss.source else None
    return LossResult(
        metric=loss.metric,
        value=round(loss.value, 3),
        unit=loss.unit,
        low=loss.low,
        high=loss.high,
        model=loss.model,
        data=loss.data,
        ours=loss.ours,
        source=source.title if source else f"{loss.page} ({loss.command})",
        address=source.address if source else None,
    )


def _accuracy(made: Made, task: str, losses: Sequence[Loss]) -> float | None:
    """Percent: what the float model was measured to score, less the recipe's loss of that score."""
    if made.subject.path is not None:
        return None
    for known in recipe_book().accuracies:
        if (known.task, known.model) != (task, made.subject.name):
            continue
        if made.recipe.baseline:
            return known.value
        for loss in losses:
            if loss.metric == known.metric:
                return round(known.value - loss.value, 2)
    return None


def _range(interval: Interval | None) -> RangeResult | None:
    """To three significant digits: more would pretend."""
    if interval is None:
        return None
    value, low, high = (
        float(f"{number:.3g}") for number in (interval.value, interval.low, interval.high)
    )
    return RangeResult(value=value, low=low, high=high)


def _notes(
    made: Made, runtime: str, unit: Unit, available: bool, prediction: Prediction
) -> list[str]:
    notes = []
    if (runtime, unit) in _NOT_RUN:
        notes.append(f"predicted only: exports of target {runtime} were not run on a {unit}")
    elif not available:
        notes.append(f"predicted only: target {runtime} is not in this version")
    if made.recipe.rows:
        notes.append(f"needs rows of the task: {made.recipe.summary}")
    return [*notes, *prediction.notes]


def _accelerator_notes(rows: Sequence[AdviceRow]) -> list[str]:
    """One sentence for the units that nothing can be said of."""
    units = sorted({row.unit for row in rows if row.unit != "cpu"})
    silent = [
        unit for unit in units if all(row.latency_ms is None for row in rows if row.unit == unit)
    ]
    if not silent:
        return []
    named = " and ".join(unit.upper() for unit in silent)
    return [f"how fast models run on its {named} cannot be predicted"]


def _rank(one: Judged) -> tuple[float | str | bool, ...]:
    """See the module's text; names last, so that the order never depends on chance."""
    row = one.row
    can = row.fits in ("yes", "probably")
    return (
        not can,
        not row.available if can else 0,
        _ORDER[row.fits] if not can else 0,
        row.accuracy is None,
        math.isinf(_lost(row)),
        -one.dense,
        _lost(row),
        one.time,
        row.runtime,
        row.unit,
        row.recipe,
    )


def _lost(row: AdviceRow) -> float:
    recipe = recipe_book().recipes.get(row.recipe)
    if recipe is not None and recipe.baseline:
        return 0.0
    if not row.losses:
        return math.inf
    counted = max(
        0.0 if loss.low is not None and loss.low <= 0 else loss.value for loss in row.losses
    )
    return 0.0 if counted <= SMALL_LOSS else counted


def _refuse_too_little(limit: float, every: Sequence[Judged]) -> None:
    """
    Raises:
        UsageError: no model of the family could keep it, on any device.
    """

    def least(one: Judged) -> float:
        return one.row.memory_mb.low if one.row.memory_mb else one.row.file_mb

    every = [one for one in every if one.row.memory_mb] or every
    smallest = min(every, key=least)
    if limit < least(smallest):
        raise UsageError(
            f"{OPTIONS['memory']} {limit:g} is {size_words(least(smallest) - limit)} less than the "
            f"smallest model needs at best: {smallest.row.title} with {smallest.row.runtime}, "
            f"{size_words(least(smallest))}",
            f"use {math.ceil(least(smallest))} or more",
        )
