"""AWQ of one decoder block: channels with great inputs get finer steps, at no cost when it runs.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
https://arxiv.org/abs/2306.00978. The columns of a layer are multiplied by s and its inputs are
divided by s, which is folded into what makes them: the norm before query, key and value, and the
one before gate and up; the rows of value before output, and those of up before down. In float the
block computes what it did. s = mean|x|^alpha, divided by the root of its greatest times its
smallest value; alpha, one for each fold, is the best of a grid for the block's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import BlockWork
from pocketglm.methods._gptq import inputs_of, layer_of
from pocketglm.model.layers import Block, GatedFeedForward
from pocketglm.ops.affine import dequantize, quantize

_SEARCHED = 512  # tokens on which candidates are compared
_SHORT = ("BF16", "F16")  # a power of two divides these exactly, F16 down to 2^-14
_LEAST = 1e-4  # of s


@dataclass(frozen=True, slots=True)
class Fold:
    """source: the norm or layer that makes the inputs of `targets`, all of which share them."""

    source: str
    targets: tuple[str, ...]


def folds_of(block: Block) -> list[Fold]:
    """As the block computes."""
    ffn = cast(GatedFeedForward, block.ffn)
    first = ("ffn.gate_up",) if ffn.fused else ("ffn.gate", "ffn.up")
    return [
        Fold("attention_norm", ("attention.query", "attention.key", "attention.value")),
        Fold("attention.value", ("attention.output",)),
        Fold("ffn_norm", first),
        Fold(first[-1], ("ffn.down",)),
    ]


def fold(block: Block, which: Fold, scale: Tensor) -> None:
    """Multiply the targets' columns by `scale`, and divide what makes their inputs; in place.

    scale: float32, one for each channel of the source (`shared`).
    """
    source = block.get_submodule(which.source)
    for name in which.targets:
        layer_of(block, name).weight.data.mul_(spread(block, which, scale))
    rows = slice(-len(scale), None)  # of a fused layer those of up, which come last
    cast(Tensor, source.weight).data[rows] /= scale if source_is_norm(which) else scale[:, None]
    if getattr(source, "bias", None) is not None:
        cast(Tensor, source.bias).data[rows] /= scale


def source_is_norm(which: Fold) -> bool:
    return which.source.endswith("norm")


def shared(block: Block, which: Fold, values: Tensor) -> Tensor:
    """Values of the targets' columns [K] -> of the source's channels: a value head serves all heads
    of its group, so theirs are averaged.
    """
    if which.source != "attention.value":
        return values
    spec = block.attention.spec
    return values.view(spec.num_kv_heads, -1, spec.head_dim).mean(1).flatten()


def spread(block: Block, which: Fold, values: Tensor) -> Tensor:
    """Values of the source's channels -> of the targets' columns [K]."""
    if which.source != "attention.value":
        return values
    spec = block.attention.spec
    heads = values.view(spec.num_kv_heads, spec.head_dim)
    return heads.repeat_interleave(spec.num_heads // spec.num_kv_heads, 0).flatten()


def channel_scale(means: Tensor, alpha: float) -> Tensor:
    """s for mean |x| [K]; a channel without input keeps 1."""
    s = means.clamp(min=0) ** alpha
    live = means > 0
    if not live.any():
        return torch.ones_like(means)
    s = s / (s[live].max() * s[live].min()).sqrt()
    return torch.where(live, s.clamp(min=_LEAST), 1.0)


@dataclass(frozen=True, slots=True)
class Search:
    """Folding one block. few: the part of the inputs on which candidates are compared; wanted: what
    the float block gives for it.
    """

    work: BlockWork
    few: Sequence[Tensor]
    wanted: Sequence[Tensor]
    steps: int
    search: bool

    @classmethod
    def of(cls, work: BlockWork, steps: int, search: bool) -> Search:
        few: list[Tensor] = []
        left = _SEARCHED
        # Rows of all lengths take part: of the longest batches first, a share of each.
        share = min(1.0, _SEARCHED / sum(x.shape[0] * x.shape[1] for x in work.hidden))
        for batch in reversed(work.hidden):
            rows = min(len(batch), max(1, round(len(batch) * share)))
            if left > 0:
                few.append(batch[:rows].clone())
                left -= rows * batch.shape[1]
        with torch.inference_mode():
            wanted = [work.call(x) for x in few]
        return cls(work, few, wanted, steps, search)

    @property
    def block(self) -> Block:
        return cast(Block, self.work.block)

    def total(self) -> float:
        """What the block adds to its inputs, squared."""
        return sum(
            float((y - x).square().double().sum())
            for x, y in zip(self.few, self.wanted, strict=True)
        )

    @torch.inference_mode()
    def error(self) -> float:
        """How far the block, as it is now, is from the float one, squared."""
        return sum(
            float((self.work.call(x) - y).square().double().sum())
            for x, y in zip(self.few, self.wanted, strict=True)
        )

    def error_of(self, layers: Iterable[str], scale: Tensor | None = None) -> float:
        """The error with `layers` quantized after their columns were multiplied by `scale`."""
        schemes = self.work.schemes
        chosen = {name: schemes[name] for name in layers if name in schemes}
        with rounded(self.block, chosen, scale, self.search):
            return self.error()

    def candidate(self, which: Fold, means: Tensor, alpha: float) -> Tensor:
        """s as it can be stored: the new norm is rounded to its type, s is what it stands for."""
        s = channel_scale(means, alpha)
        if any(self.work.stored[name] in _SHORT for name in self._stay_float(which)):
            s = torch.exp2(s.log2().round())
        if not source_is_norm(which):
            return s
        weight = cast(Tensor, self.block.get_submodule(which.source).weight).data
        if (kind := self.work.stored[f"{which.source}.weight"]) in _SHORT:
            dtype = torch.bfloat16 if kind == "BF16" else torch.float16
            new = (weight / s).to(dtype).float()
            return torch.where((new != 0) & new.isfinite(), weight / new, 1.0)
        return s

    def _stay_float(self, which: Fold) -> list[str]:
        """Parameters that the fold changes and that are not quantized; norms aside."""
        found = [f"{n}.weight" for n in which.targets if n not in self.work.schemes]
        if not source_is_norm(which):
            found += [f"{which.source}.bias"]
            found += [f"{which.source}.weight"] * (which.source not in self.work.schemes)
        return [name for name in found if name in self.work.stored]

    def alphas(self, which: Fold) -> dict[float, float]:
        """The error for each alpha of the grid."""
        means = self.means(which)
        found = {}
        for step in range(self.steps + 1):
            alpha = step / self.steps
            scale = spread(self.block, which, self.candidate(which, means, alpha))
            found[alpha] = self.error_of(which.targets, scale)
        return found

    def means(self, which: Fold) -> Tensor:
        """Mean |x| of the inputs of the targets, on all tokens, by channel of the source."""
        work = self.work
        total, count = torch.zeros(()), 0
        for x in inputs_of(work.block, which.targets[0], work.call, work.hidden):
            total, count = total + x.abs().sum(0), count + len(x)
        return shared(self.block, which, total.clone() / count)

    def fold_all(self) -> dict[str, float]:
        """Fold what has a layer to quantize; the alphas by source."""
        chosen = {}
        for which in folds_of(self.block):
            if any(name in self.work.schemes for name in which.targets):
                errors = self.alphas(which)
                alpha = min(errors, key=lambda a: (errors[a], a))
                fold(self.block, which, self.candidate(which, self.means(which), alpha))
                self._round(which)
                chosen[which.source] = alpha
        return chosen

    def _round(self, which: Fold) -> None:
        """What stays float is what will be stored: F16 has few bits for the smallest values."""
        for name in self._stay_float(which):
            if self.work.stored[name] == "F16":
                data = self.block.get_parameter(name).data
                data.copy_(data.half())


@contextmanager
def rounded(
    block: nn.Module,
    schemes: Mapping[str, TensorScheme],
    scale: Tensor | None,
    search: bool,
) -> Iterator[None]:
    """Meanwhile these layers have the values of integers, of columns multiplied by `scale`."""
    kept = {name: layer_of(block, name).weight.data for name in schemes}
    try:
        for name, scheme in schemes.items():
            weight = kept[name] if scale is None else kept[name] * scale
            value = dequantize(*quantize(weight, scheme, search=search), scheme)
            layer_of(block, name).weight.data = value if scale is None else value / scale
        yield
    finally:
        for name, weight in kept.items():
            layer_of(block, name).weight.data = weight


def awq_bytes(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bytes for the layers' values of integers beside the float ones, and one of them in work."""
    sizes = [rows * columns for rows, columns in shapes.values()]
    return 4 * sum(sizes) + 12 * max(sizes)
