"""Single weights of the linear layers become 0: the smallest, or all but N of every M neighbours.

Magnitude: Han et al. 2015, https://arxiv.org/abs/1506.02626. N:M: Mishra et al. 2021,
https://arxiv.org/abs/2104.08378.

The zeros are stored like any other number: the checkpoint and its exports keep their size, and no
runtime here gets faster by them. Only a compressed copy (gzip, an app store's download) shrinks;
the effect tells its size before and after.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import Config, ModelMethod, StepContext
from pocketglm.methods._prune import quantized_reason
from pocketglm.methods._weights import skip_reasons
from pocketglm.model.hf import is_linear
from pocketglm.ops.importance import Threshold, below, least, n_m_mask
from pocketglm.ops.stored import as_array, as_tensor, check_finite

_SPARSITY = 0.5
_CHUNK = 1 << 22  # bytes read at a time
_BYTES = 64  # for a value of the tensor in work
_SPARE = 64 << 20  # what is read at a time, and what the allocator keeps
_GZIP = 6  # gzip's own default level


# YAML reads an unquoted 2:4 as minutes and seconds.
_SECONDS = {124: "2:4", 248: "4:8"}


class UnstructuredConfig(Config):
    """Settings of unstructured pruning."""

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="share of the weights that become 0; default: 0.5"
    )
    pattern: Literal["2:4", "4:8"] | None = Field(
        None, description="instead: so many of so many neighbours along a row stay"
    )
    scope: Literal["layer", "global"] = Field(
        "layer", description="the share holds in every weight matrix, or in all together"
    )
    skip: list[str] = Field([], description="patterns (*, ?) of tensor names that stay whole")

    @field_validator("pattern", mode="before")
    @classmethod
    def _unquoted(cls, value: Any) -> Any:
        return _SECONDS.get(value, value) if isinstance(value, int) else value


def _chosen(config: UnstructuredConfig, ckpt: Checkpoint) -> list[str]:
    return [
        name
        for name, info in ckpt.tensors.items()
        if is_linear(name, info.shape)
        and not any(fnmatchcase(name, pattern) for pattern in config.skip)
    ]


def _pattern(config: UnstructuredConfig) -> tuple[int, int] | None:
    if config.pattern is None:
        return None
    n, m = config.pattern.split(":")
    return int(n), int(m)


def _check(config: UnstructuredConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    reasons = quantized_reason(ckpt)
    reasons += skip_reasons(config.skip, ckpt)
    chosen = _chosen(config, ckpt)
    if not chosen:
        reasons.append("it has no weight of a linear layer to prune with these settings")
    if config.pattern and config.sparsity is not None:
        reasons.append(f"pattern={config.pattern} is itself a sparsity: leave sparsity out")
    if config.pattern and config.scope == "global":
        reasons.append(f"pattern={config.pattern} holds in every row: leave scope out")
    _, m = _pattern(config) or (1, 1)
    for name in chosen:
        columns = ckpt.tensors[name].shape[1]
        if columns % m:
            reasons.append(f"pattern: {name} has {columns} columns, no multiple of {m}")
    return reasons


def _predict(config: UnstructuredConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    return ckpt


def _run(
    config: UnstructuredConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    """Memory is that of one tensor."""
    chosen = _chosen(config, ckpt)
    for name in chosen:
        check_finite(ckpt, name, as_tensor(ckpt.read(name)).float())
    which = _masks(config, ckpt, chosen)
    layout = {name: (info.dtype, info.shape) for name, info in ckpt.tensors.items()}
    writer = safetensors.Writer(folder / "model.safetensors", layout)
    zeros = total = 0
    lost = whole = 0.0
    for done, name in enumerate(ckpt.tensors, 1):
        value = as_tensor(ckpt.read(name))
        if name in chosen:
            gone = which(name, value)
            exact = value.double()
            lost += float(exact[gone].square().sum())
            whole += float(exact.square().sum())
            value = value.masked_fill(gone, 0)
            zeros, total = zeros + int((value == 0).sum()), total + value.numel()
        writer.write(name, as_array(value))
        context.reporter.progress("prune_unstructured", done, len(ckpt.tensors), name)
    writer.close()
    _copy_side_files(ckpt, folder)
    context.reporter.say("compressing with gzip, to tell the size")
    weights = sorted({info.file for info in ckpt.tensors.values()})
    return {
        "zeros": float(f"{zeros / total:.6g}"),
        "weight_error": float(f"{math.sqrt(lost / whole) if whole else 0.0:.6g}"),
        "gzip_bytes_before": float(_gzip_bytes(weights)),
        "gzip_bytes_after": float(_gzip_bytes([folder / "model.safetensors"])),
    }


def _masks(
    config: UnstructuredConfig, ckpt: Checkpoint, chosen: list[str]
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """What says which values of a tensor go; it must be asked in file order."""
    pattern = _pattern(config)
    if pattern is not None:
        n, m = pattern
        return lambda name, value: n_m_mask(value, n, m)
    share = _SPARSITY if config.sparsity is None else config.sparsity

    def count(size: int) -> int:
        return int(share * size + 0.5)

    if config.scope == "layer":
        return lambda name, value: below(value, least(lambda: [value], count(value.numel())))[0]

    def values() -> Iterator[torch.Tensor]:
        for name in chosen:
            yield as_tensor(ckpt.read(name))

    left: Threshold = least(values, count(sum(ckpt.tensors[name].size for name in chosen)))

    def everywhere(name: str, value: torch.Tensor) -> torch.Tensor:
        nonlocal left
        gone, left = below(value, left)
        return gone

    return everywhere


def _copy_side_files(ckpt: Checkpoint, folder: Path) -> None:
    for file in ckpt.files:
        if file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json"):
            continue
        target = folder / file.relative_to(ckpt.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _gzip_bytes(files: Iterable[Path]) -> int:
    total = 0
    for path in files:
        packer = zlib.compressobj(_GZIP)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                total += len(packer.compress(chunk))
        total += len(packer.flush())
    return total


def _memory(config: UnstructuredConfig, ckpt: Checkpoint, context: StepContext) -> int:
    """A tensor, its mask as indices, and copies in float64."""
    return _BYTES * max((info.size for info in ckpt.tensors.values()), default=0) + _SPARE


SPEC = ModelMethod(
    summary="set single weights to 0; neither smaller nor faster as it is, see gzip",
    config=UnstructuredConfig,
    check=_check,
    predict=_predict,
    run=_run,
    identity={"sparsity": 0.0},
    memory=_memory,
)
