"""The parts of a transformer block, built from a `BlockSpec`.

Attention: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762. GELU: Hendrycks & Gimpel 2016,
https://arxiv.org/abs/1606.08415 (`gelu_new` is its tanh approximation).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketglm.model.spec import Activation, BlockSpec

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself; bidirectional."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.query = nn.Linear(spec.hidden_size, width, spec.attention_bias)
        self.key = nn.Linear(spec.hidden_size, kv_width, spec.attention_bias)
        self.value = nn.Linear(spec.hidden_size, kv_width, spec.attention_bias)
        self.output = nn.Linear(width, spec.hidden_size, spec.attention_bias)

    def forward(self, x: Tensor, attend: Tensor) -> Tensor:
        """x [B, S, H], attend bool [B, 1, 1, S] (True = may be looked at) -> [B, S, H]."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attend,
            dropout_p=self.spec.attention_dropout if self.training else 0.0,
            enable_gqa=self.spec.num_kv_heads != self.spec.num_heads,
        )
        result: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.up = nn.Linear(spec.hidden_size, spec.intermediate_size, spec.ffn_bias)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, spec.ffn_bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        result: Tensor = self.down(self.activation(self.up(x)))
        return result


class Block(nn.Module):
    """Attention and FFN, each added to its input and then normalized (post-norm)."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.attention = Attention(spec)
        self.attention_norm = nn.LayerNorm(spec.hidden_size, spec.norm_eps)
        self.ffn = FeedForward(spec)
        self.ffn_norm = nn.LayerNorm(spec.hidden_size, spec.norm_eps)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor, attend: Tensor) -> Tensor:
        """x [B, S, H], attend bool [B, 1, 1, S] -> [B, S, H]."""
        x = self.attention_norm(x + self.dropout(self.attention(x, attend)))
        out: Tensor = self.ffn_norm(x + self.dropout(self.ffn(x)))
        return out


def init_weights(module: nn.Module, generator: torch.Generator, std: float = 0.02) -> None:
    """BERT's initialization, in place: weights normal(0, std), biases 0, LayerNorm 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, 0.0, std, generator=generator)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)
