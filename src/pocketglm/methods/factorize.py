"""Linear layers as products of two smaller ones, where that saves bytes.

W [N, K] becomes B [N, r] times A [r, K]: by plain SVD, or so that the outputs on calibration rows
change least (SVD-LLM); `ops/lowrank.py` has both. The layers of a block are done in the order in
which it computes, each for the inputs that the factorized model gives it. Ranks are multiples of
the group size, so that a following step can quantize both factors by group; they are chosen by the
bytes that the layer will have after that step (`bits`), and a layer that would not become smaller
stays as it is, to the last bit. Nothing is retrained: `distill` afterwards.

MiniLM's embeddings of 300 clinc150 rows that it was not calibrated with moved (1 - cosine) by 0.07,
0.11 and 0.21 with 0.9, 0.75 and 0.5 of the linear layers' bytes; by plain SVD 0.32, 0.43 and 0.64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, cast

from pydantic import Field, model_validator
from torch import Tensor, nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import Config, ModelMethod, StepContext
from pocketglm.methods._gptq import inputs_of, stages_of
from pocketglm.methods._prune import check_scores, float_type, headers, load, save
from pocketglm.methods._walk import (
    Model,
    block_of,
    calibration_batches,
    call,
    embedded,
)
from pocketglm.methods._weights import skip_reasons
from pocketglm.model.decoder import Decoder
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import model_spec_of, stored_name
from pocketglm.model.layers import Block, Factored, bare_modules
from pocketglm.model.spec import DecoderSpec, Ranks
from pocketglm.ops.lowrank import Decomposition, Moments
from pocketglm.ops.stored import parameter_counts
from pocketglm.train._calibration import calibration_reasons

_RATIO = 0.75
_SPARE = 256 << 20  # rows, what a batch computes, what the allocator keeps


class FactorizeConfig(Config):
    """Settings; `docs/extensions.md` is generated from the descriptions."""

    whitened: bool = Field(
        True,
        description="lose least of the layers' outputs on training rows (needs --data); false: of "
        "the weights themselves (plain SVD)",
    )
    ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of a layer's bytes that stay; default without energy: 0.75",
    )
    energy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="instead: share of the squared singular values that a layer keeps",
    )
    bits: Literal[4, 8] | None = Field(
        None,
        description="to which a following step quantizes: bytes are counted as after it; None = "
        "there is none",
    )
    group_size: Literal[32, 64, 128] = Field(
        32, description="ranks are multiples of it, for a following step by groups of this size"
    )
    tokens: int = Field(8192, ge=1, description="tokens of the training rows to calibrate with")
    damping: float = Field(
        0.01,
        ge=0,
        description="added to the inputs' second moments, as a share of their mean: how much "
        "inputs count that the rows do not have",
    )
    skip: list[str] = Field([], description="patterns (*, ?) of tensor names that stay whole")

    @model_validator(mode="after")
    def _one(self) -> FactorizeConfig:
        if self.ratio is not None and self.energy is not None:
            raise ValueError("ratio and energy both say the ranks: set one of them")
        return self


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of layers after the step that may follow. width: bytes of a stored float."""

    bits: Literal[4, 8] | None
    group_size: int
    width: int

    def whole(self, rows: int, columns: int) -> int:
        """Of one weight [N, K]."""
        if self.bits is None:
            return self.width * rows * columns
        group = self.group_size if self.bits == 4 else None
        return TensorScheme(bits=self.bits, group_size=group).nbytes(rows, columns)

    def factored(self, rows: int, columns: int, rank: int) -> int:
        """Of [N, rank] and [rank, K]."""
        return self.whole(rows, rank) + self.whole(rank, columns)

    def largest_rank(self, rows: int, columns: int, ratio: float) -> int:
        """The largest with at most this share of the whole weight's bytes, and fewer than all of
        them; a multiple of the group size, 0: there is none.
        """
        step, most = self.group_size, self.whole(rows, columns)
        rank = 0
        while (needed := self.factored(rows, columns, rank + step)) <= ratio * most:
            if needed >= most:
                break
            rank += step
        return rank


def _cost(config: FactorizeConfig, ckpt: Checkpoint) -> Cost:
    return Cost(config.bits, config.group_size, float_type(ckpt).itemsize)


def _shapes(config: FactorizeConfig, ckpt: Checkpoint) -> list[dict[str, tuple[int, int]]]:
    """[N, K] of each block's layers that may be factorized, by their names in it."""
    spec = model_spec_of(ckpt)
    found: list[dict[str, tuple[int, int]]] = [{} for _ in range(spec.num_layers)]
    for index, block in enumerate(found):
        for layer in spec.linear_layers:
            name = stored_name(ckpt, f"blocks.{index}.{layer}.weight")
            info = ckpt.tensors.get(name)
            if info and not any(fnmatchcase(name, pattern) for pattern in config.skip):
                block[layer] = info.shape[0], info.shape[1]
    return found


def _largest(config: FactorizeConfig, ckpt: Checkpoint) -> list[Ranks]:
    """By `ratio`, or with `energy` the largest ranks that save anything."""
    cost = _cost(config, ckpt)
    ratio = 1.0 if config.energy is not None else config.ratio or _RATIO
    return [
        tuple((n, rank) for n, s in block.items() if (rank := cost.largest_rank(*s, ratio)))
        for block in _shapes(config, ckpt)
    ]


def _check(config: FactorizeConfig, ckpt: Checkpoint, context: StepContext) -> list[str]:
    if ckpt.manifest.schemes or "quantization_config" in ckpt.config:
        return ["it is quantized: factorize the float model, before that step of the plan"]
    spec = model_spec_of(ckpt)
    if isinstance(spec, DecoderSpec) and (spec.unified or spec.layer_blocks):
        kind = "unified" if spec.unified else "shared"
        return [f"its blocks are {kind}: factorize a model whose layers have blocks of their own"]
    if spec.layer_ranks:
        return ["it is factorized already: start from the model before that"]
    reasons = skip_reasons(config.skip, ckpt)
    if not any(_largest(config, ckpt)):
        reasons.append(
            f"no layer becomes smaller: with ranks in steps of {config.group_size} the factors "
            "have as many bytes as the whole, or more than the ratio allows"
        )
    return reasons + (calibration_reasons(ckpt, context) if config.whitened else [])


def _predict(config: FactorizeConfig, ckpt: Checkpoint, context: StepContext) -> Checkpoint:
    """With `energy` any layer may stay whole, so the size is the most."""
    spec = model_spec_of(ckpt)
    if config.energy is not None:
        return headers(ckpt, spec)
    return headers(ckpt, replace(spec, layer_ranks=tuple(_largest(config, ckpt))))


@dataclass(frozen=True, slots=True)
class _Result:
    """Of one layer: 0 where it stays whole. lost: share of the squared outputs (plain: weights)."""

    rank: int
    lost: float = 0.0


def _run(
    config: FactorizeConfig, ckpt: Checkpoint, folder: Path, context: StepContext
) -> Mapping[str, float]:
    model = load(ckpt)
    batches = calibration_batches(ckpt, context, config.tokens) if config.whitened else []
    hidden = embedded(model, batches)
    ranks: list[dict[str, int]] = []
    found: list[_Result] = []
    for index, largest in enumerate(_largest(config, ckpt)):
        block, chosen = block_of(model, index), dict[str, int]()
        for stage in stages_of(dict(largest)):
            moments = _moments(config, ckpt, model, index, stage[0], hidden)
            for name in stage:
                result = _factorize(config, ckpt, block, name, dict(largest)[name], moments)
                found.append(result)
                if result.rank:
                    chosen[name] = result.rank
        for number, x in enumerate(hidden):
            hidden[number] = call(model, block, x)
        ranks.append(chosen)
        context.reporter.progress("factorizing", index + 1, model.spec.num_layers, _words(chosen))
    save(_rebuilt(model, tuple(tuple(chosen.items()) for chosen in ranks)), ckpt, folder)
    made = [result for result in found if result.rank]
    error = (sum(result.lost for result in made) / max(len(made), 1)) ** 0.5
    return {
        "layers": float(len(made)),
        "layers_whole": float(sum(map(len, _shapes(config, ckpt))) - len(made)),
        "rank_mean": round(sum(result.rank for result in made) / max(len(made), 1), 1),
        "error": float(f"{error:.6g}"),
        "tokens": float(sum(batch.numel() for batch in batches)),
    }


def _moments(
    config: FactorizeConfig,
    ckpt: Checkpoint,
    model: Model,
    index: int,
    name: str,
    hidden: Sequence[Tensor],
) -> Tensor | None:
    """X^T X of the inputs of layer `name`; None for plain SVD."""
    if not config.whitened:
        return None
    block = block_of(model, index)
    found = Moments(cast(nn.Linear, block.get_submodule(name)).in_features)
    for x in inputs_of(block, name, lambda x: call(model, block, x), hidden):
        found.add(x)
    check_scores(ckpt, f"the inputs of blocks.{index}.{name}", found.matrix)
    return found.damped(config.damping)


def _factorize(
    config: FactorizeConfig,
    ckpt: Checkpoint,
    block: Block,
    name: str,
    most: int,
    moments: Tensor | None,
) -> _Result:
    """Put the factors of a layer in its place, if they are of rank `most` at most."""
    layer = cast(nn.Linear, block.get_submodule(name))
    if config.energy == 1:
        return _Result(0)
    found = Decomposition.of(layer.weight.detach(), moments)
    rank = most
    if config.energy is not None:
        step = config.group_size
        rank = -(-found.rank_for(config.energy) // step) * step
        if rank > most:
            return _Result(0)
    with bare_modules():
        new = Factored(layer.in_features, layer.out_features, rank, layer.bias is not None)
    inner, outer = found.factors(rank)
    state = {"factor_in.weight": inner, "factor_out.weight": outer}
    state |= {} if layer.bias is None else {"factor_out.bias": layer.bias.detach()}
    dtype = float_type(ckpt)  # later layers see what is stored
    new.load_state_dict({n: v.to(dtype).float() for n, v in state.items()}, assign=True)
    block.set_submodule(name, new.eval())
    return _Result(rank, found.lost(rank) / max(float(found.energies.sum()), 1e-300))


def _words(chosen: Mapping[str, int]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {rank}" for name, rank in chosen.items())


def _rebuilt(model: Model, ranks: tuple[Ranks, ...]) -> Model:
    """A model whose spec says what `model`'s layers have become."""
    with bare_modules():
        new: Model
        if isinstance(model, Encoder):
            new = Encoder(replace(model.spec, layer_ranks=ranks))
        else:
            new = Decoder(replace(model.spec, layer_ranks=ranks))
    new.load_state_dict(model.state_dict(), assign=True)
    return new.eval()


def _memory(config: FactorizeConfig, ckpt: Checkpoint, context: StepContext) -> int:
    """The model in float32, the rows' hidden states, and one layer's matrices in float64."""
    spec = model_spec_of(ckpt)
    shapes = [shape for block in _shapes(config, ckpt) for shape in block.values()]
    matrices = [3 * n * k + 4 * k * k + 4 * min(n, k) ** 2 for n, k in shapes]
    hidden = 4 * config.tokens * spec.hidden_size if config.whitened else 0
    values = sum(parameter_counts(ckpt).values())
    return 6 * values + hidden + 8 * max(matrices, default=0) + _SPARE


SPEC = ModelMethod(
    summary="linear layers as products of two smaller ones (SVD, SVD-LLM)",
    config=FactorizeConfig,
    check=_check,
    predict=_predict,
    run=_run,
    needs_rows=lambda config: config.whitened,
    identity={"energy": 1.0},
    memory=_memory,
)
