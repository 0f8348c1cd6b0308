"""4 or 8 bits for each weight, by what it costs: the best use of a budget of bytes.

Each unit (query, key and value together, gate and up together, every other linear layer, the
embedding, the head; a tied head is the embedding) is quantized alone, in every form that it may
have, and the change of the model's output on training rows is measured (`_mixed.py`). Then bytes go
where they save the most of it (`ops/allocation.py`). The changes are added up as if they did not
depend on each other; `kl` in the result is measured with all of them at once. The weights are
stored as `quantize_rtn` stores them.

MiniLM's embeddings of 300 clinc150 rows that it did not see moved (1 - cosine) by 0.030 with 13.6
MB (all 4 bits), 0.015 with 14.6 (ratio 0.1), 0.0068 with 16.0 (0.25), 0.0015 with 18.3 (0.5) and
0.0004 with 23.5 (all 8 bits). The changes of its units added up were within 5 % of the change of
all, and within 5 % of the bound.

The whole model is held in float32, and passed through once for each form of each unit, from that
unit on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import Activation, TensorScheme
from pocketglm.contracts import Config, ModelMethod, StepContext
from pocketglm.methods._mixed import Sensitivity, Unit, unit_name
from pocketglm.methods._prune import load
from pocketglm.methods._static import predicted, write_static
from pocketglm.methods._walk import calibration_batches
from pocketglm.methods._weights import WeightConfig, select_scheme, skip_reasons
from pocketglm.model.decoder import Decoder
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import model_spec_of, stored_name
from pocketglm.model.layers import bare_modules
from pocketglm.model.spec import EncoderSpec
from pocketglm.ops.affine import group_reason
from pocketglm.ops.allocation import Option, allocate_options
from pocketglm.ops.stored import parameter_counts
from pocketglm.train._calibration import calibration_reasons

_RATIO = 0.25
_SPARE = 256 << 20  # rows, what a batch computes, what the allocator keeps
_FLOATS = ("F64", "F32", "F16", "BF16")


class MixedConfig(Config):
    """Settings; `docs/extensions.md` is generated from the descriptions."""

    ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="the budget between all weights in 4 bits (0) and all in 8 (1); default "
        "without max_bytes: 0.25",
    )
    max_bytes: int | None = Field(
        None, ge=1, description="instead: the bytes of all tensors of the result"
    )
    float_allowed: bool = Field(
        False, description="a weight may also stay float, where that is worth its bytes"
    )
    group_size: Literal[32, 64, 128] = Field(
        32, description="columns that share a scale in 4 bits; in 8 bits the row does"
    )
    symmetric: bool = Field(True, description="no zero points; what every runtime reads right")
    embeddings: bool = Field(True, description="the token embedding takes part; false: it is float")
    head: bool = Field(
        True, description="classifier, pooler or lm_head take part; false: they are float"
    )
    activation: Activation | None = Field(
        None,
        description="how a runtime may quantize the layers' inputs; default: none for 4 bits, "
        "dynamic_tensor for 8",
    )
    tokens: int = Field(2048, ge=1, description="tokens of the training rows to measure with")
    search: bool = Field(True, description="look for the scale with the least squared error")
    skip: list[str] = Field([], description="patterns (*, ?) of tensor names that stay float")

    @model_validator(mode="after")
    def _one(self) -> MixedConfig:
        if self.ratio is not None and self.max_bytes is not None:
            raise ValueError("ratio and max_bytes both say the budget: set one of them")
        if self.activation == "static":
            raise ValueError("static activations are calibrated by quantize_static and qat")
        return self


def _weights(config: MixedConfig, bits: Literal[4, 8]) -> WeightConfig:
    """The settings of `quantize_rtn` with which every weight has so many bits."""
    # One scale for a tensor's activations goes with whole rows only.
    by_tensor = bits == 4 and config.activation == "dynamic_tensor"
    return WeightConfig(
        bits=bits,
        group_size=config.group_size if bits == 4 else None,
        symmetric=config.symmetric,
        embeddings=bits if config.embeddings else None,
        head=bits if config.head else None,
        activation=None if by_tensor else config.activation,
        skip=config.skip,
    )


def _units(config: MixedConfig, ckpt: Checkpoint) -> list[Unit]:
    """In the model's order. Of the forms of a unit all its members can have each."""
    spec = model_spec_of(ckpt)
    with bare_modules():
        model = Encoder(spec) if isinstance(spec, EncoderSpec) else Decoder(spec)
    members: dict[str, list[str]] = {}
    for name in model.state_dict():
        info = ckpt.tensors.get(stored_name(ckpt, name))
        if info and (select_scheme(_weights(config, 8), ckpt, info)):
            members.setdefault(unit_name(name), []).append(name)
    return [
        Unit(name, tuple(names), list(_forms(config, ckpt, names)))
        for name, names in members.items()
    ]


def _forms(
    config: MixedConfig, ckpt: Checkpoint, names: Sequence[str]
) -> list[dict[str, TensorScheme]]:
    found: list[dict[str, TensorScheme]] = []
    for bits in (4, 8):
        form = {}
        for name in names:
            info = ckpt.tensors[stored_name(ckpt, name)]
            scheme = select_scheme(_weights(config, bits), ckpt, info)
            if scheme and not group_reason(info.name, info.shape[1], scheme):
                form[name] = scheme
        if len(form) == len(names):
            found.append(form)
    return [*found, {}] if config.float_allowed else found


def _schemes(ckpt: Checkpoint, forms: Mapping[str, TensorScheme]) -> dict[str, TensorScheme]:
    """By stored names, in file order."""
    stored = {stored_name(ckpt, name): scheme for name, scheme in forms.items()}
    return {name: stored[name] for name in ckpt.tensors if name in stored}


def _bytes(ckpt: Checkpoint, forms: Mapping[str, TensorScheme]) -> int:
    """Of all tensors, with these parameters quantized."""
    found = predicted(ckpt, _schemes(ckpt, forms))
    return sum(info.nbytes for info in found.tensors.values())


def _together(forms: Sequence[Mapping[str, TensorScheme]]) -> dict[str, TensorScheme]:
    return {name: scheme for form in forms for name, scheme in form.items()}


def _limits(ckpt: Checkpoint, units: Sequence[Unit]) -> tuple[int, int]:
    """Bytes of all tensors with every unit in its smallest form, and with 8 bits."""
    small = _bytes(ckpt, _together([unit.forms[0] for unit in units]))
    large = _bytes(ckpt, _together([unit.forms[_eight(unit)] for unit in units]))
    return small, large


def _eight(unit: Unit) -> int:
    """The number of the form in 8 bits."""
    return max(number for number, form in enumerate(unit.forms) if form)


def _budget(config: MixedConfig, ckpt: Checkpoint, units: Sequence[Unit]) -> int:
    if config.max_bytes is not None:
        return config.max_bytes
    small, large = _limits(ckpt, units)
    return small + int((_RATIO if config.ratio is None else config.ratio) * (large - small))


def _check(config: MixedConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if ckpt.manifest.schemes or "quantization_config" in ckpt.config:
        return ["it is already quantized: start from the float checkpoint"]
    reasons = skip_reasons(config.skip, ckpt)
    units = _units(config, ckpt)
    if not units:
        return [*reasons, "it has no tensor to quantize with these settings"]
    small, large = _limits(ckpt, units)
    if config.max_bytes is not None and config.max_bytes < small:
        reasons.append(
            f"max_bytes={config.max_bytes:,}: with every weight in the fewest bits it has "
            f"{small:,} bytes (in 8 bits {large:,})"
        )
    return reasons + calibration_reasons(ckpt, context)


def _predict(config: MixedConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    """Which weights get how many bits is measured; here the first ones get the most, until the
    budget is reached, so the size is the most.
    """
    units = _units(config, ckpt)
    budget, chosen = _budget(config, ckpt, units), [unit.forms[0] for unit in units]
    for number, unit in enumerate(units):
        for form in unit.forms[1:]:
            if _bytes(ckpt, _together(chosen)) < budget:
                chosen[number] = form
    return predicted(ckpt, _schemes(ckpt, _together(chosen)))


def _run(
    config: MixedConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    model, units = load(ckpt), _units(config, ckpt)
    batches = calibration_batches(ckpt, context, config.tokens)
    sensitivity = Sensitivity.of(model, batches, config.search)
    losses = sensitivity.measure(units, context.reporter)
    base = _bytes(ckpt, {})
    options = [
        [
            Option(_bytes(ckpt, form) - base, loss)
            for form, loss in zip(unit.forms, found, strict=True)
        ]
        for unit, found in zip(units, losses, strict=True)
    ]
    result = allocate_options(options, _budget(config, ckpt, units) - base)
    chosen = [unit.forms[number] for unit, number in zip(units, result.chosen, strict=True)]
    forms = _together(chosen)
    for unit, form in zip(units, chosen, strict=True):
        bits = {f"{scheme.bits} bits" for scheme in form.values()} or {"float"}
        context.reporter.say(f"{unit.name}: {bits.pop()}")
    moved = sensitivity.of_all(forms)
    schemes = _schemes(ckpt, forms)
    error = write_static(ckpt, folder, schemes, {}, {}, search=config.search)
    embeds = isinstance(model, Encoder) and model.spec.head == "embedding"
    figure = "cosine_loss" if embeds else "kl"
    effect = {
        "weights": len(schemes),
        "weights_4": sum(scheme.bits == 4 for scheme in schemes.values()),
        "weights_8": sum(scheme.bits == 8 for scheme in schemes.values()),
        "weight_error": error,
        figure: moved,
        f"{figure}_added_up": result.loss,
        f"{figure}_bound": result.bound,
        "tokens": sum(batch.numel() for batch in batches),
    }
    return {name: float(f"{value:.6g}") for name, value in effect.items()}


def _memory(config: MixedConfig, ckpt: Checkpoint, context: StepContext) -> int:
    """The model in float32 twice (one unit may be all of it), hidden states, and the outputs."""
    spec = model_spec_of(ckpt)
    width = spec.num_labels if isinstance(spec, EncoderSpec) else spec.vocab_size
    values = sum(parameter_counts(ckpt).values())
    return 8 * values + 4 * config.tokens * (2 * spec.hidden_size + 2 * max(width, 1)) + _SPARE


SPEC = ModelMethod(
    summary="4 or 8 bits for each weight, by its measured effect, within a budget of bytes",
    config=MixedConfig,
    check=_check,
    predict=_predict,
    run=_run,
    needs_rows=lambda config: True,
    memory=_memory,
)
