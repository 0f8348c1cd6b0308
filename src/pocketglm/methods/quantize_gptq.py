"""GPTQ: INT4 or INT8 weights whose rounding errors make up for each other on sample rows.

Frantar et al. 2023, https://arxiv.org/abs/2210.17323; `ops/hessian.py` and `_gptq.py`. The weights
are stored as `quantize_rtn` stores them, with scales by the same rule, fixed before any integer is
chosen. Embedding and head are rounded to nearest. One block of the model is in memory at a time.
"""

from __future__ import annotations

from pydantic import Field

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import BlockMethod, BlockResult, BlockWork
from pocketglm.methods._gptq import GptqOptions, effect_of, gptq_block, gptq_bytes
from pocketglm.methods._weights import (
    BlockConfig,
    block_reasons,
    block_shapes,
    round_to_nearest,
    select_scheme,
)


class GptqConfig(BlockConfig):
    """Settings of GPTQ; `docs/extensions.md` is generated from the descriptions."""

    damping: float = Field(
        0.01, ge=0, description="added to the Hessian's diagonal, as a share of its mean"
    )
    act_order: bool = Field(
        False, description="round the columns with the greatest inputs first; stored in order"
    )
    weighted: bool = Field(
        True, description="search for scales with the errors weighted by the inputs' squares"
    )


def _block(config: GptqConfig, work: BlockWork) -> BlockResult:
    options = GptqOptions(config.damping, config.act_order, config.weighted, config.search)
    return gptq_block(options, work)


def _memory(config: GptqConfig, ckpt: Checkpoint, index: int) -> int:
    return gptq_bytes(block_shapes(ckpt, index).values())


SPEC = BlockMethod(
    summary="INT4 or INT8 weights, rounded so that a layer's outputs change least (GPTQ)",
    config=GptqConfig,
    check=block_reasons,
    select=select_scheme,
    quantize=round_to_nearest,
    block=_block,
    effect=effect_of,
    tokens=lambda config: config.tokens,
    memory=_memory,
)
