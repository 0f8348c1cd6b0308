"""The encoder (BERT) as one method `forward(input_ids, attention_mask)`, both int64 [1, S].

S is free, 1 to `max_length`. Pooling, head and normalization are part of it. All but the lookups
and the mask's sum is written so that XNNPACK takes it in one piece.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketglm.model.spec import EncoderSpec
from pocketglm.targets._executorch_layers import Float, activation, embedding, linear, norm
from pocketglm.targets._litert_weights import Weights

_MASKED = -10000.0  # added to the scores of padding; exp() of it is 0 in float32


class EncoderGraph(nn.Module):
    """For texts of at most `max_length` tokens; logits [1, C], or the embedding [1, H]."""

    places: Tensor
    kind: Tensor

    def __init__(self, spec: EncoderSpec, weights: Weights, max_length: int) -> None:
        super().__init__()
        self.spec = spec
        self.words = embedding(weights, "embeddings.tokens")
        self.positions = embedding(weights, "embeddings.positions", max_length)
        # Every token is of type 0.
        kind = torch.from_numpy(weights.floats("embeddings.types.weight"))[0].clone()
        self.register_buffer("kind", kind)
        self.register_buffer("places", torch.arange(max_length)[None])
        self.norm = norm(weights, "embeddings.norm", spec.layer_norm_eps, centred=True)
        self.blocks = nn.ModuleList(_Block(spec, weights, i) for i in range(spec.num_layers))
        embeds = spec.head == "embedding"
        self.classifier = None if embeds else linear(weights, "classifier")
        pools = spec.pooler and spec.pooling == "cls" and not embeds
        self.pooler = linear(weights, "pooler") if pools else None
        self.total = Float(torch.ones(1, spec.hidden_size))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See above."""
        mask = attention_mask.to(torch.float32)
        bias = (1.0 - mask) * _MASKED
        places = self.kind + self.positions(self.places[:, : input_ids.shape[1]])
        x: Tensor = self.norm(places + self.words(input_ids))
        for block in self.blocks:
            x = block(x, bias)
        pooled = self._mean(x, mask) if self.spec.pooling == "mean" else x[:, 0]
        if self.classifier is None:
            squares: Tensor = self.total(pooled * pooled)
            return pooled * torch.rsqrt(squares.clamp(min=1e-24))
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(pooled))
        logits: Tensor = self.classifier(pooled)
        return logits

    def _mean(self, x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(1, keepdim=True).clamp(min=1.0)
        return torch.bmm((mask / count)[:, None], x).view(1, self.spec.hidden_size)


class _Block(nn.Module):
    """Attention and FFN, each added to its input and normalized."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module

    def __init__(self, spec: EncoderSpec, weights: Weights, index: int) -> None:
        super().__init__()
        at, epsilon = f"blocks.{index}.", spec.layer_norm_eps
        self.heads, self.size = spec.heads()[index], spec.head_dim
        for name in ("query", "key", "value", "output"):
            self.add_module(name, linear(weights, f"{at}attention.{name}"))
        self.up, self.down = (linear(weights, f"{at}ffn.{name}") for name in ("up", "down"))
        self.attention_norm = norm(weights, at + "attention_norm", epsilon, centred=True)
        self.ffn_norm = norm(weights, at + "ffn_norm", epsilon, centred=True)
        self.activation = activation(spec.activation)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [1, S, H], bias [1, S] -> [1, S, H]."""
        q, k, v = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = torch.bmm(q * self.size**-0.5, k.mT) + bias
        mixed = torch.bmm(scores.softmax(-1), v).permute(1, 0, 2)
        mixed = mixed.contiguous().view(1, -1, self.heads * self.size)
        x = self.attention_norm(x + self.output(mixed))
        result: Tensor = self.ffn_norm(x + self.down(self.activation(self.up(x))))
        return result

    def _split(self, x: Tensor) -> Tensor:
        """[1, S, heads * size] -> [heads, S, size]."""
        return x.view(-1, self.heads, self.size).permute(1, 0, 2)
