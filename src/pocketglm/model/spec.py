"""What a model is made of: frozen values, from which `encoder.py` builds the modules.

Families (`bert.py`, ...) translate their `config.json` into these and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu", "gelu_new", "relu"]
Pooling = Literal["mean", "cls"]
Head = Literal["classification", "embedding"]
Role = Literal["embedding", "attention", "ffn", "head", "other"]


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One transformer block: attention and a two-layer FFN, each followed by LayerNorm.

    Widths in numbers of features. `num_kv_heads` divides `num_heads`; the projections are
    [num_heads * head_dim, hidden_size] and [num_kv_heads * head_dim, hidden_size].
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: Activation
    norm_eps: float
    attention_bias: bool
    ffn_bias: bool
    dropout: float
    attention_dropout: float


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A bidirectional encoder with one head.

    pooler: the model holds BERT's dense + tanh over the first token. Classification with "cls"
    pooling uses it; an embedding model only carries it (its embedding is the raw pooled state).
    num_labels: classes of the classification head, 0 for an embedding.
    classifier_dropout: None = `dropout`.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: Activation = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float | None = None
    pooling: Pooling = "mean"
    head: Head = "embedding"
    pooler: bool = False
    num_labels: int = 0
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if (self.head == "classification") != (self.num_labels > 0):
            raise ValueError(f"a {self.head} head cannot have {self.num_labels} labels")
        if self.head == "classification" and self.pooler != (self.pooling == "cls"):
            raise ValueError("a classifier has a pooler exactly if its pooling is 'cls'")

    def block(self) -> BlockSpec:
        """The spec of each of its blocks."""
        return BlockSpec(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            intermediate_size=self.intermediate_size,
            activation=self.activation,
            norm_eps=self.layer_norm_eps,
            attention_bias=True,
            ffn_bias=True,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
        )
