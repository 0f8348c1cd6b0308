"""Bytes of a model after a recipe, against what the methods and the stored layout say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pocketglm.devices.footprint import footprint, group_reasons, reshaped
from pocketglm.devices.recipes import recipe_book
from pocketglm.methods._tiny import tiny_spec
from pocketglm.methods.tiny import TinyConfig, _structure
from pocketglm.model.family import SIZES
from pocketglm.model.sizes import weight_bytes
from pocketglm.model.spec import DecoderSpec, EncoderSpec

RECIPES = recipe_book().recipes
NANO = SIZES["autoglm-nano"]
MINILM = EncoderSpec(
    vocab_size=30522,
    hidden_size=384,
    num_layers=6,
    num_heads=12,
    intermediate_size=1536,
    head="classification",
    num_labels=151,
)


@pytest.mark.parametrize("name", SIZES)
def test_bytes_are_those_of_the_stored_layout(name: str) -> None:
    spec, expected = SIZES[name], weight_bytes(SIZES[name])
    assert footprint(spec, RECIPES["fp16"]).file_bytes == expected["fp16"]
    assert footprint(spec, RECIPES["fp32"]).file_bytes == 2 * expected["fp16"]
    assert footprint(spec, RECIPES["int8"]).file_bytes == expected["int8"]
    assert footprint(spec, RECIPES["int4"]).file_bytes == expected["int4"]
    coarse = footprint(spec, RECIPES["int4-128"]).file_bytes
    assert expected["int4"] * 0.9 < coarse < expected["int4"]


def test_a_token_table_that_is_only_looked_up_is_not_read() -> None:
    tied, untied = (footprint(replace(NANO, tied=tied), RECIPES["int8"]) for tied in (True, False))
    table = NANO.vocab_size * NANO.hidden_size
    assert (tied.table, untied.table) == (0, table)
    assert tied.read_bytes == tied.file_bytes == untied.read_bytes
    assert untied.file_bytes - untied.read_bytes == table + 2 * NANO.vocab_size
    assert footprint(MINILM, RECIPES["fp32"]).table == 384 * (30522 + 512 + 2)


@pytest.mark.parametrize("name", ["autoglm-nano", "autoglm-tiny", "autoglm-base"])
def test_the_tiny_structure_is_the_methods(name: str) -> None:
    spec, recipe = SIZES[name], RECIPES["tiny"]
    expected = tiny_spec(spec, _structure(TinyConfig(top_k=64), spec))
    assert reshaped(spec, recipe.structure) == expected
    size = footprint(expected, recipe)
    assert size.parameters <= 0.6 * footprint(spec, recipe).parameters
    assert size.used > size.parameters  # a shared block works as often as layers use it


@pytest.mark.parametrize(
    ("key", "smaller"), [("encoder-7x", 6.5), ("encoder-12x", 12.6), ("encoder-16x", 16.9)]
)
def test_the_encoders_chains_are_as_small_as_measured(key: str, smaller: float) -> None:
    """benchmarks/compression.md, column `smaller`; a real file has a graph besides."""
    recipe = RECIPES[key]
    spec = reshaped(MINILM, recipe.structure)
    assert spec is not None
    before = footprint(MINILM, RECIPES["fp32"]).file_bytes
    assert before / footprint(spec, recipe).file_bytes == pytest.approx(smaller, rel=0.06)


def test_a_structure_that_changes_nothing_or_cannot_be_made_is_no_candidate() -> None:
    twelve, tiny = RECIPES["encoder-12x"].structure, RECIPES["tiny"].structure
    assert reshaped(replace(MINILM, num_layers=3), twelve) is None
    assert reshaped(replace(NANO, four_norms=True), tiny) is None
    assert reshaped(replace(NANO, layer_ffn=(64, 128, 256, 512)), tiny) is None
    assert reshaped(NANO, twelve) is None
    wide = replace(NANO, vocab_size=500_000)  # the embedding alone is more than 60 %
    assert reshaped(wide, tiny) is None
    assert reshaped(NANO, None) is NANO


def test_groups_must_divide_the_columns() -> None:
    odd: DecoderSpec = replace(NANO, intermediate_size=520)
    assert list(group_reasons(NANO, RECIPES["int4"])) == []
    [reason] = group_reasons(odd, RECIPES["int4"])
    assert reason == "groups of 32 do not divide its weights of 520 columns"
    assert list(group_reasons(odd, RECIPES["int8"])) == []
