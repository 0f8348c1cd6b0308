"""Does an exported decoder compute what its checkpoint computes?

Block by block, activation quantization off: each block of the checkpoint in PyTorch gets what the
file's own previous block gave, so that errors do not add up and the faulty block is named. One
block of either side is in memory at a time. A model that is small enough is also compared whole, as
it ships: the logits of its runtime, with its delegate and without, against those of PyTorch's
blocks one after the other. Of an INT8 cache the file's integers are compared, and then taken: a
value halfway between two integers may become either.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import ExportManifest, Parity
from pocketglm.contracts import ExportOptions, Floats, Ids, Reporter, RunOptions, Target, Tolerance
from pocketglm.errors import MissingExtraError, ParityError
from pocketglm.model.hf import decoder_spec_of, stored_name
from pocketglm.model.inputs import layer_scales
from pocketglm.model.layers import Block, Rotation, bare_modules, rotation
from pocketglm.model.spec import DecoderSpec
from pocketglm.ops.stored import check_finite, parameter_counts, read_quantized, read_weight
from pocketglm.runtimes import open_decoder
from pocketglm.runtimes._cores import usable_cores
from pocketglm.stages._file_cache import FileCache
from pocketglm.stages._memory import Ceiling, resident
from pocketglm.stages._parity import SAMPLES, by_parts, judge, on_and_off, worst
from pocketglm.text.tokenizer import Tokenizer

WHOLE = 200_000_000  # parameters up to which the whole model is compared
# Texts and how many tokens of each. The first are all that a model of many blocks gets: every
# weight takes part in every token.
_TEXTS = ((SAMPLES[5], 8), (SAMPLES[0], 5), (SAMPLES[3], 12), (SAMPLES[13], 5))
_FEW = 2
_TABLES = {"rotary", "rows"}
# Top-k attention is discrete: where two scores are nearly the same, one rounding may decide which
# key stays. So only a few tokens see more than k keys, and a comparison that fails is made again
# with other tokens: a wrong file fails each time.
_BEYOND, _TRIES, _LARGEST_K = 2, 3, 512
_CHUNK = 1 << 20  # weights that are dequantized at a time
_FILE_BYTES = {4: 0.75, 8: 1.25}  # for a weight with its share of scales and zero points
_SPARE = 128 << 20  # chunks, activations, the runtime's and the allocator's own


def check_decoder_parity(
    ckpt: Checkpoint,
    folder: Path,
    manifest: ExportManifest,
    target: Target,
    options: ExportOptions,
    reporter: Reporter,
) -> Parity:
    """Compare the files in `folder`, whose export.json is `manifest`, with the checkpoint.

    Raises:
        ParityError: a part or the whole differs by more than the form of the file explains.
        CheckpointError: a weight of the checkpoint holds NaN or infinity.
    """
    top_k = decoder_spec_of(ckpt).top_k
    for number in range(_TRIES - 1 if top_k else 0):
        try:
            return _check(ckpt, folder, manifest, target, options, reporter, number)
        except ParityError as error:
            reporter.say(f"{error.message}: trying other tokens")
    return _check(ckpt, folder, manifest, target, options, reporter, _TRIES - 1 if top_k else 0)


def _check(
    ckpt: Checkpoint,
    folder: Path,
    manifest: ExportManifest,
    target: Target,
    options: ExportOptions,
    reporter: Reporter,
    number: int,
) -> Parity:
    """Once; `number` decides with which tokens a text that is too short goes on."""
    whole, texts = _is_small(ckpt, manifest, options), _texts(decoder_spec_of(ckpt).top_k)
    ids, mask = _samples(folder, manifest, texts if whole else texts[:_FEW], number)
    found = target.blocks(folder / manifest.model_file, ids, mask)
    tolerance = target.tolerance
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(threads, usable_cores() - 1)))  # the file's side has a core
    try:
        blocks, wanted = _compare(
            _Reference(ckpt, decoder_spec_of(ckpt), half=manifest.floats == "fp16"),
            found,
            ids,
            mask,
            options.max_memory,
            reporter,
            tolerance.part,
            whole=whole,
        )
    finally:
        torch.set_num_threads(threads)
    if not whole:
        return by_parts(blocks, wanted, tolerance)
    try:
        shipped, plain = on_and_off(
            manifest, lambda options: _run(folder, ids, mask, options), reporter
        )
    except MissingExtraError as error:
        return by_parts(blocks, wanted, tolerance, error, reporter)
    return judge(manifest, wanted, shipped, plain, blocks, tolerance, classes=True)


def _texts(top_k: int | None) -> tuple[tuple[str, int], ...]:
    """Texts and how many tokens of each. The second's last tokens see more than k keys: its words
    are few, so most of its tokens are random (keys that are alike would tell nothing).
    """
    if top_k is None or top_k > _LARGEST_K:
        return _TEXTS
    first, (short, length), *others = _TEXTS
    return (first, (short, max(length, top_k + _BEYOND)), *others)


def _samples(
    folder: Path,
    manifest: ExportManifest,
    texts: Sequence[tuple[str, int]] = _TEXTS,
    number: int = 0,
) -> tuple[Ids, Ids]:
    """ids and mask [B, S]: rows of two tokens at least, padded on the right.

    A text that is too short goes on with random tokens, which also reach rare rows.
    """
    encoded = Tokenizer.load(folder).encode([text for text, _ in texts], manifest.max_length)
    lengths = np.array([min(count, manifest.max_length) for _, count in texts])
    shape = (len(lengths), lengths.max())
    ids = np.random.default_rng(number).integers(0, manifest.vocab_size, shape)
    given = min(shape[1], encoded.ids.shape[1])
    ids[:, :given] = np.where(encoded.mask[:, :given], encoded.ids[:, :given], ids[:, :given])
    mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
    return ids * mask, mask


def _is_small(ckpt: Checkpoint, manifest: ExportManifest, options: ExportOptions) -> bool:
    """Whether the whole file is compared: its runtime holds it, mapped and as it arranges it."""
    file = sum(entry.bytes for entry in manifest.files.values())
    needed = resident() + 2 * file + decoder_buffers(ckpt)
    limit = options.max_memory or psutil.virtual_memory().available // 2
    return sum(parameter_counts(ckpt).values()) <= WHOLE and needed <= limit


def decoder_buffers(ckpt: Checkpoint) -> int:
    """An upper estimate of the bytes that exporting and comparing a decoder hold at once.

    The largest part in the file, mapped and as its runtime arranges it; the checkpoint's side is
    taken by chunks.
    """
    file: Counter[str] = Counter()
    for name, count in parameter_counts(ckpt).items():
        block = re.search(r"layers\.(\d+)\.", name)
        scheme = ckpt.manifest.schemes.get(name)
        part = block[1] if block else name
        file[part] += int(count * (_FILE_BYTES[scheme.bits] if scheme else 4))
    return 2 * max(file.values()) + _SPARE


# --- block by block ------------------------------------------------------------------------------


@torch.inference_mode()
def _compare(
    reference: _Reference,
    found: Iterable[tuple[str, Floats]],
    ids: Ids,
    mask: Ids,
    max_memory: int | None,
    reporter: Reporter,
    tolerance: float = Tolerance().part,
    *,
    whole: bool,
) -> tuple[dict[str, float], Floats]:
    """Worst absolute difference per part at real tokens; and the checkpoint's logits. tolerance: of
    a value of size 1.

    Of the last tokens [B, V], from what the file gave; with `whole` of all tokens [n, V], from what
    the checkpoint's own parts gave one after the other.
    """
    keep, rows, last = mask.astype(bool), np.arange(len(ids)), mask.sum(axis=1) - 1
    ceiling = Ceiling(max_memory, "export")
    total, batch = reference.spec.num_layers + 2, len(ids)
    x = own = logits = torch.empty(0)
    kept: FileCache | None = None
    differences: dict[str, float] = {}
    for name, value in _ahead(found):
        part, _, place = name.partition(".")
        if part == "cache":
            kept = FileCache.of(name, value, mask, layer_scales(reference.ckpt, int(place)))
            continue
        if part in ("rotary", "rows"):
            start, stop = map(int, place.split(":"))
            expected = getattr(reference, part)(start, stop).numpy()
            difference = _difference(name, expected, value, tolerance)
            differences[part] = max(difference, differences.get(part, 0.0))
            continue
        # Both inputs of a part go through it together: its weights are read once.
        if part == "embeddings":
            wanted = own = reference.embeddings(torch.from_numpy(ids))
        elif part == "head":
            ends = x[rows, last]
            logits = reference.head(torch.cat([ends, own[keep]]) if whole else ends)
            wanted, logits = logits[:batch], logits[batch if whole else 0 :]
        else:
            both = reference.block(int(place), torch.cat([x, own]) if whole else x, kept)
            wanted, own = both[:batch], both[batch:]
        x, expected = torch.from_numpy(value), wanted.numpy()
        if part != "head":
            expected, value = expected[keep], value[keep]
        differences[name] = _difference(name, expected, value, tolerance)
        ceiling.check()
        reporter.progress("checking parity", len(differences.keys() - _TABLES), total, name)
    return differences, logits.numpy()


def _difference(name: str, expected: Floats, found: Floats, tolerance: float) -> float:
    """The greatest absolute difference.

    Raises:
        ParityError: it is too great, or the shapes differ.
    """
    limit = tolerance * max(1.0, float(np.abs(expected).max()))
    difference = worst(expected, found) if expected.shape == found.shape else math.inf
    if not difference <= limit:
        raise ParityError(
            f"'{name}' of the written file differs from the checkpoint by {difference:.3g} "
            f"(limit {limit:.3g}), activation quantization off",
            "this is a defect of the export: please report it with this checkpoint's config",
        )
    return difference


def _ahead(found: Iterable[tuple[str, Floats]]) -> Iterator[tuple[str, Floats]]:
    """The same, each computed in another thread while its predecessor is in use."""
    items = iter(found)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


class _Streamed(nn.Module):
    """A linear layer whose weight is read and multiplied a chunk of rows at a time."""

    def __init__(self, reference: _Reference, name: str, layer: nn.Linear) -> None:
        super().__init__()
        self.reference, self.name = reference, name
        self.shape, self.has_bias = tuple(layer.weight.shape), layer.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y = self.reference.product(x, f"{self.name}.weight", self.shape)
        return y + self.reference.read(f"{self.name}.bias") if self.has_bias else y


@dataclass(frozen=True, slots=True)
class _Reference:
    """The checkpoint's parts in PyTorch, float32, each read when it is used.

    No more than a chunk of a weight is in memory as float32. half: constants that are not quantized
    are rounded to fp16, as in the file.
    """

    ckpt: Checkpoint
    spec: DecoderSpec
    half: bool = False

    def embeddings(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> [B, S, H]."""
        used, place = np.unique(ids.numpy(), return_inverse=True)
        rows = [self.rows(int(i) // 8 * 8, int(i) + 1)[-1:] for i in used]
        return torch.cat(rows)[torch.from_numpy(place.reshape(ids.shape))]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the token embedding [rows, H]; `start` is a multiple of 8."""
        return self.read("tokens.weight", start, stop)

    def rotary(self, start: int, stop: int) -> Tensor:
        """Cosines and sines of positions `start:stop`: [2, positions, rotary dims / 2]."""
        turn = self._rotation(torch.arange(start, stop)[None])
        return torch.stack([turn.cos[0, 0], turn.sin[0, 0]])

    def _rotation(self, positions: Tensor) -> Rotation:
        turn = rotation(self.spec.rope, positions, torch.float32)
        if not self.half:
            return turn
        return turn._replace(cos=turn.cos.half().float(), sin=turn.sin.half().float())

    def block(self, index: int, x: Tensor, past: FileCache | None = None) -> Tensor:
        """Layer `index`: x [B, S, H] -> [B, S, H], every row by itself from position 0."""
        with bare_modules():
            block = Block(self.spec.block(index)).eval()
        at = f"blocks.{self.spec.blocks()[index]}."
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                block.set_submodule(name, _Streamed(self, at + name, layer))
        block.load_state_dict({n: self.read(at + n) for n in block.state_dict()}, assign=True)
        turn = self._rotation(torch.arange(x.shape[1])[None])
        result: Tensor = block(x, None, turn, past)
        return result

    def head(self, x: Tensor) -> Tensor:
        """x [B, H] -> logits [B, V]."""
        norm = nn.RMSNorm(self.spec.hidden_size, self.spec.rms_norm_eps)
        norm.load_state_dict({"weight": self.read("norm.weight")})
        name = "tokens.weight" if self.spec.tied else "head.weight"
        return self.product(norm(x), name, (self.spec.vocab_size, self.spec.hidden_size))

    def product(self, x: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        """x [..., K] times the transposed weight `name` [N, K] -> [..., N]."""
        step = max(_CHUNK // shape[1] // 8 * 8, 8)
        starts = range(0, shape[0], step)
        parts = [F.linear(x, self.read(name, start, start + step)) for start in starts]
        return torch.cat(parts, dim=-1)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of a parameter, finite values all; `start` is a multiple of 8."""
        stored = stored_name(self.ckpt, name)
        if stored not in self.ckpt.manifest.schemes:
            rows = read_weight(self.ckpt, stored, start, stop)
            check_finite(self.ckpt, stored, rows, start)
            return rows.half().float() if self.half else rows
        found = read_quantized(self.ckpt, stored, start, stop)
        check_finite(self.ckpt, stored, found.scales, start)
        return found.dequantized()


# --- the whole file ------------------------------------------------------------------------------


def _run(folder: Path, ids: Ids, mask: Ids, options: RunOptions) -> Floats:
    """Logits [tokens, V] of all rows' real tokens, by the runtime."""
    session = open_decoder(folder, options)
    try:
        rows = [row[: keep.sum()].tolist() for row, keep in zip(ids, mask, strict=True)]
        return np.concatenate([session.score(row) for row in rows])
    finally:
        session.close()
