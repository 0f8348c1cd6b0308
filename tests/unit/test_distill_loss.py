"""train/_distill_loss and the loss of a whole batch, against a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import distillation as oracle
from tiny_encoder import spec
from torch import Tensor, nn

from pocketglm.model.encoder import init_encoder
from pocketglm.train._distill_job import Pupil, Terms, distillation_loss
from pocketglm.train._distill_loss import hidden_distance, relation_distance, soft_targets
from pocketglm.train._taps import tapped, taps

LENGTHS = [7, 3, 5, 1]
MASK = torch.tensor([[int(token < length) for token in range(7)] for length in LENGTHS])


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = random(4, 6, seed=1, scale=3.0), random(4, 6, seed=2, scale=3.0)
OURS, THEIRS = random(4, 7, 24, seed=3), random(4, 7, 36, seed=4)
NARROW = random(4, 7, 36, seed=5)
ALL = torch.ones_like(MASK)


def close(found: Tensor, expected: Any) -> bool:
    return bool(np.allclose(found.double().numpy(), expected, rtol=2e-5, atol=1e-6))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 6.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_soft_targets(temperature: float, reverse: bool) -> None:
    found = soft_targets(STUDENT, TEACHER, temperature, reverse=reverse)
    assert close(found, oracle.soft_targets(STUDENT, TEACHER, temperature, reverse))
    assert close(soft_targets(TEACHER, TEACHER, temperature), np.zeros(4))


def test_soft_targets_stay_finite_where_a_class_is_impossible() -> None:
    certain = torch.tensor([[2000.0, 0.0, -2000.0]])
    for reverse in (False, True):
        assert soft_targets(certain, certain.flip(1), 1.0, reverse=reverse).isfinite().all()


def test_hidden_states() -> None:
    assert close(hidden_distance(NARROW, THEIRS, MASK), oracle.hidden(NARROW, THEIRS, LENGTHS))


@pytest.mark.parametrize("heads", [1, 4, 12])
def test_relations_of_unequal_widths(heads: int) -> None:
    found = relation_distance(OURS, THEIRS, MASK, heads)
    assert close(found, oracle.relations(OURS, THEIRS, LENGTHS, heads))


BUGS: dict[str, tuple[Callable[[], Tensor], Callable[[], Any]]] = {
    "T^2 is missing": (
        lambda: soft_targets(STUDENT, TEACHER, 4.0) / 16,
        lambda: oracle.soft_targets(STUDENT, TEACHER, 4.0),
    ),
    "the direction of KL is swapped": (
        lambda: soft_targets(STUDENT, TEACHER, 4.0, reverse=True),
        lambda: oracle.soft_targets(STUDENT, TEACHER, 4.0),
    ),
    "the student is not divided by T": (
        lambda: soft_targets(STUDENT * 4, TEACHER, 4.0),
        lambda: oracle.soft_targets(STUDENT, TEACHER, 4.0),
    ),
    "padding counts in hidden states": (
        lambda: hidden_distance(NARROW, THEIRS, ALL),
        lambda: oracle.hidden(NARROW, THEIRS, LENGTHS),
    ),
    "padding counts in relations": (
        lambda: relation_distance(OURS, THEIRS, ALL, 4),
        lambda: oracle.relations(OURS, THEIRS, LENGTHS, 4),
    ),
    "relations are swapped": (
        lambda: relation_distance(THEIRS, OURS, MASK, 4),
        lambda: oracle.relations(OURS, THEIRS, LENGTHS, 4),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_oracle_catches(bug: str) -> None:
    wrong, right = BUGS[bug]
    assert not close(wrong(), right())


def test_relations_ignore_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = relation_distance(OURS, THEIRS, MASK, 4)
    assert torch.equal(found, relation_distance(OURS, THEIRS, MASK, 4))


# --- a whole batch -------------------------------------------------------------------------------


def pupil(terms: Terms, width: int, **sizes: Any) -> Pupil:
    student = init_encoder(spec(dropout=0.0, attention_dropout=0.0, **sizes), seed=4)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(9)), alpha=0.1)
    places = taps(student, terms.features, list(terms.pairs))
    return Pupil(student, terms, [width] * len(places), seed=0)


def batch(count: int, width: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (4, 7), generator=torch.Generator().manual_seed(6))
    features = {f"features-{n}": random(4, 7, width, seed=20 + n).half() for n in range(count)}
    return {
        "ids": ids * MASK,
        "mask": MASK,
        "labels": torch.tensor([0, 2, 1, 1]),
        "hard": torch.tensor([1.0, 1.0, 0.0, 1.0]),
        "aligned": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "soft": random(4, 3, seed=30, scale=4.0),
        **features,
    }


@pytest.mark.parametrize("features", ["none", "hidden", "relations"])
def test_the_loss_of_a_batch(features: Any) -> None:
    """Both layers of the student, 64 wide, are compared with features 96 wide."""
    terms = Terms(0.7, 4.0, features, 0.5, {0: 1, 1: 3}, 8, label_smoothing=0.1)
    model = pupil(terms, 96, hidden_size=64, num_heads=2)
    given = batch({"none": 0, "hidden": 2, "relations": 6}[features], 96)
    total, weight = distillation_loss(terms)(model, given)
    assert float(weight) == 4

    inside = taps(model.student, features, [0, 1])
    logits, states = tapped(inside, lambda: model.student(given["ids"], given["mask"]))
    ours = logits.detach()
    expected = 0.7 * oracle.soft_targets(ours, given["soft"], 4.0)
    hard = oracle.cross_entropy(ours, given["labels"].tolist(), 0.1)
    expected += 0.3 * hard * given["hard"].numpy()
    for number, state in enumerate(states):
        theirs, state = given[f"features-{number}"], state.detach()
        if features == "hidden":
            projection = model.projections[number]
            assert isinstance(projection, nn.Linear)
            part = oracle.hidden(state, theirs, LENGTHS, projection.weight.detach())
        else:
            part = oracle.relations(state, theirs, LENGTHS, 8)
        expected += 0.5 / 2 * part * given["aligned"].numpy()
    assert float(total.detach()) == pytest.approx(expected.sum(), rel=1e-4)
    total.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in model.projections.parameters())


def test_alpha_0_is_the_loss_of_fine_tuning() -> None:
    terms = Terms(0.0, 4.0)
    model, given = pupil(terms, 0), batch(0, 0)
    given |= {"hard": torch.ones(4)}
    total, weight = distillation_loss(terms)(model, given)
    logits = model.student(given["ids"], given["mask"])
    assert torch.equal(total, F.cross_entropy(logits, given["labels"], reduction="sum"))
    assert float(weight) == 4


def test_equal_widths_need_no_projection() -> None:
    terms = Terms(0.7, 4.0, "hidden", 1.0, {0: 0, 1: 1})
    assert not list(pupil(terms, 128).projections.parameters())
