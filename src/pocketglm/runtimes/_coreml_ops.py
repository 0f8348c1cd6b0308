"""Every operation of a Core ML program that the evaluator computes; `docs/coreml-ops.md` lists
them. `const` is no entry: its value is read. Torch-free."""

from __future__ import annotations

from pocketglm.runtimes import (
    _coreml_layers,
    _coreml_math,
    _coreml_shapes,
    _coreml_weights,
)
from pocketglm.runtimes._coreml_table import Op, Table

FAMILIES: dict[str, Table] = {
    "Stored weights": _coreml_weights.TABLE,
    "Elements and reductions": _coreml_math.TABLE,
    "Matrices, norms, quantization": _coreml_layers.TABLE,
    "Shapes, slices, gather, scatter, states": _coreml_shapes.TABLE,
}
OPS: dict[str, Op] = {name: op for table in FAMILIES.values() for name, op in table.items()}
