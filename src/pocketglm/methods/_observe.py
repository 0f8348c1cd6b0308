"""What an encoder does on sample rows: the inputs of its layers, and how far a change moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketglm.contracts import Reporter
from pocketglm.model.encoder import Encoder
from pocketglm.ops.fake_quant import InputGrid, quantized_inputs
from pocketglm.ops.histogram import Histogram
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._rows import pad, tokenize

BATCH = 32  # rows at a time: bounds the activations in memory


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Token ids of the rows, shortest first."""

    ids: Sequence[npt.NDArray[np.int32]]
    pad_id: int

    @classmethod
    def draw(
        cls, texts: Sequence[str], count: int, seed: int, tokenizer: Tokenizer, max_length: int
    ) -> SampleRows:
        """`count` texts (or all, if there are fewer), drawn by `seed`."""
        chosen = sorted(np.random.default_rng(seed).permutation(len(texts))[:count])
        ids: list[npt.NDArray[np.int32]] = []
        for start in range(0, len(chosen), BATCH):  # a tokenizer's own results are large
            part = [texts[number] for number in chosen[start : start + BATCH]]
            ids += tokenize(tokenizer, part, max_length).ids
        return cls(sorted(ids, key=len), tokenizer.pad_id)

    def part(self, count: int) -> SampleRows:
        """`count` of the rows, of all lengths."""
        if count >= len(self.ids):
            return self
        chosen = np.linspace(0, len(self.ids) - 1, count).round().astype(int)
        return SampleRows([self.ids[number] for number in chosen], self.pad_id)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """ids and mask [B, S] int64."""
        for start in range(0, len(self.ids), BATCH):
            batch = pad(self.ids, range(start, min(start + BATCH, len(self.ids))), self.pad_id)
            yield batch["ids"], batch["mask"]


def input_histograms(
    model: Encoder, units: Mapping[str, Sequence[str]], rows: SampleRows, reporter: Reporter
) -> dict[str, Histogram]:
    """The inputs of each unit's layers, which are one and the same; padding does not count.

    Raises:
        CheckpointError: an input holds NaN or infinity; the layer is named.
    """
    found = {unit: Histogram(f"the inputs of {layers[0]}") for unit, layers in units.items()}
    watched = {layers[0]: found[unit].add for unit, layers in units.items()}
    _watch(model, watched, rows, reporter, "calibrating")
    return found


def channel_maxima(
    model: Encoder, layers: Sequence[str], rows: SampleRows, reporter: Reporter
) -> dict[str, Tensor]:
    """The greatest |x| of each channel of a layer's input: float32 [K]."""
    found = {layer: _Maxima() for layer in layers}
    _watch(model, {n: m.add for n, m in found.items()}, rows, reporter, "looking for outliers")
    return {layer: maxima.value for layer, maxima in found.items()}


@dataclass
class _Maxima:
    value: Tensor = field(default_factory=lambda: torch.zeros(1))

    def add(self, x: Tensor) -> None:
        """x [N, K]."""
        self.value = torch.maximum(self.value, x.abs().amax(0))


@torch.inference_mode()
def _watch(
    model: Encoder,
    watched: Mapping[str, Callable[[Tensor], None]],
    rows: SampleRows,
    reporter: Reporter,
    label: str,
) -> None:
    """Run the rows; each watcher gets the inputs [N, K] of the layer of its name."""
    keep = torch.empty(0)

    def hook(watcher: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            watcher(args[0][keep] if args[0].ndim == 3 else args[0])

        return see

    with ExitStack() as hooks:
        for name, watcher in watched.items():
            handle = model.get_submodule(name).register_forward_pre_hook(hook(watcher))
            hooks.callback(handle.remove)
        done = 0
        for ids, mask in rows.batches():
            keep = mask.bool()
            model(ids, mask)
            done += len(ids)
            reporter.progress(label, done, len(rows.ids))


@torch.inference_mode()
def outputs(model: Encoder, rows: SampleRows) -> list[Tensor]:
    """What the model gives, by batch: [B, C]."""
    return [model(ids, mask) for ids, mask in rows.batches()]


def divergence(model: Encoder, wanted: Sequence[Tensor], rows: SampleRows) -> float:
    """How far the model is from outputs `wanted`, a mean over the rows.

    Logits: Kullback-Leibler divergence of the probabilities, in nats. Embeddings: 1 - cosine.
    """
    total = 0.0
    for expected, found in zip(wanted, outputs(model, rows), strict=True):
        if model.spec.head == "classification":
            total += float(
                F.kl_div(
                    found.log_softmax(-1),
                    expected.log_softmax(-1),
                    reduction="sum",
                    log_target=True,
                )
            )
        else:
            total += float((1 - (found * expected).sum(-1)).sum())
    return total / len(rows.ids)


@contextmanager
def quantized(
    model: Encoder, weights: Mapping[str, Tensor], grids: Mapping[str, InputGrid] | None
) -> Iterator[None]:
    """Meanwhile the layers named have other weights, and inputs on their grids; without grids, on
    one of each text's own.
    """
    kept = {name: _layer(model, name).weight.data for name in weights}
    try:
        for name, weight in weights.items():
            _layer(model, name).weight.data = weight
        with quantized_inputs(model, {name: grids[name] if grids else None for name in weights}):
            yield
    finally:
        for name, weight in kept.items():
            _layer(model, name).weight.data = weight


def _layer(model: Encoder, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(name))
