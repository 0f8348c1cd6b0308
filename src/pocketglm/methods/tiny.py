"""The Tiny structure: shared and unified blocks, fewer layers, top-k attention; then healing.

Neighbouring layers use one block (Dehghani et al. 2019, https://arxiv.org/abs/1807.03819; Lan et
al. 2020, https://arxiv.org/abs/1909.11942; converting a dense model: Bae et al. 2024,
https://arxiv.org/abs/2410.20672). A block's attention and FFN stand side by side in one unit
(PaLM, https://arxiv.org/abs/2204.02311), and a query looks at the keys of its `top_k` largest
scores (`model/sparse.py`). The weights come from the dense ones (`_tiny.py`). The result computes
something else until it has learned again from what the dense model says, as `distill` does it.

By default as few layers share as remove 40 % of the parameters, the embedding counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from pydantic import Field, model_validator

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import ModelMethod, StepContext
from pocketglm.errors import InputError
from pocketglm.methods import _distill_decoder as healing
from pocketglm.methods._distill import TeachingConfig
from pocketglm.methods._prune import headers, load, save
from pocketglm.methods._tiny import (
    Source,
    Structure,
    parameters,
    structure_of,
    tiny_model,
    tiny_spec,
)
from pocketglm.model.decoder import Decoder
from pocketglm.model.hf import decoder_spec_of, is_decoder
from pocketglm.model.spec import DecoderSpec
from pocketglm.ops.stored import parameter_counts

_REMOVES = 0.4
_TRAINING, _SPARE = 24, 1 << 30  # bytes a parameter, and more, while it heals


class TinyConfig(TeachingConfig):
    """Settings; `docs/extensions.md` is generated from the descriptions."""

    removes: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of all parameters that goes at least, by as little sharing as that "
        "takes; default without share: 0.4",
    )
    share: int | None = Field(
        None,
        ge=1,
        description="instead: neighbouring layers that use one block, at most; 1: none share",
    )
    fuse: int = Field(1, ge=1, description="neighbouring layers that become one, at most")
    source: Source = Field(
        "first",
        description="what layers that become one block give it: average = the mean of their "
        "weights, or those of the first or the last of them",
    )
    unify: bool = Field(True, description="attention and FFN side by side, in one unit")
    top_k: int | None = Field(
        64,
        ge=1,
        description="keys that a query looks at, those of its largest scores; exact for texts of "
        "so many tokens; None = all",
    )

    @model_validator(mode="after")
    def _one(self) -> TinyConfig:
        if self.removes is not None and self.share is not None:
            raise ValueError("removes and share both say how many layers share: set one of them")
        return self


def _structure(config: TinyConfig, spec: DecoderSpec) -> Structure:
    """
    Raises:
        ValueError: no sharing removes as much as the settings ask for, or the layers differ.
    """

    def of(blocks: int) -> Structure:
        return structure_of(spec.num_layers, config.fuse, blocks, config.unify, config.top_k)

    layers = -(-spec.num_layers // config.fuse)
    if config.share is not None:
        return of(-(-layers // config.share))
    goal, dense = config.removes or _REMOVES, parameters(spec)
    removed = 0.0
    for blocks in range(layers, 0, -1):
        removed = 1 - parameters(tiny_spec(spec, of(blocks))) / dense
        if removed >= goal:
            return of(blocks)
    raise ValueError(
        f"removes={goal:g}: one block for all layers removes {removed:.1%} of the parameters: set "
        "less, or trim_vocabulary first (the embedding counts)"
    )


def _check(config: TinyConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if not is_decoder(ckpt):
        return ["it is an encoder: shared and unified blocks are for decoders"]
    if ckpt.manifest.schemes or "quantization_config" in ckpt.config:
        return ["it is quantized: put tiny before that step in the plan"]
    spec = decoder_spec_of(ckpt)
    if spec.layer_blocks or spec.unified:
        return ["its blocks are shared or unified already: heal it with distill"]
    if spec.layer_ranks:
        return ["it is factorized: products of two are not merged; start from the model before"]
    if config.unify and spec.four_norms:
        return ["unify: a block with four norms cannot be one unit: set unify to false"]
    try:
        after = tiny_spec(spec, _structure(config, spec))
    except ValueError as error:
        return [str(error)]
    if not config.epochs or context.rows is None:
        return []
    if not context.rows.train:
        return ["there are no training rows"]
    return healing.task_reason(context) or _healing_reasons(config, ckpt, after, context)


def _healing_reasons(
    config: TinyConfig, ckpt: Checkpoint, after: DecoderSpec, context: StepContext
) -> list[str]:
    try:
        return healing.teaching_reasons(config, after, ckpt, context)
    except InputError as error:
        return [f"{error.message}: {error.hint}" if error.hint else error.message]


def _predict(config: TinyConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    wanted = _structure(config, decoder_spec_of(ckpt))
    if not config.epochs:
        return headers(ckpt, tiny_spec(decoder_spec_of(ckpt), wanted))
    base = healing.base_spec(ckpt, context)
    return healing.predict_student(ckpt, tiny_spec(base, wanted), context)


def _run(
    config: TinyConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    spec = decoder_spec_of(ckpt)
    wanted = _structure(config, spec)
    after = tiny_spec(spec, wanted)
    before, left = parameters(spec), parameters(after)
    context.reporter.say(
        f"{after.num_layers} layers of {spec.num_layers}, {len(after.first_layers())} blocks, "
        f"{left:,} of {before:,} parameters"
    )

    def make(base: Decoder) -> Decoder:
        return tiny_model(base, wanted, config.source)

    effect: Mapping[str, float] = {}
    if config.epochs:
        effect = healing.teach(config, ckpt, folder, context, make)
    else:
        save(make(cast(Decoder, load(ckpt))), ckpt, folder)
    return {
        "layers": float(after.num_layers),
        "blocks": float(len(after.first_layers())),
        "parameters_removed": round(1 - left / before, 4),
        **effect,
    }


def _memory(config: TinyConfig, ckpt: Checkpoint, context: StepContext) -> int:
    """The dense model in float32 and the new one; or those of training."""
    values = sum(parameter_counts(ckpt).values())
    return (_TRAINING if config.epochs else 8) * values + _SPARE


def _inputs(config: TinyConfig) -> Sequence[Path]:
    return [] if config.teacher is None else [Path(config.teacher)]


SPEC = ModelMethod(
    summary="shared and unified blocks, fewer layers, top-k attention, from a dense decoder",
    config=TinyConfig,
    check=_check,
    predict=_predict,
    run=_run,
    needs_rows=lambda config: config.epochs > 0,
    inputs=_inputs,
    identity={"share": 1, "unify": False, "top_k": None, "epochs": 0},
    memory=_memory,
)
