"""What the parts of a written .pte file give, one after the other: see `contracts.Target`.

The file has no names. Its parts are found by their place: a decoder's residual stream is the
embedding and each sum with the one before; an encoder's blocks end with every second norm, whose
results are sums with a constant behind a reciprocal square root.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from pocketglm.contracts import Floats, Ids
from pocketglm.targets._executorch_read import PteFile
from pocketglm.targets._executorch_run import Event, Run

_POSITIONS, _ROWS = 4096, 512  # of the tables, at a time
_CACHE = "index_put_"
_SUMS = ("Add", "add")
_ROOTS = ("ReciprocalSquareRoot", "rsqrt")
_LOOKUPS = ("embedding", "embedding_byte", "embedding_4bit")


@torch.inference_mode()
def blocks(file: Path, ids: Ids, mask: Ids) -> Iterator[tuple[str, Floats]]:
    """ids, mask [B, S] -> the parts' values; see above."""
    read = PteFile(file)
    caches = sum(
        type(call).__name__ == "KernelCall" and _CACHE in read.operator(call)
        for call in read.instructions
    )
    if caches:
        yield from _decoder(read, ids, mask, caches // 2)
    else:
        yield from _encoder(read, ids, mask)


def _encoder(read: PteFile, ids: Ids, mask: Ids) -> Iterator[tuple[str, Floats]]:
    rows = [
        (torch.from_numpy(row)[None], torch.from_numpy(keep)[None])
        for row, keep in zip(ids, mask, strict=True)
    ]
    run, norms, rooted = Run(read, rows), 0, False
    for event in run.events():
        rooted |= event.kind in _ROOTS
        if rooted and event.kind in _SUMS and any(event.stored):
            if norms % 2 == 0:
                name = f"block.{norms // 2 - 1}" if norms else "embeddings"
                yield name, torch.cat(event.output).numpy()
            norms, rooted = norms + 1, False
    yield "head", torch.cat(run.result).numpy()


def _decoder(read: PteFile, ids: Ids, mask: Ids, layers: int) -> Iterator[tuple[str, Floats]]:
    lengths = mask.sum(axis=1)
    rows = [
        (torch.from_numpy(row[:size])[None], torch.zeros(1, dtype=torch.int64))
        for row, size in zip(ids, lengths, strict=True)
    ]
    run = Run(read, rows)
    tables: list[Tensor] = []
    stream: list[list[Tensor]] = []
    for event in run.events():
        if event.kind in _LOOKUPS and not stream:
            stream.append(event.output)
            yield "embeddings", _padded(event.output, ids.shape[1])
            yield from _rows(event)
        elif event.kind == "index" and len(tables) < 2:
            tables.append(event.inputs[0][0])
            if len(tables) == 2:
                yield from _rotary(*tables)
        elif event.kind in _SUMS and stream and any(x is stream[-1] for x in event.inputs):
            stream.append(event.output)
    # of a layer: attention's sum and the FFN's, or one for both
    step = (len(stream) - 1) // layers
    for index in range(layers):
        yield f"block.{index}", _padded(stream[step * (index + 1)], ids.shape[1])
    yield "head", torch.stack([x.reshape(-1, x.shape[-1])[-1] for x in run.result]).numpy()


def _padded(rows: list[Tensor], length: int) -> Floats:
    """[1, S, H] of each text -> [B, length, H]."""
    found: Floats = torch.cat([pad(x, (0, 0, 0, length - x.shape[1])) for x in rows]).numpy()
    return found


def _rows(event: Event) -> Iterator[tuple[str, Floats]]:
    """All rows of the table that was looked up in, by the same operator."""
    table = event.inputs[0][0]
    if event.repeat is None:
        return
    for start in range(0, len(table), _ROWS):
        ids = torch.arange(start, min(start + _ROWS, len(table)))
        yield f"rows.{start}:{start + len(ids)}", event.repeat(ids).numpy()


def _rotary(cos: Tensor, sin: Tensor) -> Iterator[tuple[str, Floats]]:
    """Cosines and sines, each [positions, dims / 2]."""
    for start in range(0, len(cos), _POSITIONS):
        stop = min(start + _POSITIONS, len(cos))
        yield f"rotary.{start}:{stop}", torch.stack([cos[start:stop], sin[start:stop]]).numpy()
