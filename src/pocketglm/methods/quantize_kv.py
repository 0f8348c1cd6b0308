"""INT8 keys and values in a decoder's cache, with scales calibrated on the task's rows.

The cache takes a quarter of float32's memory (half of fp16's); the weights stay as they are, float
or quantized, so this goes before or after their quantization. The scales, their rounding and what
the ranges are taken from: `ops/kv_cache.py`. One scale for each feature of each key/value head
costs no more than one for a layer: keys have features that are many times greater than others
(Liu et al. 2024, KIVI, https://arxiv.org/abs/2402.02750).

A GLM of 4 layers with one key/value head, trained on snips, lost 0.00002 nats of its next-token
distribution on 6000 unseen tokens (INT8 weights 0.00004, INT4 in groups of 32 0.0019), 0.00003 with
one scale for a layer; the calibrators differed by less than that.

In ONNX Runtime 1.32, 98 M parameters in INT4, one thread, CPU time: a token took 0.94, 0.92, 0.91
and 0.77 times as long after 150, 500, 1000 and 1900 tokens; a prompt of that length 1.2, 1.5, 2.1
and 2.8 times as long. So it suits short prompts and long answers, or little memory.

The rows go through the model block by block, once in float, where the keys and values are seen, and
once with the integers of the cache, so that the loss of the whole model is measured at the end.
Memory is that of one block, its keys and values, and the hidden states of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint, TensorInfo, copy_side_files
from pocketglm.artifacts.manifest import MANIFEST, write_json
from pocketglm.artifacts.scheme import CacheScheme
from pocketglm.contracts import Config, ModelMethod, StepContext
from pocketglm.errors import CheckpointError
from pocketglm.eval.lm import WINDOW
from pocketglm.methods._weights import block_shapes
from pocketglm.model.cache import RoundedKV
from pocketglm.model.causal import cache_layout, cache_scale_names
from pocketglm.model.hf import decoder_spec_of, is_decoder
from pocketglm.model.parts import Parts, cut
from pocketglm.model.spec import DecoderSpec
from pocketglm.ops.kv_cache import (
    CacheCalibrator,
    Turned,
    choose_kv_scales,
    restore_kv,
    round_kv,
)
from pocketglm.ops.stored import Layout, as_array
from pocketglm.train._calibration import (
    BATCH,
    batches_of,
    calibration_reasons,
    calibration_rows,
)

_WEIGHTS = "model.safetensors"
_CHUNK = 1 << 22  # elements of a tensor that are copied at a time
_JUDGED = 256  # tokens, spread over the rows, whose logits are compared
_TEMPORARY = 6  # times the keys or values of a layer: lengths, rounded ones, errors
_SPARE = 96 << 20  # rows, chunks of tables, what the allocator keeps


class KvConfig(Config):
    """Settings; `docs/extensions.md` is generated from the descriptions."""

    per: Literal["channel", "tensor"] = Field(
        "channel",
        description="what shares a scale: one feature of one key/value head, or all keys (all "
        "values) of a layer",
    )
    calibrator: CacheCalibrator = Field(
        "minmax", description="what chooses the ranges: minmax, percentile, mse"
    )
    percentile: float = Field(
        99.99, gt=0, le=100, description="of calibrator percentile: share of the values in range"
    )
    tokens: int = Field(4096, ge=1, description="tokens of the training rows to calibrate with")


@dataclass(slots=True)
class _Seen:
    """Keys and values of one layer, as they would enter the cache."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Note them [B, kv heads, S, head_dim], and let them pass."""
        for found, new in ((self.keys, key), (self.values, value)):
            found.append(new.transpose(1, 2).flatten(0, 1))
        return key, value


def _check(config: KvConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if not is_decoder(ckpt):
        return ["it is an encoder: it has no cache of keys and values"]
    spec = decoder_spec_of(ckpt)
    if spec.layer_blocks or spec.unified or spec.top_k:
        return ["shared blocks, unified blocks and top-k attention keep a float cache"]
    return calibration_reasons(ckpt, context)


def _scheme(config: KvConfig) -> CacheScheme:
    return CacheScheme(per=config.per)


def _layout(ckpt: Checkpoint, scheme: CacheScheme) -> Layout:
    """All tensors: those of the checkpoint but for older scales, and the new scales."""
    spec = decoder_spec_of(ckpt)
    scales: Layout = {name: ("F32", shape) for name, shape in cache_layout(spec, scheme).items()}
    return {n: (i.dtype, i.shape) for n, i in ckpt.tensors.items() if n not in scales} | scales


def _predict(config: KvConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    scheme, file = _scheme(config), ckpt.path / _WEIGHTS
    return replace(
        ckpt,
        manifest=ckpt.manifest.model_copy(update={"cache": scheme}),
        tensors={
            name: TensorInfo(name, dtype, shape, file, 0)
            for name, (dtype, shape) in _layout(ckpt, scheme).items()
        },
    )


def _run(
    config: KvConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    scales, effect = _calibrate(config, ckpt, context)
    scheme = _scheme(config)
    _write(ckpt, folder, _layout(ckpt, scheme), scales)
    copy_side_files(ckpt, folder)
    write_json(folder / "config.json", ckpt.config)
    write_json(folder / MANIFEST, ckpt.manifest.model_copy(update={"cache": scheme}))
    return {name: float(f"{value:.6g}") for name, value in effect.items()}


@torch.inference_mode()
def _calibrate(
    config: KvConfig, ckpt: Checkpoint, context: StepContext
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The scales by the names of their tensors, and what the integers cost."""
    parts, spec = Parts(ckpt), decoder_spec_of(ckpt)
    batches = batches_of(calibration_rows(ckpt, context, config.tokens))
    plain = parts.embedded(batches, lambda rows: rows)
    rounded = plain.clone()
    scales: dict[str, Tensor] = {}
    errors: dict[str, list[float]] = {"key_error": [], "value_error": []}
    for index in range(spec.num_layers):
        block, seen = parts.block(index), _Seen()
        for batch in cut(plain, batches):
            batch.copy_(parts.call(block, batch, seen))
        found = _scales(config, spec, index, seen)
        for name, scale, error, figures in zip(
            cache_scale_names(index), *found, errors.values(), strict=True
        ):
            scales[name] = scale
            figures.append(error)
        past = RoundedKV(torch.stack([s.reshape(len(s), 1, -1) for s in found[0]]))
        for batch in cut(rounded, batches):
            batch.copy_(parts.call(block, batch, past))
        note = f"keys {found[1][0]:.2%}, values {found[1][1]:.2%} off"
        context.reporter.progress("quantize_kv", index + 1, spec.num_layers, note)
    effect = {name: sum(figures) / len(figures) for name, figures in errors.items()}
    effect |= _loss(parts, plain, rounded)
    return scales, effect | {"tokens": float(len(plain))}


def _scales(
    config: KvConfig, spec: DecoderSpec, index: int, seen: _Seen
) -> tuple[list[Tensor], list[float]]:
    """Of one layer's keys and values: the scales, and their relative errors."""
    scales, errors = [], []
    turned = Turned(spec.rope.dims, spec.rope.interleaved)
    parts = (("keys", "k_proj", seen.keys, turned), ("values", "v_proj", seen.values, Turned()))
    for what, layer, batches, pairs in parts:
        x = torch.cat(batches)
        batches.clear()
        if not x.isfinite().all():
            raise CheckpointError(
                f"the {what} of layer {index} (model.layers.{index}.self_attn.{layer}) hold NaN or "
                "infinity on these rows",
                "the training run diverged or the weights are damaged: use an earlier checkpoint",
            )
        scale = choose_kv_scales(
            x, config.calibrator, per=config.per, turned=pairs, percentile=config.percentile
        )
        lost = restore_kv(round_kv(x, scale), scale).sub_(x)
        scales.append(scale)
        errors.append(float(lost.norm() / x.norm().clamp_min(1e-30)))
    return scales, errors


def _loss(parts: Parts, plain: Tensor, rounded: Tensor) -> dict[str, float]:
    """What the model's answers lose: divergence in nats, and the share of other first choices."""
    some = torch.linspace(0, len(plain) - 1, min(_JUDGED, len(plain))).round().long()
    wanted, found = (parts.logits(x[some]).log_softmax(-1) for x in (plain, rounded))
    divergence = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    flips = (wanted.argmax(-1) != found.argmax(-1)).float().mean()
    return {"kl": max(float(divergence), 0.0), "flip_rate": float(flips)}


def _write(ckpt: Checkpoint, folder: Path, layout: Layout, scales: Mapping[str, Tensor]) -> None:
    """The checkpoint's tensors, byte by byte, and the scales."""
    writer = safetensors.Writer(folder / _WEIGHTS, layout)
    for name in layout:
        if name in scales:
            writer.write(name, as_array(scales[name]))
            continue
        for start, stop in _row_ranges(ckpt.tensors[name]):
            writer.write(name, ckpt.read(name, start, stop))
    writer.close()


def _row_ranges(info: TensorInfo) -> Iterator[tuple[int, int | None]]:
    if not info.shape or not info.size:
        yield 0, None
        return
    step = max(_CHUNK * info.shape[0] // info.size, 1)
    for start in range(0, info.shape[0], step):
        yield start, min(start + step, info.shape[0])


def _memory(config: KvConfig, ckpt: Checkpoint, context: StepContext) -> int:
    """A block in float32, its keys and values, the hidden states twice, the logits compared."""
    spec = decoder_spec_of(ckpt)
    shapes = (block_shapes(ckpt, index).values() for index in range(spec.num_layers))
    block = max(sum(rows * columns for rows, columns in found) for found in shapes)
    width = spec.num_kv_heads * spec.head_dim
    batch = max(BATCH, min(WINDOW, spec.max_position_embeddings))
    states = config.tokens * (2 * spec.hidden_size + (2 + _TEMPORARY) * width)
    work = batch * (4 * spec.intermediate_size + 8 * spec.hidden_size)
    # A block's weights come dequantized beside the integers that they are made from.
    return 4 * (2 * block + states + work + 4 * _JUDGED * spec.vocab_size) + _SPARE


SPEC = ModelMethod(
    summary="INT8 keys and values in a decoder's cache, with calibrated scales",
    config=KvConfig,
    check=_check,
    predict=_predict,
    run=_run,
    needs_rows=lambda config: True,
    memory=_memory,
    in_parts=True,
)
