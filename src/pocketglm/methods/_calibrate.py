"""INT8 layers with inputs on fixed grids: the settings, which layers, and their calibration.

What `quantize_static` and `qat` have in common, down to the bytes: `qat` without steps stores what
`quantize_static` stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import Activation, TensorScheme
from pocketglm.contracts import Config, StepContext
from pocketglm.methods._observe import (
    BATCH,
    SampleRows,
    channel_maxima,
    divergence,
    input_histograms,
    outputs,
    quantized,
)
from pocketglm.methods._smooth import smooth, smoothable
from pocketglm.methods._static import (
    deployed,
    predicted,
    static_layers,
    token_table,
    units_of,
)
from pocketglm.methods._weights import skip_reasons
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import is_decoder, load_encoder, max_length_of, spec_of, stored_name
from pocketglm.ops.calibration import Calibrator, calibrate
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.stored import check_finite, parameter_counts
from pocketglm.text.tokenizer import Tokenizer

_BYTES = 12  # for a parameter
_SPARE = 128 << 20  # histograms, rows, what the allocator keeps
_MEASURED = 128  # rows with which changes of the output are measured


class CalibratedConfig(Config):
    """Settings of INT8 layers whose inputs are looked at."""

    calibrator: Calibrator = Field(
        "mse", description="what chooses the inputs' ranges: minmax, percentile, entropy (KL), mse"
    )
    percentile: float = Field(
        99.99, gt=0, le=100, description="of calibrator percentile: share of the values in range"
    )
    symmetric_inputs: bool = Field(False, description="ranges of inputs are -x to x, zero point 0")
    symmetric: bool = Field(True, description="weights without zero points")
    embeddings: Literal[4, 8] | None = Field(
        None, description="bits of the token embedding; None = float"
    )
    head: Literal[4, 8] | None = Field(
        None, description="bits of classifier, pooler or lm_head; None = float"
    )
    rows: int = Field(512, ge=1, description="training rows to calibrate with, drawn by the seed")
    smoothquant: float | None = Field(
        None, ge=0, le=1, description="alpha of SmoothQuant, 0.5 is usual; None = off"
    )
    float_layers: int | float = Field(
        0,
        ge=0,
        description="layers to keep float, those whose quantization changes the output most: "
        "a number (2), or a share (0.1); query, key and value count as one",
    )
    search: bool = Field(True, description="look for the scale with the least squared error")
    skip: list[str] = Field([], description="patterns (*, ?) of tensor names that stay float")

    @field_validator("float_layers")
    @classmethod
    def _share(cls, value: float) -> float:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError("a share is below 1; write a whole number for a number of layers")
        return value

    def kept_float(self, units: int) -> int:
        """How many of so many units stay float."""
        share = isinstance(self.float_layers, float)
        return math.ceil(self.float_layers * units) if share else int(self.float_layers)


class StaticConfig(CalibratedConfig):
    """Settings of static INT8; `docs/extensions.md` is generated from the descriptions."""

    head: Literal[8] | None = Field(
        None, description="8: classifier and pooler become static INT8 too; None = float"
    )


def static_reasons(config: CalibratedConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if is_decoder(ckpt):
        return ["it is a decoder: static inputs are for encoders; use quantize_rtn"]
    if ckpt.manifest.schemes or "quantization_config" in ckpt.config:
        return ["it is already quantized: start from the float checkpoint"]
    reasons = skip_reasons(config.skip, ckpt)
    layers = layers_of(config, ckpt)
    units = units_of(layers)
    if context.rows is not None and not context.rows.train:
        reasons.append("there are no training rows to calibrate with")
    if config.kept_float(len(units)) >= len(units):
        reasons.append(
            f"float_layers={config.float_layers}: it has {len(units)} layers to quantize, and "
            "nothing would be left"
            if units
            else "it has no layer to quantize with these settings"
        )
    if config.smoothquant is not None and not smoothable(spec_of(ckpt), layers):
        reasons.append(
            "smoothquant: no attention.output is left to smooth, with these patterns to skip"
        )
    return reasons


def static_bytes(config: CalibratedConfig, ckpt: Checkpoint, context: StepContext) -> int:
    """Bytes that calibration holds: the float model, its weights rounded, one of them in work, and
    what a batch of the longest rows computes.
    """
    spec = spec_of(ckpt)
    batch = BATCH * max_length_of(ckpt) * (4 * spec.intermediate_size + 8 * spec.hidden_size)
    return _BYTES * sum(parameter_counts(ckpt).values()) + 4 * batch + _SPARE


def layers_of(config: CalibratedConfig, ckpt: Checkpoint) -> dict[str, str]:
    return static_layers(ckpt, head=config.head is not None, skip=config.skip)


def scheme_of(config: CalibratedConfig, activation: Activation) -> TensorScheme:
    """Of the linear layers."""
    return TensorScheme(bits=8, symmetric=config.symmetric, activation=activation)


def schemes_of(
    config: CalibratedConfig, ckpt: Checkpoint, weights: Iterable[str], activation: Activation
) -> dict[str, TensorScheme]:
    """Schemes of these layers' weights, and of the embedding, in file order."""
    schemes = dict.fromkeys(weights, scheme_of(config, activation))
    table = token_table(ckpt, config.skip)
    if config.embeddings and table:
        schemes[table] = TensorScheme(
            bits=config.embeddings,
            group_size=32 if config.embeddings == 4 else None,
            symmetric=config.symmetric,
        )
    return {name: schemes[name] for name in ckpt.tensors if name in schemes}


def static_headers(
    config: CalibratedConfig, ckpt: Checkpoint, activation: Activation = "static"
) -> Checkpoint:
    """Which layers stay float is measured; here it is the largest, so the size is the most."""
    layers = layers_of(config, ckpt)
    units = units_of(layers)

    def size(unit: str) -> int:
        return sum(ckpt.tensors[layers[layer]].size for layer in units[unit])

    largest = sorted(units, key=size, reverse=True)[: config.kept_float(len(units))]
    kept = [layer for unit in largest for layer in units[unit]]
    weights = [stored for layer, stored in layers.items() if layer not in kept]
    return predicted(ckpt, schemes_of(config, ckpt, weights, activation))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A calibrated model, still in float. layers: our name -> the stored name of the weight. grids:
    of the layers' inputs; None: they are quantized dynamically. moved: parameters that smoothing
    has changed: our name -> the stored one. sample, wanted: rows, and what the model gave for them
    at first.
    """

    model: Encoder
    rows: SampleRows
    layers: Mapping[str, str]
    grids: Mapping[str, InputGrid] | None
    moved: Mapping[str, str]
    sample: SampleRows
    wanted: Sequence[Tensor]
    scheme: TensorScheme

    def stored_grids(self) -> dict[str, InputGrid]:
        """Grids by the stored names of the weights."""
        return {self.layers[layer]: grid for layer, grid in (self.grids or {}).items()}


def prepare(
    config: CalibratedConfig,
    ckpt: Checkpoint,
    context: StepContext,
    activation: Activation = "static",
) -> Prepared:
    """Smooth, calibrate, and leave out the layers that are to stay float."""
    model, rows = load_encoder(ckpt), _rows(config, ckpt, context)
    for name, values in model.state_dict().items():
        check_finite(ckpt, stored_name(ckpt, name), values)
    scheme = scheme_of(config, activation)
    layers = layers_of(config, ckpt)
    sample = rows.part(_MEASURED)
    wanted = outputs(model, sample)
    makers = smoothable(model.spec, layers) if config.smoothquant is not None else {}
    if config.smoothquant is not None:
        maxima = channel_maxima(model, list(makers), rows, context.reporter)
        smooth(model, makers, maxima, config.smoothquant)
    units = units_of(layers)
    grids = None
    if activation == "static":
        grids = _grids(config, model, units, rows, context)
    kept = config.kept_float(len(units))
    ranked = (
        _sensitivity(config, model, units, grids, wanted, sample, context, scheme) if kept else []
    )
    for unit in ranked[:kept]:
        context.reporter.say(f"stays float: {', '.join(units[unit])}")
        for layer in units[unit]:
            del layers[layer]
            if grids:
                del grids[layer]
    moved = {
        f"{layer}.{part}": stored_name(ckpt, f"{layer}.{part}")
        for pair in makers.items()
        for layer in pair
        for part, _ in model.get_submodule(layer).named_parameters()
    }
    return Prepared(model, rows, layers, grids, moved, sample, wanted, scheme)


def _rows(config: CalibratedConfig, ckpt: Checkpoint, context: StepContext) -> SampleRows:
    texts = [row.text for row in context.rows.train] if context.rows else []
    tokenizer = Tokenizer.load(ckpt.path)
    return SampleRows.draw(texts, config.rows, context.seed, tokenizer, max_length_of(ckpt))


def _grids(
    config: CalibratedConfig,
    model: Encoder,
    units: Mapping[str, Sequence[str]],
    rows: SampleRows,
    context: StepContext,
) -> dict[str, InputGrid]:
    """The grid of each layer's input."""
    grids = {}
    for unit, histogram in input_histograms(model, units, rows, context.reporter).items():
        grid = calibrate(
            histogram,
            config.calibrator,
            symmetric=config.symmetric_inputs,
            percentile=config.percentile,
        )
        grids.update(dict.fromkeys(units[unit], grid))
    return grids


def _sensitivity(
    config: CalibratedConfig,
    model: Encoder,
    units: Mapping[str, Sequence[str]],
    grids: Mapping[str, InputGrid] | None,
    wanted: Sequence[Tensor],
    sample: SampleRows,
    context: StepContext,
    scheme: TensorScheme,
) -> list[str]:
    """Units by how far the output moves if they alone are quantized, the worst first."""
    moved = {}
    for number, (unit, layers) in enumerate(units.items(), 1):
        weights = {
            layer: deployed(model.get_parameter(f"{layer}.weight"), scheme, search=config.search)
            for layer in layers
        }
        with quantized(model, weights, grids):
            moved[unit] = divergence(model, wanted, sample)
        context.reporter.progress("sensitivity", number, len(units), f"{unit} {moved[unit]:.3g}")
    return sorted(moved, key=lambda unit: -moved[unit])
