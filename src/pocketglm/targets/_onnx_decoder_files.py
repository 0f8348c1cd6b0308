"""A decoder's folder: onnxruntime-genai opens it as it is, and so does plain ONNX Runtime.

model.onnx is small; every weight lies in model.onnx.data, which is written as the checkpoint is
read, a chunk at a time.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Lowered, Reporter
from pocketglm.model.hf import (
    decoder_config,
    decoder_spec_of,
    eos_ids_of,
    is_embedding,
    max_length_of,
)
from pocketglm.model.spec import upstream_spec
from pocketglm.runtimes._cores import usable_cores
from pocketglm.targets._onnx_decoder import OPSET, DecoderGraph, top_k_of
from pocketglm.targets._onnx_external import ExternalData
from pocketglm.targets._onnx_folder import oldest_runtime, part_bytes, port, write_tokenizer
from pocketglm.targets._onnx_genai import genai_config
from pocketglm.targets._onnx_rows import BLOCKS, Rows, block_of, stored_shape
from pocketglm.targets._refusals import scheme_reasons

MODEL = "model.onnx"
_SIXTEEN = 16  # GroupQueryAttention's rotary kernel takes features by this many


def supports(ckpt: Checkpoint, options: ExportOptions) -> list[str]:
    """The reasons why this decoder cannot be lowered; empty if it can."""
    spec = decoder_spec_of(ckpt)
    reasons = []
    if options.opset not in (None, OPSET):
        reasons.append(
            f"opset {options.opset}: a decoder needs ONNX Runtime's own operators and is written "
            f"for opset {OPSET}: leave --opset out"
        )
    whole = top_k_of(spec, options.max_length or max_length_of(ckpt)) is None
    for what, size in (("head_dim", spec.head_dim), ("rotary dims", spec.rope.dims)):
        if whole and size % _SIXTEEN:
            reasons.append(f"{what} {size}: GroupQueryAttention takes multiples of {_SIXTEEN} only")
    return reasons + scheme_reasons(
        ckpt, lambda name, scheme: _refusal(scheme, stored_shape(ckpt, name)[1])
    )


def _refusal(scheme: TensorScheme, columns: int) -> str:
    if scheme.activation == "static":
        return "activation static: this target quantizes activations dynamically or not at all"
    if block_of(scheme, columns):
        return ""
    if scheme.group_size is not None:
        return f"group_size {scheme.group_size}: the operators know {sorted(BLOCKS)}"
    return f"K = {columns} is not a multiple of {min(BLOCKS)}"


def lower(ckpt: Checkpoint, out: Path, options: ExportOptions, reporter: Reporter) -> Lowered:
    """Write model, external data, genai_config.json, config.json and tokenizer into `out`."""
    spec = decoder_spec_of(ckpt)
    context = options.max_length or max_length_of(ckpt)
    with ExternalData(out / f"{MODEL}.data") as data:
        graph = DecoderGraph(spec, Rows(ckpt), data, context, last=options.logits == "last")
        model = graph.build(reporter)
        digest = data.digest
    onnx.save(model, str(out / MODEL))
    threads = options.threads or usable_cores()
    if options.threads is None:
        reporter.say(f"threads: {threads}, as many as cores here; --threads sets the phone's")
    genai = genai_config(
        spec,
        eos_ids_of(ckpt),
        model_file=MODEL,
        context=context,
        threads=threads,
        spinning=options.spinning,
    )
    write_json(out / "genai_config.json", genai)
    config = decoder_config(upstream_spec(spec), ckpt, torch.float32)
    write_json(out / "config.json", config | {"max_position_embeddings": context})
    write_tokenizer(ckpt, out, context)
    operators, cache = graph.g.operators, ckpt.manifest.cache
    kept = "int8" if cache else "float32"
    return Lowered(
        model_file=MODEL,
        inputs=[
            *(port(key, "int64", shape) for key, shape in graph.inputs.items()),
            *(port(key, kept, shape) for key, shape in graph.past.items()),
        ],
        outputs=[
            port(key, "float32" if key == "logits" else kept, shape)
            for key, shape in graph.outputs.items()
        ],
        operators=operators,
        minimum={
            "onnxruntime": oldest_runtime(
                ckpt.manifest.schemes.values(), operators, int8_cache=cache is not None
            ),
            "opset": str(OPSET),
        },
        parts=part_bytes(graph.g),
        activation=_activation(ckpt),
        digests={data.file.name: digest},
    )


def _activation(ckpt: Checkpoint) -> str:
    """What the body's linear layers do to their inputs; every dynamic form is by block here."""
    schemes = [s for name, s in ckpt.manifest.schemes.items() if not is_embedding(name)]
    found = {"none" if s.activation == "none" else "dynamic_block" for s in schemes} or {"none"}
    return found.pop() if len(found) == 1 else "mixed"
