"""A package for Core ML (iOS, iPadOS, macOS)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pocketglm.contracts import Floats, Ids, Target, Tolerance
from pocketglm.targets._coreml_blocks import decoder_blocks, encoder_blocks, has_decoder
from pocketglm.targets._coreml_files import lower, supports
from pocketglm.targets._coreml_nodes import graphs


def blocks(file: Path, ids: Ids, mask: Ids) -> Iterable[tuple[str, Floats]]:
    """What the parts of a written file give, see `contracts.Target`."""
    return decoder_blocks(file, ids, mask) if has_decoder(file) else encoder_blocks(file, ids, mask)


SPEC = Target(
    summary="Core ML: iPhone, iPad and Mac; for the Neural Engine, or the GPU and CPU",
    runtime="coreml",
    supports=supports,
    lower=lower,
    blocks=blocks,
    # Weights that are not quantized are fp16; then every value, as Core ML computes it.
    graphs=graphs,
    systems=("ios", "macos"),
    tolerance=Tolerance(part=1e-3, whole=5e-3),
)
