"""The gate that a written package passes before it is kept, whatever it computes.

The package is read back from its files: the operators are those of the model, each layer's cache is
read and written, ids are integers, and the integers, scales and zero points of every quantized
weight are the checkpoint's. What it computes is compared afterwards (`stages/_parity.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.errors import ParityError
from pocketglm.model.spec import DecoderSpec, EncoderSpec
from pocketglm.ops.stored import read_quantized
from pocketglm.runtimes._coreml_file import Function, Package, read_package
from pocketglm.targets._coreml_form import Form

_HINT = "this is a defect of the export: please report it with this checkpoint's config"
_BOTH = {
    "add", "cast", "concat", "expand_dims", "gather", "matmul", "mul", "real_div", "reduce_max",
    "abs", "maximum", "reshape", "rsqrt", "slice_by_index", "softmax", "split", "squeeze", "sub",
    "transpose", "quantize", "dequantize", "gelu", "relu", "silu", "linear", "conv",
    "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "reduce_sum",
}  # fmt: skip
_ENCODER = {"layer_norm", "tanh", "shape", "range_1d"}
_DECODER = {
    "read_state", "write_state", "slice_update", "less_equal", "greater_equal", "topk", "stack",
    "reduce_mean",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Expected:
    """How many operators of the kinds that carry the model one function has; `allowed`: all kinds
    that may occur.
    """

    counts: Mapping[str, int]
    allowed: frozenset[str]
    static: bool


def expected(
    spec: EncoderSpec | DecoderSpec, form: Form, schemes: Mapping[str, TensorScheme]
) -> Expected:
    """Of a model with these quantized weights."""
    decoder = isinstance(spec, DecoderSpec)
    layers = spec.num_layers
    products = len([n for i in range(layers) for n in _products(spec, i)])
    products += _head_products(spec)
    counts = {
        "conv" if form.channels else "linear": products,
        "linear" if form.channels else "conv": 0,
        "constexpr_blockwise_shift_scale": len(schemes) if form.ios >= 18 else 0,
        "constexpr_affine_dequantize": len(schemes) if form.ios < 18 else 0,
        "softmax": sum(_heads(spec)) if form.channels else layers,
    }
    if decoder:
        # Keys and values: read, written, and read again for the products.
        counts |= {"read_state": 4 * layers, "write_state": 2 * layers, "slice_update": 2 * layers}
        counts["gather"] = 3
    else:
        counts |= {"layer_norm": 2 * layers + 1, "gather": 2 if form.channels else 3}
        counts |= {"read_state": 0, "write_state": 0}
    static = any(scheme.activation == "static" for scheme in schemes.values())
    return Expected(counts, frozenset(_BOTH | (_DECODER if decoder else _ENCODER)), static)


def _products(spec: EncoderSpec | DecoderSpec, index: int) -> list[str]:
    """The matrices of a layer; a factorized one counts twice."""
    if isinstance(spec, DecoderSpec) and spec.unified:
        return ["input", "output"]
    factored = dict(spec.ranks(index))
    return [part for name in spec.linear_layers for part in [name] * (1 + (name in factored))]


def _head_products(spec: EncoderSpec | DecoderSpec) -> int:
    if isinstance(spec, DecoderSpec):
        return 1
    return (1 + spec.pooler) * (spec.head == "classification")


def _heads(spec: EncoderSpec | DecoderSpec) -> tuple[int, ...]:
    if isinstance(spec, EncoderSpec):
        return spec.heads()
    return (spec.num_heads,) * spec.num_layers


def check_package(
    ckpt: Checkpoint, file: Path, wanted: Expected, labels: Mapping[str, str]
) -> Package:
    """Read a written package back. labels: the name in the file of each quantized weight.

    Raises:
        ParityError: it is not what was meant to be written.
    """
    package = read_package(file)
    for function in package.functions.values():
        _check_operators(function, wanted)
        _check_ports(function)
        for name, label in labels.items():
            _check_integers(ckpt, package, function.name, name, label)
    return package


def _check_operators(function: Function, wanted: Expected) -> None:
    found = Counter(function.counts)
    if foreign := sorted(set(found) - wanted.allowed):
        raise ParityError(
            f"function {function.name} has operators that are not of this model: "
            f"{', '.join(foreign)}",
            _HINT,
        )
    for kind, count in wanted.counts.items():
        if found[kind] != count:
            raise ParityError(
                f"function {function.name} has {found[kind]} operators {kind}, not {count}", _HINT
            )
    if found["quantize"] != found["dequantize"] or wanted.static != (found["quantize"] > 0):
        raise ParityError(
            f"function {function.name} has {found['quantize']} operators quantize and "
            f"{found['dequantize']} dequantize",
            _HINT,
        )


def _check_ports(function: Function) -> None:
    for port in function.inputs.values():
        if port.type.dtype != "int32":
            raise ParityError(
                f"input {port.name} is {port.type}: ids beyond 2048 need int32", _HINT
            )
    for port in function.outputs.values():
        if port.type.dtype != "fp32":
            raise ParityError(f"output {port.name} is {port.type}, not fp32", _HINT)


def _check_integers(
    ckpt: Checkpoint, package: Package, function: str, name: str, label: str
) -> None:
    stored, part = package.stored(label, function), read_quantized(ckpt, name)
    none = np.zeros(part.scales.shape, np.int8)
    data = stored.get("data", stored.get("quantized_data", none))
    zeros = stored.get("offset", stored.get("zero_point", none))
    pairs = (
        (data, part.q.numpy()),
        (stored["scale"].astype(np.float32), part.scales.numpy()),
        (zeros, none if part.zero_points is None else part.zero_points.numpy()),
    )
    if any(a.size != b.size or not np.array_equal(a.reshape(b.shape), b) for a, b in pairs):
        raise ParityError(
            f"'{name}' of the written file has other integers, scales or zero points than the "
            "checkpoint",
            _HINT,
        )
