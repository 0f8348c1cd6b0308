"""A fake-quantized weight: values and slopes by a float64 reference, the packer's integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from oracles import fake_weight as oracle
from torch import nn
from torch.nn.utils import parametrize

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.ops.affine import canonical, limits, quantize, to_integers
from pocketglm.ops.fake_quant import fake_quant_blocks, quantized_inputs
from pocketglm.ops.fake_weight import FakeWeight, rounded_once
from pocketglm.ops.packing import pack_blocks

SCHEMES = [
    TensorScheme(bits=4, group_size=32),
    TensorScheme(bits=4, group_size=32, symmetric=False),
    TensorScheme(bits=8),
    TensorScheme(bits=8, group_size=64, symmetric=False),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def made(scheme: TensorScheme, *, learned: bool = True) -> tuple[nn.Parameter, FakeWeight]:
    """A weight some of whose values are clipped, or lie in the middle of two integers."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    _, scales, zeros = quantize(weight, scheme)
    weight[0] = (torch.arange(64) - 31.5) * scales[0, 0]
    weight[1, ::3] *= 3
    fake = FakeWeight(scheme, scales, zeros, learned=learned)
    if fake.log_factor is not None:
        with torch.no_grad():
            fake.log_factor.copy_(torch.linspace(-0.4, 0.4, len(fake.log_factor)))
    return nn.Parameter(weight), fake


def differs(scheme: TensorScheme, bug: str = "") -> bool:
    weight, fake = made(scheme)
    assert fake.log_factor is not None
    scales, factors = fake.scales(), torch.linspace(0.5, 2, weight.numel()).view_as(weight)
    zeros = torch.zeros_like(scales) if fake.zero_points is None else fake.zero_points
    assert isinstance(zeros, torch.Tensor)
    found = fake(weight)
    of_weight, of_factor = torch.autograd.grad((found * factors).sum(), [weight, fake.log_factor])
    value, slope, steep = oracle.rounded(
        weight.detach().double().numpy(), scales.double().numpy(), zeros.double().numpy(),
        *limits(scheme), bug,
    )  # fmt: skip
    outer = factors.double().numpy()
    wanted = (steep * outer).reshape(scales.numel(), -1).sum(1)
    size = float(np.abs(value).max())
    return bool(
        np.abs(found.detach().numpy() - value).max() > 1e-6 * size
        or np.abs(of_weight.numpy() - slope * outer).max() > 1e-6
        or np.abs(of_factor.numpy() - wanted).max() > 1e-4 * np.abs(wanted).max()
    )


@every_scheme
def test_values_and_slopes_are_as_the_reference(scheme: TensorScheme) -> None:
    assert not differs(scheme)


@pytest.mark.parametrize("bug", oracle.BUGS)
def test_planted_bugs_are_caught(bug: str) -> None:
    assert all(differs(scheme, bug) for scheme in SCHEMES[:2])


@every_scheme
def test_the_integers_are_the_nearest_for_a_scale_that_is_stored(scheme: TensorScheme) -> None:
    weight, fake = made(scheme)
    scales = fake.scales()
    assert torch.equal(scales, canonical(scales))
    zeros = fake.zero_points
    assert zeros is None or isinstance(zeros, torch.Tensor)
    q = to_integers(weight.detach(), scales, zeros, scheme)
    shift = 0 if zeros is None else zeros.repeat_interleave(64 // zeros.shape[1], 1)
    steps = scales.repeat_interleave(64 // scales.shape[1], 1)
    assert torch.equal(fake(weight), (q.float() - shift) * steps)


@every_scheme
def test_before_training_it_is_the_packers(scheme: TensorScheme) -> None:
    """Learned scales begin exactly where the fixed ones stay."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    _, scales, zeros = quantize(weight, scheme)
    fixed, learned = (FakeWeight(scheme, scales, zeros, learned=x) for x in (False, True))
    assert torch.equal(fixed(weight), learned(weight))
    assert torch.equal(learned.scales(), scales)
    assert [name for name, _ in learned.named_parameters()] == ["log_factor"]
    assert not list(fixed.parameters())
    assert learned.state_dict().keys() == {"log_factor"}, "the rest is made anew"


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_kept_is_never_old(fused: bool) -> None:
    """With `rounded_once` a training gives the same, bit by bit."""
    found = []
    for keep in (False, True):
        weight, fake = made(SCHEMES[0])
        layer = nn.Linear(64, 6, bias=False)
        layer.weight = weight
        parametrize.register_parametrization(layer, "weight", fake)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, fused=fused)
        seen: list[Any] = []
        with rounded_once([fake] if keep else []):
            for step in range(4):
                with torch.inference_mode():
                    seen.append(layer.weight.clone())
                x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step))
                (layer(x).square().sum() + layer.weight.sum()).backward()
                optimizer.step()
                optimizer.zero_grad()
            layer.load_state_dict({k: v * 0.5 for k, v in layer.state_dict().items()})
            seen.append(layer.weight.detach().clone())
        assert fake.kept is None
        found.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_rounds_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fake = made(SCHEMES[0])
    calls = []
    plain = FakeWeight._round

    def counted(self: FakeWeight, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return plain(self, w)

    monkeypatch.setattr(FakeWeight, "_round", counted)
    with rounded_once([fake]):
        for _ in range(3):
            fake(weight).sum().backward()
        assert len(calls) == 1
    fake(weight)
    fake(weight)
    assert len(calls) == 3


# --- inputs by block -----------------------------------------------------------------------------


def rows(columns: int) -> torch.Tensor:
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(0))
    x[1] *= 1000
    x[2] = 0
    x[3, 5] = 80
    return x


@pytest.mark.parametrize("size", [32, 64, 128])
def test_blocks_are_as_the_reference(size: int) -> None:
    for columns in (128, 96):
        x = rows(columns)
        found, wanted = fake_quant_blocks(x, size), oracle.blocks(x.double().numpy(), size)
        # A value in the middle of two may go either way in float32: one step of its block.
        assert np.abs(found.numpy() - wanted).max() <= 1e-5 * float(x.abs().max())
        assert found.shape == x.shape
    turned = rows(128).T.contiguous().T  # not in order in memory
    assert torch.equal(fake_quant_blocks(turned, size), fake_quant_blocks(rows(128), size))
    other = oracle.blocks(rows(128).double().numpy(), size // 2)
    assert np.abs(fake_quant_blocks(rows(128), size).numpy() - other).max() > 1e-3


@pytest.mark.parametrize("size", [32, 128])
def test_blocks_are_onnx_runtimes(size: int) -> None:
    """MatMulNBits of accuracy level 4, with the identity as its weight, gives its rounded input."""
    columns, eye = 128, torch.eye(128, dtype=torch.int8)
    scales = np.ones((columns, columns // size), np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=columns, N=columns,
        bits=4, block_size=size, accuracy_level=4,
    )  # fmt: skip
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, columns]) for n in "xy"]
    weights = [
        numpy_helper.from_array(pack_blocks(eye, 4, size), "w"),
        numpy_helper.from_array(scales, "s"),
    ]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], weights)
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=8).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = rows(columns)
    (theirs,) = session.run(None, {"x": x.numpy()})
    ours = fake_quant_blocks(x, size).numpy()
    biggest = x.abs().view(7, -1, size).amax(-1).repeat_interleave(size, 1).numpy()
    assert (np.abs(theirs - ours) <= 1e-4 * biggest).mean() > 0.995
    assert (np.abs(theirs - ours) <= biggest / 126).all(), "more than a step apart"
    assert (np.abs(x.numpy() - ours) > 1e-4 * biggest).mean() > 0.5, "it does not round"


def test_inputs_and_outputs_by_block() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with quantized_inputs(model, {"0": 32}, {"1": 64}):
        found = model(x)
        found.sum().backward()
    inner = model[1](model[0](fake_quant_blocks(x, 32)))
    assert torch.equal(found, model[2](fake_quant_blocks(inner, 64)))
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not torch.equal(found, model(x))
