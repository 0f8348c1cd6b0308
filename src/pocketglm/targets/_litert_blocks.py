"""What the parts of a written LiteRT file give, one after the other: see `contracts.Target`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pocketglm.contracts import Floats, Ids
from pocketglm.targets._litert_encoder import SIGNATURE
from pocketglm.targets._litert_parts import FlatFile


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
