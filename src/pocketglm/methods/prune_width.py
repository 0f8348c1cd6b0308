"""Narrower layers: whole heads (with their key/value group), FFN channels, hidden dimensions.

One shot: all scores are those of the model as it comes; see ops/importance.py for what they are and
the papers. Nothing is retrained: fine-tune or distill afterwards. Cut sizes are multiples of 32;
attention's width too, so heads whose features are no divisor of 32 go several at a time.

On clinc150 (MiniLM with 95.8 % of 800 validation rows, cut once, not retrained) half of the FFN
channels cost 1.6 points by taylor, 2.1 by activation, 3.1 by l2 and 4.9 by l1; half of the heads
1.3, 1.3, 2.0 and 4.3; a third of the hidden size 9.0 by taylor and 6.6 by activation, and by l1 or
l2 more than half of all answers.

A removed hidden dimension leaves every norm's mean and variance, even one whose values were all 0:
cutting the hidden size costs most, and needs the most training afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import Config, ModelMethod, StepContext
from pocketglm.methods._prune import (
    MULTIPLE,
    calibration,
    check_scores,
    headers,
    load,
    quantized_reason,
    save,
    structure_reason,
    taylor_reason,
)
from pocketglm.methods._scores import (
    Model,
    UnitScores,
    activation_scores,
    taylor_scores,
    weight_scores,
)
from pocketglm.model.hf import is_decoder, model_spec_of
from pocketglm.model.spec import DecoderSpec, EncoderSpec
from pocketglm.model.surgery import Kept, cut, cut_spec, everything, layer_groups
from pocketglm.ops.importance import allocate, best, kept_size, shared_scale

_FLOOR = 0.25  # of what an equal share would be: what a layer keeps at least


class WidthConfig(Config):
    """Settings of width pruning."""

    heads: float = Field(0.0, ge=0, lt=1, description="share of the heads that goes")
    ffn: float = Field(0.5, ge=0, lt=1, description="share of the FFN channels that goes")
    hidden: float = Field(0.0, ge=0, lt=1, description="share of the hidden dimensions that goes")
    importance: Literal["l1", "l2", "taylor", "activation"] = Field(
        "taylor", description="by what the weakest are found; the last two need rows (--data)"
    )
    per_layer: Literal["uniform", "global"] = Field(
        "uniform",
        description="every layer loses the same share, or the weakest go wherever they are and a "
        "layer keeps at least a quarter of an equal share (of a decoder: FFN channels only)",
    )
    rows: int = Field(512, ge=1, description="training rows to measure with")


@dataclass(frozen=True, slots=True)
class _Units:
    """One kind of structure: its sizes by layer, the share that goes, and the steps it goes in."""

    setting: str
    what: str
    sizes: Sequence[int]
    ratio: float
    multiple: int

    def counts(self) -> list[int]:
        """What each layer keeps if all lose the same share."""
        return [kept_size(size, self.ratio, self.multiple) for size in self.sizes]

    def reason(self) -> str | None:
        """Why this share cannot go, or None."""
        if not self.ratio or self.counts() != list(self.sizes):
            return None
        smallest = min(self.sizes)
        step = f"{self.what} in steps of {self.multiple}" if self.multiple > 1 else self.what
        return f"{self.setting}: {self.ratio:g} of {smallest} removes none ({step}, and one stays)"


def _units(config: WidthConfig, spec: EncoderSpec | DecoderSpec) -> tuple[_Units, _Units, _Units]:
    group = "heads" if isinstance(spec, EncoderSpec) else "key/value groups"
    step = MULTIPLE // math.gcd(MULTIPLE, spec.head_dim)
    return (
        _Units("heads", group, layer_groups(spec), config.heads, step),
        _Units("ffn", "channels", spec.ffn(), config.ffn, MULTIPLE),
        _Units("hidden", "dimensions", [spec.hidden_size], config.hidden, MULTIPLE),
    )


def _needs_rows(config: WidthConfig) -> bool:
    return config.importance in ("taylor", "activation")


def _check(config: WidthConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    reasons = quantized_reason(ckpt) + structure_reason(ckpt)
    units = _units(config, model_spec_of(ckpt))
    reasons += [reason for unit in units if (reason := unit.reason())]
    if model_spec_of(ckpt).layer_ranks:
        reasons.append("it is factorized: prune it before that step of the plan")
    if config.importance == "taylor":
        reasons += taylor_reason(ckpt, context)
    if config.per_layer == "global" and config.heads and is_decoder(ckpt):
        reasons.append(
            "per_layer: a decoder has the same key/value heads in every layer, as its cache: cut "
            "them in a step with per_layer=uniform"
        )
    return reasons


def _predict(config: WidthConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    """With `global` the layers will differ, and have as much together."""
    spec = model_spec_of(ckpt)
    groups, ffn, hidden = (unit.counts() for unit in _units(config, spec))
    kept = Kept(
        layers=everything(spec).layers,
        groups=tuple(tuple(range(n)) for n in groups),
        ffn=tuple(tuple(range(n)) for n in ffn),
        hidden=tuple(range(hidden[0])),
    )
    return headers(ckpt, cut_spec(spec, kept))


def _run(
    config: WidthConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    model = load(ckpt)
    units = _units(config, model.spec)
    kept = everything(model.spec)
    if any(unit.ratio for unit in units):
        context.reporter.say(f"scoring heads, channels and dimensions by {config.importance}")
        scores = _scores(config, ckpt, context, model)
        for what, values in _named(scores):
            check_scores(ckpt, what, values)
        kept = _choose(config, units, scores, kept)
    small = cut(model, kept)
    save(small, ckpt, folder)
    after = _units(config, small.spec)
    return {
        f"{unit.setting}_{when}": float(sum(unit.sizes))
        for pair in zip(units, after, strict=True)
        for when, unit in zip(("before", "after"), pair, strict=True)
    }


def _scores(
    config: WidthConfig, ckpt: Checkpoint, context: StepContext, model: Model
) -> UnitScores:
    if config.importance in ("l1", "l2"):
        return weight_scores(model, 1 if config.importance == "l1" else 2)
    batches = calibration(ckpt, context, config.rows, model)
    measure = taylor_scores if config.importance == "taylor" else activation_scores
    return measure(model, batches)


def _named(scores: UnitScores) -> Iterator[tuple[str, torch.Tensor]]:
    for kind, layers in (("heads", scores.groups), ("channels", scores.ffn)):
        for index, values in enumerate(layers):
            yield f"the {kind} of layer {index}", values
    yield "the hidden dimensions", scores.hidden


def _choose(config: WidthConfig, units: Sequence[_Units], scores: UnitScores, whole: Kept) -> Kept:
    heads, ffn, hidden = units
    return replace(
        whole,
        groups=_best(config, heads, scores.groups),
        ffn=_best(config, ffn, scores.ffn),
        hidden=best(scores.hidden, hidden.counts()[0]),
    )


def _best(
    config: WidthConfig, units: _Units, scores: Sequence[torch.Tensor]
) -> tuple[tuple[int, ...], ...]:
    """The units that each layer keeps."""
    counts = units.counts()
    if config.per_layer == "global" and units.ratio:
        floor = [max(int(_FLOOR * n) // units.multiple, 1) * units.multiple for n in counts]
        # A change of the loss is the same in every layer; sizes of weights and activations are not.
        alike = config.importance == "taylor"
        ranked = scores if alike else [shared_scale(values) for values in scores]
        counts = allocate(ranked, sum(counts), units.multiple, floor)
    return tuple(best(values, n) for values, n in zip(scores, counts, strict=True))


SPEC = ModelMethod(
    summary="remove whole heads, FFN channels and hidden dimensions",
    config=WidthConfig,
    check=_check,
    predict=_predict,
    run=_run,
    needs_rows=_needs_rows,
    identity={"heads": 0.0, "ffn": 0.0, "hidden": 0.0},
)
