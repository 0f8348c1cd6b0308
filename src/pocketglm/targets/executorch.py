"""A .pte file for ExecuTorch (Android, iOS, desktop), with XNNPACK on the CPU."""

from __future__ import annotations

from pocketglm.contracts import Target
from pocketglm.targets._executorch_blocks import blocks
from pocketglm.targets._executorch_files import lower, supports
from pocketglm.targets._executorch_nodes import graphs

SPEC = Target(
    summary="ExecuTorch: Android, iOS and desktop, with XNNPACK on the CPU",
    runtime="executorch",
    supports=supports,
    lower=lower,
    blocks=blocks,
    graphs=graphs,
)
