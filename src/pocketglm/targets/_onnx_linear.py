"""Linear layers and embeddings of an ONNX graph, in the form that the weight's scheme asks for.

    weight             activation        nodes
    float                                MatMul, Add
    INT8 per channel   dynamic_tensor    DynamicQuantizeMatMul (one scale per activation tensor)
    INT8 per channel   static            QuantizeLinear, DequantizeLinear, MatMul, Add (QDQ)
    INT8, INT4         dynamic_block     MatMulNBits, accuracy_level 4 (int8 activations by block)
    INT8, INT4         dynamic_token     the same: a block is finer than a token
    INT8, INT4         none              MatMulNBits, accuracy_level 1 (float activations)
    embedding, INT8 per row              Gather of integers and scales, Cast, Mul
    embedding, INT4 or by group          GatherBlockQuantized

The integers are the checkpoint's own. MatMulNBits and GatherBlockQuantized store them shifted by
8 or 128, low nibble first: w = (stored - zero_point) * scale. Specs: ONNX Runtime,
ContribOperators.md.

Static activations are uint8 in the file, the checkpoint's int8 plus 128: the same values, and the
type that x86's integer products take. ONNX Runtime makes QuantizeLinear and MatMulIntegerToFloat of
each such layer (1.32, x86, both opsets); biases stay float: as int32 they would need Gemm, which it
left in float around the reshapes that a [B, S, K] input needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.model.bert import hf_name
from pocketglm.model.hf import stored_name
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.packing import pack_blocks, pack_rows
from pocketglm.ops.stored import Quantized, read_grid, read_quantized, read_weight
from pocketglm.targets._onnx_graph import GraphBuilder

BLOCK = (
    128  # of MatMulNBits where the scheme has one scale per row: the fastest when sizes were tried
)
_BLOCKS = (16, 32, 64, 128, 256)  # the sizes that ONNX Runtime's kernels know


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint's weights by our parameter names (`model/encoder.py`)."""

    ckpt: Checkpoint

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor in float32, dequantized if need be."""
        array: npt.NDArray[np.float32] = read_weight(
            self.ckpt, stored_name(self.ckpt, name)
        ).numpy()
        return array

    def scheme(self, name: str) -> TensorScheme | None:
        """How a weight is quantized; None: it is stored in float."""
        return self.ckpt.manifest.schemes.get(stored_name(self.ckpt, name))

    def grid(self, name: str) -> InputGrid | None:
        """How the input of the layer with weight `name` is quantized; None: not on a fixed grid."""
        return read_grid(self.ckpt, stored_name(self.ckpt, name))

    def factored(self, layer: str) -> bool:
        """Whether a layer's weight is the product of two."""
        if not layer.startswith("blocks."):
            return False
        inner = stored_name(self.ckpt, f"{layer}.factor_in.weight")
        return inner in self.ckpt.tensors or f"{inner}_packed" in self.ckpt.tensors

    def integers(self, name: str) -> Quantized:
        """The integers of a quantized weight."""
        return read_quantized(self.ckpt, stored_name(self.ckpt, name))


def refusal(scheme: TensorScheme, *, linear: bool) -> str:
    """Why no operator carries this scheme, or ''."""
    if scheme.group_size is not None and scheme.group_size not in _BLOCKS:
        return f"group_size {scheme.group_size}: the operators know {_BLOCKS}"
    if not linear:
        return ""
    per_channel = scheme.bits == 8 and scheme.group_size is None
    if scheme.activation in ("dynamic_tensor", "static") and not per_channel:
        return f"activation {scheme.activation} goes with INT8 per channel only"
    return ""


def is_standard(scheme: TensorScheme, *, linear: bool) -> bool:
    """Whether standard operators carry this scheme."""
    per_channel = scheme.bits == 8 and scheme.group_size is None
    return per_channel and (scheme.activation == "static" or not linear)


def label(*layers: str) -> str:
    """The name of a layer's initializers: the checkpoint's; packed layers joined by '|'."""
    return "|".join(hf_name(f"{layer}.weight").removesuffix(".weight") for layer in layers)


def linear(g: GraphBuilder, weights: Weights, x: str, *layers: str) -> str:
    """x [..., K] -> [..., N]: `layers` side by side as one product; they must share a scheme, and
    the grid of their input, and be whole. A factorized one comes alone, and makes two products.
    """
    if weights.factored(layers[0]):
        inner = _product(g, weights, x, f"{layers[0]}.factor_in", bias="")
        layers = (f"{layers[0]}.factor_out",)
        x = inner
    return _product(g, weights, x, *layers, bias=biases(g, weights, *layers))


def _product(g: GraphBuilder, weights: Weights, x: str, *layers: str, bias: str) -> str:
    """bias: '' = none."""
    name = label(*layers)
    scheme = weights.scheme(f"{layers[0]}.weight")
    if scheme is None:
        return _sum(g, g.op("MatMul", x, float_columns(g, weights, *layers)), bias)
    part = side_by_side(weights, *layers)
    if scheme.activation not in ("dynamic_tensor", "static"):
        return _matmul_nbits(g, name, x, part, bias)
    weight, scales, zeros = integer_columns(g, name, part)
    if part.grid is not None:
        inputs = [weight, scales, *([zeros] if zeros else [])]
        columns = g.op("DequantizeLinear", *inputs, axis=1)
        return _sum(g, g.op("MatMul", _on_grid(g, x, part.grid), columns), bias)
    return g.microsoft("DynamicQuantizeMatMul", x, weight, scales, zeros, *([bias] if bias else []))


def _sum(g: GraphBuilder, x: str, bias: str) -> str:
    return g.op("Add", x, bias) if bias else x


def _on_grid(g: GraphBuilder, x: str, grid: InputGrid) -> str:
    """x as its runtime computes with it: rounded to uint8 and back."""
    zero = grid.zero_point + 128
    ends = g.scalar(grid.scale), g.constant(f"uint8_{zero}", np.array(zero, np.uint8))
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, *ends), *ends)


def biases(g: GraphBuilder, weights: Weights, *layers: str) -> str:
    """The layers' biases, concatenated: [N]."""
    values = [weights.floats(f"{layer}.bias") for layer in layers]
    return g.constant(f"{label(*layers)}.bias", np.concatenate(values))


def float_columns(g: GraphBuilder, weights: Weights, *layers: str) -> str:
    """The layers' float weights side by side: [K, N]."""
    values = [weights.floats(f"{layer}.weight") for layer in layers]
    return g.constant(f"{label(*layers)}.weight", np.concatenate(values).T)


def integer_columns(g: GraphBuilder, name: str, part: Quantized) -> tuple[str, str, str]:
    """Per-channel integers int8 [K, N], scales [N], zero points int8 [N] ('' if symmetric)."""
    zeros = part.zero_points
    return (
        g.constant(f"{name}.weight", part.q.T.numpy()),
        g.constant(f"{name}.scales", part.scales[:, 0].numpy()),
        "" if zeros is None else g.constant(f"{name}.zero_points", zeros[:, 0].numpy()),
    )


def side_by_side(weights: Weights, *layers: str) -> Quantized:
    """The integers of layers that share a scheme, concatenated along N."""
    parts = [weights.integers(f"{layer}.weight") for layer in layers]
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return Quantized(
        torch.cat([part.q for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
        parts[0].scheme,
        parts[0].grid,
    )


def embedding(
    g: GraphBuilder, weights: Weights, layer: str, rows: str, limit: int | None = None
) -> str:
    """Rows of a table: indices `rows` int64 [...] -> [..., H] float32.

    Only the rows that are looked up become float, so the table stays small in memory. Only the
    first `limit` rows are written.
    """
    name = label(layer)
    scheme = weights.scheme(f"{layer}.weight")
    if scheme is None:
        table = g.constant(f"{name}.weight", weights.floats(f"{layer}.weight")[:limit])
        return g.op("Gather", table, rows)
    part = _first_rows(weights.integers(f"{layer}.weight"), limit)
    if scheme.bits == 4 or scheme.group_size:
        return _gather_block(g, name, rows, part)
    values = g.op("Gather", g.constant(f"{name}.weight", part.q.numpy()), rows)
    values = g.op("Cast", values, to=TensorProto.FLOAT)
    if part.zero_points is not None:
        table = g.constant(f"{name}.zero_points", part.zero_points.numpy())
        zeros = g.op("Gather", table, rows)
        values = g.op("Sub", values, g.op("Cast", zeros, to=TensorProto.FLOAT))
    scales = g.constant(f"{name}.scales", part.scales.numpy())
    return g.op("Mul", values, g.op("Gather", scales, rows))


def _first_rows(part: Quantized, limit: int | None) -> Quantized:
    zeros = None if part.zero_points is None else part.zero_points[:limit]
    return Quantized(part.q[:limit], part.scales[:limit], zeros, part.scheme)


def _gather_block(g: GraphBuilder, name: str, rows: str, part: Quantized) -> str:
    bits, columns = part.scheme.bits, part.q.shape[1]
    inputs = [
        g.constant(f"{name}.weight", pack_rows(part.q, bits)),
        rows,
        g.constant(f"{name}.scales", part.scales.numpy()),
    ]
    if part.zero_points is not None:
        inputs.append(g.constant(f"{name}.zero_points", pack_rows(part.zero_points, bits)))
    return g.microsoft(
        "GatherBlockQuantized",
        *inputs,
        bits=bits,
        # One scale per row: one block that is at least as long as the row.
        block_size=part.scheme.group_size or max(16, 1 << (columns - 1).bit_length()),
        gather_axis=0,
        quantize_axis=1,
    )


def _matmul_nbits(g: GraphBuilder, name: str, x: str, part: Quantized, bias: str) -> str:
    bits, (rows, columns) = part.scheme.bits, part.q.shape
    block = part.scheme.group_size or BLOCK
    blocks = -(-columns // block)
    scales, zeros = part.scales.expand(rows, blocks), part.zero_points
    if zeros is not None:
        zeros = zeros.expand(rows, blocks)
    inputs = [
        x,
        g.constant(f"{name}.weight", pack_blocks(part.q, bits, block)),
        g.constant(f"{name}.scales", scales.numpy()),
        "" if zeros is None else g.constant(f"{name}.zero_points", pack_rows(zeros, bits)),
        "",
        bias,
    ]
    while not inputs[-1]:
        inputs.pop()
    return g.microsoft(
        "MatMulNBits",
        *inputs,
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=1 if part.scheme.activation == "none" else 4,
    )
