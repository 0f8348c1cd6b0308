"""The folder of an encoder for LiteRT: model.tflite, config.json, delegate.json, the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Lowered, Reporter
from pocketglm.model.hf import is_embedding, max_length_of, role_of, spec_of
from pocketglm.targets._litert_delegate import write_delegates
from pocketglm.targets._litert_encoder import EncoderGraph
from pocketglm.targets._litert_graph import FlatModel, Subgraph
from pocketglm.targets._litert_linear import refusal
from pocketglm.targets._litert_ranges import result_ranges
from pocketglm.targets._litert_weights import Weights
from pocketglm.targets._onnx_folder import encoder_config, port, write_tokenizer
from pocketglm.targets._onnx_rows import stored_shape
from pocketglm.targets._refusals import scheme_reasons

MODEL = "model.tflite"
MINIMUM = {"ai-edge-litert": "2.3"}  # the only one that the files were tried with


def supports(ckpt: Checkpoint, options: ExportOptions) -> list[str]:
    """The reasons why this encoder cannot be lowered; empty if it can."""
    return weight_reasons(ckpt)


def weight_reasons(ckpt: Checkpoint) -> list[str]:
    """The reasons that lie in the weights' schemes."""

    def refuse(name: str, scheme: TensorScheme) -> str:
        return refusal(scheme, stored_shape(ckpt, name)[1], linear=not is_embedding(name))

    return scheme_reasons(ckpt, refuse)


def lower(ckpt: Checkpoint, out: Path, options: ExportOptions, reporter: Reporter) -> Lowered:
    """Write the model file, config.json and the tokenizer files into `out`."""
    spec = spec_of(ckpt)
    max_length = options.max_length or max_length_of(ckpt)
    weights = Weights(ckpt, result_ranges(ckpt, max_length))
    graph = EncoderGraph(spec, weights, max_length)
    model = graph.build(reporter)
    model.write(out / MODEL)
    write_json(out / "config.json", encoder_config(ckpt, spec, max_length))
    write_tokenizer(ckpt, out, max_length)
    quantized = bool(weights.linear_schemes)
    write_delegates(out, out / MODEL, quantized=quantized, decoder=False)
    return Lowered(
        model_file=MODEL,
        inputs=ports(graph.g, graph.g.inputs, "int32", {1: "sequence"}),
        outputs=ports(graph.g, graph.g.outputs, "float32"),
        operators=model.operators,
        minimum=MINIMUM,
        parts=part_bytes(model),
        activation=activation_of(weights.linear_schemes),
    )


def activation_of(schemes: Iterable[TensorScheme]) -> str:
    """What the linear layers do to their inputs: a dynamic grid is always one per token."""
    found = {
        "dynamic_token" if scheme.activation.startswith("dynamic") else scheme.activation
        for scheme in schemes
    } or {"none"}
    return found.pop() if len(found) == 1 else "mixed"


def ports(
    g: Subgraph, tensors: dict[str, int], dtype: str, free: dict[int, str] | None = None
) -> list[dict[str, object]]:
    """Inputs or outputs as export.json lists them; `free`: names of axes of any size."""
    return [
        port(
            name,
            dtype,
            tuple((free or {}).get(axis, size) for axis, size in enumerate(g.shapes[index])),
        )
        for name, index in tensors.items()
    ]


def part_bytes(model: FlatModel) -> dict[str, int]:
    """Bytes of the constants by part of the model."""
    parts: dict[str, int] = {}
    for constant, size in model.constant_bytes().items():
        name = constant.removesuffix(".scales")
        role = role_of(name if name.endswith((".weight", ".bias")) else f"{name}.weight")
        parts[role] = parts.get(role, 0) + size
    return dict(sorted(parts.items()))
