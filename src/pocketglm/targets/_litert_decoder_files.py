"""The folder of a decoder: model.tflite for LiteRT, model.litertlm for LiteRT-LM, config.json,
delegate.json and the tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import write_json
from pocketglm.contracts import ExportOptions, Lowered, Reporter
from pocketglm.model.hf import decoder_config, decoder_spec_of, eos_ids_of, max_length_of
from pocketglm.model.spec import upstream_spec
from pocketglm.targets._litert_decoder import DECODE, DecoderModel
from pocketglm.targets._litert_delegate import write_delegates
from pocketglm.targets._litert_files import (
    MINIMUM,
    MODEL,
    activation_of,
    part_bytes,
    ports,
    weight_reasons,
)
from pocketglm.targets._litert_lm import write_bundle
from pocketglm.targets._litert_weights import Weights
from pocketglm.targets._onnx_folder import write_tokenizer


def supports(ckpt: Checkpoint, options: ExportOptions) -> list[str]:
    """The reasons why this decoder cannot be lowered; empty if it can."""
    reasons = weight_reasons(ckpt)
    if any(scheme.activation == "static" for scheme in ckpt.manifest.schemes.values()):
        reasons.append("static activations are for encoders: compress with dynamic_block")
    if ckpt.manifest.cache is not None:
        reasons.append(
            "an INT8 cache: its graphs keep keys and values in float32: export the checkpoint from "
            "before quantize_kv, or to onnx"
        )
    return reasons


def lower(ckpt: Checkpoint, out: Path, options: ExportOptions, reporter: Reporter) -> Lowered:
    """Write the model file, config.json and the tokenizer files into `out`."""
    spec, weights = decoder_spec_of(ckpt), Weights(ckpt)
    context = options.max_length or max_length_of(ckpt)
    plan = DecoderModel(spec, weights, context, last=options.logits == "last")
    model = plan.build(reporter)
    model.write(out / MODEL)
    config = decoder_config(upstream_spec(spec), ckpt, torch.float32)
    write_json(out / "config.json", config | {"max_position_embeddings": context})
    write_tokenizer(ckpt, out, context)
    quantized = bool(weights.linear_schemes)
    write_delegates(out, out / MODEL, quantized=quantized, decoder=True)
    if stops := eos_ids_of(ckpt):
        reporter.say("writing the LiteRT-LM bundle")
        write_bundle(out, out / MODEL, context=context, bos_id=spec.bos_id, eos_ids=stops)
    else:
        reporter.say("no model.litertlm: LiteRT-LM needs a token that ends a text, there is none")
    decode = next(graph for graph in model.graphs if graph.signature == DECODE)
    kinds = {"tokens": "int32", "input_pos": "int32"}
    outputs = {"logits": decode.outputs["logits"], **decode.outputs}
    return Lowered(
        model_file=MODEL,
        inputs=[
            entry | {"dtype": kinds.get(str(entry["name"]), "float32")}
            for entry in ports(decode, decode.inputs, "float32")
        ],
        outputs=ports(decode, outputs, "float32"),
        operators=model.operators,
        minimum=MINIMUM,
        parts=part_bytes(model),
        activation=activation_of(weights.linear_schemes),
    )
