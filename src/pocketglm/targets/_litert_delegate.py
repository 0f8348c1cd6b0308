"""delegate.json: which delegate an app should ask for, by what it prefers, and why.

    XNNPACK   the CPU; measured here, when the file is written
    GPU       takes FULLY_CONNECTED to version 9; weights with scales per channel or block are 12.
              LiteRT's own accelerator runs published models of such weights: not tried here
    NNAPI     takes it to version 5; deprecated since Android 15

Sources: the delegates' own checks (model_builder.cc, nnapi_delegate.cc), Android's migration guide
for NNAPI. GPU and NNAPI were not run: the file says so.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pocketglm.artifacts.manifest import write_json
from pocketglm.errors import require
from pocketglm.runtimes._quiet import silence

DELEGATE = "delegate.json"
Preference = Literal["low_power", "fast_single_answer", "sustained_speed"]
PREFERENCES: tuple[Preference, ...] = ("low_power", "fast_single_answer", "sustained_speed")
_THREADS: dict[Preference, int] = {"low_power": 1, "fast_single_answer": 4, "sustained_speed": 2}
_WHY: dict[Preference, str] = {
    "low_power": "one core is the least power that a CPU needs",
    "fast_single_answer": "nothing is compiled before the first answer; as many threads as big "
    "cores, at most 4",
    "sustained_speed": "two cores stay below the heat at which a phone slows down",
}
_NNAPI = {  # ANeuralNetworks preference codes
    "low_power": 0,
    "fast_single_answer": 1,
    "sustained_speed": 2,
}
_GPU = {
    "low_power": "INFERENCE_PREFERENCE_SUSTAINED_SPEED",
    "fast_single_answer": "INFERENCE_PREFERENCE_FAST_SINGLE_ANSWER",
    "sustained_speed": "INFERENCE_PREFERENCE_SUSTAINED_SPEED",
}


def write_delegates(folder: Path, model: Path, *, quantized: bool, decoder: bool) -> None:
    """Write the file for the model that is there."""
    gpu = _gpu_reasons(quantized, decoder)
    choices = {}
    for preference in PREFERENCES:
        on_gpu = not gpu and preference != "fast_single_answer"
        choices[preference] = {
            "delegate": "gpu" if on_gpu else "xnnpack",
            "otherwise": "xnnpack" if on_gpu else "cpu",
            "because": "all products are in float: the GPU takes them, and computes in float16"
            if on_gpu
            else _WHY[preference],
            "xnnpack": {"threads": _THREADS[preference]},
            "gpu": {"inference_preference": _GPU[preference], "precision_loss_allowed": True},
            "nnapi": {"execution_preference": _NNAPI[preference]},
        }
    write_json(
        folder / DELEGATE,
        {
            "format": 1,
            "default": "fast_single_answer",
            "preferences": choices,
            "delegates": {
                "xnnpack": _xnnpack(model),
                "gpu": _gpu(gpu),
                "nnapi": _nnapi(quantized, decoder),
            },
        },
    )


def _xnnpack(model: Path) -> dict[str, Any]:
    return {
        "usable": True,
        "needs": "nothing: the LiteRT interpreter uses it by default; set the number of threads",
        "measured": xnnpack_share(model),
    }


def _gpu_reasons(quantized: bool, decoder: bool) -> list[str]:
    reasons = []
    if quantized:
        reasons.append(
            "weights in integers with scales per channel or block: FULLY_CONNECTED is version 12, "
            "the GPU delegate of TensorFlow Lite takes it to version 9, these products then stay "
            "on the CPU; LiteRT's own GPU accelerator (CompiledModel) is said to take them"
        )
    if decoder:
        reasons.append(
            "a decoder's cache update and lookups by position stay on the CPU: the graph falls "
            "apart into pieces, and each step copies between them"
        )
    return reasons


def _gpu(reasons: list[str]) -> dict[str, Any]:
    return {
        "usable": not reasons,
        "reasons": reasons,
        "needs": [
            "a float32 export",
            "inputs of the file's own length: do not resize them",
            "OpenCL or OpenGL ES 3.1 (Android), Metal (iOS)",
        ],
        "tried": False,
    }


def _nnapi(quantized: bool, decoder: bool) -> dict[str, Any]:
    reasons = ["deprecated since Android 15 (API level 35): do not begin with it"]
    if quantized:
        reasons.append(
            "weights in integers with scales per channel or block: FULLY_CONNECTED is version 12, "
            "the delegate takes it to version 5; these products stay on the CPU"
        )
    if decoder:
        reasons.append("a decoder's cache update and lookups by position stay on the CPU")
    return {
        "usable": not (quantized or decoder),
        "reasons": reasons,
        "needs": [
            "a float32 export",
            "inputs of the file's own length: do not resize them",
            "Android 8.1 to 14 (API level 27 to 34)",
        ],
        "deprecated_from": {"android": 15, "api_level": 35},
        "replaced_by": [
            "LiteRT in Google Play services, with the GPU delegate",
            "LiteRT's CompiledModel with the chip maker's NPU accelerator",
            "XNNPACK on the CPU",
        ],
        "tried": False,
    }


def xnnpack_share(model: Path) -> dict[str, Any]:
    """How much of the file's first graph XNNPACK takes here: operators, those that it takes, in how
    many pieces, and what is left.
    """
    litert = require("ai_edge_litert.interpreter", extra="litert")
    with silence():
        interpreter = litert.Interpreter(model_path=str(model), num_threads=1)
        interpreter.allocate_tensors()
    operators = interpreter._get_ops_details()  # there is no public way
    made = {int(i): o for o in operators for i in o["outputs"]}  # the delegate's nodes come last
    wanted = [int(entry["index"]) for entry in interpreter.get_output_details()]
    seen: dict[int, Any] = {}
    while wanted:
        operator = made.get(wanted.pop())
        if operator is not None and operator["index"] not in seen:
            seen[operator["index"]] = operator
            wanted.extend(int(i) for i in operator["inputs"] if i >= 0)
    left = Counter(o["op_name"] for o in seen.values())
    pieces = left.pop("DELEGATE", 0)
    total = sum(o["op_name"] != "DELEGATE" for o in operators)
    return {
        "graph": next(iter(interpreter.get_signature_list())),
        "operators": total,
        "delegated": total - left.total(),
        "pieces": pieces,
        "left": dict(sorted(left.items())),
    }
