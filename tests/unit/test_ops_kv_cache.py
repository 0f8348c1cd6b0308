"""ops/kv_cache: scales and rounding against the oracle and ONNX Runtime's own kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from oracles import kv_cache as oracle

from pocketglm.contracts import Floats
from pocketglm.ops.kv_cache import Turned, choose_kv_scales, restore_kv, round_kv

HEADS, KV, DIM = 4, 2, 32
TURNED = {
    "none": Turned(),
    "neighbours": Turned(16, interleaved=True),
    "halves": Turned(DIM),
}
every_turn = pytest.mark.parametrize("turned", TURNED.values(), ids=TURNED)
every_share = pytest.mark.parametrize("per", ["channel", "tensor"])


def samples(tokens: int = 400, seed: int = 0, tail: float = 6.0) -> Floats:
    """[T, kv heads, D] with heavy tails, and features of very different size."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(0, 1, (KV, DIM)))
    values: Floats = (rng.standard_t(tail, (tokens, KV, DIM)) * sizes).astype(np.float32)
    return values


def chosen(x: Floats, calibrator: Any, per: Any, turned: Turned, **more: Any) -> Floats:
    scales = choose_kv_scales(torch.from_numpy(x), calibrator, per=per, turned=turned, **more)
    found: Floats = scales.numpy()
    return found


def turn(x: Floats, turned: Turned, angle: float) -> Floats:
    first, second = (part.numpy() for part in turned.pairs())
    out = x.copy()
    out[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    out[..., second] = x[..., second] * np.cos(angle) + x[..., first] * np.sin(angle)
    return out


def attend(
    query: Floats, key: Floats, value: Floats, scales: tuple[Floats, Floats], per: str
) -> tuple[Floats, npt.NDArray[np.int8]]:
    """ONNX Runtime's kernel on [T, heads, D] each: its output, and keys and values it kept."""
    cache = [helper.make_tensor_value_info(n, TensorProto.INT8, None) for n in ("pk", "pv")]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "qkv"]
    node = helper.make_node(
        "GroupQueryAttention",
        [*"qkv", "pk", "pv", "last", "total", *[""] * 5, "ks", "vs"],
        ["out", "nk", "nv"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV,
        k_quant_type=f"PER_{per.upper()}",
        v_quant_type=f"PER_{per.upper()}",
        kv_cache_bit_width=8,
    )
    numbers = {
        "last": np.array([len(query) - 1], np.int32),
        "total": np.array(len(query), np.int32),
        "ks": scales[0],
        "vs": scales[1],
    }
    graph = helper.make_graph(
        [node],
        "one",
        [*inputs, *cache],
        [
            helper.make_tensor_value_info("out", TensorProto.FLOAT, None),
            *(helper.make_tensor_value_info(n, TensorProto.INT8, None) for n in ("nk", "nv")),
        ],
        [numpy_helper.from_array(array, name) for name, array in numbers.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    nothing = np.zeros((1, KV, 0, DIM), np.int8)
    feeds = {n: x.reshape(1, len(x), -1) for n, x in zip("qkv", (query, key, value), strict=True)}
    out, *kept = session.run(None, feeds | {"pk": nothing, "pv": nothing})
    return out.reshape(query.shape), np.stack(kept)[:, 0].transpose(0, 2, 1, 3)


@every_share
def test_rounding_is_the_runtimes_bit_by_bit(per: str) -> None:
    key, value = samples(200, 1), samples(200, 2)
    scales = (
        chosen(key, "percentile", per, Turned(), percentile=97),
        chosen(value, "percentile", per, Turned(), percentile=97),
    )
    for x, scale in zip((key, value), scales, strict=True):
        x[::2] = (np.rint(x[::2] / scale) + 0.5).astype(np.float32) * scale  # between two integers
    query = np.random.default_rng(3).standard_normal((200, HEADS, DIM), np.float32)
    out, kept = attend(query, key, value, scales, per)
    pairs = zip((key, value), scales, strict=True)
    mine = [round_kv(torch.from_numpy(x), torch.from_numpy(s)).numpy() for x, s in pairs]
    assert np.array_equal(kept, np.stack(mine))
    assert {kept.min(), kept.max()} == {-128, 127}, "nothing was clipped"
    # Around the ties float64 may round the other way, so the kernel's own integers count there.
    wide = [q.astype(np.float64) * s for q, s in zip(mine, scales, strict=True)]
    wanted = oracle.attention(query.astype(np.float64), wide[0], wide[1], *scales)
    assert np.abs(out - wanted).max() < 1e-4


@every_turn
@every_share
def test_scales_are_the_oracles(per: str, turned: Turned) -> None:
    x = samples()
    for calibrator, share in (("minmax", 1.0), ("percentile", 0.97)):
        found = chosen(x, calibrator, per, turned, percentile=100 * share)
        wanted = oracle.scales(
            x.astype(np.float64), per, turned.dims, turned.interleaved, share=share
        )
        assert found.shape == ((1,) if per == "tensor" else (KV, DIM))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@every_turn
@every_share
def test_mse_is_near_the_least_error(per: str, turned: Turned) -> None:
    x = samples(tail=2.0)
    wide = x.astype(np.float64)
    top = oracle.scales(wide, per, turned.dims, turned.interleaved)

    def errors(scale: Any) -> Any:
        lost = np.square(oracle.rounded(wide, scale) - wide).sum(0)
        if per == "tensor":
            return lost.sum()
        first, second = (part.numpy() for part in turned.pairs())
        both = lost[:, first] + lost[:, second]
        lost[:, first] = lost[:, second] = both
        return lost

    dense = np.stack([errors(top * reach) for reach in np.linspace(0.05, 1, 300)]).min(0)
    found = errors(chosen(x, "mse", per, turned).astype(np.float64))
    assert (found <= 1.1 * dense).all()
    assert found.sum() < errors(top).sum(), "no range was cut"


@pytest.mark.parametrize("turned", [TURNED["neighbours"], TURNED["halves"]], ids=["near", "half"])
def test_no_position_clips(turned: Turned) -> None:
    """Keys of one position, then turned by others: with the pairs' lengths none is too great."""
    x = samples()
    scale = chosen(x, "minmax", "channel", turned)
    single = oracle.scales(x.astype(np.float64), "channel", turned.dims, False, bug="single")
    clipped = 0.0
    for angle in np.linspace(0, 2 * np.pi, 17):
        moved = turn(x, turned, angle)
        assert np.abs(moved / scale).max() < 127.01
        clipped = max(clipped, float(np.abs(moved / single).max()))
    assert clipped > 130, "the planted defect was not seen"


@pytest.mark.parametrize("bug", ["truncated", "wrapped"])
def test_a_planted_defect_is_seen(bug: str) -> None:
    x = samples()
    scale = chosen(x, "percentile", "channel", Turned(), percentile=97)
    integers = torch.from_numpy(rounded_integers(x, scale))
    mine = restore_kv(integers, torch.from_numpy(scale))
    wide, steps = x.astype(np.float64), scale.astype(np.float64)
    same = np.abs(mine.numpy() - oracle.rounded(wide, steps)) < 1e-3 * steps
    assert same.mean() > 0.9999
    broken = np.abs(mine.numpy() - oracle.rounded(wide, steps, bug)) < 1e-3 * steps
    assert broken.mean() < 0.99


def rounded_integers(x: Floats, scale: Floats) -> npt.NDArray[np.int8]:
    found: npt.NDArray[np.int8] = round_kv(torch.from_numpy(x), torch.from_numpy(scale)).numpy()
    return found


def test_features_that_are_silent_get_a_scale() -> None:
    x = samples()
    x[:, 0, 3] = 0
    scale = chosen(x, "mse", "channel", Turned())
    assert (scale > 0).all()
    assert scale[0, 3] == scale.max() / 4096
    assert (chosen(np.zeros_like(x), "mse", "channel", Turned()) == 2.0**-60).all()
    assert round_kv(torch.zeros(2), torch.tensor([2.0**-60])).tolist() == [0, 0]
