"""Simulated quantization: a float64 reference, ONNX Runtime's own operators, the packer's bytes."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from oracles import fake_quant as oracle
from torch import nn

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.ops.affine import quantize
from pocketglm.ops.fake_quant import (
    InputGrid,
    fake_quant_activation,
    fake_quant_weight,
    quantized_inputs,
)
from pocketglm.ops.stored import Quantized

GRIDS = [(0.03, 0), (0.5, 0), (0.0123, -57), (2.0**-5, 100), (0.25, -128)]


def values(scale: float, zero: int) -> torch.Tensor:
    """Inside, outside, and on the ties of a grid."""
    rng = np.random.default_rng(1)
    ties = (np.arange(-140, 140) + 0.5) * scale
    spread = rng.normal(0, 90 * scale, 300) - zero * scale
    return torch.tensor(np.concatenate([ties, spread, [0.0]]), dtype=torch.float32)


def ours(x: torch.Tensor, scale: float, zero: int) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    found = fake_quant_activation(leaf, scale, zero)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    return found.detach(), gradient


def differs(scale: float, zero: int, bug: str = "") -> bool:
    x = values(scale, zero)
    found, gradient = ours(x, scale, zero)
    wanted, slope = oracle.fake_quant(x.double().numpy(), float(np.float32(scale)), zero, bug)
    return bool(
        np.abs(found.numpy() - wanted).max() > 1e-6 * 256 * scale
        or (gradient.numpy() != slope).any()
    )


@pytest.mark.parametrize(("scale", "zero"), GRIDS)
def test_activations_are_as_the_reference(scale: float, zero: int) -> None:
    assert not differs(scale, zero)


@pytest.mark.parametrize("bug", oracle.BUGS)
def test_planted_bugs_are_caught(bug: str) -> None:
    assert any(differs(scale, zero, bug) for scale, zero in GRIDS)


@pytest.mark.parametrize(("scale", "zero"), GRIDS)
def test_activations_are_as_onnx_runtime_rounds_them(scale: float, zero: int) -> None:
    ends = ["scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *ends], ["q"]),
        helper.make_node("DequantizeLinear", ["q", *ends], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "round",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("zero", TensorProto.UINT8, [], [zero + 128]),
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7
    ).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = values(scale, zero)
    (wanted,) = session.run(None, {"x": x.numpy()})
    grid = float(np.float32(scale))
    assert np.array_equal(fake_quant_activation(x, grid, zero).numpy(), wanted)


def test_bf16_is_rounded_in_float32() -> None:
    """In bf16 the division would move many values to another integer."""
    x = (torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    found = fake_quant_activation(x, 0.03, 5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fake_quant_activation(x.float(), 0.03, 5).bfloat16())


def test_a_grid_knows_its_range() -> None:
    grid = InputGrid(0.5, -28)
    assert grid.range == (-50.0, 77.5)
    assert not grid.symmetric
    ends = torch.tensor([-1000.0, 1000.0])
    assert fake_quant_activation(ends, grid.scale, grid.zero_point).tolist() == [-50.0, 77.5]
    again = fake_quant_activation(torch.tensor([-50.0, 0.0, 77.5]), grid.scale, grid.zero_point)
    assert again.tolist() == [-50.0, 0.0, 77.5]


SCHEMES = [
    TensorScheme(bits=8),
    TensorScheme(bits=8, symmetric=False),
    TensorScheme(bits=4, group_size=32),
    TensorScheme(bits=4, group_size=32, symmetric=False),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_are_what_the_packer_stores(scheme: TensorScheme) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q, scales, zeros = quantize(weight.detach(), scheme)
    stored = Quantized(q, scales, zeros, scheme).dequantized()
    for fixed in ((), (scales, zeros)):
        found = fake_quant_weight(weight, scheme, *fixed)
        assert torch.equal(found, stored)
    (gradient,) = torch.autograd.grad((found * torch.arange(1.0, 65.0)).sum(), weight)
    passed = gradient / torch.arange(1.0, 65.0)
    assert set(passed.flatten().tolist()) <= {0.0, 1.0}
    clipped = (weight.detach() - stored).abs() > 0.501 * scales.repeat_interleave(
        64 // scales.shape[1], 1
    )
    assert not passed[clipped].any()
    assert passed[~clipped].mean() > 0.97


def test_inputs_are_rounded_meanwhile() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x, grid = torch.randn(5, 8), InputGrid(0.1)
    plain = model(x)
    with quantized_inputs(model, {"0": grid}):
        rounded = model(x)
    assert torch.equal(rounded, model(fake_quant_activation(x, 0.1)))
    assert not torch.equal(rounded, plain)
    assert torch.equal(model(x), plain)
