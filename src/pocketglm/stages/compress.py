"""Checkpoint + Plan -> smaller Checkpoint. Finished steps come from the step cache.

A step reads the folder of the one before it and writes its own into the cache, a chunk of rows at
a time; the last one is copied to OUT. A tensor is complete or the step does not exist, so after a
kill the same command ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pocketglm.artifacts.checkpoint import Checkpoint, TensorInfo
from pocketglm.artifacts.manifest import MANIFEST, digest_value, tool_versions, write_json
from pocketglm.artifacts.output import free_bytes, is_done, output_folder
from pocketglm.artifacts.schemas import CompressResult, StepResult
from pocketglm.contracts import Reporter, Silent
from pocketglm.errors import DiskFullError, UnsupportedError
from pocketglm.model.hf import check_tensors
from pocketglm.stages import _cache
from pocketglm.stages._memory import Ceiling
from pocketglm.stages._step import (
    WEIGHTS,
    StepJob,
    chunk_size,
    copy_file,
    step_key,
    step_layout,
    stored_bytes,
)
from pocketglm.stages.plan import Plan, PlanStep


def compress(
    path: Path,
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    dry_run: bool = False,
    cache: Path | None = None,
    max_memory: int | None = None,
    reporter: Reporter | None = None,
) -> CompressResult:
    """Run `plan` on the checkpoint in `path` and write `out`; `dry_run` writes nothing.

    cache: folder of finished steps, None = the user's. Sizes in the result are the bytes of all
    tensors; a dry run computes them from the headers. max_memory: bytes that the process may have
    resident; the result's bytes do not depend on it.

    Raises:
        UnsupportedError: a method refuses the checkpoint; every reason is listed.
        CheckpointError: a weight holds NaN, or the checkpoint is damaged.
        DiskFullError: checked before the work begins.
        MemoryCeilingError: the work does not fit `max_memory`; checked before it begins.
        UsageError: `out` is, or holds, the checkpoint.
        OutputExistsError, LockedError: as `artifacts.output.output_folder`.
    """
    reporter, root = reporter or Silent(), cache or _cache.cache_root()
    ckpt = Checkpoint.open(path)
    check_tensors(ckpt)
    stages = _predict(ckpt, plan)
    if dry_run:
        steps = [
            _result(step, stages[i], stages[i + 1], reused=False)
            for i, step in enumerate(plan.steps)
        ]
        return _summary(out, steps, ckpt, dry_run=True)
    source = ckpt.digest()
    request = digest_value(
        {
            "verb": "compress",
            "checkpoint": source,
            "plan": plan.describe(),
            "version": tool_versions()["pocketglm"],
        }
    )
    if is_done(out, request, force, [path]):
        return _summary(out, _past(plan, stages, out), ckpt, already_done=True)
    missing = stages[1 + _finished(plan, root, source) :]
    _require_space({root: sum(map(stored_bytes, missing)), out: stored_bytes(stages[-1])})
    ceiling = Ceiling(max_memory, "compress")
    size = chunk_size(ckpt, ceiling)
    with output_folder(out, request, force, [path]) as folder:
        steps = []
        current, digest = ckpt, source
        for step in plan.steps:
            began = time.monotonic()
            key = step_key(step, plan.seed, digest)
            job = StepJob(step, plan.seed, current, digest, reporter, ceiling, size)
            entry = _cache.obtain(root, key, job.run)
            seconds = round(time.monotonic() - began, 3)
            steps.append(_result(step, current, entry.ckpt, entry.reused, seconds))
            current, digest = entry.ckpt, entry.digest
        _copy(current, folder)
        manifest = current.manifest.model_copy(update={"request": request})
        write_json(folder / MANIFEST, manifest)
    return _summary(out, steps, ckpt)


# --- before the work -----------------------------------------------------------------------------


def _predict(ckpt: Checkpoint, plan: Plan) -> list[Checkpoint]:
    """`ckpt`, and the headers of what each step will make; refuses before any work."""
    stages = [ckpt]
    for number, step in enumerate(plan.steps, 1):
        before = stages[-1]
        if reasons := step.spec.check(step.config, before):
            where = f"step {number}, {step.method}," if len(plan.steps) > 1 else step.method
            raise UnsupportedError(f"{where} cannot process {ckpt.path}:", reasons)
        layout, schemes = step_layout(step, before)
        tensors = {
            name: TensorInfo(name, dtype, shape, ckpt.path / WEIGHTS, 0)
            for name, (dtype, shape) in layout.items()
        }
        manifest = before.manifest.model_copy(update={"schemes": schemes})
        stages.append(replace(before, tensors=tensors, manifest=manifest))
    return stages


def _finished(plan: Plan, root: Path, digest: str) -> int:
    """How many of the plan's first steps are in the cache."""
    for number, step in enumerate(plan.steps):
        found = _cache.sealed_digest(root, step_key(step, plan.seed, digest))
        if found is None:
            return number
        digest = found
    return len(plan.steps)


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
    """All files of a checkpoint. Copies, not links: editing OUT must not change the cache."""
    for file in ckpt.files:
        copy_file(file, folder / file.relative_to(ckpt.path))


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
