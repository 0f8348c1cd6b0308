"""What the pruning methods share: refusals, rows to measure with, and the model in and out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import StepContext
from pocketglm.errors import CheckpointError, DataError
from pocketglm.methods._scores import Batch, Model
from pocketglm.model.decoder import Decoder
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import (
    is_decoder,
    labels_of,
    load_decoder,
    load_encoder,
    max_length_of,
    model_spec_of,
    predicted,
    save_decoder,
    save_encoder,
    stored_name,
)
from pocketglm.model.spec import DecoderSpec, EncoderSpec
from pocketglm.ops.stored import check_finite
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._rows import pad, tokenize

MULTIPLE = 32  # of widths that are cut: runtimes quantize by groups of 32 and more
_BATCH = 32  # rows
_LENGTH = 512  # tokens of a row, at most
_LOGITS = 1 << 26  # values of a batch: 256 MiB in float32, and their gradients
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def quantized_reason(ckpt: Checkpoint) -> list[str]:
    """Why integers are not pruned, or nothing."""
    if not ckpt.manifest.schemes and "quantization_config" not in ckpt.config:
        return []
    bits = sorted({f"INT{scheme.bits}" for scheme in ckpt.manifest.schemes.values()})
    return [
        f"it is quantized ({', '.join(bits) or 'quantization_config'}): pruning cannot follow "
        "quantization, put it before that step in the plan"
    ]


def structure_reason(ckpt: Checkpoint) -> list[str]:
    """Why blocks that are shared or unified are not cut, or nothing."""
    spec = model_spec_of(ckpt)
    if isinstance(spec, DecoderSpec) and (spec.layer_blocks or spec.unified):
        kind = "unified" if spec.unified else "shared by layers"
        return [f"its blocks are {kind}, they are not cut: prune before tiny in the plan"]
    return []


def taylor_reason(ckpt: Checkpoint, context: StepContext) -> list[str]:
    """Why there is no loss to differentiate, or nothing."""
    if is_decoder(ckpt):
        return []
    instead = "fine-tune it first, or set importance to l1, l2 or activation"
    if not labels_of(ckpt):
        return [f"importance: taylor needs a classifier, this is an embedding model: {instead}"]
    if context.rows is None:
        return []
    unknown = {row.label for row in context.rows.train} - set(labels_of(ckpt))
    if unknown:
        name = min(unknown)
        return [f"importance: taylor needs its labels, and '{name}' is none of them: {instead}"]
    return []


def calibration(ckpt: Checkpoint, context: StepContext, count: int, model: Model) -> list[Batch]:
    """`count` training rows, drawn with the seed; of like length in each batch.

    Raises:
        CheckpointError: the tokenizer has ids beyond the vocabulary.
        DataError: no row has a token (of a decoder: one after another).
    """
    rows = list(context.rows.train) if context.rows else []
    random = np.random.default_rng([context.seed, len(rows)])
    chosen = [rows[i] for i in np.sort(random.permutation(len(rows))[:count])]
    tokenizer = Tokenizer.load(ckpt.path)
    tokenizer.check_vocabulary(model.spec.vocab_size, ckpt.path)
    limit = min(max_length_of(ckpt), _LENGTH)
    tokens = tokenize(tokenizer, [row.text for row in chosen], limit)
    decodes = isinstance(model, Decoder)
    order = np.argsort(tokens.lengths, kind="stable")
    order = order[tokens.lengths[order] > decodes]
    if not len(order):
        raise DataError(
            f"none of {len(chosen)} training rows has a token to measure with",
            "does --text-column name the right column?",
        )
    numbers = {label: number for number, label in enumerate(labels_of(ckpt))}
    labels = [numbers.get(getattr(row, "label", ""), -1) for row in chosen]
    # Of a decoder every token has as many logits as there are words, and their gradients.
    values = model.spec.vocab_size * int(tokens.lengths.max()) if decodes else 0
    size = min(_BATCH, max(1, _LOGITS // values)) if values else _BATCH
    batches = []
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = pad(tokens.ids, part, tokenizer.pad_id)
        truth = [labels[i] for i in part]
        known = torch.tensor(truth) if min(truth) >= 0 else None
        batches.append(Batch(batch["ids"], batch["mask"], known))
    return batches


def load(ckpt: Checkpoint) -> Model:
    """The model in float32.

    Raises:
        CheckpointError: it cannot be used, or a weight holds NaN (the tensor is named).
    """
    model = load_decoder(ckpt) if is_decoder(ckpt) else load_encoder(ckpt)
    for name, value in model.state_dict().items():
        check_finite(ckpt, stored_name(ckpt, name), value)
    return model


def check_scores(ckpt: Checkpoint, what: str, scores: torch.Tensor) -> None:
    """Refuse scores that are not numbers: an activation or a gradient overflowed.

    Raises:
        CheckpointError: names the layer.
    """
    if not scores.isfinite().all():
        raise CheckpointError(
            f"{ckpt.path}: {what} have activations or gradients that are NaN or infinite",
            "the training run diverged: use an earlier checkpoint",
        )


def float_type(ckpt: Checkpoint) -> torch.dtype:
    """The type that most values are stored in; a pruned model keeps it."""
    sizes: Counter[str] = Counter()
    for info in ckpt.tensors.values():
        sizes[info.dtype] += info.size
    return _TYPES.get(sizes.most_common(1)[0][0], torch.float32)


def save(model: Model, ckpt: Checkpoint, folder: Path) -> None:
    """Write it with everything beside the model that `ckpt` has."""
    dtype, manifest = float_type(ckpt), ckpt.manifest
    if isinstance(model, Encoder):
        labels = labels_of(ckpt)
        save_encoder(model, folder, source=ckpt, labels=labels, manifest=manifest, dtype=dtype)
    else:
        save_decoder(model, folder, source=ckpt, manifest=manifest, dtype=dtype)


def headers(ckpt: Checkpoint, spec: EncoderSpec | DecoderSpec) -> Checkpoint:
    """What `save` will write of a model of this spec."""
    return predicted(ckpt, spec, float_type(ckpt))
