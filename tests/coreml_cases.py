"""One small case of each operation of the Core ML evaluator, with torch's result for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

_random = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    """Float values that float16 holds exactly."""
    return _random.standard_normal(shape).astype(np.float16).astype(np.float32)


def positive(*shape: int) -> Any:
    return (np.abs(normal(*shape)) + 0.25).astype(np.float16).astype(np.float32)


def whole(high: int, *shape: int, low: int = 0) -> Any:
    return _random.integers(low, high, shape).astype(np.int32)


def truth(*shape: int) -> Any:
    return _random.integers(0, 2, shape).astype(bool)


@dataclass(frozen=True)
class Case:
    """build: builder, float type of the program and input values -> the result's value.

    expected: tensors of the inputs -> torch's result.
    """

    name: str
    build: Callable[..., Any]
    expected: Callable[..., Any]
    inputs: list[Any] = field(default_factory=list)
    opset: int = 18

    @property
    def op(self) -> str:
        """The operation: the name up to a remark."""
        return self.name.partition(" ")[0]


CASES: list[Case] = []


def case(
    name: str,
    build: Callable[..., Any],
    expected: Callable[..., Any],
    *inputs: Any,
    opset: int = 18,
) -> None:
    CASES.append(Case(name, build, expected, list(inputs), opset))


# --- elements -----------------------------------------------------------------------------------


def _unary(name: str, expected: Callable[[Any], Any], values: Any) -> None:
    case(name, lambda mb, t, x: getattr(mb, name)(x=x), expected, values)


def _pair(name: str, expected: Callable[[Any, Any], Any], x: Any, y: Any) -> None:
    case(name, lambda mb, t, x, y: getattr(mb, name)(x=x, y=y), expected, x, y)


_UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": torch.abs,
    "atan": torch.atan,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "identity": torch.clone,
    "relu": torch.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
for _name, _function in _UNARY.items():
    _unary(_name, _function, normal(3, 4, 5) * 2)
_unary("round", torch.round, np.array([-1.5, -0.5, 0.5, 1.5, 2.5, 0.3, -2.7], np.float32))
_unary("sqrt", torch.sqrt, positive(3, 4))
case(
    "logical_not",
    lambda mb, t, x: mb.logical_not(x=x),
    torch.logical_not,
    truth(3, 4),
)
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
for _name, _pair_function in _ARITHMETIC.items():
    _pair(_name, _pair_function, normal(2, 3, 4), normal(3, 1))
_pair("real_div", torch.div, normal(2, 3, 4), positive(4))
_pair("pow", torch.pow, positive(2, 3), normal(2, 3))
_pair("floor_div", torch.floor_divide, whole(20, 3, 4, low=-20), whole(5, 4, low=1))
_pair("mod", torch.remainder, whole(20, 3, 4, low=-20), whole(5, 4, low=1))
case("add integers", lambda mb, t, x, y: mb.add(x=x, y=y), torch.add, whole(9, 3, 4), whole(9, 4))
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
}
for _name, _pair_function in _COMPARE.items():
    _pair(_name, _pair_function, whole(4, 3, 5), whole(4, 5))
_LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
}
for _name, _pair_function in _LOGIC.items():
    _pair(_name, _pair_function, truth(3, 5), truth(5))
case(
    "select",
    lambda mb, t, c, a, b: mb.select(cond=c, a=a, b=b),
    torch.where,
    truth(3, 4),
    normal(3, 4),
    normal(3, 4),
)
case(
    "cast to an integer",
    lambda mb, t, x: mb.cast(x=x, dtype="int32"),
    lambda x: x.to(torch.int32),
    normal(3, 4) * 5,
)
case(
    "cast to a truth value",
    lambda mb, t, x: mb.cast(x=x, dtype="bool"),
    lambda x: x.bool(),
    whole(3, 3, 4),
)
case(
    "clip",
    lambda mb, t, x: mb.clip(x=x, alpha=t(-0.5), beta=t(1)),
    lambda x: x.clamp(-0.5, 1),
    normal(9),
)
case(
    "threshold",
    lambda mb, t, x: mb.threshold(x=x, alpha=t(0.5)),
    lambda x: x.clamp(min=0.5),
    normal(9),
)
case(
    "log",
    lambda mb, t, x: mb.log(x=x, epsilon=t(0.5)),
    lambda x: torch.log(x + 0.5),
    positive(3, 4),
)
case(
    "rsqrt",
    lambda mb, t, x: mb.rsqrt(x=x, epsilon=t(0.5)),
    lambda x: torch.rsqrt(x + 0.5),
    positive(3, 4),
)
case(
    "inverse",
    lambda mb, t, x: mb.inverse(x=x, epsilon=t(0.5)),
    lambda x: 1 / (x + 0.5),
    positive(3, 4),
)
case(
    "leaky_relu",
    lambda mb, t, x: mb.leaky_relu(x=x, alpha=t(0.125)),
    lambda x: F.leaky_relu(x, 0.125),
    normal(3, 4),
)
case("elu", lambda mb, t, x: mb.elu(x=x, alpha=t(0.5)), lambda x: F.elu(x, 0.5), normal(3, 4))
case("gelu", lambda mb, t, x: mb.gelu(x=x), F.gelu, normal(4, 50) * 3)
case(
    "gelu by tanh",
    lambda mb, t, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
    lambda x: F.gelu(x, approximate="tanh"),
    normal(4, 50) * 3,
)
case(
    "gelu by sigmoid",
    lambda mb, t, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
    lambda x: x * torch.sigmoid(1.702 * x),
    normal(4, 50),
)

# --- reductions ---------------------------------------------------------------------------------


def _reduce(name: str, expected: Callable[..., Any], values: Any) -> None:
    case(
        name,
        lambda mb, t, x: getattr(mb, name)(x=x, axes=[0, -1], keep_dims=True),
        lambda x: expected(x, (0, 2), True),
        values,
    )


_reduce("reduce_sum", torch.sum, normal(2, 3, 4))
_reduce("reduce_mean", torch.mean, normal(2, 3, 4))
_reduce("reduce_max", torch.amax, normal(2, 3, 4))
_reduce("reduce_min", torch.amin, normal(2, 3, 4))
_reduce("reduce_prod", lambda x, a, k: x.prod(2, k).prod(0, k), normal(2, 3, 4))
_reduce("reduce_sum_square", lambda x, a, k: (x * x).sum(a, k), normal(2, 3, 4))
_reduce("reduce_l1_norm", lambda x, a, k: x.abs().sum(a, k), normal(2, 3, 4))
_reduce("reduce_l2_norm", lambda x, a, k: (x * x).sum(a, k).sqrt(), normal(2, 3, 4))
_reduce("reduce_log_sum", lambda x, a, k: x.sum(a, k).log(), positive(2, 3, 4))
_reduce("reduce_log_sum_exp", torch.logsumexp, normal(2, 3, 4))
case(
    "reduce_sum of integers",
    lambda mb, t, x: mb.reduce_sum(x=x, axes=[1], keep_dims=False),
    lambda x: x.sum(1),
    whole(9, 3, 4),
)
case(
    "reduce_argmax",
    lambda mb, t, x: mb.reduce_argmax(x=x, axis=1, keep_dims=False),
    lambda x: x.argmax(1),
    normal(3, 7),
)
case(
    "reduce_argmin",
    lambda mb, t, x: mb.reduce_argmin(x=x, axis=0, keep_dims=True),
    lambda x: x.argmin(0, keepdim=True),
    normal(3, 7),
)
case("cumsum", lambda mb, t, x: mb.cumsum(x=x, axis=1), lambda x: x.cumsum(1), normal(3, 4))
case(
    "cumsum exclusive and reverse",
    lambda mb, t, x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
    lambda x: x.flip(1).cumsum(1).flip(1) - x,
    whole(9, 3, 4),
)

# --- matrices, norms, quantization --------------------------------------------------------------

_W, _B = normal(6, 8), normal(6)
case(
    "linear",
    lambda mb, t, x: mb.linear(x=x, weight=_W.astype(t), bias=_B.astype(t)),
    lambda x: F.linear(x, torch.tensor(_W), torch.tensor(_B)),
    normal(2, 3, 8),
)
case("matmul", lambda mb, t, x, y: mb.matmul(x=x, y=y), torch.matmul, normal(2, 3, 4), normal(4, 5))
case(
    "matmul transposed",
    lambda mb, t, x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
    lambda x, y: x.mT @ y.mT,
    normal(2, 4, 3),
    normal(2, 5, 4),
)
for _equation, _left, _right in (
    ("nchw,nwhu->nchu", (2, 3, 4, 5), (2, 5, 4, 6)),
    ("chw,whr->chr", (3, 4, 5), (5, 4, 6)),
    ("bkhc,bchq->bkhq", (2, 5, 1, 4), (1, 4, 2, 3)),
):
    case(
        f"einsum {_equation}",
        lambda mb, t, x, y, equation=_equation: mb.einsum(values=(x, y), equation=equation),
        lambda x, y, equation=_equation: torch.einsum(equation, x, y),
        normal(*_left),
        normal(*_right),
    )
_K1, _K2, _KG = normal(5, 4, 1, 1), normal(6, 4, 3, 2), normal(8, 1, 3)
case(
    "conv 1x1",
    lambda mb, t, x: mb.conv(x=x, weight=_K1.astype(t), bias=_B[:5].astype(t)),
    lambda x: F.conv2d(x, torch.tensor(_K1), torch.tensor(_B[:5])),
    normal(2, 4, 1, 7),
)
case(
    "conv with padding, strides and dilations",
    lambda mb, t, x: mb.conv(
        x=x,
        weight=_K2.astype(t),
        pad_type="custom",
        pad=[1, 1, 2, 2],
        strides=[2, 1],
        dilations=[1, 2],
    ),
    lambda x: F.conv2d(x, torch.tensor(_K2), padding=(1, 2), stride=(2, 1), dilation=(1, 2)),
    normal(2, 4, 7, 6),
)
case(
    "conv depthwise",
    lambda mb, t, x: mb.conv(x=x, weight=_KG.astype(t), pad_type="same", groups=4),
    lambda x: F.conv1d(x, torch.tensor(_KG), padding="same", groups=4),
    normal(2, 4, 9),
)
case("softmax", lambda mb, t, x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1), normal(2, 3, 4))
case(
    "scaled_dot_product_attention",
    lambda mb, t, q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
    F.scaled_dot_product_attention,
    normal(2, 3, 4, 8),
    normal(2, 3, 5, 8),
    normal(2, 3, 5, 6),
    normal(4, 5),
)
case(
    "scaled_dot_product_attention with a truth mask",
    lambda mb, t, q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
    F.scaled_dot_product_attention,
    normal(1, 2, 4, 8),
    normal(1, 2, 4, 8),
    normal(1, 2, 4, 8),
    np.tril(np.ones((4, 4), bool)),
)
_G, _H = positive(4), normal(4)
case(
    "layer_norm",
    lambda mb, t, x: mb.layer_norm(
        x=x, axes=[-1], gamma=_G.astype(t), beta=_H.astype(t), epsilon=t(0.125)
    ),
    lambda x: F.layer_norm(x, (4,), torch.tensor(_G), torch.tensor(_H), 0.125),
    normal(2, 3, 4),
)
case(
    "layer_norm over channels",
    lambda mb, t, x: mb.layer_norm(
        x=x, axes=[1], gamma=_G.astype(t), beta=_H.astype(t), epsilon=t(0.125)
    ),
    lambda x: F.layer_norm(x.mT, (4,), torch.tensor(_G), torch.tensor(_H), 0.125).mT,
    normal(2, 4, 5),
)
case(
    "batch_norm",
    lambda mb, t, x: mb.batch_norm(
        x=x,
        mean=_H.astype(t),
        variance=_G.astype(t),
        gamma=_G.astype(t),
        beta=_H.astype(t),
        epsilon=t(0.125),
    ),
    lambda x: F.batch_norm(
        x,
        torch.tensor(_H),
        torch.tensor(_G),
        torch.tensor(_G),
        torch.tensor(_H),
        eps=0.125,
    ),
    normal(2, 4, 5),
)
case(
    "instance_norm",
    lambda mb, t, x: mb.instance_norm(x=x, gamma=_G.astype(t), beta=_H.astype(t), epsilon=t(0.125)),
    lambda x: F.instance_norm(x, weight=torch.tensor(_G), bias=torch.tensor(_H), eps=0.125),
    normal(2, 4, 5, 3),
)
case(
    "l2_norm",
    lambda mb, t, x: mb.l2_norm(x=x, epsilon=t(0.125)),
    lambda x: x / (x.square().sum((1, 2, 3), True) + 0.125).sqrt(),
    normal(2, 3, 4, 5),
)
_S, _Z = np.array([0.5, 0.25, 0.125], np.float32), np.array([3, -2, 0], np.int8)
case(
    "quantize",
    lambda mb, t, x: mb.quantize(
        input=x, scale=_S.astype(t), zero_point=_Z, axis=np.int32(1), output_dtype="int8"
    ),
    # torch.quantize_per_channel adds the zero point before it rounds: other results at halves.
    lambda x: (
        (torch.round(x / torch.tensor(_S)[:, None]) + torch.tensor(_Z)[:, None]).clamp(-128, 127)
    ).to(torch.int8),
    normal(2, 3, 4) * 20,
)
case(
    "quantize to uint8",
    lambda mb, t, x: mb.quantize(
        input=x, scale=t(0.25), zero_point=np.uint8(100), output_dtype="uint8"
    ),
    lambda x: (torch.round(x / 0.25) + 100).clamp(0, 255).to(torch.uint8),
    normal(2, 3, 4) * 20,
)
case(
    "dequantize",
    lambda mb, t, x: mb.dequantize(
        input=mb.cast(x=x, dtype="int8"), scale=_S.astype(t), zero_point=_Z, axis=np.int32(1)
    ),
    lambda x: (x - torch.tensor(_Z)[:, None]) * torch.tensor(_S)[:, None],
    whole(127, 2, 3, 4, low=-128),
)

# --- shapes -------------------------------------------------------------------------------------

case(
    "reshape",
    lambda mb, t, x: mb.reshape(x=x, shape=[0, -1, 2]),
    lambda x: x.reshape(2, 6, 2),
    normal(2, 3, 4),
)
case(
    "transpose",
    lambda mb, t, x: mb.transpose(x=x, perm=[2, 0, 1]),
    lambda x: x.permute(2, 0, 1),
    normal(2, 3, 4),
)
case(
    "expand_dims",
    lambda mb, t, x: mb.expand_dims(x=x, axes=[0, -1]),
    lambda x: x[None, ..., None],
    normal(2, 3),
)
case("squeeze", lambda mb, t, x: mb.squeeze(x=x, axes=[1]), lambda x: x.squeeze(1), normal(2, 1, 1))
case(
    "flatten2d",
    lambda mb, t, x: mb.flatten2d(x=x, axis=2),
    lambda x: x.reshape(6, 4),
    normal(2, 3, 4),
)
case(
    "concat",
    lambda mb, t, x, y: mb.concat(values=(x, y), axis=1),
    lambda x, y: torch.cat([x, y], 1),
    normal(2, 3),
    normal(2, 4),
)
case(
    "concat in turns",
    lambda mb, t, x, y: mb.concat(values=(x, y), axis=0, interleave=True),
    lambda x, y: torch.stack([x, y], 1).reshape(6, 2),
    normal(3, 2),
    normal(3, 2),
)
case(
    "stack",
    lambda mb, t, x, y: mb.stack(values=(x, y), axis=-1),
    lambda x, y: torch.stack([x, y], -1),
    normal(2, 3),
    normal(2, 3),
)
case(
    "split",
    lambda mb, t, x: mb.split(x=x, num_splits=2, axis=1)[1],
    lambda x: x.chunk(2, 1)[1],
    normal(2, 6),
)
case(
    "split by sizes",
    lambda mb, t, x: mb.split(x=x, split_sizes=[1, 3, 2], axis=1)[1],
    lambda x: x[:, 1:4],
    normal(2, 6),
)
case("tile", lambda mb, t, x: mb.tile(x=x, reps=[2, 3]), lambda x: x.tile(2, 3), normal(2, 3))
case("reverse", lambda mb, t, x: mb.reverse(x=x, axes=[1]), lambda x: x.flip(1), normal(2, 3))
for _mode, _torch_mode in (
    ("constant", "constant"),
    ("reflect", "reflect"),
    ("replicate", "replicate"),
):
    case(
        f"pad {_mode}",
        lambda mb, t, x, mode=_mode: mb.pad(x=x, pad=[1, 2], mode=mode, constant_val=t(0.5)),
        lambda x, mode=_torch_mode: F.pad(x, (1, 2), mode, *([0.5] if mode == "constant" else [])),
        normal(2, 3, 5),
    )
case("shape", lambda mb, t, x: mb.shape(x=x), lambda x: torch.tensor(x.shape), normal(2, 3, 4))
case("fill", lambda mb, t: mb.fill(shape=[2, 3], value=t(0.5)), lambda: torch.full((2, 3), 0.5))
case(
    "fill_like",
    lambda mb, t, x: mb.fill_like(ref_tensor=x, value=t(0.5)),
    lambda x: torch.full_like(x, 0.5),
    normal(2, 3),
)
case(
    "range_1d",
    lambda mb, t, n: mb.range_1d(start=2, end=mb.squeeze(x=n), step=3),
    lambda n: torch.arange(2, 17, 3),
    np.array([17], np.int32),
)
case(
    "band_part",
    lambda mb, t, x: mb.band_part(x=x, lower=1, upper=-1),
    lambda x: x.triu(-1),
    normal(2, 5, 4),
)
case(
    "one_hot",
    lambda mb, t, i: mb.one_hot(
        indices=i, one_hot_vector_size=5, axis=1, on_value=t(2), off_value=t(-1)
    ),
    lambda i: F.one_hot(i.long(), 5).permute(0, 2, 1) * 3.0 - 1,
    whole(5, 2, 3),
)
case(
    "slice_by_index",
    lambda mb, t, x: mb.slice_by_index(
        x=x,
        begin=[-1, 1, 5, 0],
        end=[0, -1, 0, 0],
        stride=[1, 1, 2, 3],
        begin_mask=[False, False, True, False],
        end_mask=[False, False, True, True],
        squeeze_mask=[True, False, False, False],
    ),
    lambda x: x[-1, 1:-1, ::2, ::3],
    normal(2, 4, 6, 7),
)
case(
    "slice_by_index at a computed place",
    lambda mb, t, x, p: mb.slice_by_index(x=x, begin=p, end=mb.add(x=p, y=[1, 2])),
    lambda x, p: x[2:3, 1:3],
    normal(4, 5),
    np.array([2, 1], np.int32),
)
case(
    "slice_by_size",
    lambda mb, t, x: mb.slice_by_size(x=x, begin=[1, 2], size=[2, -1]),
    lambda x: x[1:3, 2:],
    normal(4, 5),
)
case(
    "slice_update",
    lambda mb, t, x, u, p: mb.slice_update(
        x=x, update=u, begin=p, end=mb.add(x=p, y=[1, 3]), begin_mask=[False, False]
    ),
    lambda x, u, p: torch.cat([x[:2], torch.cat([x[2:3, :1], u, x[2:3, 4:]], 1), x[3:]]),
    normal(4, 5),
    normal(1, 3),
    np.array([2, 1], np.int32),
)

# --- gather and scatter -------------------------------------------------------------------------

case(
    "gather",
    lambda mb, t, x, i: mb.gather(x=x, indices=i, axis=1),
    lambda x, i: x[:, i.long()],
    normal(3, 5, 2),
    whole(5, 2, 4),
)
case(
    "gather in a batch",
    lambda mb, t, x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
    lambda x, i: torch.stack([x[b][:, i[b].long()] for b in range(3)]),
    normal(3, 2, 5),
    whole(5, 3, 4),
)
case(
    "gather_nd",
    lambda mb, t, x, i: mb.gather_nd(x=x, indices=i),
    lambda x, i: x[i[..., 0].long(), i[..., 1].long()],
    normal(3, 5, 2),
    whole(3, 4, 2),
)
case(
    "gather_nd in a batch",
    lambda mb, t, x, i: mb.gather_nd(x=x, indices=i, batch_dims=1),
    lambda x, i: torch.stack([x[b][i[b, :, 0].long()] for b in range(3)]),
    normal(3, 5, 2),
    whole(5, 3, 4, 1),
)
case(
    "gather_along_axis",
    lambda mb, t, x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
    lambda x, i: x.gather(1, i.long()),
    normal(3, 5),
    whole(5, 3, 4),
)
_MODES: dict[str, str] = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
for _mode, _torch_mode in _MODES.items():
    case(
        f"scatter_along_axis {_mode}",
        lambda mb, t, d, i, u, mode=_mode: mb.scatter_along_axis(
            data=d, indices=i, updates=u, axis=1, mode=mode
        ),
        lambda d, i, u, mode=_torch_mode: d.scatter_reduce(1, i.long(), u, mode),
        normal(3, 5),
        whole(5, 3, 4),
        normal(3, 4),
    )
case(
    "scatter_along_axis update",
    lambda mb, t, d, i, u: mb.scatter_along_axis(
        data=d, indices=i, updates=u, axis=1, mode="update"
    ),
    lambda d, i, u: d.scatter(1, i.long(), u),
    normal(2, 5),
    np.array([[4, 0, 2], [1, 3, 0]], np.int32),
    normal(2, 3),
)
case(
    "scatter add",
    lambda mb, t, d, i, u: mb.scatter(data=d, indices=i, updates=u, axis=0, mode="add"),
    lambda d, i, u: d.index_add(0, i, u),
    normal(4, 3),
    np.array([2, 0, 2], np.int32),
    normal(3, 3),
)
case(
    "scatter sub",
    lambda mb, t, d, i, u: mb.scatter(data=d, indices=i, updates=u, axis=1, mode="sub"),
    lambda d, i, u: d.index_add(1, i, -u),
    normal(3, 4),
    np.array([2, 0], np.int32),
    normal(3, 2),
)
case(
    "scatter_nd update",
    lambda mb, t, d, i, u: mb.scatter_nd(data=d, indices=i, updates=u, mode="update"),
    lambda d, i, u: d.index_put((i[:, 0].long(), i[:, 1].long()), u),
    normal(4, 3, 2),
    np.array([[0, 1], [3, 2]], np.int32),
    normal(2, 2),
)
case(
    "scatter_nd div",
    lambda mb, t, d, i, u: mb.scatter_nd(data=d, indices=i, updates=u, mode="div"),
    lambda d, i, u: d.index_put((i[:, 0].long(),), d[i[:, 0].long()] / u),
    normal(4, 3),
    np.array([[3], [1]], np.int32),
    positive(2, 3),
)
case(
    "topk",
    lambda mb, t, x: mb.topk(x=x, k=3, axis=1)[0],
    lambda x: x.topk(3, 1).values,
    normal(3, 7),
)
case(
    "topk places",
    lambda mb, t, x: mb.topk(x=x, k=2, axis=0, ascending=True)[1],
    lambda x: x.topk(2, 0, largest=False).indices,
    normal(5, 3),
)
case(
    "argsort",
    lambda mb, t, x: mb.argsort(x=x, axis=1, ascending=True),
    lambda x: x.argsort(1),
    normal(3, 7),
)
case("non_zero", lambda mb, t, x: mb.non_zero(x=x), lambda x: x.nonzero(), whole(3, 4, 5))

# --- stored weights -----------------------------------------------------------------------------

_INT4, _INT8 = whole(8, 6, 8, low=-8).astype(np.int8), whole(128, 6, 8, low=-128).astype(np.int8)
_UINT4, _UINT8 = whole(16, 6, 8).astype(np.uint8), whole(256, 6, 8).astype(np.uint8)
_SCALES, _COLUMN = positive(6, 2), positive(6, 1)


def _blocks(data: Any, scale: Any, offset: Any = None) -> torch.Tensor:
    """Dequantized in float64, block by block."""
    size = data.shape[1] // scale.shape[1]
    wide = np.repeat(scale.astype(np.float64), size, axis=1)
    zero = 0 if offset is None else np.repeat(offset.astype(np.float64), size, axis=1)
    return torch.tensor(((data - zero) * wide).astype(np.float32))


def _shift_scale(data: Any, kind: str, scale: Any, offset: Any = None) -> Callable[..., Any]:
    def build(mb: Any, t: Any, types: Any) -> Any:
        stored = types.nptype_from_builtin(getattr(types, kind))
        options = {} if offset is None else {"offset": offset.astype(stored)}
        return mb.constexpr_blockwise_shift_scale(
            data=data.astype(stored), scale=scale.astype(t), **options
        )

    return build


_ZERO4, _ZERO8 = whole(16, 6, 2).astype(np.uint8), whole(128, 6, 1, low=-128).astype(np.int8)
for _name, _data, _kind, _scale, _offset in (
    ("int4 in blocks", _INT4, "int4", _SCALES, None),
    ("uint4 with zero points", _UINT4, "uint4", _SCALES, _ZERO4),
    ("int8 with zero points", _INT8, "int8", _COLUMN, _ZERO8),
    ("uint8", _UINT8, "uint8", _COLUMN, None),
):
    case(
        f"constexpr_blockwise_shift_scale {_name}",
        _shift_scale(_data, _kind, _scale, _offset),
        lambda d=_data, s=_scale, o=_offset: _blocks(d, s, o),
    )
for _opset in (16, 17):
    case(
        f"constexpr_affine_dequantize iOS {_opset}",
        lambda mb, t, types: mb.constexpr_affine_dequantize(
            quantized_data=_INT8,
            zero_point=_ZERO8[:, 0],
            scale=_COLUMN[:, 0].astype(t),
            axis=np.int32(0),
        ),
        lambda: _blocks(_INT8, _COLUMN, _ZERO8),
        opset=_opset,
    )
case(
    "constexpr_affine_dequantize of a whole tensor",
    lambda mb, t, types: mb.constexpr_affine_dequantize(
        quantized_data=_UINT8, zero_point=np.uint8(7), scale=t(0.25), axis=np.int32(0)
    ),
    lambda: torch.tensor((_UINT8.astype(np.float32) - 7) * 0.25),
    opset=16,
)
_TABLES, _BITS3 = normal(2, 1, 4, 1), whole(4, 6, 8).astype(np.uint8)
case(
    "constexpr_lut_to_dense",
    lambda mb, t, types: mb.constexpr_lut_to_dense(
        indices=_BITS3.astype(types.nptype_from_builtin(types.uint2)), lut=_TABLES.astype(t)
    ),
    lambda: torch.tensor(
        np.concatenate([_TABLES[0, 0, _BITS3[:3], 0], _TABLES[1, 0, _BITS3[3:], 0]])
    ),
)
_SIX = normal(64)
_SIX_AT = whole(64, 5, 6)
case(
    "constexpr_lut_to_dense of one table",
    lambda mb, t, types: mb.constexpr_lut_to_dense(
        indices=np.packbits(
            np.unpackbits(_SIX_AT.astype(np.uint8).reshape(-1, 1), axis=1, bitorder="little")[
                :, :6
            ],
            bitorder="little",
        ),
        lut=_SIX.astype(t),
        shape=np.array([5, 6], np.uint32),
    ),
    lambda: torch.tensor(_SIX[_SIX_AT]),
    opset=16,
)
case(
    "constexpr_cast",
    lambda mb, t, types: mb.constexpr_cast(source_val=_W.astype(np.float16), output_dtype="fp32"),
    lambda: torch.tensor(_W),
    opset=16,
)
