"""Quantization-aware training: the weights learn while the layers already compute in INT8 or INT4.

Jacob et al. 2018, https://arxiv.org/abs/1712.05877, with the straight-through estimator. The
forward pass rounds weights with the packer's own functions (`ops/fake_weight.py`), and inputs in
the form that the settings name and the manifest records (`ops/fake_quant.py`). So what is trained
is what is stored, every validation score is that of the deployed numbers, and without steps the
result is, byte for byte, that of post-training quantization: `quantize_static` of encoders in INT8
by row, `quantize_rtn` of all else.

The labels teach (alpha 0), or a float teacher too: the plan's input or any folder, as in `distill`;
of decoders usually both (`preset: qad`). The model has to be trained for its task before; a tenth
of its learning rate is usual.

With adapters (`lora`) the weights stay as they are: w + (alpha / rank) B A is what is rounded, and
only A and B have gradients and an optimizer's moments. LLM-QAT: https://arxiv.org/abs/2305.17888;
adapters under fake quantization: https://arxiv.org/abs/2402.04902 (L4Q).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import WORK, ModelMethod, StepContext
from pocketglm.data.frames import grammar_of
from pocketglm.errors import InputError
from pocketglm.methods import _distill_decoder, _distill_encoder
from pocketglm.methods._calibrate import prepare, schemes_of, static_headers, static_reasons
from pocketglm.methods._distill import keeps_zeros, listed
from pocketglm.methods._qat import (
    QatConfig,
    Rounding,
    adapted_weights,
    by_row,
    bytes_needed,
    in_block,
    rank_reason,
    rounding_by_weight,
    schemes_by_weight,
    train_rounded,
    weight_config,
)
from pocketglm.methods._static import predicted
from pocketglm.methods._weights import weight_reasons
from pocketglm.model.hf import decoder_spec_of, is_decoder, labels_of, spec_of, stored_name
from pocketglm.ops.stored import parameter_counts
from pocketglm.text.frame import mark_names
from pocketglm.train._decoder_job import set_dropout

# --- refusals ------------------------------------------------------------------------------------


def _check(config: QatConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    found = _form_reasons(config, ckpt, context)
    if found:
        return found
    if context.rows is not None and not context.rows.train:
        return ["there are no training rows"]
    reasons = _decoder_reasons if is_decoder(ckpt) else _encoder_reasons
    try:
        return reasons(config, ckpt, context)
    except InputError as error:
        return [f"{error.message}: {error.hint}" if error.hint else error.message]


def _form_reasons(config: QatConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    """Why the weights cannot be stored so."""
    if by_row(config, ckpt):
        found = static_reasons(config, ckpt, context)
        if config.head == 4:
            found.append("head=4: with inputs in INT8 by text the head is 8 bits or float")
        return found
    found = []
    if config.activation == "static":
        found.append(
            "activation: static inputs are for encoders in INT8 by row; set none (exact), "
            "or dynamic_block (fast)"
        )
    if config.smoothquant is not None or config.float_layers:
        found.append(
            "smoothquant and float_layers need inputs that are looked at: encoders in INT8 by row"
        )
    if found:
        return found
    return weight_reasons(weight_config(config, ckpt), ckpt)


def _encoder_reasons(config: QatConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if context.task != "intent":
        return [f"this method trains encoders for intent, the task is {context.task}"]
    if config.lora is not None:
        return ["lora is for decoders: leave it out"]
    labels = {row.label for row in context.rows.train} if context.rows else set()
    if other := labels ^ set(labels_of(ckpt)):
        return [
            f"the rows have other labels than the model: {listed(other)}; train it first "
            "(pocketglm train, or distill)"
        ]
    return _distill_encoder.teaching_reasons(config, spec_of(ckpt), ckpt, context)


def _decoder_reasons(config: QatConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if context.task not in ("lm", "command"):
        return [f"this method trains decoders for lm or command, the task is {context.task}"]
    if context.task == "command" and context.rows is not None:
        command = ckpt.manifest.command
        known = set() if command is None else set(mark_names(command))
        if new := set(mark_names(grammar_of(context.rows.train))) - known:
            return [
                f"the model is not trained for the rows' commands: it lacks {listed(new)}; train "
                "it first (pocketglm train, or distill)"
            ]
    found = (
        [reason] if (reason := rank_reason(config, ckpt, schemes_by_weight(config, ckpt))) else []
    )
    if config.lora is not None and keeps_zeros(config, ckpt):
        found.append(
            "lora: adapters would fill what was pruned: leave it out, or keep_zeros: false"
        )
    return found + _distill_decoder.teaching_reasons(config, decoder_spec_of(ckpt), ckpt, context)


# --- work ----------------------------------------------------------------------------------------


def _predict(config: QatConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    if by_row(config, ckpt):
        return static_headers(config, ckpt, config.activation or "static")
    return predicted(ckpt, schemes_by_weight(config, ckpt))


def _run(
    config: QatConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    if is_decoder(ckpt):
        return _run_decoder(config, ckpt, folder, context)
    return _run_encoder(config, ckpt, folder, context)


def _run_encoder(
    config: QatConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> dict[str, float]:
    positions = spec_of(ckpt).max_position_embeddings
    job = _distill_encoder.classifier_job(ckpt, context, config.dropout, positions)
    if by_row(config, ckpt):
        activation = config.activation or "static"
        found = prepare(config, ckpt, context, activation)
        job.model.load_state_dict(found.model.state_dict())
        rounding = Rounding(
            schemes_of(config, ckpt, found.layers.values(), activation),
            inputs={layer: (found.grids or {}).get(layer) for layer in found.layers},
            stored_grids=found.stored_grids(),
        )
    else:
        rounding = rounding_by_weight(config, ckpt, job.model)
    return train_rounded(
        config,
        ckpt,
        folder,
        job.model,
        rounding,
        lambda: _distill_encoder.learn(config, job, ckpt, folder / WORK, context),
        context,
    )


def _run_decoder(
    config: QatConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> dict[str, float]:
    job = _distill_decoder.decoder_job(config, ckpt, context)
    if config.dropout:
        set_dropout(job.model, config.dropout)
    rounding = rounding_by_weight(config, ckpt, job.model)
    if config.lora:  # what does not learn stays in the type in which it is stored
        for name, weight in job.model.named_parameters():
            if in_block(name) and stored_name(ckpt, name) in rounding.schemes:
                weight.data = weight.data.to(job.source.dtype)
    return train_rounded(
        config,
        ckpt,
        folder,
        job.model,
        rounding,
        lambda: _distill_decoder.learn(config, job, ckpt, folder / WORK, context),
        context,
    )


def _memory(config: QatConfig, ckpt: Checkpoint, context: StepContext) -> int:
    shapes = adapted_weights(ckpt, schemes_by_weight(config, ckpt)).values()
    adapters = sum((rows + columns) * (config.lora or 0) for rows, columns in shapes)
    return bytes_needed(config, sum(parameter_counts(ckpt).values()), adapters)


SPEC = ModelMethod(
    summary="train a model while it already computes in INT8 or INT4",
    config=QatConfig,
    check=_check,
    predict=_predict,
    run=_run,
    needs_rows=lambda config: True,
    inputs=lambda config: [Path(p) for p in (config.teacher, *config.corpora) if p is not None],
    memory=_memory,
)
