"""Bytes and values of a model after a recipe, from its spec: what the cost model asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.devices.recipes import Bits, Recipe, Structure
from pocketglm.model.matrices import Matrix, matrices_of, parameter_count
from pocketglm.model.spec import DecoderSpec, EncoderSpec

Spec = EncoderSpec | DecoderSpec


@dataclass(frozen=True, slots=True)
class Footprint:
    """parameters: stored values. used: those of a pass, a shared block as often as layers use it.
    table: of them, in tables that are only looked up; head: in the head. file_bytes: of the
    weights. read_bytes: of them, what one token reads.
    """

    parameters: int
    used: int
    table: int
    head: int
    file_bytes: int
    read_bytes: int


def footprint(spec: Spec, recipe: Recipe) -> Footprint:
    """Of a model whose structure is final.

    A shared block is counted once in `read_bytes`: layers that share one are neighbours, and the
    second finds what fits into the processor's cache.
    """
    matrices = matrices_of(spec)
    tables = [matrix for matrix in matrices if "table" in matrix.part]
    sizes = {id(matrix): matrix_bytes(matrix, recipe) for matrix in matrices}
    file_bytes = sum(sizes.values())
    return Footprint(
        parameters=parameter_count(matrices),
        used=sum(matrix.size * matrix.layers for matrix in matrices),
        table=parameter_count(tables),
        head=sum(matrix.size for matrix in matrices if matrix.part == "head"),
        file_bytes=file_bytes,
        read_bytes=file_bytes - sum(sizes[id(matrix)] for matrix in tables),
    )


def matrix_bytes(matrix: Matrix, recipe: Recipe) -> int:
    """Bytes of one weight. Norms, biases and the small tables of a quantized model are fp16."""
    bits: Bits = recipe.table_bits if matrix.part in ("table", "head") else recipe.bits
    group = recipe.group_size if matrix.part == "linear" else recipe.table_group
    if bits in (4, 8) and matrix.part in ("linear", "table", "head"):
        scheme = TensorScheme(bits=4 if bits == 4 else 8, group_size=group)
        return scheme.nbytes(matrix.rows, matrix.columns)
    return matrix.size * (4 if bits == 32 else 2)


def group_reasons(spec: Spec, recipe: Recipe) -> Iterator[str]:
    """Why the recipe's groups do not fit this model's weights."""
    for matrix in matrices_of(spec):
        group = recipe.group_size if matrix.part == "linear" else None
        if group and matrix.columns % group:
            yield (f"groups of {group} do not divide its weights of {matrix.columns:,} columns")
            return


def reshaped(spec: Spec, structure: Structure | None) -> Spec | None:
    """The spec after the recipe's structural steps; None where they would change nothing, or
    cannot be made.
    """
    if structure is None:
        return spec
    if isinstance(spec, DecoderSpec):
        return None if structure.removes is None else _shared(spec, structure)
    if structure.layers and structure.layers >= spec.num_layers:
        return None
    layers = structure.layers or spec.num_layers
    vocabulary = min(spec.vocab_size, structure.vocabulary or spec.vocab_size)
    channels = round(spec.intermediate_size * (1 - (structure.ffn or 0)))
    return replace(
        spec,
        num_layers=layers,
        vocab_size=vocabulary,
        intermediate_size=channels,
        layer_heads=(),
        layer_ffn=(),
        layer_ranks=(),
    )


def _shared(spec: DecoderSpec, structure: Structure) -> DecoderSpec | None:
    """As `methods/tiny.py` chooses: unified blocks, shared by as few layers as remove enough."""
    if not spec.regular or spec.four_norms:
        return None
    dense, layers = parameter_count(matrices_of(spec)), spec.num_layers
    for blocks in range(layers, 0, -1):
        new = replace(
            spec,
            layer_blocks=tuple(index * blocks // layers for index in range(layers)),
            unified=True,
            top_k=structure.top_k,
        )
        if 1 - parameter_count(matrices_of(new)) / dense >= (structure.removes or 0):
            return new
    return None
