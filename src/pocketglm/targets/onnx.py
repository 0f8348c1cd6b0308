"""ONNX files for ONNX Runtime; an encoder's folder also for Transformers.js, a decoder's also for
onnxruntime-genai.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import ExportOptions, Floats, Ids, Lowered, Reporter, Target
from pocketglm.model.hf import is_decoder
from pocketglm.targets import _onnx_decoder_files as decoder
from pocketglm.targets import _onnx_encoder_files as encoder
from pocketglm.targets._onnx_blocks import float_blocks
from pocketglm.targets._onnx_decoder_blocks import decoder_blocks
from pocketglm.targets._onnx_nodes import graphs


def supports(ckpt: Checkpoint, options: ExportOptions) -> list[str]:
    """The reasons why this checkpoint cannot be lowered; empty if it can."""
    form = decoder.supports if is_decoder(ckpt) else encoder.supports
    return form(ckpt, options)


def lower(ckpt: Checkpoint, out: Path, options: ExportOptions, reporter: Reporter) -> Lowered:
    """Write the model's files and the tokenizer's into `out`."""
    form = decoder.lower if is_decoder(ckpt) else encoder.lower
    return form(ckpt, out, options, reporter)


def blocks(file: Path, ids: Ids, mask: Ids) -> Iterable[tuple[str, Floats]]:
    """What the parts of a written file give, see `contracts.Target`."""
    form = decoder_blocks if (file.parent / "genai_config.json").is_file() else float_blocks
    return form(file, ids, mask)


SPEC = Target(
    summary="ONNX Runtime (CPU: servers, Android, iOS, Windows) and Transformers.js (web)",
    runtime="onnx",
    supports=supports,
    lower=lower,
    blocks=blocks,
    graphs=graphs,
)
