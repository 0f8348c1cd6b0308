"""What a model is made of: frozen values, from which `encoder.py` builds the modules.

Families (`bert.py`, ...) translate their `config.json` into these and back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Activation = Literal["gelu", "gelu_new", "relu", "silu"]
Pooling = Literal["mean", "cls"]
Head = Literal["classification", "embedding"]
Role = Literal["embedding", "attention", "ffn", "head", "other"]
Family = Literal["glm", "glm4", "llama", "qwen2", "qwen3"]
Ranks = tuple[tuple[str, int], ...]  # factorized layers of a block and their ranks, as in FACTORS

# The linear layers of a block, by their names in it: what can be the product of two.
FACTORS = (
    *(f"attention.{name}" for name in ("query", "key", "value", "output")),
    *(f"ffn.{name}" for name in ("gate_up", "gate", "up", "down")),
)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1's stretched frequencies, for contexts longer than `original_positions`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions on the first `dims` features of a head.

    interleaved: features 0 and 1, 2 and 3, ... turn together (GLM), instead of i and i + dims/2.
    """

    dims: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One transformer block: attention and a feed-forward network (FFN), with norms and residuals.

    Widths in numbers of features. `num_kv_heads` divides `num_heads`; the projections are
    [num_heads * head_dim, hidden_size] and [num_kv_heads * head_dim, hidden_size].
    attention_bias: of query, key and value; output_bias: of attention's output.
    norms: "post" = after each residual sum (BERT), "pre" = before attention and before the FFN,
    "both" = before and after them, four norms (GLM-4-0414).
    ffn: "plain" = two layers, "gated" = gate, up and down, "fused" = gate and up in one weight.
    qk_norm: query and key are normalized head by head. rope: None = no rotary positions.
    ranks: layers whose weight is the product of two, [N, rank] and [rank, K].
    top_k: a query looks at so many keys only, those with its largest scores; None = at all.
    unified: one norm, and attention and FFN side by side: all that reads the norm's output is one
    weight [query | key | value | gate | up], all that writes to the residual another, [attention's
    output | down] (`norms`, `ffn` and the separate weights do not count then).
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
    output_bias: bool = True
    norm: Literal["layer", "rms"] = "layer"
    norms: Literal["post", "pre", "both"] = "post"
    ffn: Literal["plain", "gated", "fused"] = "plain"
    qk_norm: bool = False
    rope: RopeSpec | None = None
    ranks: Ranks = ()
    top_k: int | None = None
    unified: bool = False


def _settle_ranks(spec: EncoderSpec | DecoderSpec) -> None:
    """One form for each meaning: layers in the order of `FACTORS`; empty if none is a product."""
    if not any(spec.layer_ranks):
        object.__setattr__(spec, "layer_ranks", ())
        return
    if len(spec.layer_ranks) != spec.num_layers:
        raise ValueError(
            f"layer_ranks are of {len(spec.layer_ranks)} layers, the model has {spec.num_layers}"
        )
    known = spec.linear_layers
    for name, rank in (pair for ranks in spec.layer_ranks for pair in ranks):
        if name not in known:
            raise ValueError(f"layer_ranks: there is no '{name}', only {', '.join(known)}")
        if rank < 1:
            raise ValueError(f"layer_ranks: the rank of '{name}' is {rank}, it should be positive")
    ordered = tuple(
        tuple((name, found[name]) for name in known if name in found)
        for found in map(dict, spec.layer_ranks)
    )
    object.__setattr__(spec, "layer_ranks", ordered)


def _settle(spec: EncoderSpec | DecoderSpec, name: str, common: str) -> None:
    """One form for each meaning: sizes of layers that are alike become the common size."""
    sizes: tuple[int, ...] = getattr(spec, name)
    if not sizes:
        return
    if len(sizes) != spec.num_layers or min(sizes) < 1:
        raise ValueError(
            f"{name} {list(sizes)}: should be a positive number for each of the "
            f"{spec.num_layers} layers"
        )
    object.__setattr__(spec, common, max(sizes))
    object.__setattr__(spec, name, tuple(sizes) if len(set(sizes)) > 1 else ())


def _settle_blocks(spec: DecoderSpec) -> None:
    """Blocks are numbered from 0 in the order of the layers; no list where each has its own."""
    listed = spec.layer_blocks
    if not listed:
        return
    order = {block: number for number, block in enumerate(dict.fromkeys(listed))}
    blocks = tuple(order[block] for block in listed)
    if len(blocks) != spec.num_layers or list(blocks) != sorted(blocks):
        raise ValueError(
            f"layer_blocks {list(listed)}: should be a number for each of the {spec.num_layers} "
            "layers, and layers that share a block should be neighbours"
        )
    if len(set(zip(blocks, spec.ffn(), strict=True))) > len(order):
        raise ValueError(
            f"layer_ffn {list(spec.ffn())}: layers that share a block have the same channels"
        )
    object.__setattr__(spec, "layer_blocks", blocks if len(order) < len(blocks) else ())


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A bidirectional encoder with one head.

    pooler: the model holds BERT's dense + tanh over the first token. Classification with "cls"
    pooling uses it; an embedding model only carries it (its embedding is the raw pooled state).
    num_labels: classes of the classification head, 0 for an embedding.
    classifier_dropout: None = `dropout`.
    head_dim: 0 = hidden_size / num_heads, and then filled in; a pruned model has fewer heads than
    fill the hidden size. layer_heads, layer_ffn: heads and FFN channels of each layer where they
    differ, empty where all are alike; `num_heads` and `intermediate_size` are then the greatest.
    layer_ranks: the factorized linear layers of each layer, as in `BlockSpec`; empty: none is.
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
    head_dim: int = 0
    layer_heads: tuple[int, ...] = ()
    layer_ffn: tuple[int, ...] = ()
    layer_ranks: tuple[Ranks, ...] = ()

    def __post_init__(self) -> None:
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_heads "
                    f"{self.num_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        _settle(self, "layer_heads", "num_heads")
        _settle(self, "layer_ffn", "intermediate_size")
        _settle_ranks(self)
        if (self.head == "classification") != (self.num_labels > 0):
            raise ValueError(f"a {self.head} head cannot have {self.num_labels} labels")
        if self.head == "classification" and self.pooler != (self.pooling == "cls"):
            raise ValueError("a classifier has a pooler exactly if its pooling is 'cls'")

    @property
    def regular(self) -> bool:
        """Whether all layers are alike, whole, and their heads fill the hidden size, as upstream's
        do.
        """
        filled = self.num_heads * self.head_dim == self.hidden_size
        return filled and not (self.layer_heads or self.layer_ffn or self.layer_ranks)

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """The linear layers of a block, by their names in it."""
        return tuple(name for name in FACTORS if name not in ("ffn.gate_up", "ffn.gate"))

    def ranks(self, index: int) -> Ranks:
        """The factorized layers of a block."""
        return self.layer_ranks[index] if self.layer_ranks else ()

    def blocks(self) -> tuple[int, ...]:
        """The block that each layer uses: its own."""
        return tuple(range(self.num_layers))

    first_layers = blocks

    def heads(self) -> tuple[int, ...]:
        """Attention heads of each layer."""
        return self.layer_heads or (self.num_heads,) * self.num_layers

    def ffn(self) -> tuple[int, ...]:
        """FFN channels of each layer."""
        return self.layer_ffn or (self.intermediate_size,) * self.num_layers

    def block(self, index: int) -> BlockSpec:
        """The spec of one of its blocks."""
        heads = self.heads()[index]
        return BlockSpec(
            hidden_size=self.hidden_size,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=self.head_dim,
            intermediate_size=self.ffn()[index],
            activation=self.activation,
            norm_eps=self.layer_norm_eps,
            attention_bias=True,
            ffn_bias=True,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            ranks=self.ranks(index),
        )


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A causal language model. `family` names its form on disk; the rest says what it computes.

    tied: the head is the token embedding. four_norms: attention and FFN are normalized before and
    after. eos_ids: any of them ends a text. layer_ffn, layer_ranks: as in `EncoderSpec`; heads are
    the same in every layer, as the cache is. layer_blocks: the block whose weights each layer uses,
    empty where each has its own; every layer has its own keys and values. unified, top_k: as in
    `BlockSpec`. Shared and unified blocks are never factorized.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope: RopeSpec
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    activation: Activation = "silu"
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    fused_ffn: bool = False
    four_norms: bool = False
    qk_norm: bool = False
    attention_dropout: float = 0.0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    layer_ffn: tuple[int, ...] = ()
    layer_ranks: tuple[Ranks, ...] = ()
    layer_blocks: tuple[int, ...] = ()
    unified: bool = False
    top_k: int | None = None

    def __post_init__(self) -> None:
        _settle(self, "layer_ffn", "intermediate_size")
        _settle_ranks(self)
        _settle_blocks(self)
        if self.unified and self.four_norms:
            raise ValueError("a unified block has one norm, it cannot have four")
        if self.layer_ranks and (self.unified or self.layer_blocks):
            kind = "unified" if self.unified else "shared"
            raise ValueError(f"layer_ranks: {kind} blocks are never factorized")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k}: a query looks at one key at least")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} attention heads are not a multiple of "
                f"{self.num_kv_heads} key/value heads"
            )
        if self.rope.dims % 2 or not 0 < self.rope.dims <= self.head_dim:
            raise ValueError(
                f"{self.rope.dims} rotary dims: should be even and at most head_dim {self.head_dim}"
            )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in an fp16 cache."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def regular(self) -> bool:
        """Whether upstream's classes can express it: all layers alike and whole, each with its own
        block.
        """
        own = self.layer_ffn or self.layer_ranks or self.layer_blocks or self.unified or self.top_k
        return not own

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """The linear layers of a block that is not unified, by their names in it."""
        other = ("ffn.gate", "ffn.up") if self.fused_ffn else ("ffn.gate_up",)
        return tuple(name for name in FACTORS if name not in other)

    def ranks(self, index: int) -> Ranks:
        """The factorized layers of a block."""
        return self.layer_ranks[index] if self.layer_ranks else ()

    def blocks(self) -> tuple[int, ...]:
        """The block that each layer uses."""
        return self.layer_blocks or tuple(range(self.num_layers))

    def first_layers(self) -> tuple[int, ...]:
        """The first layer that uses each block."""
        blocks = self.blocks()
        return tuple(blocks.index(block) for block in range(blocks[-1] + 1))

    def ffn(self) -> tuple[int, ...]:
        """FFN channels of each layer."""
        return self.layer_ffn or (self.intermediate_size,) * self.num_layers

    def block(self, index: int) -> BlockSpec:
        """The spec of the block that a layer uses."""
        return BlockSpec(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.ffn()[index],
            activation=self.activation,
            norm_eps=self.rms_norm_eps,
            attention_bias=self.attention_bias,
            ffn_bias=self.ffn_bias,
            dropout=0.0,
            attention_dropout=self.attention_dropout,
            output_bias=self.output_bias,
            norm="rms",
            norms="both" if self.four_norms else "pre",
            ffn="fused" if self.fused_ffn else "gated",
            qk_norm=self.qk_norm,
            rope=self.rope,
            ranks=self.ranks(index),
            top_k=self.top_k,
            unified=self.unified,
        )


def upstream_spec(spec: DecoderSpec) -> DecoderSpec:
    """The nearest one that upstream's classes know: all layers alike, whole, with blocks of their
    own.
    """
    return replace(spec, layer_ffn=(), layer_ranks=(), layer_blocks=(), unified=False, top_k=None)
