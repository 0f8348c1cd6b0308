"""Checkpoint + Plan -> smaller Checkpoint. Finished steps come from the step cache.

A step reads the folder of the one before it and writes its own into the cache, a chunk of rows at
a time; the last one is copied to OUT. A tensor is complete or the step does not exist, so after a
kill the same command ends with the same bytes.
"""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint, TensorInfo
from pocketglm.artifacts.manifest import (
    MANIFEST,
    Manifest,
    Step,
    digest_files,
    digest_value,
    tool_versions,
    write_json,
)
from pocketglm.artifacts.output import free_bytes, is_done, output_folder
from pocketglm.artifacts.schemas import CompressResult, StepResult
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import Reporter, Silent
from pocketglm.errors import CheckpointError, DiskFullError, UnsupportedError
from pocketglm.model.hf import check_tensors, model_spec_of, pocketglm_fields
from pocketglm.ops.affine import dequantize
from pocketglm.ops.stored import Layout, as_tensor, store, stored_layout
from pocketglm.stages import _cache
from pocketglm.stages._upstream import opens_in_transformers, quantization_config, tied_twin
from pocketglm.stages.plan import Plan, PlanStep

CHUNK = 1 << 22  # elements of a tensor that are in memory as float32 at a time
WEIGHTS = "model.safetensors"
_PACKAGE = Path(__file__).parents[1]


def compress(
    path: Path,
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    dry_run: bool = False,
    cache: Path | None = None,
    reporter: Reporter | None = None,
) -> CompressResult:
    """Run `plan` on the checkpoint in `path` and write `out`; `dry_run` writes nothing.

    cache: folder of finished steps, None = the user's. Sizes in the result are the bytes of all
    tensors; a dry run computes them from the headers.

    Raises:
        UnsupportedError: a method refuses the checkpoint; every reason is listed.
        CheckpointError: a weight holds NaN, or the checkpoint is damaged.
        DiskFullError: checked before the work begins.
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
    _require_space({root: sum(map(_bytes, missing)), out: _bytes(stages[-1])})
    with output_folder(out, request, force, [path]) as folder:
        steps = []
        current, digest = ckpt, source
        for step in plan.steps:
            began = time.monotonic()
            key = _key(step, plan.seed, digest)
            job = _Job(step, plan.seed, current, digest, reporter)
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
        layout, schemes = _layout(step, before)
        tensors = {
            name: TensorInfo(name, dtype, shape, ckpt.path / WEIGHTS, 0)
            for name, (dtype, shape) in layout.items()
        }
        manifest = before.manifest.model_copy(update={"schemes": schemes})
        stages.append(replace(before, tensors=tensors, manifest=manifest))
    return stages


def _layout(step: PlanStep, ckpt: Checkpoint) -> tuple[Layout, dict[str, TensorScheme]]:
    """Tensors and schemes after a step, in file order, from the headers."""
    layout: Layout = {}
    schemes = dict(ckpt.manifest.schemes)
    for name, info in ckpt.tensors.items():
        scheme = step.spec.select(step.config, ckpt, info)
        parts = stored_layout(name, info.shape, scheme, info.dtype)
        layout |= parts
        if scheme:
            schemes[name] = scheme
            layout |= {
                twin: parts[part] for part in parts if (twin := tied_twin(ckpt, part, scheme))
            }
    return layout, schemes


def _finished(plan: Plan, root: Path, digest: str) -> int:
    """How many of the plan's first steps are in the cache."""
    for number, step in enumerate(plan.steps):
        found = _cache.sealed_digest(root, _key(step, plan.seed, digest))
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


# --- one step ------------------------------------------------------------------------------------


@functools.cache
def _code(method: str) -> str:
    """Digest of the source that a step's numbers come from: an edit makes old entries invalid."""
    files = [path for folder in ("ops/*.py", "methods/_*.py") for path in _PACKAGE.glob(folder)]
    return digest_files(_PACKAGE, [*files, _PACKAGE / "methods" / f"{method}.py"])


def _key(step: PlanStep, seed: int | None, parent: str) -> str:
    return digest_value(
        {
            "parent": parent,
            "method": step.method,
            "settings": step.settings,
            "seed": seed,
            "version": tool_versions()["pocketglm"],
            "code": _code(step.method),
        }
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """One step of a plan on one checkpoint."""

    step: PlanStep
    seed: int | None
    ckpt: Checkpoint
    parent: str
    reporter: Reporter

    def run(self, folder: Path) -> None:
        """Write the step's checkpoint into `folder`."""
        layout, schemes = _layout(self.step, self.ckpt)
        new = {n: s for n, s in schemes.items() if n not in self.ckpt.manifest.schemes}
        writer = safetensors.Writer(folder / WEIGHTS, layout)
        lost = total = 0.0
        for done, (name, info) in enumerate(self.ckpt.tensors.items(), 1):
            if name in new:
                error, norm = self._quantize(writer, info, new[name])
                lost, total = lost + error, total + norm
            else:
                for start, stop in _chunks(info):
                    writer.write(name, self.ckpt.read(name, start, stop))
            self.reporter.progress(self.step.method, done, len(self.ckpt.tensors), name)
        writer.close()
        _copy_side_files(self.ckpt, folder)
        effect = {
            "weights": float(len(new)),
            "weight_error": float(f"{math.sqrt(lost / total) if total else 0.0:.6g}"),
            "bytes_before": float(_bytes(self.ckpt)),
            "bytes_after": float(_layout_bytes(layout)),
        }
        lineage = Step(
            method=self.step.method,
            settings=self.step.settings,
            seed=self.seed,
            parent=self.parent,
            versions=tool_versions("torch"),
            effect=effect,
        )
        manifest = self.ckpt.manifest.model_copy(
            update={
                "request": "",
                "lineage": [*self.ckpt.manifest.lineage, lineage],
                "schemes": schemes,
            }
        )
        write_json(folder / "config.json", _config(self.ckpt, manifest))
        write_json(folder / MANIFEST, manifest)

    def _quantize(
        self, writer: safetensors.Writer, info: TensorInfo, scheme: TensorScheme
    ) -> tuple[float, float]:
        """Write one weight; returns the squared norms of its error and of itself."""
        lost = total = 0.0
        for start, stop in _chunks(info):
            weight = as_tensor(self.ckpt.read(info.name, start, stop)).float()
            _check_finite(self.ckpt, info.name, weight, start)
            q, scales, zero_points = self.step.spec.quantize(self.step.config, weight, scheme)
            stored = store(info.name, q, scales, zero_points, scheme)
            for part, array in stored.items():
                if part == f"{info.name}_shape":  # of the whole weight, written once
                    array[:] = info.shape
                    if start:
                        continue
                writer.write(part, array)
                if twin := tied_twin(self.ckpt, part, scheme):
                    writer.write(twin, array)
            error = dequantize(q, scales, zero_points, scheme) - weight
            lost += float(error.double().square().sum())
            total += float(weight.double().square().sum())
        return lost, total


def _chunks(info: TensorInfo) -> list[tuple[int, int | None]]:
    """Row ranges; whole multiples of 8 rows, because packed zero points hold 8 rows in a word."""
    if not info.shape:
        return [(0, None)]
    rows = info.shape[0]
    step = max(CHUNK // max(info.size // max(rows, 1), 1) // 8 * 8, 8)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _check_finite(ckpt: Checkpoint, name: str, weight: torch.Tensor, start: int) -> None:
    bad = (~weight.isfinite()).any(dim=1).nonzero()
    if len(bad):
        raise CheckpointError(
            f"{ckpt.path}: '{name}' holds NaN or infinity, first in row {start + int(bad[0])}",
            "the training run diverged or the file is damaged: use an earlier checkpoint",
        )


def _config(ckpt: Checkpoint, manifest: Manifest) -> dict[str, Any]:
    """config.json after a step: upstream's quantization_config where upstream can open it."""
    config = {key: value for key, value in ckpt.config.items() if key != "quantization_config"}
    if opens_in_transformers(replace(ckpt, manifest=manifest)).startswith("no"):
        # model/auto.py opens it from the manifest; upstream's loader must not try.
        return config | pocketglm_fields(model_spec_of(ckpt))
    if not manifest.schemes:
        return config
    return config | {"quantization_config": quantization_config(manifest.schemes, ckpt.tensors)}


def _copy_side_files(ckpt: Checkpoint, folder: Path) -> None:
    """Tokenizer, pooling and the like: everything but weights, config and manifest."""
    weights = {info.file.name for info in ckpt.tensors.values()}
    for file in ckpt.files:
        name = file.relative_to(ckpt.path)
        if file.name in weights or name.name.endswith(".safetensors.index.json"):
            continue
        if str(name) not in ("config.json", MANIFEST):
            _copy_file(file, folder / name)


def _copy(ckpt: Checkpoint, folder: Path) -> None:
    """All files of a checkpoint. Copies, not links: editing OUT must not change the cache."""
    for file in ckpt.files:
        _copy_file(file, folder / file.relative_to(ckpt.path))


def _copy_file(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


# --- the result ----------------------------------------------------------------------------------


def _bytes(ckpt: Checkpoint) -> int:
    return sum(info.nbytes for info in ckpt.tensors.values())


def _layout_bytes(layout: Layout) -> int:
    return sum(
        math.prod(shape) * safetensors.DTYPES[dtype].itemsize for dtype, shape in layout.values()
    )


def _result(
    step: PlanStep, before: Checkpoint, after: Checkpoint, reused: bool, seconds: float = 0.0
) -> StepResult:
    lineage = after.manifest.lineage
    done = len(lineage) > len(before.manifest.lineage)  # else it is a prediction
    return StepResult(
        method=step.method,
        settings=step.settings,
        reused=reused,
        bytes_before=_bytes(before),
        bytes_after=_bytes(after),
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
        bytes_before=_bytes(ckpt),
        bytes_after=steps[-1].bytes_after,
    )
