"""The folder for ExecuTorch: model.pte, config.json and the tokenizer's files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Lowered, Reporter
from pocketglm.model.hf import (
    decoder_config,
    decoder_spec_of,
    eos_ids_of,
    is_decoder,
    is_embedding,
    max_length_of,
    spec_of,
)
from pocketglm.model.spec import upstream_spec
from pocketglm.targets._executorch_decoder import DecoderGraph
from pocketglm.targets._executorch_encoder import EncoderGraph
from pocketglm.targets._executorch_layers import refusal
from pocketglm.targets._executorch_lower import LoweredModule, lower_module
from pocketglm.targets._litert_ranges import result_ranges
from pocketglm.targets._litert_weights import Weights
from pocketglm.targets._onnx_folder import encoder_config, port, write_tokenizer
from pocketglm.targets._onnx_rows import stored_shape
from pocketglm.targets._refusals import scheme_reasons

MODEL = "model.pte"
MINIMUM = {"executorch": "1.5"}  # the only one that the files were tried with
_EXAMPLE = 4  # tokens that the module is traced with; 0 and 1 would be taken for fixed sizes
_ROLES = {
    **dict.fromkeys(("tokens", "words", "positions"), "embedding"),
    **dict.fromkeys(("query", "key", "value", "output"), "attention"),
    **dict.fromkeys(("gate", "up", "down"), "ffn"),
    **dict.fromkeys(("head", "pooler", "classifier"), "head"),
}


def supports(ckpt: Checkpoint, options: ExportOptions) -> list[str]:
    """The reasons why this checkpoint cannot be lowered; empty if it can."""
    reasons = _scheme_reasons(ckpt)
    if options.opset is not None:
        reasons.append(f"opset {options.opset}: that is ONNX's, leave --opset out")
    static = any(scheme.activation == "static" for scheme in ckpt.manifest.schemes.values())
    if is_decoder(ckpt) and static:
        reasons.append("static activations are for encoders: compress with dynamic_block")
    if ckpt.manifest.cache is not None:
        reasons.append(
            "an INT8 cache: its file keeps keys and values in float32: export the checkpoint from "
            "before quantize_kv, or to onnx"
        )
    return reasons


def _scheme_reasons(ckpt: Checkpoint) -> list[str]:
    def refuse(name: str, scheme: TensorScheme) -> str:
        return refusal(scheme, stored_shape(ckpt, name)[1], linear=not is_embedding(name))

    reasons = scheme_reasons(ckpt, refuse)
    if not (is_decoder(ckpt) and decoder_spec_of(ckpt).tied):
        return reasons
    # The head reads the embedding's integers by a linear layer's kernel.
    dynamic = "dynamic_token" if Weights(ckpt).dynamic else "none"

    def refuse_head(name: str, scheme: TensorScheme) -> str:
        read = scheme.model_copy(update={"activation": dynamic})
        cause = refusal(read, stored_shape(ckpt, name)[1], linear=True)
        return cause and f"as the head: {cause}"

    tables = [name for name in ckpt.manifest.schemes if is_embedding(name)]
    return reasons + scheme_reasons(ckpt, refuse_head, tables, tied=True)


def lower(ckpt: Checkpoint, out: Path, options: ExportOptions, reporter: Reporter) -> Lowered:
    """Write the model file, config.json and the tokenizer's files into `out`.

    Raises:
        MissingExtraError: executorch is not installed.
    """
    length = options.max_length or max_length_of(ckpt)
    form = _decoder if is_decoder(ckpt) else _encoder
    graph, lowered, inputs, output = form(ckpt, out, options, length, reporter)
    (out / MODEL).write_bytes(lowered.data)
    write_tokenizer(ckpt, out, length)
    return Lowered(
        model_file=MODEL,
        inputs=inputs,
        outputs=[output],
        operators=lowered.operators,
        minimum=MINIMUM,
        links=_links(lowered),
        parts=_part_bytes(graph),
        activation=_activation(Weights(ckpt).linear_schemes),
    )


def _links(lowered: LoweredModule) -> list[str]:
    """Also the names of the frameworks for Apple's systems; Android's package has all of them."""
    quantized = any(
        node.op.startswith("quantized_decomposed.") and not node.delegated for node in lowered.nodes
    )
    return ["backend_xnnpack", "kernels_optimized", *(["kernels_quantized"] if quantized else [])]


_Parts = tuple[nn.Module, LoweredModule, list[dict[str, Any]], dict[str, Any]]


def _decoder(
    ckpt: Checkpoint, out: Path, options: ExportOptions, length: int, reporter: Reporter
) -> _Parts:
    spec = decoder_spec_of(ckpt)
    graph = DecoderGraph(spec, Weights(ckpt), length, options.logits)
    metadata = {
        "get_max_seq_len": length,
        "get_max_context_len": length,
        "get_vocab_size": spec.vocab_size,
        "get_n_layers": spec.num_layers,
        "get_eos_ids": list(eos_ids_of(ckpt)),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": False,
        "enable_dynamic_shape": True,
    }
    if spec.bos_id is not None:
        metadata["get_bos_id"] = spec.bos_id
    example = torch.zeros(1, min(_EXAMPLE, length), dtype=torch.int64)
    free = torch.export.Dim("tokens", min=1, max=length)
    reporter.say("lowering the decoder to ExecuTorch")
    lowered = lower_module(
        graph, (example, torch.zeros(1, dtype=torch.int64)), ({1: free}, None), metadata
    )
    config = decoder_config(upstream_spec(spec), ckpt, torch.float32)
    write_json(out / "config.json", config | {"max_position_embeddings": length})
    inputs = [port("tokens", "int64", (1, "sequence")), port("input_pos", "int64", (1,))]
    shape = (1, spec.vocab_size) if options.logits == "last" else (1, "sequence", spec.vocab_size)
    return graph, lowered, inputs, port("logits", "float32", shape)


def _encoder(
    ckpt: Checkpoint, out: Path, options: ExportOptions, length: int, reporter: Reporter
) -> _Parts:
    spec = spec_of(ckpt)
    graph = EncoderGraph(spec, Weights(ckpt, result_ranges(ckpt, length)), length)
    example = torch.ones(1, min(_EXAMPLE, length), dtype=torch.int64)
    free = torch.export.Dim("tokens", min=1, max=length)
    reporter.say("lowering the encoder to ExecuTorch")
    lowered = lower_module(graph, (example, example.clone()), ({1: free}, {1: free}))
    write_json(out / "config.json", encoder_config(ckpt, spec, length))
    names = ("input_ids", "attention_mask")
    inputs = [port(name, "int64", (1, "sequence")) for name in names]
    embeds = spec.head == "embedding"
    output = port(
        "sentence_embedding" if embeds else "logits",
        "float32",
        (1, spec.hidden_size if embeds else spec.num_labels),
    )
    return graph, lowered, inputs, output


def _activation(schemes: Iterable[TensorScheme]) -> str:
    """What the linear layers do to their inputs: a dynamic grid is always one per token."""
    found = {
        "dynamic_token" if scheme.activation.startswith("dynamic") else scheme.activation
        for scheme in schemes
    } or {"none"}
    return found.pop() if len(found) == 1 else "mixed"


def _part_bytes(graph: nn.Module) -> dict[str, int]:
    """Bytes of the stored weights by part of the model; a cache takes none."""
    parts: dict[str, int] = {}
    for name, buffer in graph.named_buffers():
        owner, _, kind = name.rpartition(".")
        if name.startswith(("keys_", "values_")) or kind == "zeros":
            continue
        role = next((_ROLES[part] for part in owner.split(".") if part in _ROLES), "other")
        size = buffer.nbytes
        if getattr(graph.get_submodule(owner), "group", 0):  # INT4: half a byte, scales in bf16
            size = size // 2 if kind in ("weight", "scales") else size
        parts[role] = parts.get(role, 0) + size
    return dict(sorted(parts.items()))
