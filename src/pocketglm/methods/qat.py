"""Quantization-aware training: the weights learn while the layers already compute in INT8.

Jacob et al. 2018, https://arxiv.org/abs/1712.05877, with the straight-through estimator. The grids
of weights and inputs are those that post-training quantization chooses for the weights at the
start, and stay; the forward pass rounds with the packer's own functions (`ops/fake_quant.py`). So
what is trained is what is stored, every validation score is that of the deployed numbers, and
without steps the result is, byte for byte, that of `quantize_static`.

The labels teach (alpha 0), or a float teacher too: the plan's input or any folder, as in `distill`.
The model has to be trained for its labels before; a tenth of its learning rate is usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.utils import parametrize

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import WORK, ModelMethod, StepContext
from pocketglm.errors import InputError
from pocketglm.methods._calibrate import (
    StaticConfig,
    prepare,
    schemes_of,
    static_headers,
    static_reasons,
)
from pocketglm.methods._distill import TeachingConfig, listed
from pocketglm.methods._distill_encoder import classifier_job, learn, teaching_reasons
from pocketglm.methods._static import write_static
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import labels_of, spec_of, stored_name
from pocketglm.ops.affine import choose_scales
from pocketglm.ops.fake_quant import FakeWeight, quantized_inputs


class QatConfig(TeachingConfig, StaticConfig):
    """Settings; `docs/extensions.md` is generated from the descriptions."""

    activation: Literal["static", "dynamic_tensor"] = Field(
        "static",
        description="how the layers' inputs are quantized, in training and on the phone: on grids "
        "found by calibration, or on one of each text's own",
    )
    preset: Literal["soft", "features"] | None = Field(
        None, description="learn from a teacher too: as in `distill`; None: the settings below"
    )
    alpha: float = Field(
        0.0, ge=0, le=1, description="weight of the teacher's term; 1 - alpha: of the labels'"
    )
    epochs: float = Field(2, ge=0, description="passes over the training rows; 0: no training")
    learning_rate: float = Field(2e-5, gt=0, description="the highest one")


def _check(config: QatConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    reasons = static_reasons(config, ckpt, context)
    if reasons:
        return reasons
    if context.task != "intent":
        return [f"this method trains encoders for intent, the task is {context.task}"]
    labels = {row.label for row in context.rows.train} if context.rows else set()
    if other := labels ^ set(labels_of(ckpt)):
        return [
            f"the rows have other labels than the model: {listed(other)}; train it first "
            "(pocketglm train, or distill)"
        ]
    try:
        return teaching_reasons(config, spec_of(ckpt), ckpt, context)
    except InputError as error:
        return [f"{error.message}: {error.hint}" if error.hint else error.message]


def _run(
    config: QatConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    found = prepare(config, ckpt, context, config.activation)
    schemes = schemes_of(config, ckpt, found.layers.values(), config.activation)
    job = classifier_job(ckpt, context, config.dropout, found.model.spec.max_position_embeddings)
    model = job.model
    model.load_state_dict(found.model.state_dict())
    stored = {ours: stored_name(ckpt, ours) for ours, _ in model.named_parameters()}
    scales = {
        name: choose_scales(model.get_parameter(ours).detach(), schemes[name], search=config.search)
        for ours, name in stored.items()
        if name in schemes
    }
    effect: dict[str, float] = {}
    if config.epochs:
        places = {ours: (schemes[n], *scales[n]) for ours, n in stored.items() if n in schemes}
        grids = {layer: (found.grids or {}).get(layer) for layer in found.layers}
        with _rounded(model, places), quantized_inputs(model, grids):
            effect = learn(config, job, ckpt, folder / WORK, context)
    error = write_static(
        ckpt,
        folder,
        schemes,
        found.stored_grids(),
        {name: model.get_parameter(ours) for ours, name in stored.items()},
        scales=scales,
    )
    return {
        **effect,
        "layers": float(len(found.layers)),
        "weight_error": float(f"{error:.6g}"),
    }


@contextmanager
def _rounded(
    model: Encoder, places: Mapping[str, tuple[TensorScheme, Tensor, Tensor | None]]
) -> Iterator[None]:
    """Meanwhile these parameters are used as they will be stored: scheme, scales, zero points."""
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in places}
    try:
        for name, layer in layers.items():
            parametrize.register_parametrization(layer, "weight", FakeWeight(*places[name]))
        yield
    finally:
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


SPEC = ModelMethod(
    summary="train an encoder while it already computes in INT8",
    config=QatConfig,
    check=_check,
    predict=lambda config, ckpt, context: static_headers(config, ckpt, config.activation),
    run=_run,
    needs_rows=lambda config: True,
    inputs=lambda config: [Path(p) for p in (config.teacher, *config.corpora) if p is not None],
)
