"""One step of a plan by a method that sees a block at a time, with what goes into it.

Blocks are done one after the other: a quantized block's outputs are the next one's inputs. Each
one's tensors, and then the inputs of the next, are written to WORK, whole or not at all; a killed
step goes on with the block that it was in. A block that layers share sees what enters each of them,
computed with its float weights. At the end the tensors are put together in one file.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint, copy_side_files
from pocketglm.artifacts.manifest import MANIFEST, Step, tool_versions, write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import WORK, BlockMethod, BlockResult, BlockWork, Config, StepContext
from pocketglm.eval.lm import WINDOW
from pocketglm.model.hf import model_spec_of, stored_name
from pocketglm.model.layers import Block, bare_modules
from pocketglm.model.parts import Parts, TableRows, cut
from pocketglm.ops.affine import dequantize
from pocketglm.ops.stored import Layout, as_array, as_tensor, store, stored_layout
from pocketglm.stages._memory import Ceiling, keep_freed_memory, megabytes
from pocketglm.stages._model_step import SCORED, scoring_bytes
from pocketglm.stages._step import (
    CHUNK,
    WEIGHTS,
    in_order,
    layout_bytes,
    row_ranges,
    step_layout,
    stored_bytes,
    stored_chunk,
    upstream_config,
)
from pocketglm.stages.plan import PlanStep
from pocketglm.train._calibration import BATCH, batches_of, calibration_rows

_HIDDEN, _FIGURE = "hidden", "figure."
_SPARE = 96 << 20  # a batch's activations, chunks of the embedding, what the allocator keeps


@dataclass(frozen=True, slots=True)
class BlockJob:
    """One step on one checkpoint, whose digest is `parent`."""

    step: PlanStep
    spec: BlockMethod
    ckpt: Checkpoint
    parent: str
    context: StepContext
    ceiling: Ceiling
    size: int = CHUNK

    def run(self, folder: Path) -> None:
        """Write the step's checkpoint into `folder`; continues from `folder / WORK`."""
        needed = block_step_bytes(self.spec, self.step.config, self.ckpt)
        say = self.context.reporter.say
        say(f"{self.step.method} holds up to {megabytes(needed)} at once, for one block")
        self.ceiling.require(needed, "one block of the model")
        if scoring_bytes(self.ckpt) <= SCORED:
            self.ceiling.require(scoring_bytes(self.ckpt), "the whole model, to score it")
        keep_freed_memory()
        work = folder / WORK
        work.mkdir(exist_ok=True)
        layout, schemes = step_layout(self.spec, self.step.config, self.ckpt)
        figures = self._blocks(work, schemes)
        self._assemble(folder, work, layout, schemes)
        copy_side_files(self.ckpt, folder)
        lineage = Step(
            method=self.step.method,
            settings=self.step.settings,
            seed=self.context.seed,
            parent=self.parent,
            versions=tool_versions("torch"),
            effect={
                **self.spec.effect(figures),
                "bytes_before": float(stored_bytes(self.ckpt)),
                "bytes_after": float(layout_bytes(layout)),
            },
        )
        old = self.ckpt.manifest
        manifest = old.model_copy(
            update={"request": "", "lineage": [*old.lineage, lineage], "schemes": schemes}
        )
        write_json(folder / "config.json", upstream_config(self.ckpt, manifest))
        write_json(folder / MANIFEST, manifest)

    # --- blocks --------------------------------------------------------------------------------

    def _blocks(self, work: Path, schemes: Mapping[str, TensorScheme]) -> list[dict[str, float]]:
        """Do all blocks; what was measured in each."""
        count, parts = len(uses_of(self.ckpt)), Parts(self.ckpt)
        rows = calibration_rows(self.ckpt, self.context, self.spec.tokens(self.step.config))
        batches = batches_of(rows)
        first, hidden = _resumed(work)
        if hidden is None:
            hidden = parts.embedded(batches, self._table_rows(parts, schemes))
        for index in range(first, count):
            began = time.monotonic()
            words = self._block(work, index, cut(hidden, batches), schemes)
            _write(work, f"{_HIDDEN}-{index + 1}", {_HIDDEN: as_array(hidden)})
            _file(work, f"{_HIDDEN}-{index}").unlink(missing_ok=True)
            seconds = f"{time.monotonic() - began:.1f} s"
            note = f"{seconds}, {words}" if words else seconds
            self.context.reporter.progress(self.step.method, index + 1, count, note)
            self.ceiling.check()
        return [_figures(work, index) for index in range(count)]

    def _table_rows(self, parts: Parts, schemes: Mapping[str, TensorScheme]) -> TableRows:
        """What makes rows of the token table what they will be stored as."""
        scheme = schemes.get(parts.table)
        if scheme is None:
            return lambda rows: rows
        found, config = scheme, self.step.config
        return lambda rows: dequantize(*self.spec.quantize(config, rows, found), found)

    def _block(
        self, work: Path, index: int, hidden: list[Tensor], schemes: Mapping[str, TensorScheme]
    ) -> str:
        """Quantize one block, and turn what enters its first layer [B, S, H] into what leaves its
        last, in place."""
        parts, at = Parts(self.ckpt), f"blocks.{index}."
        block = parts.block(index)
        names = {name: stored_name(self.ckpt, at + name) for name in block.state_dict()}
        own = {n.removesuffix(".weight"): schemes[s] for n, s in names.items() if s in schemes}
        entering, uses = hidden, uses_of(self.ckpt)[index]
        with torch.inference_mode():
            for _ in range(uses - 1):
                entering = [*entering, *(parts.call(block, x) for x in entering[-len(hidden) :])]
        result = self.spec.block(
            self.step.config,
            BlockWork(
                index=index,
                block=block,
                schemes=own,
                hidden=entering,
                call=functools.partial(parts.call, block),
                stored={name: self.ckpt.tensors[stored].dtype for name, stored in names.items()},
            ),
        )
        _write(work, f"block-{index}", self._stored(result, block, names, own))
        with torch.inference_mode():
            for batch in hidden:
                for _ in range(uses):
                    batch.copy_(parts.call(block, batch))
        return result.words

    def _stored(
        self,
        result: BlockResult,
        block: Block,
        names: Mapping[str, str],
        schemes: Mapping[str, TensorScheme],
    ) -> dict[str, npt.NDArray[Any]]:
        """A block's tensors as they will be stored, and its figures."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, value in block.state_dict().items():
            stored, layer = names[name], name.removesuffix(".weight")
            if layer in schemes and name.endswith(".weight"):
                arrays |= store(stored, *result.integers[layer], schemes[layer])
                continue
            old = as_tensor(self.ckpt.read(stored))
            # What was not changed is stored as it was, float64 too.
            arrays[stored] = as_array(
                old if torch.equal(old.float(), value) else value.to(old.dtype)
            )
        return arrays | {f"{_FIGURE}{n}": np.array([v]) for n, v in result.figures.items()}

    # --- the whole file ------------------------------------------------------------------------

    def _assemble(
        self, folder: Path, work: Path, layout: Layout, schemes: Mapping[str, TensorScheme]
    ) -> None:
        """Put the blocks' tensors and all others in one file."""
        writer = safetensors.Writer(folder / WEIGHTS, layout)
        done = set()
        for index in range(len(uses_of(self.ckpt))):
            for name, info in safetensors.read_header(_file(work, f"block-{index}")).items():
                if not name.startswith(_FIGURE):
                    writer.write(name, safetensors.read(info))
                    done.add(name)
        others = {
            name: info
            for name, info in self.ckpt.tensors.items()
            if done.isdisjoint(stored_layout(name, info.shape, schemes.get(name), ""))
        }
        quantize = functools.partial(self.spec.quantize, self.step.config)
        chunks = (
            functools.partial(
                stored_chunk, self.ckpt, info, schemes.get(name), quantize, start, stop
            )
            for name, info in others.items()
            for start, stop in row_ranges(info, self.size)
        )
        for chunk in in_order(chunks):
            for part, array in chunk.parts:
                writer.write(part, array)
        writer.close()


def block_step_bytes(spec: BlockMethod, config: Config, ckpt: Checkpoint) -> int:
    """The most bytes that a step holds beside the program: a block, the inputs of all its tokens,
    what the method needs, one batch's activations.
    """
    model = model_spec_of(ckpt)
    hidden, ffn = model.hidden_size, model.intermediate_size
    tokens, batch = spec.tokens(config), max(BATCH, min(WINDOW, model.max_position_embeddings))
    # Weights in float32, and their integers once more while they are packed; inputs of each layer.
    largest = max(
        6 * block_parameters(ckpt, index)
        + spec.memory(config, ckpt, index)
        + 4 * tokens * hidden * (uses + 1 if uses > 1 else 1)
        for index, uses in enumerate(uses_of(ckpt))
    )
    return largest + 4 * batch * (4 * ffn + 8 * hidden) + _SPARE


def uses_of(ckpt: Checkpoint) -> list[int]:
    """How many layers use each block."""
    blocks = model_spec_of(ckpt).blocks()
    return [blocks.count(block) for block in range(blocks[-1] + 1)]


def block_parameters(ckpt: Checkpoint, index: int) -> int:
    """Values of one block's parameters."""
    spec = model_spec_of(ckpt)
    with bare_modules():
        block = Block(spec.block(spec.first_layers()[index]))
    return sum(value.numel() for value in block.state_dict().values())


# --- what a killed step goes on with -------------------------------------------------------------


def _file(work: Path, name: str) -> Path:
    return work / f"{name}.safetensors"


def _write(work: Path, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Whole or not at all."""
    part = work / f"{name}.part"
    safetensors.write_file(part, arrays.items())
    part.replace(_file(work, name))


def _resumed(work: Path) -> tuple[int, Tensor | None]:
    """The block to go on with, and its inputs [T, H]; None: begin with the embedding."""
    for part in work.glob("*.part"):
        part.unlink()
    found = [int(f.stem.removeprefix(f"{_HIDDEN}-")) for f in work.glob(f"{_HIDDEN}-*.safetensors")]
    if not found:
        return 0, None
    info = safetensors.read_header(_file(work, f"{_HIDDEN}-{max(found)}"))[_HIDDEN]
    return max(found), as_tensor(safetensors.read(info))


def _figures(work: Path, index: int) -> dict[str, float]:
    infos = safetensors.read_header(_file(work, f"block-{index}"))
    return {
        name.removeprefix(_FIGURE): float(safetensors.read(info)[0])
        for name, info in infos.items()
        if name.startswith(_FIGURE)
    }
