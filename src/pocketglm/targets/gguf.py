"""One GGUF file for llama.cpp and what is built on it (Ollama, LM Studio, llama-cpp-python)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Lowered, Reporter, Target
from pocketglm.errors import require
from pocketglm.model.hf import (
    decoder_spec_of,
    eos_ids_of,
    is_decoder,
    is_embedding,
    labels_of,
    max_length_of,
    role_of,
    spec_of,
    stored_name,
)
from pocketglm.targets import _gguf_decoder as decoder
from pocketglm.targets import _gguf_encoder as encoder
from pocketglm.targets import _gguf_tokenizer as tokens
from pocketglm.targets._gguf_blocks import blocks
from pocketglm.targets._gguf_file import F16, F32, Q4_0, Q8_0, VERSION, Entry, Writer
from pocketglm.targets._gguf_readback import check_values
from pocketglm.targets._gguf_tensors import Source, Weights, refusal
from pocketglm.targets._onnx_folder import port, write_tokenizer
from pocketglm.targets._refusals import scheme_reasons

MODEL = "model.gguf"
_FILE_TYPES = {F32: 0, F16: 1, Q4_0: 2, Q8_0: 7}  # general.file_type: what most weights are


def supports(ckpt: Checkpoint, options: ExportOptions) -> list[str]:
    """The reasons why this checkpoint cannot be lowered; empty if it can."""
    reasons = []
    if options.opset is not None:
        reasons.append(f"opset {options.opset}: that is ONNX's, leave --opset out")
    length = options.max_length or max_length_of(ckpt)
    if is_decoder(ckpt):
        reasons += decoder.reasons(decoder_spec_of(ckpt), length)
        reasons += tokens.bpe_reasons(ckpt, eos_ids_of(ckpt))
    else:
        reasons += encoder.reasons(spec_of(ckpt))
        reasons += tokens.wordpiece_reasons(ckpt)
    if ckpt.manifest.cache:
        reasons.append(
            "INT8 cache with fixed scales: GGUF has no place for them; export the checkpoint from "
            "before quantize_kv (llama.cpp's own: --cache-type-k q8_0)"
        )
    return reasons + _scheme_reasons(ckpt)


def _scheme_reasons(ckpt: Checkpoint) -> list[str]:
    tables = [] if is_decoder(ckpt) else [stored_name(ckpt, n) for n in encoder.FLOAT_TABLES]
    weights = Weights(ckpt)

    def refuse(name: str, scheme: TensorScheme) -> str:
        if name in tables:
            return "llama.cpp reads this table as float: leave it out of the quantization"
        return refusal(scheme, weights.stored_shape(name)[1])

    return scheme_reasons(ckpt, refuse)


def lower(ckpt: Checkpoint, out: Path, options: ExportOptions, reporter: Reporter) -> Lowered:
    """Write model.gguf and the tokenizer's files into `out`, and read the weights back.

    Raises:
        MissingExtraError: the package gguf, which reads the file back, is not installed.
        ParityError: a weight of the file is not the checkpoint's.
    """
    require("gguf", extra="gguf")
    length = options.max_length or max_length_of(ckpt)
    sources, metadata = _plan(ckpt, length, reporter)
    weights = Weights(ckpt)
    tensors = [weights.tensor(source) for source in sources]
    sizes = Counter({t.type: 0 for t in tensors})
    for tensor in tensors:
        sizes[tensor.type] += tensor.nbytes
    head = {
        "general.architecture": Entry("str", next(iter(metadata)).partition(".")[0]),
        "general.file_type": Entry("u32", _FILE_TYPES[sizes.most_common(1)[0][0]]),
        "general.quantization_version": Entry("u32", 2),
        **metadata,
    }
    with Writer(out / MODEL, head, tensors) as writer:
        for index, source in enumerate(sources):
            reporter.progress("writing", index, len(sources), source.name)
            for chunk in weights.chunks(source):
                writer.write(source.name, chunk)
    reporter.progress("writing", len(sources), len(sources))
    write_tokenizer(ckpt, out, length)
    reporter.say("reading the weights back")
    check_values(out / MODEL, weights, sources)
    parts: Counter[str] = Counter()
    for source, tensor in zip(sources, tensors, strict=True):
        parts[role_of(weights.stored(source)) if source.parameter else "other"] += tensor.nbytes
    return Lowered(
        model_file=MODEL,
        inputs=[port("tokens", "int32", ("batch", "tokens"))],
        outputs=[_output(ckpt)],
        operators={t.name: n for t, n in sorted(Counter(t.type for t in tensors).items(), key=str)},
        minimum={"gguf": str(VERSION)},
        parts=dict(sorted(parts.items())),
        activation=_activation(ckpt, weights, sources),
        digests={MODEL: writer.digest},
    )


def _plan(
    ckpt: Checkpoint, length: int, reporter: Reporter
) -> tuple[list[Source], dict[str, Entry]]:
    """The file's tensors and metadata; the architecture's keys come first."""
    if not is_decoder(ckpt):
        spec = spec_of(ckpt)
        numbers = encoder.metadata(spec, labels_of(ckpt), length)
        words = tokens.wordpiece_metadata(ckpt, spec.vocab_size)
        if note := tokens.wordpiece_note(ckpt):
            reporter.say(note)
        return list(encoder.sources(spec, length)), numbers | words
    of = decoder_spec_of(ckpt)
    if note := tokens.prefix_note(ckpt):
        reporter.say(note)
    if len(set(of.blocks())) < of.num_layers:
        reporter.say("layers that share a block are written one by one: GGUF knows no sharing")
    words = tokens.bpe_metadata(ckpt, of.vocab_size, eos_ids_of(ckpt), of.bos_id)
    return list(decoder.sources(of)), decoder.metadata(of, length) | words


def _output(ckpt: Checkpoint) -> dict[str, Any]:
    if is_decoder(ckpt):
        return port("logits", "float32", ("batch", "tokens", decoder_spec_of(ckpt).vocab_size))
    spec = spec_of(ckpt)
    if spec.num_labels:
        return port("logits", "float32", ("batch", spec.num_labels))
    return port("sentence_embedding", "float32", ("batch", spec.hidden_size))


def _activation(ckpt: Checkpoint, weights: Weights, sources: list[Source]) -> str:
    """What llama.cpp's CPU code does to the linear layers' inputs, or at its worst elsewhere.

    Quantized weights: int8 in blocks of 32. F16 weights: half precision, as BERT's GELU always.
    """
    tied = is_decoder(ckpt) and decoder_spec_of(ckpt).tied
    if any(tied or not is_embedding(name) for name in ckpt.manifest.schemes):
        return "dynamic_block"
    half = any(weights.type(source) == F16 for source in sources)
    return "float16" if half or not is_decoder(ckpt) else "none"


SPEC = Target(
    summary="GGUF for llama.cpp (Android, iOS, desktop): Q8_0, Q4_0, F16, F32",
    runtime="gguf",
    supports=supports,
    lower=lower,
    blocks=blocks,
)
