"""An encoder's folder: for ONNX Runtime and, in the same folder, for Transformers.js.

Forms: float32; INT8 with dynamic activations (fast, one scale per activation tensor); INT8 and
INT4 by block or with float activations (accurate); INT8 with static activations (QDQ: what NPUs
and other runtimes read); `--opset 13`: float32 or static INT8 from standard operators alone. The
default opset is 17, the first with LayerNormalization. What each weight becomes is in
`_onnx_linear.py`, the graph in `_onnx_encoder.py`.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Lowered, Reporter
from pocketglm.model.hf import is_embedding, max_length_of, spec_of
from pocketglm.targets._onnx_encoder import (
    DEFAULT_OPSET,
    INPUTS,
    STANDARD_OPSET,
    EncoderGraph,
)
from pocketglm.targets._onnx_folder import (
    encoder_config,
    oldest_runtime,
    part_bytes,
    port,
    write_tokenizer,
)
from pocketglm.targets._onnx_linear import Weights, is_standard, refusal
from pocketglm.targets._refusals import scheme_reasons

# Bits of the linear layers -> the file name and `dtype` by which Transformers.js finds the file.
_FILES = {32: ("model.onnx", "fp32"), 8: ("model_quantized.onnx", "q8"), 4: ("model_q4.onnx", "q4")}


def supports(ckpt: Checkpoint, options: ExportOptions) -> list[str]:
    """The reasons why this checkpoint cannot be lowered; empty if it can."""
    reasons = []
    opset = options.opset or DEFAULT_OPSET
    schemes = ckpt.manifest.schemes
    if opset not in (STANDARD_OPSET, DEFAULT_OPSET):
        reasons.append(
            f"opset {opset}: offered are {STANDARD_OPSET} (standard operators only, float32 or "
            f"static INT8) and {DEFAULT_OPSET} (default)"
        )
    own = [n for n, s in schemes.items() if not is_standard(s, linear=not is_embedding(n))]
    if opset == STANDARD_OPSET and own:
        reasons.append(
            f"opset {STANDARD_OPSET} is float32 or static INT8 only, and {len(own)} weights are "
            f"quantized otherwise, e.g. {own[0]}: leave --opset out, compress with "
            "quantize_static, or export the checkpoint from before its quantization"
        )
    return reasons + scheme_reasons(ckpt, lambda n, s: refusal(s, linear=not is_embedding(n)))


def lower(ckpt: Checkpoint, out: Path, options: ExportOptions, reporter: Reporter) -> Lowered:
    """Write the model file, config.json and the tokenizer files into `out`."""
    spec = spec_of(ckpt)
    max_length = options.max_length or max_length_of(ckpt)
    graph = EncoderGraph(spec, Weights(ckpt), max_length, options.opset or DEFAULT_OPSET)
    model = graph.build(reporter)
    # The linear layers name the file; the embedding, if it alone is quantized.
    schemes = _linear_schemes(ckpt) or ckpt.manifest.schemes.values()
    name, dtype = _FILES[min((scheme.bits for scheme in schemes), default=32)]
    (out / "onnx").mkdir(exist_ok=True)
    file = out / "onnx" / name
    onnx.save(model, str(file))
    config = encoder_config(ckpt, spec, max_length)
    write_json(out / "config.json", config | {"transformers.js_config": {"dtype": dtype}})
    write_tokenizer(ckpt, out, max_length)
    operators = graph.g.operators
    return Lowered(
        model_file=file.relative_to(out).as_posix(),
        inputs=[port(key, "int64", shape) for key, shape in INPUTS.items()],
        outputs=[port(key, "float32", shape) for key, shape in graph.outputs.items()],
        operators=operators,
        minimum={
            "onnxruntime": oldest_runtime(_linear_schemes(ckpt), operators),
            "opset": str(graph.opset),
        },
        parts=part_bytes(graph.g),
        activation=_activation(ckpt),
    )


def _linear_schemes(ckpt: Checkpoint) -> list[TensorScheme]:
    return [s for name, s in ckpt.manifest.schemes.items() if not is_embedding(name)]


def _activation(ckpt: Checkpoint) -> str:
    """What the linear layers do to their inputs; MatMulNBits quantizes them by block at most."""
    block = {"dynamic_token": "dynamic_block"}
    found = {block.get(s.activation, s.activation) for s in _linear_schemes(ckpt)} or {"none"}
    return found.pop() if len(found) == 1 else "mixed"
