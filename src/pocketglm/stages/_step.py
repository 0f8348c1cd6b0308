"""One step of a plan: a checkpoint's tensors through a method, into a new folder.

Chunks of rows are read, quantized and packed by a few threads and written in order by one, so the
bytes do not depend on the threads, and memory is that of a few chunks whatever the model's size.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint, TensorInfo, copy_side_files
from pocketglm.artifacts.manifest import (
    MANIFEST,
    Manifest,
    Step,
    digest_files,
    tool_versions,
    write_json,
)
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import BlockMethod, Config, Reporter, TensorMethod
from pocketglm.model.families import tied_twin
from pocketglm.model.hf import model_spec_of, pocketglm_fields
from pocketglm.ops.affine import squared_error
from pocketglm.ops.stored import Layout, as_tensor, check_finite, store, stored_layout
from pocketglm.runtimes._cores import usable_cores
from pocketglm.stages._memory import Ceiling, keep_freed_memory
from pocketglm.stages._upstream import opens_in_transformers, quantization_config
from pocketglm.stages.plan import PlanStep

if TYPE_CHECKING:
    from pocketglm.contracts import Integers

CHUNK = 1 << 20  # elements of a tensor that a thread has in memory as float32 at a time
WEIGHTS = "model.safetensors"
_THREADS = 4  # at most: reading and writing are not faster with more
_LEAST = 1 << 16  # elements of the smallest chunk
_BYTES = 32  # for an element in work: stored, integers, packed, with a reserve
_SPARE = 32 << 20  # headers, the scale search's buffers, what the allocator keeps
_PACKAGE = Path(__file__).parents[1]


def step_layout(
    spec: TensorMethod | BlockMethod, config: Config, ckpt: Checkpoint
) -> tuple[Layout, dict[str, TensorScheme]]:
    """Tensors and schemes after a step, in file order, from the headers."""
    layout: Layout = {}
    schemes = dict(ckpt.manifest.schemes)
    for name, info in ckpt.tensors.items():
        scheme = spec.select(config, ckpt, info)
        parts = stored_layout(name, info.shape, scheme, info.dtype)
        layout |= parts
        if scheme:
            schemes[name] = scheme
            layout |= {
                twin: parts[part] for part in parts if (twin := tied_twin(ckpt, part, scheme))
            }
    return layout, schemes


@functools.cache
def code_digest(method: str, folders: tuple[str, ...]) -> str:
    """Digest of the source that a step's numbers come from: an edit makes old entries invalid."""
    files = [path for folder in folders for path in sorted(_PACKAGE.glob(f"{folder}*.py"))]
    return digest_files(_PACKAGE, [*files, _PACKAGE / "methods" / f"{method}.py"])


@dataclass(frozen=True, slots=True)
class StepJob:
    """One step by a method that sees a tensor at a time, on one checkpoint."""

    step: PlanStep
    spec: TensorMethod
    seed: int | None
    ckpt: Checkpoint
    parent: str
    reporter: Reporter
    ceiling: Ceiling
    size: int = CHUNK

    def run(self, folder: Path) -> None:
        """Write the step's checkpoint into `folder`."""
        layout, schemes = step_layout(self.spec, self.step.config, self.ckpt)
        new = {n: s for n, s in schemes.items() if n not in self.ckpt.manifest.schemes}
        writer = safetensors.Writer(folder / WEIGHTS, layout)
        lost = total = 0.0
        done = 0
        for chunk in in_order(functools.partial(self._chunk, *c) for c in self._chunks(new)):
            for part, array in chunk.parts:
                writer.write(part, array)
            lost, total = lost + chunk.lost, total + chunk.total
            if chunk.last:
                done += 1
                self.ceiling.check()
                self.reporter.progress(self.step.method, done, len(self.ckpt.tensors), chunk.name)
        writer.close()
        copy_side_files(self.ckpt, folder)
        effect = {
            "weights": float(len(new)),
            "weight_error": float(f"{math.sqrt(lost / total) if total else 0.0:.6g}"),
            "bytes_before": float(stored_bytes(self.ckpt)),
            "bytes_after": float(layout_bytes(layout)),
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
        write_json(folder / "config.json", upstream_config(self.ckpt, manifest))
        write_json(folder / MANIFEST, manifest)

    def _chunks(
        self, new: dict[str, TensorScheme]
    ) -> Iterator[tuple[TensorInfo, TensorScheme | None, int, int | None]]:
        for name, info in self.ckpt.tensors.items():
            for start, stop in row_ranges(info, self.size):
                yield info, new.get(name), start, stop

    def _chunk(
        self, info: TensorInfo, scheme: TensorScheme | None, start: int, stop: int | None
    ) -> Chunk:
        quantize = functools.partial(self.spec.quantize, self.step.config)
        return stored_chunk(self.ckpt, info, scheme, quantize, start, stop)


def stored_chunk(
    ckpt: Checkpoint,
    info: TensorInfo,
    scheme: TensorScheme | None,
    quantize: Callable[[torch.Tensor, TensorScheme], Integers],
    start: int,
    stop: int | None,
) -> Chunk:
    """Rows `start:stop` of a tensor as they will be stored.

    Raises:
        CheckpointError: they are to be quantized, and hold NaN or infinity.
    """
    rows = ckpt.read(info.name, start, stop)
    last = stop is None or stop == info.shape[0]
    if scheme is None:
        return Chunk(info.name, [(info.name, rows)], last)
    weight = as_tensor(rows)
    check_finite(ckpt, info.name, weight, start)
    q, scales, zero_points = quantize(weight, scheme)
    parts = []
    for part, array in store(info.name, q, scales, zero_points, scheme).items():
        if part == f"{info.name}_shape":  # of the whole weight, written once
            array[:] = info.shape
            if start:
                continue
        parts.append((part, array))
        if twin := tied_twin(ckpt, part, scheme):
            parts.append((twin, array))
    lost, total = squared_error(weight, q, scales, zero_points, scheme)
    return Chunk(info.name, parts, last, lost, total)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a tensor, stored; squared norms of their error and of themselves, if quantized."""

    name: str
    parts: list[tuple[str, npt.NDArray[Any]]]
    last: bool
    lost: float = 0.0
    total: float = 0.0


def in_order(work: Iterable[Callable[[], Chunk]]) -> Iterator[Chunk]:
    """Results of `work`, in its order, computed by a few threads a little ahead."""
    keep_freed_memory()
    threads, before = _threads(), torch.get_num_threads()
    waiting: deque[Future[Chunk]] = deque()
    try:
        # One thread of torch in each: they would wait for each other.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for task in work:
                    waiting.append(pool.submit(task))
                    if len(waiting) > threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(before)


def _threads() -> int:
    return min(usable_cores(), _THREADS)


def chunk_size(ckpt: Checkpoint, ceiling: Ceiling) -> int:
    """Elements of a chunk with which a step stays below the limit: as many as are fast, or fewer.

    Raises:
        MemoryCeilingError: not even the smallest chunks fit.
    """
    room, size = ceiling.room(), CHUNK
    while room is not None and size > _LEAST and _buffers(ckpt, size) > room:
        size //= 2
    ceiling.require(_buffers(ckpt, size), "the chunks of the weights in work")
    return size


def _buffers(ckpt: Checkpoint, size: int) -> int:
    """Bytes of the chunks that are in work at once, if each has about `size` elements."""
    largest = max(
        (
            info.size // info.shape[0] * ((stop or 0) - start)
            for info in ckpt.tensors.values()
            if info.size and info.shape
            for start, stop in row_ranges(info, size)[:1]
        ),
        default=0,
    )
    return (_threads() + 1) * _BYTES * largest + _SPARE


def row_ranges(info: TensorInfo, size: int) -> list[tuple[int, int | None]]:
    """Row ranges of about `size` elements; whole multiples of 8 rows, because packed zero points
    hold 8 rows in a word.
    """
    if not info.shape:
        return [(0, None)]
    rows = info.shape[0]
    step = max(size // max(info.size // max(rows, 1), 1) // 8 * 8, 8)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def upstream_config(ckpt: Checkpoint, manifest: Manifest) -> dict[str, Any]:
    """config.json after a step: upstream's quantization_config where upstream can open it."""
    left_out = ("quantization_config", "auto_map")  # the Python code is not copied
    config = {key: value for key, value in ckpt.config.items() if key not in left_out}
    if opens_in_transformers(replace(ckpt, manifest=manifest)).startswith("no"):
        # model/auto.py opens it from the manifest; upstream's loader must not try.
        return config | pocketglm_fields(model_spec_of(ckpt))
    if not manifest.schemes:
        return config
    # Of a step that wrote the whole model these are its own tensors: packed ones have other names.
    names = [name.removesuffix("_packed") for name in ckpt.tensors]
    return config | {"quantization_config": quantization_config(manifest.schemes, names)}


def stored_bytes(ckpt: Checkpoint) -> int:
    """Bytes of all tensors."""
    return sum(info.nbytes for info in ckpt.tensors.values())


def layout_bytes(layout: Layout) -> int:
    """Bytes of the tensors of a layout."""
    return sum(
        math.prod(shape) * safetensors.DTYPES[dtype].itemsize for dtype, shape in layout.values()
    )
