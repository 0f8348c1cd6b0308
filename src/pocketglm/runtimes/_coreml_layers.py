"""Core ML operations that multiply matrices, normalize or quantize. numpy, torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from pocketglm.runtimes._coreml_table import Table, definer
from pocketglm.runtimes._coreml_values import numpy_dtype

Array = npt.NDArray[Any]
# Its declared types take one axis only.
_windows: Callable[..., Array] = cast(Any, sliding_window_view)
TABLE: Table = {}
define = definer(TABLE)


@define(same=("x", "weight", "bias"))
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x times the transposed weight [out, in], plus bias."""
    result: Array = np.matmul(x, weight.T)
    if bias is not None:
        result += bias
    return result


@define(same=("x", "y"))
def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    """Product of the last two axes, either one transposed."""
    left = np.swapaxes(x, -1, -2) if transpose_x else x
    right = np.swapaxes(y, -1, -2) if transpose_y else y
    return np.asarray(np.matmul(left, right))


@define("values", same=("values",))
def einsum(values: list[Array], equation: str) -> Array:
    """Two tensors multiplied as an equation says, such as `bchq,bkhc->bkhq`."""
    # As one product of matrices: numpy's own einsum goes through all elements when there is a
    # batch. Axes of size 1 that the other tensor has larger are broadcast.
    inputs, _, output = equation.replace(" ", "").partition("->")
    first, second = inputs.split(",")
    batch = [a for a in output if a in first and a in second]
    summed = [a for a in first if a in second and a not in output]
    left = [a for a in first if a not in batch and a not in summed]
    right = [a for a in second if a not in batch and a not in summed]
    if sorted(batch + left + right) != sorted(output) or len(set(first)) != len(first):
        raise ValueError(f"einsum of {equation}")
    x = _arranged(values[0], first, batch, left, summed)
    y = _arranged(values[1], second, batch, summed, right)
    sizes = dict(zip(first, values[0].shape, strict=True))
    for axis, size in zip(second, values[1].shape, strict=True):
        sizes[axis] = max(size, sizes.get(axis, 1))
    order = [*batch, *left, *right]
    product = np.matmul(x, y).reshape([sizes[axis] for axis in order])
    return np.transpose(product, [order.index(axis) for axis in output])


def _arranged(x: Array, axes: str, *groups: list[str]) -> Array:
    """x with its batch axes first and the other two groups as one axis each."""
    batch, rows, columns = groups
    moved = np.transpose(x, [axes.index(axis) for axis in [*batch, *rows, *columns]])
    shape = moved.shape
    middle = len(batch) + len(rows)
    return moved.reshape(
        *shape[: len(batch)],
        math.prod(shape[len(batch) : middle]),
        math.prod(shape[middle:]),
    )


@define(same=("x", "weight", "bias"))
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: Any = 1,
) -> Array:
    """Convolution over 1 to 3 axes; padding valid, custom, same or same_lower."""
    n, groups = weight.ndim - 2, int(groups)
    kernel = weight.shape[2:]
    stride = [1] * n if strides is None else [int(s) for s in strides]
    step = [1] * n if dilations is None else [int(d) for d in dilations]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, step, strict=True)]
    x = np.pad(x, [(0, 0), (0, 0), *_padding(pad_type, pad, x.shape[2:], reach, stride)])
    windows = _windows(x, reach, axis=tuple(range(2, 2 + n)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in stride))]
    every: tuple[Any, ...] = (..., *(slice(None, None, d) for d in step))
    windows = windows[every]
    size = windows.shape[2 : 2 + n]
    columns = np.moveaxis(windows, range(2, 2 + n), range(-n, 0))
    columns = columns.reshape(x.shape[0], groups, -1, math.prod(size))
    filters = weight.reshape(groups, weight.shape[0] // groups, -1)
    result = np.matmul(filters, columns).reshape(x.shape[0], weight.shape[0], *size)
    if bias is not None:
        result += bias.reshape(-1, *[1] * n)
    return np.asarray(result)


def _padding(
    kind: str, pad: Array | None, sizes: tuple[int, ...], reach: list[int], stride: list[int]
) -> list[tuple[int, int]]:
    """Elements before and after each axis."""
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom" and pad is not None:
        return [(int(a), int(b)) for a, b in pad.reshape(-1, 2)]
    if kind not in ("same", "same_lower"):
        raise ValueError(f"conv with padding {kind}")
    found = []
    for size, length, step in zip(sizes, reach, stride, strict=True):
        total = max(0, (-(-size // step) - 1) * step + length - size)
        less, more = total // 2, total - total // 2
        found.append((less, more) if kind == "same" else (more, less))
    return found


@define()
def softmax(x: Array, axis: Any = -1) -> Array:
    """e^x divided by its sum along an axis."""
    powers = np.exp(x - np.max(x, int(axis), keepdims=True))
    return np.asarray(powers / np.sum(powers, int(axis), keepdims=True))


@define("query", same=("query", "key", "value"))
def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, attn_mask: Array | None = None
) -> Array:
    """softmax(query key^T / sqrt(E) + mask) value; a mask of bool says what is seen."""
    scores = np.matmul(query, np.swapaxes(key, -1, -2)) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None and attn_mask.dtype == np.bool_:
        scores = np.where(attn_mask, scores, np.float32(-np.inf))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return np.asarray(np.matmul(softmax(scores), value))


@define(same=("x", "gamma", "beta", "epsilon"))
def layer_norm(
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Any = 1e-5,
) -> Array:
    """(x - mean) / sqrt(variance + epsilon) over axes, times gamma, plus beta."""
    over = tuple(range(x.ndim)) if axes is None else tuple(int(a) % x.ndim for a in axes)
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    centred = x - np.mean(x, over, keepdims=True)
    variance = np.mean(centred * centred, over, keepdims=True)
    return _scaled(centred / np.sqrt(variance + np.float32(epsilon)), gamma, beta, shape)


@define(same=("x", "mean", "variance", "gamma", "beta", "epsilon"))
def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Any = 1e-5,
) -> Array:
    """(x - mean) / sqrt(variance + epsilon) of given values per channel, times gamma, plus beta."""
    shape = [1, -1, *[1] * (x.ndim - 2)]
    spread = np.sqrt(variance.reshape(shape) + np.float32(epsilon))
    return _scaled((x - mean.reshape(shape)) / spread, gamma, beta, shape)


@define(same=("x", "gamma", "beta", "epsilon"))
def instance_norm(
    x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5
) -> Array:
    """(x - mean) / sqrt(variance + epsilon) over all but batch and channel, then as layer_norm."""
    over = tuple(range(2, x.ndim))
    centred = x - np.mean(x, over, keepdims=True)
    variance = np.mean(centred * centred, over, keepdims=True)
    normal = centred / np.sqrt(variance + np.float32(epsilon))
    return _scaled(normal, gamma, beta, [1, -1, *[1] * len(over)])


def _scaled(x: Array, gamma: Array | None, beta: Array | None, shape: list[int]) -> Array:
    x = x if gamma is None else x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


@define(same=("x", "epsilon"))
def l2_norm(x: Array, epsilon: Any = 1e-6) -> Array:
    """x / sqrt(sum of its squares over the last three axes + epsilon)."""
    total = np.sum(x * x, (-3, -2, -1), keepdims=True)
    return np.asarray(x / np.sqrt(total + np.float32(epsilon)))


def along(values: Array, axis: Any, rank: int) -> Array:
    """A vector along one axis of a tensor of `rank` axes; a scalar as it is."""
    if values.ndim == 0 or values.size == 1:
        return values.reshape(())
    if axis is None:
        raise ValueError(f"{values.size} scales and no axis")
    shape = [1] * rank
    shape[int(axis)] = -1
    return values.reshape(shape)


@define("=output_dtype", same=("input", "scale"))
def quantize(
    input: Array,
    scale: Array,
    output_dtype: str,
    zero_point: Array | None = None,
    axis: Any = None,
) -> Array:
    """round(input / scale) + zero point in int8 or uint8, halves to the even integer, limited."""
    limits = np.iinfo(numpy_dtype(output_dtype))
    integers = np.round(input / along(scale, axis, input.ndim))
    if zero_point is not None:
        integers = integers + along(zero_point.astype(np.float32), axis, input.ndim)
    return np.clip(integers, limits.min, limits.max).astype(limits.dtype)


@define("scale", same=("input", "zero_point"))
def dequantize(
    input: Array, scale: Array, zero_point: Array | None = None, axis: Any = None
) -> Array:
    """(input - zero point) scale."""
    values = input.astype(np.float32)
    if zero_point is not None:
        values -= along(zero_point.astype(np.float32), axis, input.ndim)
    values *= along(scale, axis, input.ndim)
    return values
