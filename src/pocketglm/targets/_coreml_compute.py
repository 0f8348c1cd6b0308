"""compute.json: the package's functions with their states, and which compute units an app should
allow, chip by chip, and why.

Core ML decides by itself where each operator runs; an app can only say which processors it may
take (`MLModelConfiguration.computeUnits`). These are recommendations from Apple's published rules:
nothing here was run on a device, and the file says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import write_json
from pocketglm.runtimes._coreml_file import Package, Port
from pocketglm.targets._coreml_form import Form

COMPUTE = "compute.json"
# Chip -> the first device with it, the last iOS that it gets (None: still the newest).
_CHIPS: dict[str, tuple[str, int | None]] = {
    "A12": ("iPhone XS, 2018", 18),
    "A13": ("iPhone 11, 2019", None),
    "A14": ("iPhone 12, 2020", None),
    "A15": ("iPhone 13, 2021", None),
    "A16": ("iPhone 14 Pro, 2022", None),
    "A17 Pro": ("iPhone 15 Pro, 2023", None),
    "A18": ("iPhone 16, 2024", None),
    "A19": ("iPhone 17, 2025", None),
    "M1, M2, M3": ("Mac and iPad, 2020", None),
    "M4 and newer": ("iPad Pro and Mac, 2024", None),
}
_INTEGER = ("A17 Pro", "A18", "A19", "M4 and newer")  # INT8 products at a higher rate than fp16
_SOURCES = [
    "https://apple.github.io/coremltools/docs-guides/source/opt-quantization-perf.html",
    "https://apple.github.io/coremltools/docs-guides/source/opt-whats-new.html",
    "https://apple.github.io/coremltools/docs-guides/source/flexible-inputs.html",
    "https://developer.apple.com/documentation/coreml/mlcomputeunits",
    "https://machinelearning.apple.com/research/neural-engine-transformers",
]


def write_compute(folder: Path, package: Package, form: Form, ckpt: Checkpoint) -> None:
    """Write the file for the package that is there."""
    static = any(scheme.activation == "static" for scheme in ckpt.manifest.schemes.values())
    write_json(
        folder / COMPUTE,
        {
            "format": 1,
            "tried": False,
            "deployment_target": f"iOS{form.ios}",
            "default_function": package.default,
            "functions": {
                name: {
                    "inputs": _ports(function.inputs),
                    "outputs": _ports(function.outputs),
                    "states": _ports(function.states),
                }
                for name, function in package.functions.items()
            },
            "layout": {"name": form.layout, "because": form.why},
            "compute_units": form.units,
            "before_ios16": "all" if form.units == "cpuAndNeuralEngine" else form.units,
            "chips": {
                chip: {
                    "first_device": device,
                    "last_ios": last,
                    "compute_units": form.units,
                    "because": _because(form, chip, static),
                }
                for chip, (device, last) in _CHIPS.items()
            },
            "expected_on_the_cpu": _on_the_cpu(package, form),
            "sources": _SOURCES,
        },
    )


def _ports(ports: Mapping[str, Port]) -> list[dict[str, Any]]:
    """Name, type and shape of each; a size that the caller chooses is [least, most]."""
    return [
        {"name": name, "dtype": port.type.dtype, "shape": _sizes(port)}
        for name, port in ports.items()
    ]


def _sizes(port: Port) -> list[Any]:
    return [
        size if size is not None else list(port.ranges[axis]) if port.ranges else None
        for axis, size in enumerate(port.type.shape)
    ]


def _because(form: Form, chip: str, static: bool) -> str:
    if form.units == "cpuOnly":
        return "asked for: also runs in the background, and leaves the GPU to the app"
    if form.units == "all":
        return "asked for: Core ML chooses among CPU, GPU and Neural Engine"
    if form.units == "cpuAndGPU":
        if static:
            return "INT8 inputs are rounded on the way: only the Neural Engine gains from them"
        return "linear layers; weights are decompressed where they are used"
    if static and chip in _INTEGER:
        return "its Neural Engine multiplies INT8 by INT8 faster than fp16"
    if static:
        return "its Neural Engine multiplies in fp16: INT8 inputs save memory, not time"
    return "fixed shapes and 1x1 convolutions in fp16"


def _on_the_cpu(package: Package, form: Form) -> dict[str, Any]:
    """Operators that the Neural Engine has no type for: it computes fp16 and INT8."""
    if form.units in ("cpuAndGPU", "cpuOnly"):
        return {"operators": {}, "because": "the Neural Engine is not asked for"}
    found: Counter[str] = Counter()
    for function in package.functions.values():
        for operation in function.operations:
            kinds = {type_.dtype for _, type_ in operation.outputs}
            if operation.type != "const" and kinds - {"fp16", "int8"}:
                found[operation.type] += 1
            elif operation.type == "gather":
                found["gather"] += 1
    return {
        "operators": dict(sorted(found.items())),
        "because": "int32, bool and float32 values, and look-ups by index; all of them stand "
        "before the first layer or behind the last",
    }
