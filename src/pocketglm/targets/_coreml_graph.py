"""A Core ML program under construction: functions that share their constants.

coremltools' builder checks the shape and type of every operator as it is added; the graph itself
is ours, no pass changes it. A constant's name is Hugging Face's with "_" for ".", which Core ML
does not allow in names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.errors import UnsupportedError, require
from pocketglm.model.hf import stored_name
from pocketglm.ops.stored import Quantized
from pocketglm.runtimes._quiet import silence
from pocketglm.targets._coreml_form import Form
from pocketglm.targets._litert_weights import Weights

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
EXTRA = "coreml"
MASKED = -10000.0  # score of what is not looked at: -1e9 and -inf become NaN in fp16
TINY = 2.0**-14  # fp16's smallest normal number
_LEAST_EPSILON = 2.0**-24  # fp16's smallest: a smaller one would be 0


@dataclass(frozen=True, slots=True)
class Mil:
    """coremltools' parts that are used here."""

    tools: Any  # coremltools itself
    lang: Any  # ...mil.mil: Builder, Function, Program, types
    convert: Callable[..., Any]

    @property
    def int4(self) -> Any:
        """numpy's type of arrays that are stored in 4 bits."""
        return self.lang.types.nptype_from_builtin(self.lang.types.int4)


@functools.cache
def mil() -> Mil:
    """Import coremltools, which says on stderr what it lacks off macOS.

    Raises:
        MissingExtraError: it is not installed.
    """
    with silence():
        return Mil(
            require("coremltools", EXTRA),
            require("coremltools.converters.mil.mil", EXTRA),
            require("coremltools.converters.mil.converter", EXTRA).mil_convert,
        )


def forget_names() -> None:
    """Begin again to number the values that have no name of their own. The builder counts through
    all programs of the process, until one is converted: the same model would get other bytes after
    its placement was asked for.
    """
    mil().lang.Builder.name_count.clear()


@dataclass(frozen=True, slots=True)
class Range:
    """A size that the caller chooses when the file runs, from 1 to `most`."""

    most: int


class Graph:
    """One function. Used in a `with` statement; afterwards `function` can be put into a program.

    inputs: int32, by name; sizes are numbers or one Range. states: fp16, by name.
    """

    def __init__(
        self,
        form: Form,
        weights: Weights,
        inputs: Mapping[str, tuple[int | Range, ...]],
        states: Mapping[str, Shape] | None = None,
    ) -> None:
        self.form, self.weights, self.mil = form, weights, mil()
        self.b: Any = self.mil.lang.Builder
        self.sizes: dict[str, int] = {}  # bytes of the constants by name
        self.quantized: dict[str, str] = {}  # the checkpoint's name of a weight -> the file's
        self._made: dict[str, Any] = {}
        types = self.mil.lang.types
        symbol = None
        if any(isinstance(size, Range) for shape in inputs.values() for size in shape):
            symbol = self.mil.lang.get_new_symbol()
        placeholders = {
            name: self.b.placeholder(
                shape=tuple(symbol if isinstance(n, Range) else n for n in shape),
                dtype=types.int32,
            )
            for name, shape in inputs.items()
        }
        for name, shape in (states or {}).items():
            placeholders[name] = self.b.state_tensor_placeholder(shape=shape, dtype=types.fp16)
        self.function = self.mil.lang.Function(placeholders, opset_version=self.target)
        if symbol is not None:
            self.function.set_input_types(self._flexible(inputs))

    def _flexible(self, inputs: Mapping[str, tuple[int | Range, ...]]) -> tuple[Any, ...]:
        tools = self.mil.tools

        def size(n: int | Range) -> Any:
            return tools.RangeDim(1, n.most, default=n.most) if isinstance(n, Range) else n

        return tuple(
            tools.TensorType(name=name, shape=tuple(map(size, shape)), dtype=np.int32)
            for name, shape in inputs.items()
        )

    def __enter__(self) -> Graph:
        self.function.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.function.__exit__(kind, error, traceback)

    @property
    def target(self) -> Any:
        """coremltools' name of the deployment target."""
        return getattr(self.mil.tools.target, f"iOS{self.form.ios}")

    @property
    def features(self) -> int:
        """The axis of a value's features: [1, features, 1, tokens] or [1, tokens, features]."""
        return 1 if self.form.channels else 2

    @property
    def tokens(self) -> int:
        """The axis of its tokens."""
        return 3 if self.form.channels else 1

    @property
    def dtype(self) -> Any:
        return np.float16 if self.form.half else np.float32

    @property
    def dtype_name(self) -> str:
        """The same, as the operator `cast` names it."""
        return "fp16" if self.form.half else "fp32"

    def input(self, name: str) -> Any:
        """An input or a state."""
        return self.function.inputs[name]

    # --- constants -------------------------------------------------------------------------------

    def number(self, value: float) -> Any:
        """A float for an operator's parameter, in the program's type."""
        return self.dtype(value)

    def constant(self, label: str, make: Callable[[], Array]) -> Any:
        """A constant that every function of the program shares; made when it is first used."""
        if label not in self._made:
            values, name = self._fit(label, make()), named(label)
            var = self.b.const(val=values, name=name)
            var.op.weight_id = name
            self._made[label] = var
            # int4 is int8 with a note, which == does not see.
            bits = 4 if values.dtype.metadata else 8 * values.itemsize
            self.sizes[label] = values.size * bits // 8
        return self._made[label]

    def _fit(self, name: str, values: Array) -> Array:
        """Floats in the program's type.

        Raises:
            UnsupportedError: fp16 ends at 65504.
        """
        if values.dtype.kind != "f" or values.dtype == self.dtype:
            return np.ascontiguousarray(values)
        with np.errstate(over="ignore"):
            found: Array = np.ascontiguousarray(values.astype(self.dtype))
        if not np.isfinite(found).all():
            raise UnsupportedError(
                f"coreml cannot carry {name}",
                [f"it holds {np.abs(values).max():.3g}, fp16 ends at 65504"],
                "export it to onnx or litert, which compute in float32",
            )
        return found

    def vector(self, name: str, shape: Shape | None = None) -> Any:
        """A bias or a norm's weight [N], or in a shape of as many values."""
        label = self.weights.label(name)
        return self.constant(label, lambda: self.weights.floats(name).reshape(shape or -1))

    def weight(self, name: str, *, flat: bool = False) -> Any:
        """A matrix [N, K], as integers if the checkpoint has them; where values are channels first
        [N, K, 1, 1] unless `flat`.
        """
        label, wide = self.weights.label(name), self.form.channels and not flat
        if self.weights.scheme(name) is None:
            return self.constant(label, lambda: _wide(self.weights.floats(name), wide))
        if label not in self._made:
            self._made[label] = self._integers(label, self.weights.integers(name), wide)
            self.quantized[stored_name(self.weights.ckpt, name)] = named(label)
        return self._made[label]

    def _integers(self, label: str, part: Quantized, wide: bool) -> Any:
        """An operator that gives the weight: (integers - zero points) * scales."""
        q, scales = part.q.numpy(), part.scales.numpy()
        zeros = None if part.zero_points is None else part.zero_points.numpy()
        if self.form.ios < 18:
            return self.b.constexpr_affine_dequantize(
                quantized_data=self.constant(f"{label}_data", lambda: _wide(q, wide)),
                scale=self.constant(f"{label}_scale", lambda: scales[:, 0]),
                zero_point=self.constant(
                    f"{label}_zero_point",
                    lambda: np.zeros(len(q), np.int8) if zeros is None else zeros[:, 0],
                ),
                axis=np.int32(0),
                name=named(label),
            )
        stored = self.mil.int4 if part.scheme.bits == 4 else np.int8
        offset = {}
        if zeros is not None:
            made = self.constant(f"{label}_offset", lambda: _wide(zeros.astype(stored), wide))
            offset = {"offset": made}
        return self.b.constexpr_blockwise_shift_scale(
            data=self.constant(f"{label}_data", lambda: _wide(q.astype(stored), wide)),
            scale=self.constant(f"{label}_scale", lambda: _wide(scales, wide)),
            **offset,
            name=named(label),
        )

    # --- layers ----------------------------------------------------------------------------------

    def linear(self, x: Any, layer: str, *, bias: bool = True, name: str = "") -> Any:
        """Features K -> N; a factorized layer makes two products."""
        if self.weights.factored(layer):
            x = self._product(x, f"{layer}.factor_in", bias=False)
            layer = f"{layer}.factor_out"
        return self._product(x, layer, bias=bias, name=name)

    def _product(self, x: Any, layer: str, *, bias: bool, name: str = "") -> Any:
        weight, title = self.weight(f"{layer}.weight"), _titled(name)
        x = self._rounded(x, f"{layer}.weight")
        added = {"bias": self.vector(f"{layer}.bias")} if bias else {}
        if self.form.channels:
            return self.b.conv(x=x, weight=weight, pad_type="valid", **added, **title)
        if not bias:  # the builder would write one of zeros for each layer
            rows = weight.shape[0]
            added = {"bias": self.constant(f"zeros_{rows}", lambda: np.zeros(rows, self.dtype))}
        return self.b.linear(x=x, weight=weight, **added, **title)

    def _rounded(self, x: Any, name: str) -> Any:
        """The input of a static layer on the checkpoint's grid. Core ML has its scale in the type
        of the value: in fp16 the grid is wider or narrower by up to one part in 2048.
        """
        grid = self.weights.grid(name)
        if grid is None:
            return x
        key = f"{x.name}@{grid.scale}@{grid.zero_point}"
        if key not in self._made:
            form = {"scale": self.number(grid.scale), "zero_point": np.int8(grid.zero_point)}
            rounded = self.b.quantize(input=x, **form, output_dtype="int8")
            self._made[key] = self.b.dequantize(input=rounded, **form)
        return self._made[key]

    def embedding(self, rows: Any, layer: str, *, shared: bool = False, name: str = "") -> Any:
        """Rows of a table: indices int32 [1, S] -> a value. shared: it is the head's weight too."""
        table, title = self.weight(f"{layer}.weight", flat=not shared), _titled(name)
        if not self.form.channels:
            return self.b.gather(x=table, indices=rows, axis=0, **title)
        x = self.b.gather(x=table, indices=rows, axis=0)
        x = self.b.squeeze(x=x, axes=[3, 4]) if shared else x
        return self.b.expand_dims(x=self.b.transpose(x=x, perm=[0, 2, 1]), axes=[2], **title)

    def layer_norm(self, x: Any, layer: str, epsilon: float, name: str = "") -> Any:
        """Over the features: centred, divided by the deviation, scaled and shifted."""
        least = _LEAST_EPSILON if self.form.half else 0.0
        return self.b.layer_norm(
            x=x,
            axes=[self.features],
            gamma=self.vector(f"{layer}.weight"),
            beta=self.vector(f"{layer}.bias"),
            epsilon=self.number(max(epsilon, least)),
            **_titled(name),
        )

    def rms_norm(self, x: Any, layer: str, epsilon: float, axis: int | None = None) -> Any:
        """Over the features, or `axis`: divided by the root of the mean square, and scaled.

        First divided by the greatest value: squares of more than 255 are beyond fp16.
        """
        axis = self.features if axis is None else axis
        scaled, most = self.scaled(x, axis)
        mean = self.b.reduce_mean(x=self.b.mul(x=scaled, y=scaled), axes=[axis], keep_dims=True)
        root = self.b.real_div(x=self.number(epsilon**0.5), y=most)
        mean = self.b.add(x=mean, y=self.b.mul(x=root, y=root))
        inverse = self.b.rsqrt(x=mean, epsilon=self.number(0.0))
        shape = tuple(x.shape[axis] if i == axis else 1 for i in range(len(x.shape)))
        weight = self.vector(f"{layer}.weight", shape)
        return self.b.mul(x=self.b.mul(x=scaled, y=inverse), y=weight)

    def scaled(self, x: Any, axis: int) -> tuple[Any, Any]:
        """x divided by its greatest absolute value along an axis, and that value."""
        most = self.b.reduce_max(x=self.b.abs(x=x), axes=[axis], keep_dims=True)
        most = self.b.maximum(x=most, y=self.number(TINY))
        return self.b.real_div(x=x, y=most), most

    def activation(self, kind: str, x: Any) -> Any:
        """GELU (exact, or its tanh form), ReLU or SiLU."""
        if kind == "relu":
            return self.b.relu(x=x)
        if kind == "silu":
            return self.b.silu(x=x)
        mode = "TANH_APPROXIMATION" if kind == "gelu_new" else "EXACT"
        return self.b.gelu(x=x, mode=mode)

    def part(self, x: Any, axis: int, start: int, size: int) -> Any:
        """`size` entries of one axis from `start`; the other axes whole."""
        rank = len(x.shape)
        return self.b.slice_by_index(
            x=x,
            begin=[start if i == axis else 0 for i in range(rank)],
            end=[start + size if i == axis else 0 for i in range(rank)],
            end_mask=[i != axis for i in range(rank)],
        )

    def answer(self, x: Any, name: str) -> Any:
        """Features of one token -> float32 [1, C]."""
        x = self.b.reshape(x=x, shape=[1, x.shape[self.features]])
        return self.b.cast(x=x, dtype="fp32", name=name)


def named(label: str) -> str:
    """A constant's name in the file."""
    return label.replace(".", "_")


def _titled(name: str) -> dict[str, str]:
    return {"name": name} if name else {}


def _wide(values: Array, wide: bool) -> Array:
    return values[:, :, None, None] if wide else values
