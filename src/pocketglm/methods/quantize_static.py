"""INT8 weights and inputs with fixed ranges, chosen from what the layers see on sample rows.

Every linear layer of an encoder gets INT8 weights per output channel (`ops/affine.py`) and one grid
for its input. The rows pass through the float model once; each input is counted in a histogram of
fixed size (`ops/histogram.py`), from which a calibrator chooses the range (`ops/calibration.py`).
Memory beside the model is 16 KiB for each input, one batch of 32 rows, and the rows' token ids (0.2
KB a row): 4096 rows of a small model took as much as 256, to 0.4 MB. SmoothQuant (`_smooth.py`)
adds a pass for the channels' maxima.

Query, key and value see the same input; they share a grid, and stay float together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import ModelMethod, StepContext
from pocketglm.methods._calibrate import (
    StaticConfig,
    prepare,
    schemes_of,
    static_bytes,
    static_headers,
    static_reasons,
)
from pocketglm.methods._observe import divergence, quantized
from pocketglm.methods._static import deployed, write_static


def _run(
    config: StaticConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    found = prepare(config, ckpt, context)
    model = found.model
    weights = {
        layer: deployed(model.get_parameter(f"{layer}.weight"), found.scheme, search=config.search)
        for layer in found.layers
    }
    with quantized(model, weights, found.grids):
        moved = divergence(model, found.wanted, found.sample)
    error = write_static(
        ckpt,
        folder,
        schemes_of(config, ckpt, found.layers.values(), "static"),
        found.stored_grids(),
        {stored: model.get_parameter(ours) for ours, stored in found.moved.items()},
        search=config.search,
    )
    figure = "kl" if model.spec.head == "classification" else "cosine_loss"
    return {
        "layers": float(len(found.layers)),
        "rows": float(len(found.rows.ids)),
        "weight_error": float(f"{error:.6g}"),
        figure: float(f"{moved:.6g}"),
    }


SPEC = ModelMethod(
    summary="INT8 weights and inputs with fixed ranges, calibrated on training rows",
    config=StaticConfig,
    check=static_reasons,
    predict=lambda config, ckpt, context: static_headers(config, ckpt),
    run=_run,
    needs_rows=lambda config: True,
    memory=static_bytes,
)
