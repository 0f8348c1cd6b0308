"""What the parts of a written LiteRT file give, one after the other: see `contracts.Target`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.contracts import Floats, Ids
from pocketglm.targets._litert_decoder import DECODE
from pocketglm.targets._litert_encoder import SIGNATURE
from pocketglm.targets._litert_parts import FlatFile

_POSITIONS, _ROWS = 4096, 512  # of the tables, at a time


def has_decoder(file: Path) -> bool:
    """Whether a written file is a decoder's."""
    return DECODE in FlatFile(file).graphs


def encoder_blocks(file: Path, ids: Ids, mask: Ids) -> list[tuple[str, Floats]]:
    """ids, mask [B, S] -> values after `embeddings` and each `block.I` [B, S, H]; `head` [B, C]."""
    flat = FlatFile(file)
    ends = [n for n in flat.names(SIGNATURE) if n == "embeddings" or n.startswith("block.")]
    head = next(iter(flat.outputs(SIGNATURE).values()))
    shape = (1, ids.shape[1])
    inputs = (f"{SIGNATURE}_input_ids", f"{SIGNATURE}_attention_mask")
    part = flat.part(SIGNATURE, [*ends, head], dict.fromkeys(inputs, shape))
    rows = [
        part(row[None].astype(np.int32), keep[None].astype(np.int32))
        for row, keep in zip(ids, mask, strict=True)
    ]
    values = [np.concatenate(found) for found in zip(*rows, strict=True)]
    return list(zip([*ends, "head"], values, strict=True))


def decoder_blocks(file: Path, ids: Ids, mask: Ids) -> Iterator[tuple[str, Floats]]:
    """ids, mask [B, S]: the tables, then the values of one part after the other; only that part is
    in memory as float.
    """
    flat = FlatFile(file)
    yield from _tables(flat)
    runs = _Runs(flat, ids)
    x = runs.embeddings()
    yield "embeddings", x
    for index in range(runs.layers):
        x = runs.block(index, x)
        yield f"block.{index}", x
    ends = x[np.arange(len(x)), mask.sum(axis=1) - 1]
    logits = flat.outputs(DECODE)["logits"]
    head = flat.part(DECODE, [logits], {f"block.{runs.layers - 1}": (1, 1, x.shape[-1])})
    yield "head", np.concatenate([head(end[None, None])[0][0] for end in ends])


class _Runs:
    """Rows of tokens through the parts of a prompt's graph, a call's tokens at a time.

    Where that graph ends with the last layer's cache, this layer's states are those of `decode`.
    """

    def __init__(self, flat: FlatFile, ids: Ids) -> None:
        self.flat, self.ids = flat, ids
        sizes = {int(n.partition("_")[2]): n for n in flat.graphs if n != DECODE}
        length = ids.shape[1]
        self.size = min((n for n in sizes if n >= length), default=max(sizes))
        self.name = sizes[self.size]
        self.layers = sum(n.startswith("block.") for n in flat.names(DECODE))

    def embeddings(self) -> Floats:
        """[B, S, H]."""
        key = f"{self.name}_tokens"
        part = self.flat.part(self.name, ["embeddings"], {key: (1, self.size)})

        def call(row: Any, start: int) -> Floats:
            return part(row[None].astype(np.int32))[0]

        return self._rows(self.size, call, self.ids)

    def block(self, index: int, x: Floats) -> Floats:
        """Layer `index`: x [B, S, H] -> [B, S, H]."""
        before = f"block.{index - 1}" if index else "embeddings"
        caches = [f"kv_cache_{kind}_{index}" for kind in "kv"]
        name, size = self.name, self.size
        if f"block.{index}" not in self.flat.names(name):
            name, size = DECODE, 1
        ends = [self.flat.outputs(name)[cache] for cache in caches]
        tensors, names = self.flat.graphs[name].tensors, self.flat.names(name)
        shape = tuple(int(n) for n in tensors[names[f"{name}_{caches[0]}"]].shape)
        part = self.flat.part(
            name,
            [f"block.{index}", *ends],
            {
                before: (1, size, x.shape[-1]),
                f"{name}_input_pos": (size,),
                **{f"{name}_{cache}": shape for cache in caches},
            },
        )
        kept: list[Any] = []

        def call(rows: Floats, start: int) -> Floats:
            if not start:
                kept[:] = [np.zeros(shape, np.float32) for _ in caches]
            positions = np.arange(start, start + size, dtype=np.int32)
            found, *kept[:] = part(rows[None], positions, *kept)
            return found

        return self._rows(size, call, x)

    def _rows(self, size: int, call: Callable[[Any, int], Floats], values: Any) -> Floats:
        """`call` of a row's next `size` values and their first position, for all rows."""
        missing = -values.shape[1] % size
        values = np.pad(values, ((0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)))
        starts = range(0, values.shape[1], size)
        rows = [
            np.concatenate([call(row[i : i + size], i).reshape(size, -1) for i in starts])
            for row in values
        ]
        return np.stack(rows)[:, : self.ids.shape[1]]


def _tables(flat: FlatFile) -> Iterator[tuple[str, Floats]]:
    """Rows of an embedding that is not the head, and the rotary tables."""
    graph = flat.graphs[DECODE]
    names = flat.names(DECODE)
    cos, sin = (
        flat.floats(graph, graph.tensors[names[f"rotary.{kind}"]]) for kind in ("cos", "sin")
    )
    for start in range(0, len(cos), _POSITIONS):
        stop = min(start + _POSITIONS, len(cos))
        yield f"rotary.{start}:{stop}", np.stack([cos[start:stop], sin[start:stop]])
    lookups = [i for o in graph.operators if flat.kind(o) == "EMBEDDING_LOOKUP" for i in o.inputs]
    table = int(lookups[1])
    readers = [o for o in graph.operators if table in o.inputs]
    if len(readers) > 1:
        return  # the head reads it too
    rows = int(graph.tensors[table].shape[0])
    for start in range(0, rows, _ROWS):
        stop = min(start + _ROWS, rows)
        values = flat.floats(graph, graph.tensors[table], slice(start, stop))
        yield f"rows.{start}:{stop}", values
