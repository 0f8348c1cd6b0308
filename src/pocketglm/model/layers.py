"""The parts of a transformer block, built from a `BlockSpec`.

Attention: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762. GELU: Hendrycks & Gimpel 2016,
https://arxiv.org/abs/1606.08415 (`gelu_new` is its tanh approximation). Gated FFN: Shazeer 2020,
https://arxiv.org/abs/2002.05202. RMSNorm: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
Rotary positions: Su et al. 2021, https://arxiv.org/abs/2104.09864; their scaling: Llama 3.1,
https://arxiv.org/abs/2407.21783. Attention and FFN side by side: GPT-J; PaLM, Chowdhery et al.
2022, https://arxiv.org/abs/2204.02311.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pocketglm.model.sparse import sparse_attention
from pocketglm.model.spec import Activation, BlockSpec, RopeSpec

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Rotation(NamedTuple):
    """The angles of rotary positions: cos and sin [B, 1, S, dims / 2]."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def turn(self, x: Tensor) -> Tensor:
        """Queries or keys [B, heads, S, head_dim], the first `dims` features turned."""
        dims = 2 * self.cos.shape[-1]
        turned, rest = x[..., :dims], x[..., dims:]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned.chunk(2, dim=-1)
        pair = (a * self.cos - b * self.sin, b * self.cos + a * self.sin)
        out = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat((out, rest), -1)


def rotation(spec: RopeSpec, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of tokens at `positions`, int64 [B, S]; angles are computed in float32."""
    angles = positions[:, None, :, None].float() * frequencies(spec, positions.device)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype), spec.interleaved)


def frequencies(spec: RopeSpec, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair of features, float32 [dims / 2]."""
    exponents = torch.arange(0, spec.dims, 2, device=device).float() / spec.dims
    rates = 1.0 / spec.theta**exponents
    scaling = spec.scaling
    if scaling is None:
        return rates
    # Waves longer than the old context are stretched by `factor`, short ones stay, and between
    # them the two are mixed.
    turns = scaling.original_positions * rates / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return keep * rates + (1 - keep) * rates / scaling.factor


class Past(Protocol):
    """One layer's keys and values of the tokens before; see `cache.py`."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new ones [B, kv heads, S, head_dim]; return what the queries may look at."""


class Factored(nn.Module):
    """A linear layer whose weight is the product of two: [N, rank] times [rank, K]."""

    def __init__(self, columns: int, rows: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.factor_in = nn.Linear(columns, rank, bias=False)
        self.factor_out = nn.Linear(rank, rows, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        result: Tensor = self.factor_out(self.factor_in(x))
        return result


def _layer(spec: BlockSpec, name: str, columns: int, rows: int, bias: bool) -> Any:
    """The linear layer of this name in a block: `nn.Linear`, or `Factored`."""
    rank = dict(spec.ranks).get(name)
    if rank is None:
        return nn.Linear(columns, rows, bias)
    return Factored(columns, rows, rank, bias)


class _Heads(nn.Module):
    """What stands between attention's projections."""

    query_norm: nn.RMSNorm | None
    key_norm: nn.RMSNorm | None

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec

    def _add_norms(self) -> None:
        spec = self.spec
        self.query_norm = nn.RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.key_norm = nn.RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None

    def look(
        self,
        projected: Sequence[Tensor],
        attend: Tensor | None,
        turn: Rotation | None,
        past: Past | None,
    ) -> Tensor:
        """Queries, keys and values [B, S, heads * head_dim] -> [B, S, heads * head_dim]."""
        spec = self.spec
        q, k, v = (part.view(*part.shape[:-1], -1, spec.head_dim) for part in projected)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if turn is not None:
            q, k = turn.turn(q), turn.turn(k)
        if past is not None:
            k, v = past.extend(k, v)
        dropout = spec.attention_dropout if self.training else 0.0
        if spec.top_k is not None and spec.top_k < k.shape[2]:
            out = sparse_attention(q, k, v, attend, spec.top_k, dropout)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=attend,
                dropout_p=dropout,
                is_causal=attend is None,
                enable_gqa=spec.num_kv_heads != spec.num_heads,
            )
        return out.transpose(1, 2).flatten(2)


class Attention(_Heads):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        hidden, bias = spec.hidden_size, spec.attention_bias
        self.query = _layer(spec, "attention.query", hidden, width, bias)
        self.key = _layer(spec, "attention.key", hidden, kv_width, bias)
        self.value = _layer(spec, "attention.value", hidden, kv_width, bias)
        self.output = _layer(spec, "attention.output", width, hidden, spec.output_bias)
        self._add_norms()

    def forward(
        self,
        x: Tensor,
        attend: Tensor | None,
        turn: Rotation | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """x [B, S, H] -> [B, S, H].

        attend: bool, broadcastable to [B, 1, S, T] (True = may be looked at); None = causal.
        """
        projected = self.query(x), self.key(x), self.value(x)
        result: Tensor = self.output(self.look(projected, attend, turn, past))
        return result


class Unified(_Heads):
    """Attention and a gated FFN side by side, between one projection and another."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__(spec)
        self.widths = unified_widths(spec)
        width, channels = self.widths[0], self.widths[3]
        in_bias = spec.attention_bias or spec.ffn_bias
        self.input = nn.Linear(spec.hidden_size, sum(self.widths), in_bias)
        out_bias = spec.output_bias or spec.ffn_bias
        self.output = nn.Linear(width + channels, spec.hidden_size, out_bias)
        self._add_norms()
        self.activation = ACTIVATIONS[spec.activation]

    def forward(
        self,
        x: Tensor,
        attend: Tensor | None,
        turn: Rotation | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """x [B, S, H] -> [B, S, H]; as in `Attention`."""
        *projected, gate, up = self.input(x).split(self.widths, dim=-1)
        seen = self.look(projected, attend, turn, past)
        result: Tensor = self.output(torch.cat((seen, self.activation(gate) * up), -1))
        return result


def unified_widths(spec: BlockSpec) -> tuple[int, int, int, int, int]:
    """Rows of a unified block's input weight: query, key, value, gate, up."""
    width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return width, kv_width, kv_width, spec.intermediate_size, spec.intermediate_size


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        hidden, width, bias = spec.hidden_size, spec.intermediate_size, spec.ffn_bias
        self.up = _layer(spec, "ffn.up", hidden, width, bias)
        self.down = _layer(spec, "ffn.down", width, hidden, bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        result: Tensor = self.down(self.activation(self.up(x)))
        return result


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)); a fused weight holds the gate's rows first."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        hidden, width, bias = spec.hidden_size, spec.intermediate_size, spec.ffn_bias
        if spec.ffn == "fused":
            self.gate_up = _layer(spec, "ffn.gate_up", hidden, 2 * width, bias)
        else:
            self.gate = _layer(spec, "ffn.gate", hidden, width, bias)
            self.up = _layer(spec, "ffn.up", hidden, width, bias)
        self.down = _layer(spec, "ffn.down", width, hidden, bias)
        self.fused = spec.ffn == "fused"
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1) if self.fused else (self.gate(x), self.up(x))
        result: Tensor = self.down(self.activation(gate) * up)
        return result


class Block(nn.Module):
    """Attention and FFN, each added to its input; `spec.norms` says where the norms stand.

    A unified block adds both to the same input.
    """

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        norm = nn.LayerNorm if spec.norm == "layer" else nn.RMSNorm
        self.dropout = nn.Dropout(spec.dropout)
        self.post = spec.norms == "post"
        self.unified = Unified(spec) if spec.unified else None
        if spec.unified:
            self.attention_norm = norm(spec.hidden_size, spec.norm_eps)
            return
        self.attention = Attention(spec)
        self.attention_norm = norm(spec.hidden_size, spec.norm_eps)
        self.ffn = FeedForward(spec) if spec.ffn == "plain" else GatedFeedForward(spec)
        self.ffn_norm = norm(spec.hidden_size, spec.norm_eps)
        four = spec.norms == "both"
        self.attention_post_norm = norm(spec.hidden_size, spec.norm_eps) if four else nn.Identity()
        self.ffn_post_norm = norm(spec.hidden_size, spec.norm_eps) if four else nn.Identity()

    def forward(
        self,
        x: Tensor,
        attend: Tensor | None,
        turn: Rotation | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """x [B, S, H] -> [B, S, H]; the rest as in `Attention`."""
        if self.unified is not None:
            y = self.unified(self.attention_norm(x), attend, turn, past)
            return x + cast(Tensor, self.dropout(y))
        if self.post:
            x = self.attention_norm(x + self.dropout(self.attention(x, attend, turn, past)))
            return cast(Tensor, self.ffn_norm(x + self.dropout(self.ffn(x))))
        y = self.attention(self.attention_norm(x), attend, turn, past)
        x = x + self.dropout(self.attention_post_norm(y))
        y = self.ffn_post_norm(self.ffn(self.ffn_norm(x)))
        return x + cast(Tensor, self.dropout(y))


class Passage(nn.Identity):
    """Where a layer's output passes, so that hooks can see it; layers may share their block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


def init_weights(module: nn.Module, generator: torch.Generator, std: float = 0.02) -> None:
    """BERT's initialization, in place: weights normal(0, std), biases 0, LayerNorm 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, 0.0, std, generator=generator)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)


class _NoInit(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def bare_modules() -> Iterator[None]:
    """Modules that are made meanwhile have no memory for their weights (device "meta").

    They get no initial values either: there, these would load torch's compiler, which takes 2 s.
    """
    with torch.device("meta"), _NoInit():
        yield
