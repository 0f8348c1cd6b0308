"""A .tflite file for LiteRT (Android, iOS, desktop)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import ExportOptions, Floats, Ids, Lowered, Reporter, Target
from pocketglm.model.hf import is_decoder
from pocketglm.targets import _litert_decoder_files as decoder
from pocketglm.targets import _litert_files as encoder
from pocketglm.targets._litert_blocks import decoder_blocks, encoder_blocks, has_decoder
from pocketglm.targets._litert_nodes import graphs


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
    return decoder_blocks(file, ids, mask) if has_decoder(file) else encoder_blocks(file, ids, mask)


SPEC = Target(
    summary="LiteRT (TensorFlow Lite): Android, iOS and desktop, with XNNPACK on the CPU",
    runtime="litert",
    supports=supports,
    lower=lower,
    blocks=blocks,
    graphs=graphs,
)
