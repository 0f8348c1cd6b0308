"""The folder of a Core ML export: model.mlpackage, compute.json, config.json and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Lowered, Reporter
from pocketglm.model.hf import (
    decoder_config,
    decoder_spec_of,
    is_decoder,
    max_length_of,
    role_of,
    spec_of,
)
from pocketglm.model.spec import DecoderSpec, EncoderSpec, upstream_spec
from pocketglm.ops.stored import parameter_counts
from pocketglm.targets._coreml_check import check_package, expected
from pocketglm.targets._coreml_compute import write_compute
from pocketglm.targets._coreml_decoder import DECODE, PREFILL, DecoderGraph, prompt_of
from pocketglm.targets._coreml_encoder import EncoderGraph
from pocketglm.targets._coreml_form import (
    Form,
    activation_of,
    form_of,
    form_reasons,
    static_reasons,
)
from pocketglm.targets._coreml_graph import Graph, forget_names
from pocketglm.targets._coreml_package import MODEL, write_package
from pocketglm.targets._litert_weights import Weights
from pocketglm.targets._onnx_folder import encoder_config, port, write_tokenizer

MAIN = "main"
_BYTES = 6  # for a value of a float weight, at most; the converter holds the whole model


def supports(ckpt: Checkpoint, options: ExportOptions) -> list[str]:
    """The reasons why this checkpoint cannot be lowered; empty if it can."""
    reasons = form_reasons(ckpt, options) + static_reasons(ckpt)
    if ckpt.manifest.cache is not None:
        reasons.append(
            "an INT8 cache: Core ML's states are fp16: export the checkpoint from before "
            "quantize_kv, or to onnx"
        )
    needed = _BYTES * sum(parameter_counts(ckpt).values())
    if options.max_memory is not None and needed > options.max_memory:
        reasons.append(
            f"coremltools holds the whole model: about {needed >> 20} MB, --max-memory allows "
            f"{options.max_memory >> 20} MB"
        )
    return reasons


def lower(ckpt: Checkpoint, out: Path, options: ExportOptions, reporter: Reporter) -> Lowered:
    """Write the package, config.json and the tokenizer files into `out`.

    Raises:
        MissingExtraError: coremltools is not installed.
        UnsupportedError: a weight holds what fp16 cannot.
        ParityError: the package that was written is not what it should be.
    """
    form = form_of(ckpt, options)
    length = options.max_length or max_length_of(ckpt)
    reporter.say(
        f"Core ML for iOS{form.ios} (macOS {form.minimum['macOS']}) and newer, compute units "
        f"{form.units}: {form.why}"
    )
    forget_names()
    build = _decoder if is_decoder(ckpt) else _encoder
    spec, graphs, inputs, outputs = build(ckpt, form, length, options)
    first = next(iter(graphs.values()))
    default = DECODE if DECODE in graphs else MAIN
    write_package(out / MODEL, graphs, default, f"{ckpt.path.name}, by PocketGLM")
    package = check_package(
        ckpt, out / MODEL, expected(spec, form, _used(ckpt, spec)), first.quantized
    )
    _write_config(ckpt, out, spec, length)
    write_compute(out, package, form, ckpt)
    operators: dict[str, int] = {}
    for function in package.functions.values():
        for kind, count in function.counts.items():
            operators[kind] = operators.get(kind, 0) + count
    return Lowered(
        model_file=MODEL,
        inputs=inputs,
        outputs=outputs,
        operators=dict(sorted(operators.items())),
        minimum=form.minimum,
        parts=_part_bytes(graphs),
        activation=activation_of(Weights(ckpt).linear_schemes),
        floats="fp16" if form.half else "fp32",
        cache="float16",
    )


Built = tuple[EncoderSpec | DecoderSpec, dict[str, Graph], list[dict[str, Any]], list[Any]]


def _encoder(ckpt: Checkpoint, form: Form, length: int, options: ExportOptions) -> Built:
    spec = spec_of(ckpt)
    graph = EncoderGraph(spec, Weights(ckpt), form, length)
    shape: tuple[Any, ...] = (1, length if form.channels else "sequence")
    width = spec.num_labels or spec.hidden_size
    return (
        spec,
        {MAIN: graph.build()},
        [port(name, "int32", shape) for name in ("input_ids", "attention_mask")],
        [port(graph.output, "float32", (1, width))],
    )


def _decoder(ckpt: Checkpoint, form: Form, length: int, options: ExportOptions) -> Built:
    spec, weights, every = decoder_spec_of(ckpt), Weights(ckpt), options.logits == "all"
    graphs = {
        name: DecoderGraph(spec, weights, form, length, tokens).build(every=every)
        for name, tokens in ((PREFILL, prompt_of(length)), (DECODE, 1))
    }
    tokens = "tokens" if every else 1
    return (
        spec,
        graphs,
        [port("input_ids", "int32", (1, "tokens")), port("position", "int32", (1,))],
        [port("logits", "float32", (1, tokens, spec.vocab_size))],
    )


def _used(ckpt: Checkpoint, spec: EncoderSpec | DecoderSpec) -> dict[str, TensorScheme]:
    """The quantized weights that the model uses: an embedding model may carry a pooler."""
    unused = isinstance(spec, EncoderSpec) and spec.head == "embedding"
    return {
        name: scheme
        for name, scheme in ckpt.manifest.schemes.items()
        if not (unused and "pooler." in name)
    }


def _write_config(
    ckpt: Checkpoint, out: Path, spec: EncoderSpec | DecoderSpec, length: int
) -> None:
    if isinstance(spec, EncoderSpec):
        write_json(out / "config.json", encoder_config(ckpt, spec, length))
    else:
        config = decoder_config(upstream_spec(spec), ckpt, torch.float16)
        write_json(out / "config.json", config | {"max_position_embeddings": length})
    write_tokenizer(ckpt, out, length)


def _part_bytes(graphs: Mapping[str, Graph]) -> dict[str, int]:
    """Bytes of the constants, which all functions share, by part of the model."""
    parts: dict[str, int] = {}
    for graph in graphs.values():
        for name, size in graph.sizes.items():
            parts[name] = size
    roles: dict[str, int] = {}
    for name, size in parts.items():
        role = role_of(name)
        roles[role] = roles.get(role, 0) + size
    return dict(sorted(roles.items()))
