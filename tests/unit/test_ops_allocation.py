"""Options under a budget against trying every combination."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import mixed as oracle

from pocketglm.ops.allocation import Option, allocate_options, hull


def parts_of(seed: int, count: int = 6) -> list[list[Option]]:
    """Two or three options each; more bytes mostly lose less."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(count):
        size = int(rng.integers(2, 4))
        nbytes = np.sort(rng.choice(np.arange(1, 60), size, replace=False))
        losses = np.sort(rng.exponential(1.0, size))[::-1]
        parts.append([Option(int(n), float(x)) for n, x in zip(nbytes, losses, strict=True)])
    return parts


@pytest.mark.parametrize("seed", range(12))
def test_close_to_the_best_combination(seed: int) -> None:
    """Above the best by one step's saving at most, and never below the bound."""
    parts = parts_of(seed)
    plain = [[(option.nbytes, option.loss) for option in options] for options in parts]
    small, large = (sum(pick(n for n, _ in options) for options in plain) for pick in (min, max))
    for budget in np.linspace(small, large, 9).astype(int):
        found = allocate_options(parts, int(budget))
        chosen = [options[n] for options, n in zip(parts, found.chosen, strict=True)]
        assert found.nbytes == sum(option.nbytes for option in chosen) <= budget
        assert found.loss == pytest.approx(sum(option.loss for option in chosen))
        least = oracle.best(plain, int(budget))
        step = max(options[0].loss - options[-1].loss for options in parts)
        assert found.bound - 1e-9 <= least <= found.loss + 1e-9
        assert found.loss <= found.bound + step + 1e-9


def test_everything_fits() -> None:
    parts = parts_of(0)
    found = allocate_options(parts, 10_000)
    assert found.loss == pytest.approx(sum(min(o.loss for o in options) for options in parts))
    assert found.bound == pytest.approx(found.loss)


def test_a_useless_option_is_never_taken() -> None:
    """More bytes and no less loss; or a step that a larger one beats per byte."""
    options = [Option(10, 1.0), Option(20, 1.0), Option(30, 0.9), Option(40, 0.1)]
    assert hull(options) == [0, 3]
    assert allocate_options([options], 39).chosen == (0,)
    assert allocate_options([options], 40).chosen == (3,)
    with pytest.raises(ValueError, match="take 10 bytes of 9"):
        allocate_options([options], 9)
