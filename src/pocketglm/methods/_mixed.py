"""What changes the output if it alone is quantized: a model's weights by the forms they may have.

A unit is what a runtime computes as one product, and shares one form: query, key and value; gate
and up. A tied embedding and head are one tensor, so one unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import Reporter
from pocketglm.methods._walk import Model, block_of, call, embedded, finish
from pocketglm.model.encoder import Encoder
from pocketglm.ops.affine import dequantize, quantize

Forms = Sequence[Mapping[str, TensorScheme]]  # schemes by our parameter name; empty: float
_TABLES = ("tokens.weight", "embeddings.tokens.weight")


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that share a form, and the forms that they may have."""

    name: str
    parameters: tuple[str, ...]
    forms: Forms

    @property
    def block(self) -> int | None:
        """The block that it is in; None: before or behind all of them."""
        found = re.match(r"blocks\.(\d+)\.", self.parameters[0])
        return int(found[1]) if found else None


def unit_name(parameter: str) -> str:
    """The unit of a weight, by our names."""
    layer = parameter.removesuffix(".weight")
    layer = re.sub(r"\.(query|key|value)(\.factor_in)?$", ".input", layer)
    return re.sub(r"\.(gate|up|gate_up)(\.factor_in)?$", ".up", layer)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How far each form of each unit moves the model's output on the rows.

    Of logits the Kullback-Leibler divergence in nats, a mean over the rows (of a decoder: all
    tokens); of embeddings 1 - cosine.
    """

    model: Model
    batches: Sequence[Tensor]
    search: bool
    wanted: Sequence[Tensor]

    @classmethod
    def of(cls, model: Model, batches: Sequence[Tensor], search: bool) -> Sensitivity:
        """`model` as it is now is what everything is compared with."""
        wanted = [_answer(model, x, 0) for x in embedded(model, batches)]
        return cls(model, batches, search, wanted)

    def measure(self, units: Sequence[Unit], reporter: Reporter) -> list[list[float]]:
        """By unit and form. A unit's block is computed from what enters it, in float; one that
        layers share from what enters the first of them."""
        found: dict[str, list[float]] = {}
        hidden, model = embedded(self.model, self.batches), self.model
        tables = [unit for unit in units if unit.parameters[0] in _TABLES]
        heads = [unit for unit in units if unit.block is None and unit not in tables]
        first, layers = model.spec.first_layers(), range(model.spec.num_layers)
        stages = [
            [u for u in units if u.block is not None and first[u.block] == layer]
            for layer in layers
        ]
        for unit in tables:
            found[unit.name] = self._forms(unit, None, 0)
        for index, stage in enumerate([*stages, heads]):
            for unit in stage:
                found[unit.name] = self._forms(unit, hidden, index)
                words = " ".join(f"{value:.3g}" for value in found[unit.name])
                reporter.progress("sensitivity", len(found), len(units), f"{unit.name} {words}")
            if index < len(stages):
                hidden = [call(model, block_of(model, index), x) for x in hidden]
        return [found[unit.name] for unit in units]

    def _forms(self, unit: Unit, hidden: Sequence[Tensor] | None, start: int) -> list[float]:
        found = []
        for form in unit.forms:
            if not form:
                found.append(0.0)
                continue
            with rounded(self.model, form, self.search):
                now = embedded(self.model, self.batches) if hidden is None else hidden
                found.append(self.moved(now, start))
        return found

    def moved(self, hidden: Sequence[Tensor], start: int) -> float:
        """How far the model as it is now is off, given what enters block `start`."""
        total = sum(
            _distance(self.model, wanted, _answer(self.model, x, start))
            for x, wanted in zip(hidden, self.wanted, strict=True)
        )
        return total / sum(len(wanted) for wanted in self.wanted)

    def of_all(self, forms: Mapping[str, TensorScheme]) -> float:
        """With these parameters quantized together."""
        with rounded(self.model, forms, self.search):
            return self.moved(embedded(self.model, self.batches), 0)


@torch.inference_mode()
def _answer(model: Model, x: Tensor, start: int) -> Tensor:
    """What the model makes of the input x [B, S, H] of block `start`: float32 [rows, C]."""
    for index in range(start, model.spec.num_layers):
        x = call(model, block_of(model, index), x)
    return finish(model, x)


@torch.inference_mode()
def _distance(model: Model, wanted: Tensor, found: Tensor) -> float:
    if isinstance(model, Encoder) and model.spec.head == "embedding":
        return float((1 - (found * wanted).sum(-1)).sum())
    expected, log = wanted.log_softmax(-1), found.log_softmax(-1)
    return float(F.kl_div(log, expected, reduction="sum", log_target=True))


@contextmanager
def rounded(model: Model, forms: Mapping[str, TensorScheme], search: bool) -> Iterator[None]:
    """Meanwhile these parameters have the values of their integers."""
    kept = {name: model.get_parameter(name).data for name in forms}
    try:
        for name, scheme in forms.items():
            with torch.no_grad():
                value = dequantize(*quantize(kept[name], scheme, search=search), scheme)
            model.get_parameter(name).data = value
        yield
    finally:
        for name, value in kept.items():
            model.get_parameter(name).data = value
