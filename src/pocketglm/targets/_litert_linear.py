"""Linear layers, embeddings and norms of a LiteRT graph, in the form that the scheme asks for.

    weight                      activation   operators
    float                                    FULLY_CONNECTED
    INT8 per channel            dynamic_*    FULLY_CONNECTED of float inputs and integer weights
    INT4 by group of 32 to 128  dynamic_*    the same
    INT4 per channel            dynamic_*    the same, its scale repeated for groups of up to 128:
                                             the plain kernels compute INT4 per channel wrongly
    INT8, INT4 per channel      none         DEQUANTIZE, FULLY_CONNECTED (float inputs)
    INT8 per channel            static       QUANTIZE, FULLY_CONNECTED of int8, DEQUANTIZE, ADD;
                                             before a sum with the residual stream QUANTIZE,
                                             DEQUANTIZE and the dynamic product
    embedding                                EMBEDDING_LOOKUP

The integers and scales are the checkpoint's own; scales of groups are float16, which holds every
scale of a symmetric scheme exactly (`ops/affine.py`). Dynamic inputs get one int8 grid per token,
with a zero point, in XNNPACK and in the plain kernels (`asymmetricQuantizeInputs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.ops.calibration import grid_of
from pocketglm.ops.stored import Quantized
from pocketglm.targets._litert_graph import Array, Grid, Subgraph
from pocketglm.targets._litert_weights import Weights

# Versions of FULLY_CONNECTED: with `keepNumDims`, and with scales per channel or block. A runtime
# that does not know these scales would take the first for all: it must not open the file.
FLOAT_VERSION, INTEGER_VERSION = 5, 12
_QUANTIZED_LOOKUP = 4  # of EMBEDDING_LOOKUP, likewise
# Layers whose static product gives int8. Others add to the residual stream: its outliers make one
# grid for all so coarse that a classifier of 6 layers moved by 4 of 1.9 (one standard deviation);
# with these layers alone by 1.0, as in ONNX Runtime, whose products give float.
INT8_RESULTS = ("attention.query", "attention.key", "attention.value", "ffn.up")
GROUPS = (32, 64, 128)  # the widths that XNNPACK's kernels were tried with
_WRONG_GROUPS = (
    "16 gives wrong results without an error, and no others were tried than "
    f"{', '.join(map(str, GROUPS))}"
)


def refusal(scheme: TensorScheme, columns: int, *, linear: bool) -> str:
    """Why LiteRT would not compute what this scheme says, or ''."""
    bits, group = scheme.bits, scheme.group_size
    if not scheme.symmetric:
        return "zero points: LiteRT's integer kernels drop them or refuse the file"
    if bits == 8 and group is not None:
        return f"INT8 by groups of {group}: LiteRT has none"
    if group is not None and group not in GROUPS:
        return f"group_size {group}: {_WRONG_GROUPS}"
    if bits == 4 and columns % 2:
        return f"INT4 with K = {columns}: two values share a byte: K must be even"
    if not linear:
        return ""
    if bits == 4 and scheme.activation != "none" and not block_of(scheme, columns):
        return f"INT4 with K = {columns}, no multiple of {min(GROUPS)}"
    if group is not None and scheme.activation == "none":
        return (
            "INT4 by group with float activations: dequantizing blocks gives wrong values without "
            "an error"
        )
    if scheme.activation == "static" and bits != 8:
        return "static activations go with INT8 per channel"
    return ""


def block_of(scheme: TensorScheme, columns: int) -> int:
    """Columns that share a scale in the file of an INT4 weight; 0: none of the sizes divides K."""
    if scheme.group_size is not None:
        return scheme.group_size
    return next((size for size in reversed(GROUPS) if columns % size == 0), 0)


def linear(
    g: Subgraph,
    weights: Weights,
    x: int,
    layer: str,
    *,
    bias: bool = True,
    out: str = "",
    dynamic: bool | None = None,
) -> int:
    """x [..., K] -> [..., N]; a factorized layer makes two products.

    dynamic: whether inputs are quantized, if the weight's scheme does not say it (a tied head).
    """
    if weights.factored(layer):
        x = _product(g, weights, x, f"{layer}.factor_in", bias=False, dynamic=dynamic)
        layer = f"{layer}.factor_out"
    return _product(g, weights, x, layer, bias=bias, out=out, dynamic=dynamic)


def _product(
    g: Subgraph,
    weights: Weights,
    x: int,
    layer: str,
    *,
    bias: bool,
    out: str = "",
    dynamic: bool | None,
) -> int:
    weight, scheme = table(g, weights, layer), weights.scheme(f"{layer}.weight")
    if scheme is not None and scheme.activation == "static":
        return _static(g, weights, x, layer, bias=bias, out=out)
    if dynamic is None:
        dynamic = scheme is not None and scheme.activation != "none"
    if scheme is not None and not dynamic:
        weight = g.op("DEQUANTIZE", [weight], g.shapes[weight])
    shape = (*g.shapes[x][:-1], g.shapes[weight][0])
    return g.op(
        "FULLY_CONNECTED",
        [x, weight, vector(g, weights, f"{layer}.bias") if bias else -1],
        shape,
        out=out,
        version=INTEGER_VERSION if dynamic else FLOAT_VERSION,
        keepNumDims=len(shape) > 2,
        asymmetricQuantizeInputs=dynamic,
    )


def _static(g: Subgraph, weights: Weights, x: int, layer: str, *, bias: bool, out: str) -> int:
    """The input on the checkpoint's grid. Of `INT8_RESULTS` the product is one of integers, its
    result on a grid from samples, its bias in float (as int32 it would be rounded).
    """
    weight, inputs = table(g, weights, layer), weights.grid(f"{layer}.weight")
    if inputs is None:
        raise ValueError(f"{layer} has no grid for its input")
    shape, added = (*g.shapes[x][:-1], g.shapes[weight][0]), -1
    if bias:
        added = vector(g, weights, f"{layer}.bias")
    form: dict[str, Any] = {"version": INTEGER_VERSION, "keepNumDims": len(shape) > 2}
    rounded = g.op("QUANTIZE", [x], g.shapes[x], dtype="INT8")
    g.set_grid(rounded, Grid(np.array([inputs.scale]), zero=inputs.zero_point))
    if not layer.endswith(INT8_RESULTS):
        x = g.op("DEQUANTIZE", [rounded], g.shapes[x])
        ends = [x, weight, added]
        return g.op("FULLY_CONNECTED", ends, shape, out=out, **form, asymmetricQuantizeInputs=True)
    product = g.op("FULLY_CONNECTED", [rounded, weight, -1], shape, dtype="INT8", **form)
    results = grid_of(*weights.results[layer], symmetric=False)
    g.set_grid(product, Grid(np.array([results.scale]), zero=results.zero_point))
    y = g.op("DEQUANTIZE", [product], shape, out="" if bias else out)
    return binary(g, "ADD", y, added, out=out) if bias else y


def table(g: Subgraph, weights: Weights, layer: str, limit: int | None = None) -> int:
    """A layer's weight as a constant [N, K]; of an embedding its first `limit` rows."""
    name = f"{layer}.weight"
    key, scheme = weights.label(name), weights.scheme(name)
    rows, columns = weights.shape(name)
    rows = min(rows, limit or rows)
    if scheme is None:
        return g.lazy(key, (rows, columns), "FLOAT32", lambda: weights.floats(name)[:rows])
    scales = weights.scales(name)[:rows]
    if weights.blocked(name):
        block = block_of(scheme, columns)
        scales = np.broadcast_to(scales, (rows, columns // block))
        grid = Grid(scales.astype(np.float16), block)
    else:
        grid = Grid(scales[:, 0])
    kind = "INT8" if scheme.bits == 8 else "INT4"
    return g.lazy(key, (rows, columns), kind, lambda: stored(weights.integers(name), rows), grid)


def stored(part: Quantized, rows: int) -> Array:
    """The integers as the file has them: int8, or two INT4 in a byte, the first one low."""
    q = part.q[:rows].contiguous().numpy()
    if part.scheme.bits == 8:
        return q
    pairs = q.view(np.uint8).reshape(-1, 2) & 15
    return pairs[:, 0] | pairs[:, 1] << 4


def embedding(
    g: Subgraph, weights: Weights, layer: str, rows: int, limit: int | None = None
) -> int:
    """Rows of a table: indices `rows` int32 [n] -> [n, H]."""
    values = table(g, weights, layer, limit)
    shape = (*g.shapes[rows], g.shapes[values][1])
    version = _QUANTIZED_LOOKUP if weights.scheme(f"{layer}.weight") else 1
    return g.op("EMBEDDING_LOOKUP", [rows, values], shape, version=version)


def vector(g: Subgraph, weights: Weights, name: str) -> int:
    """A bias or a norm's weight: float32 [N]."""
    return g.constant(weights.label(name), weights.floats(name))


# --- what has no weights of its own, or vectors only ---------------------------------------------


def binary(g: Subgraph, kind: str, a: int, b: int, out: str = "") -> int:
    """ADD, SUB, MUL, DIV, MAXIMUM or MINIMUM of two tensors, one broadcast to the other."""
    shape = tuple(np.broadcast_shapes(g.shapes[a], g.shapes[b]))
    return g.op(kind, [a, b], shape, out=out)


def reshape(
    g: Subgraph, x: int, *shape: int, free: int = -1, dtype: str = "FLOAT32", out: str = ""
) -> int:
    """`free`: the axis whose size follows from the others when the file runs."""
    written = [-1 if axis == free else size for axis, size in enumerate(shape)]
    return g.op("RESHAPE", [x, g.ints(*written)], shape, dtype=dtype, out=out, newShape=written)


def transpose(g: Subgraph, x: int, *order: int) -> int:
    """Axes in another order."""
    shape = tuple(g.shapes[x][axis] for axis in order)
    return g.op("TRANSPOSE", [x, g.ints(*order)], shape)


def mean(g: Subgraph, x: int) -> int:
    """Of the last axis, which stays with size 1."""
    shape = g.shapes[x]
    return g.op("MEAN", [x, g.ints(len(shape) - 1)], (*shape[:-1], 1), keepDims=True)


def product(g: Subgraph, a: int, b: int, *, transposed: bool = False) -> int:
    """Matrices of a [..., M, K] and b [..., K, N], or transposed [..., N, K] -> [..., M, N]."""
    shape = (*g.shapes[a][:-1], g.shapes[b][-2 if transposed else -1])
    return g.op("BATCH_MATMUL", [a, b], shape, adjY=transposed)


def part(g: Subgraph, x: int, axis: int, start: int, size: int) -> int:
    """`size` entries of one axis from `start`; the other axes whole, and of fixed sizes."""
    shape = g.shapes[x]
    begin = [start if index == axis else 0 for index in range(len(shape))]
    # Written out: XNNPACK leaves a slice whose sizes are -1, "all".
    sizes = tuple(size if index == axis else n for index, n in enumerate(shape))
    return g.op("SLICE", [x, g.ints(*begin), g.ints(*sizes)], sizes)


def concat(g: Subgraph, parts: Sequence[int], axis: int) -> int:
    """Side by side along `axis`, counted from the front."""
    shape = list(g.shapes[parts[0]])
    shape[axis] = sum(g.shapes[piece][axis] for piece in parts)
    return g.op("CONCATENATION", list(parts), tuple(shape), axis=axis)


def layer_norm(
    g: Subgraph, weights: Weights, x: int, layer: str, epsilon: float, out: str = ""
) -> int:
    """Over the last axis: centred, divided by the deviation, scaled and shifted."""
    centred = binary(g, "SUB", x, mean(g, x))
    variance = mean(g, binary(g, "MUL", centred, centred))
    inverse = binary(g, "ADD", variance, g.scalar(epsilon))
    inverse = g.op("RSQRT", [inverse], g.shapes[inverse])
    scaled = binary(g, "MUL", centred, inverse)
    scaled = binary(g, "MUL", scaled, vector(g, weights, f"{layer}.weight"))
    return binary(g, "ADD", scaled, vector(g, weights, f"{layer}.bias"), out=out)


def rms_norm(g: Subgraph, weights: Weights, x: int, layer: str, epsilon: float) -> int:
    """Over the last axis: divided by the root of the mean square, and scaled."""
    squares = binary(g, "ADD", mean(g, binary(g, "MUL", x, x)), g.scalar(epsilon))
    inverse = g.op("RSQRT", [squares], g.shapes[squares])
    scaled = binary(g, "MUL", x, inverse)
    return binary(g, "MUL", scaled, vector(g, weights, f"{layer}.weight"))


def activation(g: Subgraph, kind: str, x: int) -> int:
    """GELU (exact, or its tanh form), ReLU or SiLU."""
    shape = g.shapes[x]
    if kind == "relu":
        return g.op("RELU", [x], shape)
    if kind == "silu":
        return binary(g, "MUL", x, g.op("LOGISTIC", [x], shape))
    return g.op("GELU", [x], shape, approximate=kind == "gelu_new")
