"""ops/packing: read back by compressed-tensors, and computed with by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from onnx import TensorProto, helper, numpy_helper

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.ops.affine import dequantize, quantize
from pocketglm.ops.packing import pack_blocks, pack_int32, pack_rows, unpack_int32


def integers(rows: int, columns: int, bits: int = 4) -> torch.Tensor:
    top = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randint(-top, top, (rows, columns), generator=generator).to(torch.int8)


@pytest.mark.parametrize("columns", [1, 7, 8, 31, 64])
def test_int32_words_are_those_of_compressed_tensors(columns: int) -> None:
    q = integers(5, columns)
    packed = pack_int32(q)
    assert torch.equal(torch.from_numpy(packed), pack_to_int32(q, 4))
    assert torch.equal(unpack_from_int32(torch.from_numpy(packed), 4, q.shape), q)
    assert torch.equal(unpack_int32(packed, columns), q)


def test_the_first_value_is_in_the_lowest_bits() -> None:
    packed = pack_int32(torch.tensor([[-8, -7, 0, 0, 0, 0, 0, 7]], dtype=torch.int8))
    assert packed.view(np.uint32).item() == 0xF888_8810


def matmul_nbits(
    x: np.ndarray[Any, Any],
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scheme: TensorScheme,
    block: int | None = None,
) -> np.ndarray[Any, Any]:
    """x @ w.T by ONNX Runtime's operator, in float (accuracy_level 0)."""
    rows, columns = q.shape
    size = block or scheme.group_size or columns
    blocks = -(-columns // size)
    constants = {
        "B": pack_blocks(q, scheme.bits, size),
        "scales": np.ascontiguousarray(scales.expand(rows, blocks).numpy()),
    }
    if zeros is not None:
        constants["zeros"] = pack_rows(zeros.expand(rows, blocks), scheme.bits)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=scheme.bits,
        block_size=size,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x), rows])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("columns", [96, 128, 160])
@pytest.mark.parametrize(
    "scheme",
    [
        TensorScheme(bits=4, group_size=32),
        TensorScheme(bits=4, group_size=32, symmetric=False),
        TensorScheme(bits=8, group_size=32),
        TensorScheme(bits=8, group_size=32, symmetric=False),
    ],
    ids=lambda s: f"{s.bits}-{s.symmetric}",
)
def test_matmul_nbits_computes_with_our_integers(scheme: TensorScheme, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(24, columns, generator=generator) + 0.3
    q, scales, zeros = quantize(w, scheme)
    exact = dequantize(q, scales, zeros, scheme).double().numpy()
    identity = matmul_nbits(np.eye(columns, dtype=np.float32), q, scales, zeros, scheme)
    np.testing.assert_allclose(identity.T, exact, rtol=0, atol=1e-6)
    x = torch.randn(3, columns, generator=generator).numpy()
    y = matmul_nbits(x, q, scales, zeros, scheme)
    np.testing.assert_allclose(y, x.astype(np.float64) @ exact.T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("columns", [128, 160])
def test_per_channel_int8_in_blocks_of_128(columns: int) -> None:
    scheme = TensorScheme(bits=8)
    q, scales, zeros = quantize(torch.randn(16, columns), scheme)
    exact = dequantize(q, scales, zeros, scheme)
    packed = pack_blocks(q, 8, 128)
    assert packed.shape == (16, -(-columns // 128), 128)
    assert (packed.reshape(16, -1)[:, columns:] == 128).all()  # filled up with zeros
    identity = matmul_nbits(np.eye(columns, dtype=np.float32), q, scales, zeros, scheme, 128)
    np.testing.assert_allclose(identity.T, exact.numpy(), rtol=0, atol=1e-6)


def test_shapes_and_an_odd_number_of_zero_points() -> None:
    assert pack_blocks(integers(5, 96), 4, 32).shape == (5, 3, 16)
    assert pack_blocks(integers(5, 100), 4, 32).shape == (5, 4, 16)
    zeros = torch.tensor([[-8, 7, 1]], dtype=torch.int8)
    assert pack_rows(zeros, 4).tolist() == [[0xF0, 0x09]]
    assert pack_rows(zeros, 8).tolist() == [[120, 135, 129]]
