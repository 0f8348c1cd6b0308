"""Round to nearest: every weight gets a scale and the nearest integers; no data, no training.

INT8 per output channel (default) or INT4 by group; `_weights.py` says which weights, and the rule
and the scale search are in `ops/affine.py`.
"""

from __future__ import annotations

from pocketglm.contracts import TensorMethod
from pocketglm.methods._weights import (
    WeightConfig,
    round_to_nearest,
    select_scheme,
    weight_reasons,
)


class RtnConfig(WeightConfig):
    """Settings of round-to-nearest."""


SPEC = TensorMethod(
    summary="round weights to INT8 or INT4, without data",
    config=RtnConfig,
    check=weight_reasons,
    select=select_scheme,
    quantize=round_to_nearest,
)
