"""`recipes.yaml`: every loss stands on the page that it names, and every plan does what it says."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pocketglm import registry
from pocketglm.devices.recipes import FILE, Accuracy, Loss, Recipe, Recipes, recipe_book
from pocketglm.model.family import SIZES

ROOT = Path(__file__).resolve().parents[2]
BOOK = recipe_book()
LOSSES = [(key, loss) for key, recipe in BOOK.recipes.items() for loss in recipe.losses]


def figures_of(item: Loss | Accuracy) -> list[float]:
    if isinstance(item, Accuracy):
        return [item.value]
    return [
        n for n in (item.drop, item.low, item.high, item.before, item.after) if n is not None
    ]  # fmt: skip


@pytest.mark.parametrize(
    "item", [loss for _, loss in LOSSES if loss.ours] + [a for a in BOOK.accuracies if a.ours]
)
def test_our_figures_stand_on_our_pages(item: Loss | Accuracy) -> None:
    page = " ".join((ROOT / str(item.page)).read_text(encoding="utf-8").split())
    assert item.row in page

    def numbers(text: str) -> set[float]:
        return {float(n) for n in re.findall(r"-?\d+\.?\d*", text.replace("..", " "))}

    for figure in figures_of(item):
        before = isinstance(item, Loss) and figure == item.before  # it has a row of its own
        assert figure in numbers(page if before else item.row)


def test_published_figures_name_an_address_and_a_date() -> None:
    for _, loss in LOSSES:
        if not loss.ours:
            source = BOOK.sources[str(loss.source)]
            assert source.address.startswith("https://")
            assert source.date


def test_values_of_a_loss() -> None:
    common: dict[str, Any] = {
        "task": "lm", "model": "m", "parameters": 1e6, "data": "d", "row": "r", "source": "s",
    }  # fmt: skip
    more = Loss(**common, metric="perplexity", before=10, after=12)
    assert (more.unit, round(more.value, 9), round(more.counted, 9)) == ("%", 20, 20)
    less = Loss(**common, metric="accuracy", before=90, after=88)
    assert (less.unit, less.value) == ("points", 2)
    unsure = Loss(**common, metric="accuracy", drop=0.2, low=-0.1, high=0.5)
    assert (unsure.value, unsure.counted) == (0.2, 0)
    gain = Loss(**common, metric="accuracy", before=88, after=90)
    assert gain.counted == 0


def test_the_model_nearest_in_size_counts() -> None:
    small = BOOK.recipes["int4"].losses_of("lm", 3e6)
    large = BOOK.recipes["int4"].losses_of("lm", 1.1e9)
    assert {loss.model for loss in small} == {"autoglm-nano"}
    assert all(loss.parameters > 1e8 for loss in large)
    assert BOOK.recipes["int4"].losses_of("embed", 1e9) == []


PLANNED = {key: recipe for key, recipe in BOOK.recipes.items() if recipe.plan}


def steps_of(recipe: Recipe) -> list[tuple[str, dict[str, Any]]]:
    plan = yaml.safe_load((ROOT / str(recipe.plan)).read_text(encoding="utf-8"))
    return [(name, settings) for step in plan["steps"] for name, settings in step.items()]


@pytest.mark.parametrize("key", PLANNED)
def test_a_plan_does_what_its_recipe_says(key: str) -> None:
    recipe = PLANNED[key]
    steps = steps_of(recipe)
    name, last = steps[-1]
    assert name in ("quantize_rtn", "qat")
    bits = last.get("bits", 4 if last.get("preset") == "qad" else 8)
    assert bits == recipe.bits
    assert last.get("group_size", 32 if bits == 4 else None) == recipe.group_size
    assert last["embeddings"] == recipe.table_bits
    assert (32 if last["embeddings"] == 4 else None) == recipe.table_group
    needs_rows = {"qat", "distill", "tiny", "prune_width"} & {step for step, _ in steps}
    assert bool(needs_rows) == recipe.rows
    activation = last.get("activation", "none" if bits == 4 else "dynamic_tensor")
    assert (activation != "none") == (recipe.activations == "int8")


@pytest.mark.parametrize("key", [key for key, recipe in PLANNED.items() if recipe.structure])
def test_a_structure_is_its_plans(key: str) -> None:
    structure, settings = PLANNED[key].structure, dict(steps_of(PLANNED[key]))
    assert structure is not None
    wanted = {
        "layers": settings.get("distill", {}).get("layers"),
        "ffn": settings.get("prune_width", {}).get("ffn"),
        "removes": settings.get("tiny", {}).get("removes"),
        "top_k": settings.get("tiny", {}).get("top_k"),
    }
    if [name for name, _ in steps_of(PLANNED[key])].count("distill") == 2:
        wanted["layers"] = next(s["layers"] for n, s in steps_of(PLANNED[key]) if n == "distill")
    assert structure.model_dump(exclude={"vocabulary"}) == wanted
    if "trim_vocabulary" in settings:
        # benchmarks/compression.md: 9312 tokens are left with 4000 extra ones, on clinc150
        assert structure.vocabulary == 9312 - 4000 + settings["trim_vocabulary"]["extra"]


def test_names_are_those_of_the_program() -> None:
    assert set(BOOK.tasks) == set(registry.names("eval"))
    assert set(registry.names("targets")) <= set(BOOK.runtimes)
    known = {*SIZES, *BOOK.encoders}
    assert {accuracy.model for accuracy in BOOK.accuracies} <= known


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("recipes", "int8", "losses", 0, "source"), "modelopt", "either a page"),
        (("recipes", "int8", "losses", 0, "command"), None, "goes with the command"),
        (("recipes", "int8", "losses", 0, "high"), None, "two ends"),
        (("recipes", "int8", "losses", 0, "drop"), 5.0, "outside of"),
        (("recipes", "int8", "losses", 0, "before"), 5.0, "give `drop`"),
        (("recipes", "int8", "losses", 0, "task"), "chess", "no such task: chess"),
        (("recipes", "int8", "losses", 4, "source"), "hearsay", "no such source: hearsay"),
        (("recipes", "int8", "runtimes"), ["abacus"], "no such runtime: abacus"),
        (("recipes", "int8", "bits"), 7, "bits"),
        (("recipes", "int8", "colour"), "red", "colour"),
        (("encoders", "minilm-l6", "source"), "modelopt", "sources of nothing"),
    ],
)
def test_what_the_schema_refuses(path: tuple[Any, ...], value: Any, message: str) -> None:
    book = copy.deepcopy(yaml.safe_load(FILE.read_text(encoding="utf-8")))
    at = book
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ValidationError, match=message):
        Recipes.model_validate(book)
