"""Training with the weights that will be stored: settings, and what all models have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import Activation, TensorScheme
from pocketglm.contracts import Reporter, StepContext
from pocketglm.methods._calibrate import CalibratedConfig
from pocketglm.methods._distill import TeachingConfig
from pocketglm.methods._static import Scales, write_static
from pocketglm.methods._weights import Bits, WeightConfig, select_scheme
from pocketglm.model.decoder import Decoder
from pocketglm.model.hf import is_decoder, is_linear, stored_name
from pocketglm.ops.affine import choose_scales
from pocketglm.ops.fake_quant import Grid, InputGrid, quantized_inputs
from pocketglm.ops.fake_weight import FakeWeight, rounded_once
from pocketglm.train.lora import LowRank, adapter_seed

BLOCK = 128  # inputs that share a grid by block, where the weights have one scale a row
_FORMS: Mapping[str, str] = {
    "none": "stay float",
    "static": "INT8 on fixed grids",
    "dynamic_tensor": "INT8, each text on a grid of its own",
    "dynamic_block": "INT8, each block of a token on a grid of its own",
}


class QatConfig(TeachingConfig, CalibratedConfig):
    """Settings; `docs/extensions.md` is generated from the descriptions."""

    bits: Bits | None = Field(
        None, description="bits of the linear layers; None = 8 for encoders, 4 for decoders"
    )
    group_size: Literal[32, 64, 128] | None = Field(
        None, description="columns that share a scale; None = the row (8 bits), 32 (4 bits)"
    )
    activation: Literal["none", "static", "dynamic_tensor", "dynamic_block"] | None = Field(
        None,
        description="how the layers' inputs are quantized, in training and on the phone: not at "
        "all (none); on grids found by calibration (static), on one of each text's own "
        "(dynamic_tensor), both for INT8 by row; or of each block's (dynamic_block). None = static "
        "for encoders in INT8 by row, else none for 4 bits, dynamic_tensor for 8, dynamic_block "
        "for 8 in groups",
    )
    scales: Literal["fixed", "learned"] = Field(
        "fixed",
        description="the weights' scales: those of post-training quantization stay, or they learn "
        "from there",
    )
    lora: int | None = Field(
        None,
        ge=1,
        description="decoders: rank of adapters that learn in place of the weights, which they are "
        "added to before these are rounded: less memory; None = the whole model learns",
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="scale of the adapters times their rank; None = twice the rank"
    )
    preset: Literal["soft", "features", "qad"] | None = Field(
        None,
        description="learn from a float teacher too: qad = alpha 0.5, temperature 1 (for "
        "decoders); soft, features as in `distill`; None: the settings below",
    )
    alpha: float = Field(
        0.0, ge=0, le=1, description="weight of the teacher's term; 1 - alpha: of the labels'"
    )
    epochs: float = Field(2, ge=0, description="passes over the training rows; 0: no training")
    learning_rate: float = Field(2e-5, gt=0, description="the highest one")


def by_row(config: QatConfig, ckpt: Checkpoint) -> bool:
    """Whether it is an encoder in INT8 by row, whose inputs `quantize_static` knows."""
    plain = config.bits in (None, 8) and config.group_size is None
    looked_at = config.activation in (None, "static", "dynamic_tensor")
    return plain and looked_at and not is_decoder(ckpt)


def weight_config(config: QatConfig, ckpt: Checkpoint) -> WeightConfig:
    """The settings with which `quantize_rtn` makes the same forms."""
    bits = config.bits or (4 if is_decoder(ckpt) else 8)
    names = ("group_size", "symmetric", "embeddings", "head", "activation", "search", "skip")
    return WeightConfig(bits=bits, **{name: getattr(config, name) for name in names})


def schemes_by_weight(config: QatConfig, ckpt: Checkpoint) -> dict[str, TensorScheme]:
    """As `quantize_rtn` chooses them, in file order."""
    settings = weight_config(config, ckpt)
    found = ((name, select_scheme(settings, ckpt, info)) for name, info in ckpt.tensors.items())
    return {name: scheme for name, scheme in found if scheme is not None}


@dataclass(frozen=True, slots=True)
class Rounding:
    """What is rounded while a model learns.

    schemes, stored_grids: by the weights' stored names. inputs, outputs: grids by module.
    """

    schemes: Mapping[str, TensorScheme]
    inputs: Mapping[str, Grid]
    outputs: Mapping[str, Grid] = field(default_factory=dict)
    stored_grids: Mapping[str, InputGrid] = field(default_factory=dict)

    def say(self, reporter: Reporter) -> None:
        """Name the forms of weights and inputs."""
        forms: dict[tuple[int, int | None, Activation], int] = {}
        for scheme in self.schemes.values():
            form = scheme.bits, scheme.group_size, scheme.activation
            forms[form] = forms.get(form, 0) + 1
        for (bits, group, activation), count in forms.items():
            along = f"groups of {group}" if group else "rows"
            reporter.say(
                f"{count} weights in INT{bits} by {along}; their inputs {_FORMS[activation]} "
                f"({activation})"
            )


def rounding_by_weight(config: QatConfig, ckpt: Checkpoint, model: nn.Module) -> Rounding:
    """The forms of `quantize_rtn`, inputs as a runtime quantizes them by itself."""
    schemes = schemes_by_weight(config, ckpt)
    inputs: dict[str, Grid] = {}
    outputs: dict[str, Grid] = {}
    for ours, _ in model.named_parameters():
        scheme = schemes.get(stored_name(ckpt, ours))
        if scheme is None or scheme.activation == "none":
            continue
        by_text = scheme.activation == "dynamic_tensor"
        grid = None if by_text else scheme.group_size or BLOCK
        if isinstance(model, Decoder) and not in_block(ours):
            # The head's product takes the weight without its module: what enters it is this norm's.
            outputs["norm"] = grid
        else:
            inputs[ours.removesuffix(".weight")] = grid
    return Rounding(schemes, inputs, outputs)


def train_rounded(
    config: QatConfig,
    ckpt: Checkpoint,
    folder: Path,
    model: nn.Module,
    rounding: Rounding,
    learn: Callable[[], dict[str, float]],
    context: StepContext,
) -> dict[str, float]:
    """Let `learn` train the model in place while it computes with what will be stored; store that.

    Without epochs nothing is trained.
    """
    rounding.say(context.reporter)
    stored = {ours: stored_name(ckpt, ours) for ours, _ in model.named_parameters()}
    fakes = {
        ours: _fake(config, model.get_parameter(ours), rounding.schemes[name], ours)
        for ours, name in stored.items()
        if name in rounding.schemes
    }
    effect: dict[str, float] = {}
    weights: dict[str, Tensor] = {}
    if config.epochs:
        with (
            _rounded(model, fakes, config, context.seed) as adapters,
            rounded_once(fakes.values()),
            quantized_inputs(model, rounding.inputs, rounding.outputs),
        ):
            effect = learn()
        for ours, adapter in adapters.items():
            weights[stored[ours]] = adapter(model.get_parameter(ours)).detach()
    for ours, name in stored.items():
        weights.setdefault(name, model.get_parameter(ours))
    scales: dict[str, Scales] = {
        stored[ours]: (fake.scales(), cast(Tensor | None, fake.zero_points))
        for ours, fake in fakes.items()
    }
    error = write_static(
        ckpt, folder, rounding.schemes, rounding.stored_grids, weights, scales=scales
    )
    return {**effect, "layers": float(len(fakes)), "weight_error": float(f"{error:.6g}")}


def _fake(config: QatConfig, weight: Tensor, scheme: TensorScheme, name: str) -> FakeWeight:
    """Begins as post-training quantization ends. With adapters only what they change learns."""
    scales, zeros = choose_scales(weight.detach().float(), scheme, search=config.search)
    learned = config.scales == "learned" and (config.lora is None or in_block(name))
    return FakeWeight(scheme, scales, zeros, learned=learned)


def in_block(name: str) -> bool:
    """Whether a parameter, by our name, is one of a block's."""
    return name.startswith("blocks.")


@contextmanager
def _rounded(
    model: nn.Module, fakes: Mapping[str, FakeWeight], config: QatConfig, seed: int
) -> Iterator[dict[str, LowRank]]:
    """Meanwhile these parameters are used as they will be stored; gives the adapters of some."""
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in fakes}
    adapters: dict[str, LowRank] = {}
    if config.lora:
        model.requires_grad_(False)
        scale = (config.lora_alpha or 2 * config.lora) / config.lora
        for name in filter(in_block, fakes):
            weight = model.get_parameter(name)
            adapters[name] = LowRank(weight, config.lora, scale, adapter_seed(seed, name))
    try:
        for name, layer in layers.items():
            for part in filter(None, (adapters.get(name), fakes[name])):
                # unsafe: the values are float32 whatever the type in which a weight is kept.
                parametrize.register_parametrization(layer, "weight", part, unsafe=True)
        yield adapters
    finally:
        for layer in layers.values():
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def bytes_needed(config: QatConfig, parameters: int, adapted: int) -> int:
    """Bytes that training holds at most. parameters: of the model; adapted: of its adapters."""
    # Weights, gradients, two moments and the best weights in float32; what is rounded, and where it
    # was clipped; the teacher. With adapters the first four are theirs alone.
    whole, frozen, each = 30, 18, 20
    held = frozen * parameters + each * adapted if config.lora else whole * parameters
    return held + (1 << 30)  # activations, rows, what the allocator keeps


def adapted_weights(
    ckpt: Checkpoint, schemes: Mapping[str, TensorScheme]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that adapters are added to, by stored name."""
    shapes = {name: ckpt.tensors[name].shape for name in schemes}
    return {name: shape for name, shape in shapes.items() if is_linear(name, shape)}


def rank_reason(config: QatConfig, ckpt: Checkpoint, schemes: Mapping[str, TensorScheme]) -> str:
    """Why adapters cannot have this rank, or ''."""
    shapes = adapted_weights(ckpt, schemes)
    if config.lora is None or not shapes:
        return "" if config.lora is None else "lora: no layer of the blocks is quantized"
    name = min(shapes, key=lambda name: min(shapes[name]))
    if config.lora <= min(shapes[name]):
        return ""
    return f"lora={config.lora} is more than the rank of a layer: {name} is {list(shapes[name])}"
