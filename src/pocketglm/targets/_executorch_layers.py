"""Linear layers, embeddings and norms as ExecuTorch's exporter and XNNPACK's partitioner know them.

    weight                      activation   form in the file
    float                                    XNNPACK fully connected, float
    INT8 per channel            dynamic_*    the same of int8 weights, inputs rounded per token
    INT4 by group of 32 k, row  dynamic_*    the same of int4 weights, scales bf16
    INT8 per channel            none         dequantize_per_channel, mm in a plain kernel: exact,
                                             zero points too, and slow
    INT8 per channel            static       int8 in, int8 out on fixed grids, bias added in float;
                                             before a sum with the residual stream only the input is
                                             rounded to its grid, the product is the dynamic one
    embedding                                embedding_byte, embedding_4bit (plain kernels)

The integers and scales are the checkpoint's own, passed as they are: nothing is quantized here.
Norms take their means by a product with a row of 1/H, since XNNPACK's mean is for images: so a
whole block stays in the delegate. GELU's tanh form is written out: ExecuTorch 1.5.1 hands both
forms to XNNPACK's exact one without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.model.spec import Activation
from pocketglm.ops.calibration import grid_of
from pocketglm.ops.fake_quant import HIGH, LOW, InputGrid
from pocketglm.targets._litert_linear import INT8_RESULTS
from pocketglm.targets._litert_weights import Weights

GROUP = 32  # XNNPACK's groups are multiples of it
ALL = slice(None)


def refusal(scheme: TensorScheme, columns: int, *, linear: bool) -> str:
    """Why ExecuTorch would not compute what this scheme says, or ''."""
    bits, group, exact = scheme.bits, scheme.group_size, scheme.activation == "none"
    if bits == 8 and group is not None:
        return f"INT8 by groups of {group}: XNNPACK has none"
    if not linear:
        return f"INT4 with K = {columns}: two values share a byte" if columns % (8 // bits) else ""
    if not scheme.symmetric and not (bits == 8 and exact):
        return (
            "zero points: XNNPACK drops them without an error (INT8 with float activations keeps "
            "them)"
        )
    if bits == 4 and exact:
        return "INT4 with float activations: ExecuTorch has no kernel for them"
    if bits == 4 and (group or columns) % GROUP:
        what = f"group_size {group}" if group else f"INT4 per row with K = {columns}"
        return f"{what}: XNNPACK's groups are multiples of {GROUP}"
    if scheme.activation == "static" and bits != 8:
        return "static activations go with INT8 per channel"
    return ""


# --- linear layers -------------------------------------------------------------------------------


def linear(
    weights: Weights,
    layer: str,
    *,
    bias: bool = True,
    rows: slice = ALL,
    dynamic: bool | None = None,
) -> nn.Module:
    """x [..., K] -> [..., N]; a factorized layer makes two products.

    rows: of the weight, those that this product has. dynamic: whether inputs are rounded, if the
    weight's scheme does not say it (a tied head).
    """
    if weights.factored(layer):
        inner = _product(weights, f"{layer}.factor_in", bias=False, rows=ALL, dynamic=dynamic)
        outer = _product(weights, f"{layer}.factor_out", bias=bias, rows=rows, dynamic=dynamic)
        return nn.Sequential(inner, outer)
    return _product(weights, layer, bias=bias, rows=rows, dynamic=dynamic)


def _product(
    weights: Weights, layer: str, *, bias: bool, rows: slice, dynamic: bool | None
) -> nn.Module:
    name = f"{layer}.weight"
    added = torch.from_numpy(weights.floats(f"{layer}.bias"))[rows].clone() if bias else None
    scheme = weights.scheme(name)
    if scheme is None:
        return Float(torch.from_numpy(weights.floats(name))[rows].clone(), added)
    part = weights.integers(name)
    zeros = None if part.zero_points is None else part.zero_points[rows]
    inputs = weights.grid(name)
    results = None
    if inputs is not None and layer.endswith(INT8_RESULTS):
        results = grid_of(*weights.results[layer], symmetric=False)
    rounds = scheme.activation.startswith("dynamic") if dynamic is None else dynamic
    return Integer(
        part.q[rows].clone(),
        part.scales[rows].clone(),
        zeros,
        scheme,
        added,
        inputs=inputs,
        results=results,
        dynamic=rounds or (inputs is not None and results is None),
    )


class Float(nn.Module):
    """A product in float32."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return F.linear(x, self.weight, self.bias)


class Integer(Float):
    """A product with integers, q int8 [N, K], scales float32 [N, G], zeros int8 [N, 1] or None.

    dynamic: inputs are rounded, per token. inputs, results: fixed grids of what goes in and out.
    """

    scales: Tensor
    zeros: Tensor

    def __init__(
        self,
        q: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        scheme: TensorScheme,
        bias: Tensor | None,
        *,
        inputs: InputGrid | None,
        results: InputGrid | None,
        dynamic: bool,
    ) -> None:
        super().__init__(q, bias)
        if scheme.bits == 4 and not torch.equal(scales, scales.bfloat16().float()):
            raise ValueError("a scale is no bf16 number: XNNPACK would round it")
        self.group = q.shape[1] // scales.shape[1] if scheme.bits == 4 else 0
        # XNNPACK asks for int8 zero points of groups; the plain kernel for int64.
        kind = torch.int8 if self.group else torch.int64
        none = torch.zeros_like(scales, dtype=kind)
        self.register_buffer("scales", scales if self.group else scales[:, 0].clone())
        self.register_buffer("zeros", none if zeros is None else zeros.to(kind))
        if not self.group:
            self.zeros = self.zeros[:, 0].clone()
        self.inputs, self.results, self.dynamic = inputs, results, dynamic

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if self.inputs is not None:
            x = on_grid(x, self.inputs)
        if self.dynamic:
            x = _per_token(x)
        if self.results is None:
            return F.linear(x, self._weight(), self.bias)
        y = on_grid(F.linear(x, self._weight()), self.results)
        return y if self.bias is None else y + self.bias

    def _weight(self) -> Tensor:
        ops, q, scales, zeros = _ops(), self.weight, self.scales, self.zeros
        if self.group:
            kinds = torch.int8, self.group, torch.float32
            found: Tensor = ops.dequantize_per_channel_group(q, scales, zeros, -8, 7, *kinds)
        else:
            found = ops.dequantize_per_channel(q, scales, zeros, 0, -128, 127, torch.int8)
        return found


def _ops() -> Any:
    return torch.ops.quantized_decomposed


def on_grid(x: Tensor, grid: InputGrid) -> Tensor:
    """The nearest values of a fixed grid."""
    form = grid.scale, grid.zero_point, LOW, HIGH, torch.int8
    q = _ops().quantize_per_tensor(x, *form)
    found: Tensor = _ops().dequantize_per_tensor(q, *form)
    return found


def _per_token(x: Tensor) -> Tensor:
    """Each token on an int8 grid of its own, with a zero point."""
    scale, zero = _ops().choose_qparams_per_token_asymmetric(x, torch.int8)
    q = _ops().quantize_per_token(x, scale, zero, LOW, HIGH, torch.int8)
    kinds = torch.int8, torch.float32
    found: Tensor = _ops().dequantize_per_token(q, scale, zero, LOW, HIGH, *kinds)
    return found


# --- embeddings ----------------------------------------------------------------------------------


def embedding(weights: Weights, layer: str, limit: int | None = None) -> nn.Module:
    """Ids int64 [...] -> [..., H]; limit: rows that are kept."""
    name, rows = f"{layer}.weight", slice(0, limit)
    scheme = weights.scheme(name)
    if scheme is None:
        return FloatTable(torch.from_numpy(weights.floats(name))[rows].clone())
    part = weights.integers(name)
    zeros = None if part.zero_points is None else part.zero_points[rows].float()
    return IntegerTable(part.q[rows].clone(), part.scales[rows].clone(), zeros, scheme.bits)


class FloatTable(nn.Module):
    """Rows in float32."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., H]."""
        return F.embedding(ids, self.weight)


class IntegerTable(FloatTable):
    """Rows of integers: int8 as they are; INT4 with offset 8, two in a byte, the first one high."""

    scales: Tensor
    zeros: Tensor | None

    def __init__(self, q: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> None:
        if bits == 4:
            pairs = (q + 8).view(torch.uint8).view(len(q), -1, 2)
            q = pairs[..., 0] << 4 | pairs[..., 1]
        super().__init__(q)
        self.bits = bits
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., H]."""
        kernel = _ops().embedding_4bit if self.bits == 4 else _ops().embedding_byte
        low, high = (-8, 7) if self.bits == 4 else (-128, 127)
        found: Tensor = kernel.dtype(
            self.weight, self.scales, self.zeros, low, high, ids, dtype=torch.float32
        )
        return found


# --- norms and activations -----------------------------------------------------------------------


class Norm(nn.Module):
    """RMSNorm over the last axis; with a bias LayerNorm."""

    weight: Tensor

    def __init__(self, weight: Tensor, epsilon: float, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        share = torch.full((1, len(weight)), 1 / len(weight))
        self.mean = Float(share)
        self.shifted_mean = Float(share, torch.tensor([epsilon]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        if self.bias is not None:
            x = x - self.mean(x)
        scaled = x * torch.rsqrt(self.shifted_mean(x * x)) * self.weight
        return scaled if self.bias is None else scaled + self.bias


def norm(weights: Weights, layer: str, epsilon: float, *, centred: bool) -> Norm:
    """The stored norm of this name; centred: LayerNorm, else RMSNorm."""
    weight = torch.from_numpy(weights.floats(f"{layer}.weight")).clone()
    bias = torch.from_numpy(weights.floats(f"{layer}.bias")).clone() if centred else None
    return Norm(weight, epsilon, bias)


def activation(kind: Activation) -> Callable[[Tensor], Tensor]:
    """GELU (exact, or its tanh form), ReLU or SiLU."""
    known: dict[Activation, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "silu": _silu,
        "gelu": F.gelu,
        "gelu_new": _gelu_tanh,
    }
    return known[kind]


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
    half = x * 0.5
    return half + half * torch.tanh(inner)
