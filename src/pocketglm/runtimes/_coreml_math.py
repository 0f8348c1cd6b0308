"""Core ML operations that work on one element at a time, and reductions. numpy, torch-free."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.runtimes._coreml_table import Op, Table, definer
from pocketglm.runtimes._coreml_values import numpy_dtype

Array = npt.NDArray[Any]
TABLE: Table = {}
define = definer(TABLE)

_UNARY: dict[str, tuple[Callable[[Any], Any], str]] = {
    "abs": (np.abs, "absolute value"),
    "atan": (np.arctan, "arc tangent"),
    "ceil": (np.ceil, "next integer above"),
    "cos": (np.cos, "cosine"),
    "exp": (np.exp, "e to the power of x"),
    "exp2": (np.exp2, "2 to the power of x"),
    "floor": (np.floor, "next integer below"),
    "identity": (lambda x: x, "x itself"),
    "relu": (lambda x: np.maximum(x, 0), "x where positive, else 0"),
    "relu6": (lambda x: np.clip(x, 0, 6), "x limited to 0..6"),
    "round": (np.round, "nearest integer, halves to the even one"),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), "1 / (1 + e^-x)"),
    "sign": (np.sign, "-1, 0 or 1"),
    "silu": (lambda x: x / (1 + np.exp(-x)), "x sigmoid(x)"),
    "sin": (np.sin, "sine"),
    "softplus": (lambda x: np.logaddexp(x, np.float32(0)), "log(1 + e^x)"),
    "softsign": (lambda x: x / (1 + np.abs(x)), "x / (1 + |x|)"),
    "sqrt": (np.sqrt, "square root"),
    "square": (np.square, "x x"),
    "tan": (np.tan, "tangent"),
    "tanh": (np.tanh, "hyperbolic tangent"),
}
_BINARY: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "add": (np.add, "x + y"),
    "sub": (np.subtract, "x - y"),
    "mul": (np.multiply, "x y"),
    "floor_div": (np.floor_divide, "x / y, rounded down"),
    "mod": (np.mod, "remainder of floor_div; it has the sign of y"),
    "pow": (np.power, "x to the power of y"),
    "maximum": (np.maximum, "larger of both"),
    "minimum": (np.minimum, "smaller of both"),
}
_COMPARE: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "equal": (np.equal, "x = y"),
    "not_equal": (np.not_equal, "x not equal to y"),
    "greater": (np.greater, "x > y"),
    "greater_equal": (np.greater_equal, "x >= y"),
    "less": (np.less, "x < y"),
    "less_equal": (np.less_equal, "x <= y"),
    "logical_and": (np.logical_and, "both"),
    "logical_or": (np.logical_or, "one of them, or both"),
    "logical_xor": (np.logical_xor, "one of them, not both"),
}
_REDUCE: dict[str, tuple[Callable[..., Any], str]] = {
    "reduce_sum": (np.sum, "sum over axes"),
    "reduce_mean": (np.mean, "mean over axes"),
    "reduce_max": (np.max, "largest over axes"),
    "reduce_min": (np.min, "smallest over axes"),
    "reduce_prod": (np.prod, "product over axes"),
    "reduce_sum_square": (lambda x, **k: np.sum(x * x, **k), "sum of squares over axes"),
    "reduce_l1_norm": (lambda x, **k: np.sum(np.abs(x), **k), "sum of absolute values over axes"),
    "reduce_l2_norm": (
        lambda x, **k: np.sqrt(np.sum(x * x, **k)),
        "root of the sum of squares over axes",
    ),
    "reduce_log_sum": (lambda x, **k: np.log(np.sum(x, **k)), "log of the sum over axes"),
}


def _reduction(function: Callable[..., Any]) -> Callable[..., Array]:
    def run(x: Array, axes: Array | None = None, keep_dims: Any = False) -> Array:
        over = None if axes is None else tuple(int(axis) for axis in axes)
        return np.asarray(function(x, axis=over, keepdims=bool(keep_dims)))

    return run


# With arguments named as the program names them: a ufunc takes them by position only.
def _unary(function: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda x: function(x)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda x, y: function(x, y)


for _name, (_function, _about) in _UNARY.items():
    TABLE[_name] = Op(_unary(_function), _about, same=("x",), elementwise=True)
for _name, (_pair, _about) in _BINARY.items():
    TABLE[_name] = Op(_binary(_pair), _about, same=("x", "y"), elementwise=True)
for _name, (_pair, _about) in _COMPARE.items():
    TABLE[_name] = Op(_binary(_pair), _about, (":bool",), same=("x", "y"), elementwise=True)
for _name, (_over, _about) in _REDUCE.items():
    TABLE[_name] = Op(_reduction(_over), _about)


@define(same=("x", "y"), elementwise=True)
def real_div(x: Array, y: Array) -> Array:
    """x / y, of floats."""
    if x.dtype.kind != "f":
        raise ValueError("real_div of integers")
    return x / y


@define(":bool", same=("x",), elementwise=True)
def logical_not(x: Array) -> Array:
    """Not x."""
    return np.logical_not(x)


@define("a", same=("a", "b"), elementwise=True)
def select(cond: Array, a: Array, b: Array) -> Array:
    """a where cond, else b."""
    return np.where(cond, a, b)


@define("=dtype")
def cast(x: Array, dtype: str) -> Array:
    """x in another type; floats are cut towards 0, what is not 0 is true."""
    kind = numpy_dtype(dtype)
    return x.astype(np.float32 if kind.kind == "f" else kind)


@define(same=("x", "alpha", "beta"))
def clip(x: Array, alpha: Array, beta: Array) -> Array:
    """x limited to alpha..beta."""
    return np.clip(x, alpha, beta)


@define(same=("x", "alpha"))
def threshold(x: Array, alpha: Array) -> Array:
    """Larger of x and alpha."""
    return np.maximum(x, alpha)


@define(same=("x", "epsilon"))
def log(x: Array, epsilon: Any = 1e-45) -> Array:
    """log(x + epsilon)."""
    return np.log(x + np.float32(epsilon))


@define(same=("x", "epsilon"))
def rsqrt(x: Array, epsilon: Any = 1e-12) -> Array:
    """1 / sqrt(x + epsilon)."""
    return np.float32(1) / np.sqrt(x + np.float32(epsilon))


@define(same=("x", "epsilon"))
def inverse(x: Array, epsilon: Any = 1e-4) -> Array:
    """1 / (x + epsilon)."""
    return np.float32(1) / (x + np.float32(epsilon))


@define(same=("x", "alpha"))
def leaky_relu(x: Array, alpha: Any) -> Array:
    """x where positive, else alpha x."""
    return np.where(x > 0, x, alpha * x)


@define(same=("x", "alpha"))
def elu(x: Array, alpha: Any) -> Array:
    """x where positive, else alpha (e^x - 1)."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


_STEP, _END = 1 / 128, 6.0  # erf is 1 to 1e-16 beyond 6


@functools.cache
def _erf_nodes() -> tuple[Array, Array]:
    """erf and its slope at -6, -6 + 1/128, ... 6, float32."""
    at = np.arange(-_END, _END + _STEP, _STEP)
    values = np.array([math.erf(x) for x in at], np.float32)
    return values, (2 / math.sqrt(math.pi) * np.exp(-at * at)).astype(np.float32)


@define(same=("x",), elementwise=True)
def erf(x: Array) -> Array:
    """Gauss error function."""
    # Taylor's series of third order around the nearest node: the rest is below 1e-10.
    values, slopes = _erf_nodes()
    inside = np.clip(x, -_END, _END)
    index = np.nan_to_num(np.rint((inside + np.float32(_END)) / np.float32(_STEP))).astype(np.int32)
    node = index * np.float32(_STEP) - np.float32(_END)
    d = inside - node
    series = 1 - d * node + d * d * (2 * node * node - 1) / 3
    result: Array = values[index] + slopes[index] * d * series
    return result


@define(same=("x",))
def gelu(x: Array, mode: str = "EXACT") -> Array:
    """Gaussian error linear unit: EXACT, TANH_APPROXIMATION or SIGMOID_APPROXIMATION."""
    if mode == "EXACT":
        return np.asarray(x * (1 + erf(x * np.float32(math.sqrt(0.5)))) / 2)
    if mode == "TANH_APPROXIMATION":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(x * (1 + np.tanh(inner)) / 2)
    if mode == "SIGMOID_APPROXIMATION":
        return np.asarray(x / (1 + np.exp(np.float32(-1.702) * x)))
    raise ValueError(f"gelu of mode {mode}")


@define()
def reduce_log_sum_exp(x: Array, axes: Array | None = None, keep_dims: Any = False) -> Array:
    """log of the sum of e^x over axes."""
    over = tuple(range(x.ndim)) if axes is None else tuple(int(axis) for axis in axes)
    top = np.max(x, axis=over, keepdims=True)
    total = np.log(np.sum(np.exp(x - top), axis=over, keepdims=True)) + top
    return np.asarray(total if keep_dims else np.squeeze(total, over))


@define("=output_dtype")
def reduce_argmax(
    x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32"
) -> Array:
    """Position of the largest along an axis."""
    return np.asarray(np.argmax(x, int(axis), keepdims=bool(keep_dims)))


@define("=output_dtype")
def reduce_argmin(
    x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32"
) -> Array:
    """Position of the smallest along an axis."""
    return np.asarray(np.argmin(x, int(axis), keepdims=bool(keep_dims)))


@define()
def cumsum(x: Array, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> Array:
    """Sum of what is before along an axis, with or without the element itself."""
    flow = np.flip(x, int(axis)) if reverse else x
    total = np.cumsum(flow, int(axis))
    total = total - flow if exclusive else total
    return np.flip(total, int(axis)) if reverse else total
