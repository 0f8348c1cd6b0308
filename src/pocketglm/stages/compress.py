"""Checkpoint + Plan -> smaller Checkpoint. Finished steps come from the step cache.

A step reads the folder of the one before it and writes its own into the cache, a chunk of rows at
a time, a block at a time (`BlockMethod`) or (`ModelMethod`) as a whole; the last one is copied to
OUT. A step is complete or does not exist, and a block or training goes on where it was, so after a
kill the same command ends with the same bytes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint, TensorInfo, copy_file
from pocketglm.artifacts.manifest import MANIFEST, digest_value, tool_versions, write_json
from pocketglm.artifacts.output import free_bytes, is_done, output_folder
from pocketglm.artifacts.schemas import CompressResult, StepResult
from pocketglm.contracts import (
    WORK,
    BlockMethod,
    DataOptions,
    ModelMethod,
    Reporter,
    Silent,
    StepContext,
    TensorMethod,
)
from pocketglm.errors import DiskFullError, UnsupportedError, UsageError
from pocketglm.model.hf import check_tensors
from pocketglm.stages import _cache
from pocketglm.stages._block_step import BlockJob
from pocketglm.stages._memory import Ceiling
from pocketglm.stages._model_step import SCORE, SCORED, ModelJob, add_score, input_digests
from pocketglm.stages._step import (
    WEIGHTS,
    StepJob,
    chunk_size,
    code_digest,
    step_layout,
    stored_bytes,
)
from pocketglm.stages.plan import Plan, PlanStep
from pocketglm.train.finetune import read_task

_OOS, _OOS_FALL = f"{SCORE}oos_recall", 0.02
# The source that a step's numbers come from, by the kind of its method.
_CODE = ("ops/", "methods/_")
_WHOLE_CODE = (*_CODE, "model/", "train/", "data/", "text/")


def compress(
    path: Path,
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    dry_run: bool = False,
    task: str | None = None,
    data: DataOptions | None = None,
    cache: Path | None = None,
    max_memory: int | None = None,
    reporter: Reporter | None = None,
) -> CompressResult:
    """Run `plan` on the checkpoint in `path` and write `out`; `dry_run` writes nothing.

    task, data: what the model is for and rows of it, for methods that learn or look at activations;
    each step is then scored on the validation rows. task: None = the one it was trained for.

    cache: folder of finished steps, None = the user's. Sizes in the result are the bytes of all
    tensors; a dry run computes them from the headers. max_memory: bytes that the process may have
    resident; the result's bytes do not depend on it.

    Raises:
        UnsupportedError: a method refuses the checkpoint; every reason is listed.
        UsageError: a method needs rows and there is no `data`, or the task is unknown.
        DataError: the rows cannot be used.
        CheckpointError: a weight holds NaN, or the checkpoint is damaged.
        DiskFullError: checked before the work begins.
        MemoryCeilingError: the work does not fit `max_memory`; checked before it begins.
        UsageError: `out` is, or holds, the checkpoint.
        OutputExistsError, LockedError: as `artifacts.output.output_folder`.
    """
    reporter, root = reporter or Silent(), cache or _cache.cache_root()
    ckpt = Checkpoint.open(path)
    check_tensors(ckpt)
    run = _Run.prepare(ckpt, plan, task, data, reporter, root)
    stages = run.predict()
    if dry_run:
        steps = [
            _result(step, stages[i], stages[i + 1], reused=False)
            for i, step in enumerate(plan.steps)
        ]
        return _summary(out, steps, ckpt, dry_run=True)
    request = digest_value(
        {
            "verb": "compress",
            "checkpoint": run.source,
            "plan": plan.describe(),
            "version": tool_versions()["pocketglm"],
            **run.inputs,
        }
    )
    if is_done(out, request, force, [path]):
        return _summary(out, _past(plan, stages, out), ckpt, already_done=True)
    _require_space({root: run.missing_bytes(stages, root), out: stored_bytes(stages[-1])})
    ceiling = Ceiling(max_memory, "compress")
    size = chunk_size(ckpt, ceiling)
    with output_folder(out, request, force, [path]) as folder:
        steps = []
        current, digest = ckpt, run.source
        for step in plan.steps:
            began = time.monotonic()
            build = run.builder(step, current, digest, ceiling, size)
            entry = _cache.obtain(root, run.key(step, digest), build)
            seconds = round(time.monotonic() - began, 3)
            steps.append(_result(step, current, entry.ckpt, entry.reused, seconds))
            _say_effect(steps[-1], current, reporter)
            current, digest = entry.ckpt, entry.digest
        _copy(current, folder)
        manifest = current.manifest.model_copy(update={"request": request})
        write_json(folder / MANIFEST, manifest)
    return _summary(out, steps, ckpt)


@dataclass(frozen=True, slots=True)
class _Run:
    """A plan, what its steps may use, and the digests of that.

    source: digest of the plan's input. inputs: of the task's rows, where there are any.
    """

    plan: Plan
    context: StepContext
    source: str
    inputs: Mapping[str, Any]

    @classmethod
    def prepare(
        cls,
        ckpt: Checkpoint,
        plan: Plan,
        task: str | None,
        data: DataOptions | None,
        reporter: Reporter,
        cache: Path,
    ) -> _Run:
        """Read the rows, and refuse a plan that needs some where there are none."""
        task = task or ckpt.manifest.task
        for step in plan.steps:
            spec = step.spec
            asks = isinstance(spec, BlockMethod) or (
                isinstance(spec, ModelMethod) and spec.needs_rows(step.config)
            )
            if data is None and asks:
                raise UsageError(
                    f"{step.method} needs rows of the task", "add --data DATA (and --task TASK)"
                )
        if data is not None and task is None:
            raise UsageError(
                f"--data needs a task: {ckpt.path} was not trained for one here",
                "add --task intent, command or lm",
            )
        rows = read_task(task, data) if task is not None and data is not None else None
        context = StepContext(ckpt, plan.seed or 0, reporter, cache, task, data, rows)
        inputs = {"rows": digest_value([task, rows.contents])} if rows else {}
        return cls(plan, context, ckpt.digest(), inputs)

    def predict(self) -> list[Checkpoint]:
        """The input, and the headers of what each step will make; refuses before any work."""
        stages = [self.context.source]
        for number, step in enumerate(self.plan.steps, 1):
            before, spec = stages[-1], step.spec
            if isinstance(spec, TensorMethod):
                reasons = spec.check(step.config, before)
            else:
                reasons = spec.check(step.config, before, self.context)
            if reasons:
                where = (
                    f"step {number}, {step.method}," if len(self.plan.steps) > 1 else step.method
                )
                raise UnsupportedError(
                    f"{where} cannot process {self.context.source.path}:", reasons
                )
            if isinstance(spec, ModelMethod):
                stages.append(spec.predict(step.config, before, self.context))
                continue
            layout, schemes = step_layout(spec, step.config, before)
            tensors = {
                name: TensorInfo(name, dtype, shape, before.path / WEIGHTS, 0)
                for name, (dtype, shape) in layout.items()
            }
            manifest = before.manifest.model_copy(update={"schemes": schemes})
            stages.append(replace(before, tensors=tensors, manifest=manifest))
        return stages

    def key(self, step: PlanStep, parent: str) -> str:
        """The name of a step's result in the cache: a digest of all that decides it."""
        spec, own = step.spec, dict(self.inputs)
        folders: tuple[str, ...] = _CODE
        if not isinstance(spec, TensorMethod):
            folders = _WHOLE_CODE
        if isinstance(spec, BlockMethod):
            folders = (*_WHOLE_CODE, "stages/_block")
        if isinstance(spec, ModelMethod):
            own |= {"source": self.source, "files": input_digests(spec.inputs(step.config))}
        return digest_value(
            {
                "parent": parent,
                "method": step.method,
                "settings": step.settings,
                "seed": self.plan.seed,
                "version": tool_versions()["pocketglm"],
                "code": code_digest(step.method, folders),
                **own,
            }
        )

    def finished(self, root: Path) -> int:
        """How many of the plan's first steps are in the cache."""
        digest = self.source
        for number, step in enumerate(self.plan.steps):
            found = _cache.sealed_digest(root, self.key(step, digest))
            if found is None:
                return number
            digest = found
        return len(self.plan.steps)

    def missing_bytes(self, stages: list[Checkpoint], root: Path) -> int:
        """Bytes that the steps still write into the cache; `stages` as of `predict`."""
        done = self.finished(root)
        steps = zip(self.plan.steps[done:], stages[1 + done :], strict=True)
        # A method by blocks keeps its finished ones beside the file that they are put together in.
        return sum(
            stored_bytes(stage) * (2 if isinstance(step.spec, BlockMethod) else 1)
            for step, stage in steps
        )

    def builder(
        self, step: PlanStep, ckpt: Checkpoint, parent: str, ceiling: Ceiling, size: int
    ) -> Callable[[Path], None]:
        """What writes a step's checkpoint into a folder."""
        spec, context = step.spec, self.context
        job: ModelJob | BlockJob | StepJob
        if isinstance(spec, ModelMethod):
            job = ModelJob(step, spec, ckpt, parent, context, ceiling)
        elif isinstance(spec, BlockMethod):
            job = BlockJob(step, spec, ckpt, parent, context, ceiling, size)
        else:
            job = StepJob(step, spec, self.plan.seed, ckpt, parent, context.reporter, ceiling, size)

        def build(folder: Path) -> None:
            job.run(folder)
            in_parts = isinstance(spec, BlockMethod) or (
                isinstance(spec, ModelMethod) and spec.in_parts
            )
            add_score(folder, context, SCORED if in_parts else None)
            shutil.rmtree(folder / WORK, ignore_errors=True)  # last: until here a kill can resume

        return build


def _require_space(needs: Mapping[Path, int]) -> None:
    """Raise before the work if a disk has less free space than it will need."""
    disks: dict[int, list[Path]] = {}
    for path in needs:
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        disks.setdefault(existing.stat().st_dev, []).append(path)
    for paths in disks.values():
        needed, free = sum(needs[path] for path in paths), free_bytes(paths[0].absolute())
        if needed > free:
            raise DiskFullError(
                f"{' and '.join(map(str, paths))} need {needed:,} bytes, the disk has {free:,} "
                "bytes free",
                "free some space (`pocketglm cache --clear` empties the step cache), set "
                "POCKETGLM_CACHE to another disk, or choose another --out",
            )


def _copy(ckpt: Checkpoint, folder: Path) -> None:
    """All files of a finished step. The weights are linked to one OUT, which writes them once.

    So no two outputs share a file. An OUT that is edited in place damages the cache's entry; its
    digest shows that at the next use, and it is built again. Other OUTs get copies.
    """
    for file in ckpt.files:
        target = folder / file.relative_to(ckpt.path)
        target.unlink(missing_ok=True)  # of a run that was killed
        if file.name == WEIGHTS and file.stat().st_nlink == 1:
            with suppress(OSError):  # another disk, or one without links
                target.hardlink_to(file)
                continue
        copy_file(file, target)


def _say_effect(result: StepResult, before: Checkpoint, reporter: Reporter) -> None:
    """A line for each step, and a warning where out-of-scope texts are recognized less."""
    size = f"{result.bytes_before / 1e6:.1f} -> {result.bytes_after / 1e6:.1f} MB"
    reporter.say(f"{result.method}: {', '.join([size, *result.figures()])}")
    old = before.manifest.lineage[-1].effect.get(_OOS) if before.manifest.lineage else None
    fall = (old or 0.0) - result.effect.get(_OOS, 0.0)
    if fall > _OOS_FALL:
        reporter.say(
            f"warning: {result.method} costs {100 * fall:.1f} points of out-of-scope recall on the "
            "validation rows"
        )


# --- the result ----------------------------------------------------------------------------------


def _result(
    step: PlanStep, before: Checkpoint, after: Checkpoint, reused: bool, seconds: float = 0.0
) -> StepResult:
    lineage = after.manifest.lineage
    done = len(lineage) > len(before.manifest.lineage)  # else it is a prediction
    return StepResult(
        method=step.method,
        settings=step.settings,
        reused=reused,
        bytes_before=stored_bytes(before),
        bytes_after=stored_bytes(after),
        effect=lineage[-1].effect if done else {},
        seconds=seconds,
    )


def _past(plan: Plan, stages: list[Checkpoint], out: Path) -> list[StepResult]:
    """The steps of a finished output: sizes as predicted, effects from its lineage."""
    lineage = Checkpoint.open(out).manifest.lineage
    first = len(lineage) - len(plan.steps)
    return [
        _result(step, stages[i], stages[i + 1], reused=True).model_copy(
            update={"effect": lineage[first + i].effect}
        )
        for i, step in enumerate(plan.steps)
    ]


def _summary(
    out: Path,
    steps: list[StepResult],
    ckpt: Checkpoint,
    *,
    dry_run: bool = False,
    already_done: bool = False,
) -> CompressResult:
    return CompressResult(
        out=str(out),
        dry_run=dry_run,
        already_done=already_done,
        steps=steps,
        bytes_before=stored_bytes(ckpt),
        bytes_after=steps[-1].bytes_after,
    )
