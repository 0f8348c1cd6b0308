"""The family's sizes: parameters, shape, bytes by precision and cache bytes per token."""

from __future__ import annotations

import math

from pocketglm.artifacts.schemas import SizeResult, SizesResult
from pocketglm.cli._common import Json, emit, megabytes
from pocketglm.model.sizes import SIZES, shapes, weight_bytes
from pocketglm.model.spec import DecoderSpec

_HEADER = ["size", "params", "shape", "vocab", "fp16", "int8", "int4", "KV/tok"]


def main(json: Json = False) -> None:
    """List the sizes that `pocketglm init` makes."""
    result = SizesResult(sizes=[_describe(name, spec) for name, spec in SIZES.items()])

    def words() -> None:
        rows = [_HEADER, *(_row(size) for size in result.sizes)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        for row in rows:
            cells = zip(row[1:], widths[1:], strict=True)
            print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in cells)]))

    emit(result, json, words)


def _describe(name: str, spec: DecoderSpec) -> SizeResult:
    size = weight_bytes(spec)
    return SizeResult(
        name=name,
        parameters=sum(map(math.prod, shapes(spec).values())),
        layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        max_length=spec.max_position_embeddings,
        fp16_bytes=size["fp16"],
        int8_bytes=size["int8"],
        int4_bytes=size["int4"],
        kv_bytes_per_token=spec.kv_bytes_per_token,
    )


def _row(size: SizeResult) -> list[str]:
    return [
        size.name,
        _millions(size.parameters),
        f"{size.layers}x{size.hidden_size}",
        f"{size.vocab_size:,}",
        megabytes(size.fp16_bytes),
        megabytes(size.int8_bytes),
        megabytes(size.int4_bytes),
        f"{size.kv_bytes_per_token / 1024:g} KiB",
    ]


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count < 1e9 else f"{count / 1e9:.2f} B"


SPEC = main
