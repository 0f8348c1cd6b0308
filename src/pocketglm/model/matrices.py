"""The weights of a model, counted from its spec: without torch, and without building it.

`encoder.py` and `decoder.py` say what a model computes with; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pocketglm.model.spec import BlockSpec, DecoderSpec, EncoderSpec

Part = Literal["table", "small table", "linear", "head", "vector"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight [rows, columns], used by `layers` of the model's layers.

    part: `table` of tokens that are only looked up, `small table` of positions or types, `linear`
    layer of a block, `head` (of a tied decoder: the token table), `vector` (a norm or bias).
    """

    part: Part
    rows: int
    columns: int
    layers: int = 1

    @property
    def size(self) -> int:
        return self.rows * self.columns


def parameter_count(matrices: list[Matrix]) -> int:
    """All values of a model."""
    return sum(matrix.size for matrix in matrices)


def matrices_of(spec: EncoderSpec | DecoderSpec) -> list[Matrix]:
    """Every weight of a model; one that several layers share once."""
    hidden = spec.hidden_size
    found: list[Matrix] = []
    if isinstance(spec, DecoderSpec):
        found.append(Matrix("head" if spec.tied else "table", spec.vocab_size, hidden))
        if not spec.tied:
            found.append(Matrix("head", spec.vocab_size, hidden))
        found.append(Matrix("vector", 1, hidden))
    else:
        found.append(Matrix("table", spec.vocab_size, hidden))
        found += [
            Matrix("small table", rows, hidden)
            for rows in (spec.max_position_embeddings, spec.type_vocab_size)
        ]
        found.append(Matrix("vector", 2, hidden))
        for rows in ([hidden] if spec.pooler else []) + ([spec.num_labels] * bool(spec.num_labels)):
            found += [Matrix("head", rows, hidden), Matrix("vector", 1, rows)]
    blocks = spec.blocks()
    first = [blocks.index(block) for block in sorted(set(blocks))]
    for block, layer in enumerate(first):
        found += _block(spec.block(layer), blocks.count(block))
    return found


def _block(spec: BlockSpec, layers: int) -> Iterator[Matrix]:
    norms = 1 if spec.unified else 4 if spec.norms == "both" else 2
    each = 2 if spec.norm == "layer" else 1
    yield Matrix("vector", norms * each, spec.hidden_size, layers)
    if spec.qk_norm:
        yield Matrix("vector", 2, spec.head_dim, layers)
    ranks = dict(spec.ranks)
    for name, rows, columns, bias in _linears(spec):
        if name in ranks:
            yield Matrix("linear", ranks[name], columns, layers)
            yield Matrix("linear", rows, ranks[name], layers)
        else:
            yield Matrix("linear", rows, columns, layers)
        if bias:
            yield Matrix("vector", 1, rows, layers)


def _linears(spec: BlockSpec) -> list[tuple[str, int, int, bool]]:
    """Name, rows, columns and bias of each linear layer of a block."""
    hidden, channels = spec.hidden_size, spec.intermediate_size
    width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    if spec.unified:
        inner = width + 2 * kv_width + 2 * channels
        return [
            ("input", inner, hidden, spec.attention_bias or spec.ffn_bias),
            ("output", hidden, width + channels, spec.output_bias or spec.ffn_bias),
        ]
    ffn = {
        "plain": [("ffn.up", channels)],
        "gated": [("ffn.gate", channels), ("ffn.up", channels)],
        "fused": [("ffn.gate_up", 2 * channels)],
    }[spec.ffn]
    return [
        ("attention.query", width, hidden, spec.attention_bias),
        ("attention.key", kv_width, hidden, spec.attention_bias),
        ("attention.value", kv_width, hidden, spec.attention_bias),
        ("attention.output", hidden, width, spec.output_bias),
        *((name, rows, hidden, spec.ffn_bias) for name, rows in ffn),
        ("ffn.down", hidden, channels, spec.ffn_bias),
    ]
