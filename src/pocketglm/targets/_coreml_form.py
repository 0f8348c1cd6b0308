"""Which Core ML form a checkpoint takes: deployment target, compute units, arithmetic.

Core ML's operators by the first iOS that has them: INT8 weights per channel 16
(`constexpr_affine_dequantize`), INT8 activations 17 (`quantize`, `dequantize`), INT4 weights and
scales by group 18 (`constexpr_blockwise_shift_scale`), a state 18.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ComputeUnits, ExportOptions
from pocketglm.model.hf import decoder_spec_of, is_decoder
from pocketglm.ops.stored import as_tensor, read_grid

DEPLOYMENTS = ("iOS15", "iOS16", "iOS17", "iOS18")
_MAC = {15: "12", 16: "13", 17: "14", 18: "15"}  # the macOS that has the same Core ML
# Core ML holds scales as fp16; none may be rounded, or lie where fp16 has few digits.
_SMALLEST, _LARGEST = 2.0**-14, 65504.0


@dataclass(frozen=True, slots=True)
class Form:
    """How a model is written.

    ios: the deployment target. layout: channels: values [1, features, 1, tokens] and convolutions
    of width 1, for the Neural Engine; rows: values [1, tokens, features] and linear layers. units:
    what the app should allow. half: values are fp16, else float32. why: of the layout, for people.
    """

    ios: int
    layout: Literal["channels", "rows"]
    units: ComputeUnits
    half: bool
    why: str

    @property
    def channels(self) -> bool:
        return self.layout == "channels"

    @property
    def minimum(self) -> dict[str, str]:
        """The systems that open it."""
        return {"iOS": str(self.ios), "macOS": _MAC[self.ios]}


def needed_ios(scheme: TensorScheme) -> tuple[int, str]:
    """The first iOS that has what a scheme needs, and its name."""
    if scheme.bits == 4:
        return 18, "INT4 weights"
    if scheme.group_size is not None:
        return 18, f"INT8 weights by groups of {scheme.group_size}"
    if scheme.activation == "static":
        return 17, "static INT8 activations"
    return 16, "INT8 weights"


def form_of(ckpt: Checkpoint, options: ExportOptions) -> Form:
    """The form for these options, which `supports` has accepted."""
    lowest = max(_needs(ckpt), default=(15, ""))[0]
    ios = int(options.deployment.removeprefix("iOS")) if options.deployment else lowest
    half = options.compute_precision != "float32" and scales_are_half(ckpt)
    if _chooses(ckpt) and options.compute_precision is None:
        half = False
    units, why = options.compute_units, "asked for"
    if units is None or units == "all":
        layout_units, why = _default(ckpt, half)
        units = units or layout_units
    else:
        layout_units = units
    layout: Literal["channels", "rows"] = (
        "channels" if layout_units == "cpuAndNeuralEngine" else "rows"
    )
    return Form(ios, layout, units, half, why)


def _default(ckpt: Checkpoint, half: bool) -> tuple[ComputeUnits, str]:
    """The compute units for a model of this kind, and why."""
    if not half:
        return "cpuAndGPU", "values in float32, which the Neural Engine does not have"
    if is_decoder(ckpt):
        return "cpuAndGPU", (
            "a decoder reads its whole weight and cache at each token: the GPU decompresses INT4 "
            "groups on the way, the Neural Engine gains from 1x1 convolutions of many tokens"
        )
    if any(scheme.group_size is not None for scheme in ckpt.manifest.schemes.values()):
        return "cpuAndGPU", "scales by group: Core ML is fast with them on the GPU"
    return "cpuAndNeuralEngine", "a short text through all layers at once: least energy per answer"


def _chooses(ckpt: Checkpoint) -> bool:
    """Whether a rounding may change which keys a query looks at (top-k attention)."""
    return is_decoder(ckpt) and decoder_spec_of(ckpt).top_k is not None


def _needs(ckpt: Checkpoint) -> list[tuple[int, str]]:
    found = {needed_ios(scheme) for scheme in ckpt.manifest.schemes.values()}
    if is_decoder(ckpt):
        found.add((18, "a decoder's cache (a state)"))
    return sorted(found)


def form_reasons(ckpt: Checkpoint, options: ExportOptions) -> list[str]:
    """Why this checkpoint cannot be written for the deployment target and units asked for."""
    reasons = []
    if options.deployment is not None and options.deployment not in DEPLOYMENTS:
        known = ", ".join(DEPLOYMENTS)
        return [f"deployment target {options.deployment}: offered are {known}"]
    if options.deployment:
        ios = int(options.deployment.removeprefix("iOS"))
        missing = [(first, what) for first, what in _needs(ckpt) if first > ios]
        reasons += [
            f"{what}: needs iOS{first}, not {options.deployment}" for first, what in missing
        ]
        if missing:
            reasons[-1] += f": the nearest that works is iOS{max(missing)[0]}"
    whole = options.compute_precision == "float32"
    if _chooses(ckpt) and options.compute_precision is None:
        whole = True
    if not whole and not scales_are_half(ckpt):
        why = "scales that fp16 does not hold exactly"
        if options.compute_precision == "float16":
            reasons.append(f"{why}: use float32, or quantize the model again")
        whole = True
    if whole and options.compute_units == "cpuAndNeuralEngine":
        reasons.append(
            "values in float32: the Neural Engine computes in fp16: use compute units cpuAndGPU or "
            "cpuOnly"
        )
    return reasons


def static_reasons(ckpt: Checkpoint) -> list[str]:
    """Why static activations cannot be written."""
    names = [n for n, scheme in ckpt.manifest.schemes.items() if scheme.activation == "static"]
    if names and is_decoder(ckpt):
        return ["static activations are for encoders: compress with activation: none"]
    reasons = []
    for name in names:
        grid = read_grid(ckpt, name)
        if grid is not None and not _SMALLEST <= grid.scale <= _LARGEST:
            reasons.append(
                f"{name}: the scale of its input is {grid.scale:.3g}, Core ML has fp16 from "
                f"{_SMALLEST:.3g} to {_LARGEST:.0f}: compress with activation: none"
            )
    return reasons


def scales_are_half(ckpt: Checkpoint) -> bool:
    """Whether fp16 holds every scale of the weights exactly, with all its digits."""
    return all(_is_half(ckpt, name) for name in ckpt.manifest.schemes)


def _is_half(ckpt: Checkpoint, name: str) -> bool:
    scales = as_tensor(ckpt.read(f"{name}_scale")).float().numpy()
    inside = (scales >= _SMALLEST) & (scales <= _LARGEST)
    if not inside.all():
        return False
    return bool(np.array_equal(scales.astype(np.float16).astype(np.float32), scales))


def activation_of(schemes: Iterable[TensorScheme]) -> str:
    """What the file does to the linear layers' inputs. Core ML has no dynamic form: they stay
    float there.
    """
    found = {"static" if scheme.activation == "static" else "none" for scheme in schemes} or {
        "none"
    }
    return found.pop() if len(found) == 1 else "mixed"
