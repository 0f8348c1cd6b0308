"""AWQ: INT4 or INT8 weights with finer steps for the channels that see great inputs.

Lin et al. 2023, https://arxiv.org/abs/2306.00978; `_awq.py` has the search and the folding. Then
the weights are rounded to nearest, or by GPTQ, and stored as `quantize_rtn` stores them. Embedding
and head are rounded to nearest. One block of the model is in memory at a time. For decoders: an
encoder's norm stands behind its layers, so nothing can be folded into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import BlockMethod, BlockResult, BlockWork, StepContext
from pocketglm.methods._awq import Search, awq_bytes
from pocketglm.methods._gptq import GptqOptions, gptq_block, gptq_bytes, layer_of
from pocketglm.methods._weights import (
    BlockConfig,
    block_reasons,
    block_shapes,
    round_to_nearest,
    select_scheme,
)
from pocketglm.model.hf import is_decoder, model_spec_of
from pocketglm.model.spec import DecoderSpec
from pocketglm.ops.affine import dequantize

_DAMPING = 0.01


class AwqConfig(BlockConfig):
    """Settings of AWQ; `docs/extensions.md` is generated from the descriptions."""

    steps: int = Field(10, ge=1, le=100, description="steps of alpha between 0 and 1 to try")
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest", description="how the folded weights become integers"
    )


def _check(config: AwqConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if not is_decoder(ckpt):
        return [
            "it is an encoder: AWQ folds scales into norms before the layers; use quantize_gptq"
        ]
    spec = model_spec_of(ckpt)
    if isinstance(spec, DecoderSpec) and spec.unified:
        return [
            "its blocks are unified: no norm or layer makes the inputs of one weight alone; "
            "use quantize_gptq"
        ]
    if spec.layer_ranks:
        return ["it is factorized, so no layer can take a scale whole: use quantize_gptq"]
    if ckpt.manifest.cache:
        return ["its cache is calibrated, and AWQ scales the values: put quantize_kv after it"]
    return block_reasons(config, ckpt, context)


def _block(config: AwqConfig, work: BlockWork) -> BlockResult:
    search = Search.of(work, config.steps, config.search)
    figures = {"total": search.total(), "rtn": search.error_of(work.schemes)}
    alphas = search.fold_all()
    if config.rounding == "gptq":
        options = GptqOptions(_DAMPING, act_order=False, weighted=True, search=config.search)
        integers = dict(gptq_block(options, work).integers)
    else:
        integers = {}
        for name, scheme in work.schemes.items():
            weight = layer_of(work.block, name).weight.data
            integers[name] = round_to_nearest(config, weight, scheme)
            weight.copy_(dequantize(*integers[name], scheme))
    figures["error"] = search.error()
    figures |= {f"alpha.{name}": alpha for name, alpha in alphas.items()}
    return BlockResult(integers, figures, _words(figures))


def _effect(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Relative errors of the blocks' outputs, on the average, and the alphas' averages."""
    total = [max(block["total"], 1e-30) for block in figures]
    effect = {
        name: (sum(b[key] / t for b, t in zip(figures, total, strict=True)) / len(figures)) ** 0.5
        for name, key in (("error", "error"), ("rtn_error", "rtn"))
    }
    for name in (name for name in figures[0] if name.startswith("alpha.")):
        effect[name] = sum(block[name] for block in figures) / len(figures)
    return {name: float(f"{value:.6g}") for name, value in effect.items()}


def _words(figures: Mapping[str, float]) -> str:
    effect = _effect([figures])
    return f"error {effect['error']:.4f}, round to nearest {effect['rtn_error']:.4f}"


def _memory(config: AwqConfig, ckpt: Checkpoint, index: int) -> int:
    shapes = block_shapes(ckpt, index)
    own = gptq_bytes(shapes.values()) if config.rounding == "gptq" else 0
    return max(awq_bytes(shapes), own)


SPEC = BlockMethod(
    summary="INT4 or INT8 weights, scaled so that channels with great inputs lose least (AWQ)",
    config=AwqConfig,
    check=_check,
    select=select_scheme,
    quantize=round_to_nearest,
    block=_block,
    effect=_effect,
    tokens=lambda config: config.tokens,
    memory=_memory,
)
