"""Core ML operations that move values: shapes, slices, gather, scatter, states. Torch-free."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.runtimes._coreml_table import Table, definer

Array = npt.NDArray[Any]
TABLE: Table = {}
define = definer(TABLE)

_MODES = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _ints(values: Any) -> list[int]:
    return [int(value) for value in np.asarray(values).reshape(-1)]


# --- states -------------------------------------------------------------------------------------


@define("input", moves=True)
def read_state(input: Array) -> Array:
    """The state's value."""
    return input


@define(same=("input", "data"), moves=True, writes="input")
def write_state(input: Array, data: Array) -> Array:
    """The state becomes data."""
    return data


# --- shapes -------------------------------------------------------------------------------------


@define(moves=True)
def reshape(x: Array, shape: Array) -> Array:
    """The same values in another shape; -1: what is left, 0: as in x."""
    sizes = _ints(shape)
    if len(sizes) == x.ndim:
        sizes = [have if size == 0 else size for size, have in zip(sizes, x.shape, strict=True)]
    return x.reshape(sizes)


@define(moves=True)
def transpose(x: Array, perm: Array) -> Array:
    """Axes in another order."""
    return np.transpose(x, _ints(perm))


@define(moves=True)
def expand_dims(x: Array, axes: Array) -> Array:
    """New axes of size 1."""
    return np.expand_dims(x, tuple(_ints(axes)))


@define(moves=True)
def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Without axes of size 1."""
    return np.squeeze(x, None if axes is None else tuple(_ints(axes)))


@define(moves=True)
def flatten2d(x: Array, axis: Any = 1) -> Array:
    """Two axes: all before `axis`, and the rest."""
    return x.reshape(int(np.prod(x.shape[: int(axis)])), -1)


@define("values", same=("values",), moves=True)
def concat(values: list[Array], axis: Any, interleave: Any = False) -> Array:
    """One behind the other along an axis, or taking turns."""
    if not interleave:
        return np.concatenate(values, int(axis))
    place = int(axis) % values[0].ndim
    turns = np.stack(values, place + 1)
    shape = list(values[0].shape)
    shape[place] = -1
    return turns.reshape(shape)


@define("values", same=("values",), moves=True)
def stack(values: list[Array], axis: Any) -> Array:
    """Along a new axis."""
    return np.stack(values, int(axis))


@define("x", moves=True)
def split(
    x: Array, axis: Any, num_splits: Any = None, split_sizes: Array | None = None
) -> list[Array]:
    """Parts along an axis, equal ones or of given sizes."""
    if split_sizes is not None:
        return list(np.split(x, np.cumsum(_ints(split_sizes))[:-1], int(axis)))
    return list(np.split(x, int(num_splits), int(axis)))


@define(moves=True)
def tile(x: Array, reps: Array) -> Array:
    """Repeated along its axes."""
    return np.tile(x, _ints(reps))


@define(moves=True)
def reverse(x: Array, axes: Array | None = None) -> Array:
    """In the other direction along axes."""
    return np.flip(x, None if axes is None else tuple(_ints(axes)))


@define(same=("x", "constant_val"), moves=True)
def pad(x: Array, pad: Array, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """Values around the last axes: constant, reflect or replicate."""
    pairs = np.asarray(pad).reshape(-1, 2)
    widths = [(0, 0)] * (x.ndim - len(pairs)) + [(int(a), int(b)) for a, b in pairs]
    if mode == "constant":
        return np.pad(x, widths, constant_values=constant_val)
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"pad of mode {mode}")
    return np.pad(x, widths, mode="reflect" if mode == "reflect" else "edge")


@define(":int32", moves=True)
def shape(x: Array) -> Array:
    """The sizes of the axes."""
    return np.array(x.shape, np.int32)


@define("value", moves=True)
def fill(shape: Array, value: Any = 0.0) -> Array:
    """One value in a shape."""
    return np.full(_ints(shape), value, getattr(value, "dtype", np.float32))


@define("value", moves=True)
def fill_like(ref_tensor: Array, value: Any = 0.0) -> Array:
    """One value in another tensor's shape."""
    return np.full(ref_tensor.shape, value, getattr(value, "dtype", np.float32))


@define("start", same=("start", "end", "step"))
def range_1d(start: Array, end: Array, step: Array) -> Array:
    """start, start + step, ... below end."""
    return np.arange(start[()], end[()], step[()])


@define(moves=True)
def band_part(x: Array, lower: Any = -1, upper: Any = -1) -> Array:
    """0 outside of a band of the last two axes."""
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    keep = (int(lower) < 0) | (rows - columns <= int(lower))
    keep = keep & ((int(upper) < 0) | (columns - rows <= int(upper)))
    return np.where(keep, x, np.zeros((), x.dtype))


@define("on_value", same=("on_value", "off_value"), moves=True)
def one_hot(
    indices: Array,
    one_hot_vector_size: Any,
    axis: Any = -1,
    on_value: Any = 1,
    off_value: Any = 0,
) -> Array:
    """on_value at each index of a new axis, else off_value."""
    axis = int(axis) % (indices.ndim + 1)
    places = np.arange(int(one_hot_vector_size)).reshape(-1, *[1] * (indices.ndim - axis))
    return np.where(np.expand_dims(indices, axis) == places, on_value, off_value)


# --- slices -------------------------------------------------------------------------------------


def _slices(
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice | int, ...]:
    found: list[slice | int] = []
    for axis, (first, last) in enumerate(zip(_ints(begin), _ints(end), strict=True)):
        if squeeze_mask is not None and squeeze_mask[axis]:
            found.append(first)
            continue
        found.append(
            slice(
                None if begin_mask is not None and begin_mask[axis] else first,
                None if end_mask is not None and end_mask[axis] else last,
                None if stride is None else int(stride[axis]),
            )
        )
    return tuple(found)


@define(moves=True)
def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """x[begin:end:stride], each axis."""
    return np.asarray(x[_slices(begin, end, stride, begin_mask, end_mask, squeeze_mask)])


@define(same=("x", "update"), moves=True)
def slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """x with x[begin:end:stride] replaced."""
    result = x.copy()
    where = _slices(begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if result[where].shape != update.shape:
        raise ValueError(
            f"an update of shape {list(update.shape)} for {list(result[where].shape)} of x"
        )
    result[where] = update
    return result


@define(moves=True)
def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """`size` elements from `begin` on, each axis; -1: all that are left."""
    found = []
    for first, count, have in zip(_ints(begin), _ints(size), x.shape, strict=True):
        start = first + have if first < 0 else first
        found.append(slice(start, have if count < 0 else start + count))
    return x[tuple(found)]


# --- gather and scatter -------------------------------------------------------------------------


@define(moves=True)
def gather(
    x: Array, indices: Array, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False
) -> Array:
    """Slices of x along an axis, by their numbers."""
    batch, axis = int(batch_dims), int(axis) % x.ndim
    if not batch:
        return np.take(x, indices, axis)
    rows = [np.take(x[at], indices[at], axis - batch) for at in np.ndindex(x.shape[:batch])]
    return np.stack(rows).reshape(*x.shape[:batch], *rows[0].shape)


@define(moves=True)
def gather_nd(
    x: Array, indices: Array, batch_dims: Any = 0, validate_indices: Any = False
) -> Array:
    """Slices of x, each by numbers for its first axes."""
    batch = int(batch_dims)
    rows = [x[at][tuple(np.moveaxis(indices[at], -1, 0))] for at in np.ndindex(x.shape[:batch])]
    return np.stack(rows).reshape(*x.shape[:batch], *rows[0].shape)


@define(moves=True)
def gather_along_axis(
    x: Array, indices: Array, axis: Any = 0, validate_indices: Any = False
) -> Array:
    """For each element the one of x with another number along an axis."""
    shape = list(x.shape)
    shape[int(axis)] = indices.shape[int(axis)]
    if list(indices.shape) != shape:
        raise ValueError(f"indices of shape {list(indices.shape)} for x {list(x.shape)}")
    return np.take_along_axis(x, indices.astype(np.int64), int(axis))


def _scattered(data: Array, where: tuple[Any, ...], updates: Array, mode: str) -> Array:
    result = data.copy()
    if mode == "update":
        result[where] = updates
    elif mode in _MODES:
        _MODES[mode].at(result, where, updates)
    else:
        raise ValueError(f"scatter of mode {mode}")
    return result


@define("data", same=("data", "updates"))
def scatter(
    data: Array,
    indices: Array,
    updates: Array,
    axis: Any = 0,
    mode: str = "add",
    validate_indices: Any = False,
) -> Array:
    """data with slices along an axis replaced, or updated: add, sub, mul, div, max, min."""
    where = (*[slice(None)] * (int(axis) % data.ndim), indices)
    return _scattered(data, where, updates, mode)


@define("data", same=("data", "updates"))
def scatter_nd(
    data: Array, indices: Array, updates: Array, mode: str = "add", validate_indices: Any = False
) -> Array:
    """scatter with numbers for the first axes."""
    return _scattered(data, tuple(np.moveaxis(indices, -1, 0)), updates, mode)


@define("data", same=("data", "updates"))
def scatter_along_axis(
    data: Array,
    indices: Array,
    updates: Array,
    axis: Any = 0,
    mode: str = "add",
    validate_indices: Any = False,
) -> Array:
    """scatter of single elements, each with its own number along an axis."""
    where = list(np.indices(indices.shape, sparse=True))
    where[int(axis)] = indices
    return _scattered(data, tuple(where), updates, mode)


# --- order --------------------------------------------------------------------------------------


@define("x", "=output_indices_dtype", moves=True)
def topk(
    x: Array,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> list[Array]:
    """The k largest or smallest along an axis, in order, and where they are."""
    order = np.argsort(x if ascending else -x, int(axis), kind="stable")
    order = np.take(order, np.arange(int(k)), int(axis))
    values = np.take_along_axis(x, order, int(axis))
    return [values, order] if return_indices else [values]


@define(":int32", moves=True)
def argsort(x: Array, axis: Any = -1, ascending: Any = False) -> Array:
    """Where the values are that come first, second, ... along an axis."""
    return np.argsort(x if ascending else -x, int(axis), kind="stable")


@define(":int32", moves=True)
def non_zero(x: Array) -> Array:
    """Where x is not 0, [count, axes]."""
    return np.argwhere(x)
