"""Quantized weights in a checkpoint: which tensors hold them, and reading them back.

Layout of the compressed-tensors formats for a weight `X.weight` [N, K] with G scales per row:

    INT8, int-quantized    X.weight I8 [N, K], X.weight_scale BF16 [N, G],
                           X.weight_zero_point I8 [N, G] if asymmetric
    INT4, pack-quantized   X.weight_packed I32 [N, ceil(K / 8)], X.weight_scale BF16 [N, G],
                           X.weight_shape I64 [2],
                           X.weight_zero_point I32 [ceil(N / 8), G] if asymmetric

Asymmetric INT4 has F32 scales (the same values): transformers opens it with `dequantize=True` only,
which computes in the scale's type and would round the weights to bf16.

A decoder with an INT8 cache stores its scales beside the attention's weights (compressed-tensors'
names): k_scale and v_scale, F32, [kv heads, head_dim] per channel or [1].

A layer with static activations also stores the grid of its input, `X.input_scale` F32 [1] and
`X.input_zero_point` I8 [1] (0 where it is symmetric).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.errors import CheckpointError
from pocketglm.ops.affine import dequantize
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.packing import pack_int32, unpack_int32

Layout = dict[str, tuple[str, tuple[int, ...]]]
_PRECISIONS = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_PARTS = ("packed", "scale", "zero_point", "shape")


@dataclass(frozen=True, slots=True)
class Quantized:
    """One stored weight: q int8 [N, K], scales float32 [N, G], zero points int8 [N, G] or None.

    grid: that of the layer's input, where activations are static.
    """

    q: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    scheme: TensorScheme
    grid: InputGrid | None = None

    def dequantized(self) -> torch.Tensor:
        """float32 [N, K]."""
        return dequantize(self.q, self.scales, self.zero_points, self.scheme)


def as_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """A torch tensor over a numpy array's memory; knows ml_dtypes' bfloat16."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Inverse of `as_tensor`."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.ascontiguousarray(tensor.numpy())


def stored_layout(
    name: str, shape: tuple[int, ...], scheme: TensorScheme | None, dtype: str
) -> Layout:
    """The tensors (name -> safetensors dtype, shape) that hold weight `name`, in file order.

    `dtype` is that of the unquantized weight, kept where `scheme` is None.
    """
    if scheme is None:
        return {name: (dtype, shape)}
    rows, columns = shape
    scales = (rows, scheme.groups(columns))
    grid: Layout = {}
    if scheme.activation == "static":
        scale, zero = _grid_names(name)
        grid = {scale: ("F32", (1,)), zero: ("I8", (1,))}
    if scheme.bits == 8:
        layout: Layout = {name: ("I8", shape), f"{name}_scale": ("BF16", scales)}
        if not scheme.symmetric:
            layout[f"{name}_zero_point"] = ("I8", scales)
        return layout | grid
    layout = {
        f"{name}_packed": ("I32", (rows, -(-columns // 8))),
        f"{name}_scale": ("BF16" if scheme.symmetric else "F32", scales),
    }
    if not scheme.symmetric:
        layout[f"{name}_zero_point"] = ("I32", (-(-rows // 8), scales[1]))
    return layout | {f"{name}_shape": ("I64", (2,))} | grid


def _grid_names(name: str) -> tuple[str, str]:
    """The tensors of the scale and the zero point of a layer's input, by its weight's name."""
    base = name.removesuffix("weight")
    return f"{base}input_scale", f"{base}input_zero_point"


def store(
    name: str,
    q: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    scheme: TensorScheme,
    grid: InputGrid | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Arrays of `stored_layout` for q int8 [N, K], scales [N, G], zero points int8 [N, G].

    grid: of the layer's input, if activations are static.
    """
    inputs: dict[str, npt.NDArray[Any]] = {}
    if scheme.activation == "static":
        if grid is None:
            raise ValueError(f"{name}: static activations need the grid of the layer's input")
        first, second = _grid_names(name)
        inputs = {
            first: np.array([grid.scale], np.float32),
            second: np.array([grid.zero_point], np.int8),
        }
    bf16 = scheme.bits == 8 or scheme.symmetric
    scale = as_array(scales.to(torch.bfloat16 if bf16 else torch.float32))
    if scheme.bits == 8:
        arrays = {name: as_array(q), f"{name}_scale": scale}
        if zero_points is not None:
            arrays[f"{name}_zero_point"] = as_array(zero_points)
        return arrays | inputs
    arrays = {f"{name}_packed": pack_int32(q), f"{name}_scale": scale}
    if zero_points is not None:  # packed along the rows
        arrays[f"{name}_zero_point"] = np.ascontiguousarray(pack_int32(zero_points.T).T)
    return arrays | {f"{name}_shape": np.array(q.shape, np.int64)} | inputs


def read_quantized(
    ckpt: Checkpoint, name: str, start: int = 0, stop: int | None = None
) -> Quantized:
    """The integers of rows `start:stop` of weight `name`; `start` is a multiple of 8.

    Raises:
        CheckpointError: it is not quantized, or its tensors are missing or have other shapes than
            its scheme says.
    """
    scheme = ckpt.manifest.schemes.get(name)
    if scheme is None:
        raise CheckpointError(f"{ckpt.path}: '{name}' is not quantized")
    shape = _shape(ckpt, name, scheme)
    for part, (dtype, expected) in stored_layout(name, shape, scheme, "").items():
        info = ckpt.tensors.get(part)
        found = (info.dtype, info.shape) if info else None
        if found != (dtype, expected):
            raise CheckpointError(
                f"{ckpt.path}: '{part}' should be {dtype} {list(expected)}, "
                + (f"it is {found[0]} {list(found[1])}" if found else "it is missing"),
                "the folder is from another version or incomplete: compress the model again",
            )
    if start % 8:
        raise ValueError(f"rows are packed by 8, the first is {start}")
    stop = shape[0] if stop is None else min(stop, shape[0])
    scales = as_tensor(ckpt.read(f"{name}_scale", start, stop)).float()
    zero = None if scheme.symmetric else _zero_points(ckpt, name, scheme, start, stop)
    grid = read_grid(ckpt, name)
    if scheme.bits == 8:
        return Quantized(as_tensor(ckpt.read(name, start, stop)), scales, zero, scheme, grid)
    packed = ckpt.read(f"{name}_packed", start, stop)
    return Quantized(unpack_int32(packed, shape[1]), scales, zero, scheme, grid)


def read_grid(ckpt: Checkpoint, name: str) -> InputGrid | None:
    """The grid of the input of the layer with weight `name`; None: not static.

    Raises:
        CheckpointError: it should be there and is missing, or its scale is not positive.
    """
    scheme = ckpt.manifest.schemes.get(name)
    if scheme is None or scheme.activation != "static":
        return None
    scale, zero = (ckpt.read(part) for part in _grid_names(name))
    if not (np.isfinite(scale[0]) and scale[0] > 0):
        raise CheckpointError(
            f"{ckpt.path}: '{_grid_names(name)[0]}' is {scale[0]}, a scale is positive",
            "the file is damaged: calibrate the model again",
        )
    return InputGrid(float(scale[0]), int(zero[0]))


def _zero_points(
    ckpt: Checkpoint, name: str, scheme: TensorScheme, start: int, stop: int
) -> torch.Tensor:
    if scheme.bits == 8:
        return as_tensor(ckpt.read(f"{name}_zero_point", start, stop))
    words = ckpt.read(f"{name}_zero_point", start // 8, -(-stop // 8))
    return unpack_int32(words.T, stop - start).T.contiguous()


def read_weight(
    ckpt: Checkpoint, name: str, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Rows `start:stop` of tensor `name` as float32, dequantized if it is quantized (then `start`
    is a multiple of 8).

    Raises:
        CheckpointError: no such tensor, or integers without a scheme (quantized elsewhere).
    """
    if name in ckpt.manifest.schemes:
        return read_quantized(ckpt, name, start, stop).dequantized()
    array = ckpt.read(name, start, stop)
    if ckpt.tensors[name].dtype not in _PRECISIONS:
        raise CheckpointError(
            f"{ckpt.path}: '{name}' is stored as {ckpt.tensors[name].dtype} without a scheme",
            "it was quantized by another tool: start from the model's float weights",
        )
    return as_tensor(array).float()


def check_finite(ckpt: Checkpoint, name: str, values: torch.Tensor, start: int = 0) -> None:
    """Refuse NaN and infinity in rows of tensor `name`, of which `start` is the first.

    Raises:
        CheckpointError: names the tensor and the first bad row.
    """
    if not values.numel() or torch.stack(values.aminmax()).isfinite().all():
        return
    bad = (~values.isfinite()).reshape(len(values), -1).any(dim=1).nonzero()
    raise CheckpointError(
        f"{ckpt.path}: '{name}' holds NaN or infinity, first in row {start + int(bad[0])}",
        "the training run diverged or the file is damaged: use an earlier checkpoint",
    )


def precision_of(ckpt: Checkpoint) -> str:
    """'int8', 'int4' or 'mixed' after quantization, else the type of most values, e.g. 'fp32'."""
    bits = {scheme.bits for scheme in ckpt.manifest.schemes.values()}
    if bits:
        return "mixed" if len(bits) > 1 else f"int{bits.pop()}"
    sizes: Counter[str] = Counter()
    for info in ckpt.tensors.values():
        sizes[info.dtype] += info.size
    dtype = sizes.most_common(1)[0][0] if sizes else "F32"
    return _PRECISIONS.get(dtype, dtype.lower())


def parameter_counts(ckpt: Checkpoint) -> dict[str, int]:
    """How many values each unquantized tensor or quantized weight stands for."""
    schemes = ckpt.manifest.schemes
    # Not only the schemes' own parts: a tied head's scales are stored beside its embedding's.
    ends = (*(f".weight_{part}" for part in _PARTS), *_grid_names("."), ".k_scale", ".v_scale")
    whole = {n: i.size for n, i in ckpt.tensors.items() if not n.endswith(ends)}
    counts = {name: size for name, size in whole.items() if name not in schemes}
    return counts | {name: math.prod(_shape(ckpt, name, s)) for name, s in schemes.items()}


def _shape(ckpt: Checkpoint, name: str, scheme: TensorScheme) -> tuple[int, int]:
    """[N, K] of a quantized weight, from the headers (and weight_shape where it is packed)."""
    if scheme.bits == 8:
        shape = ckpt.tensors[name].shape if name in ckpt.tensors else ()
    else:
        shape = tuple(int(n) for n in ckpt.read(f"{name}_shape"))
    if len(shape) != 2:
        raise CheckpointError(f"{ckpt.path}: '{name}' has no stored [N, K] integers")
    return shape[0], shape[1]
