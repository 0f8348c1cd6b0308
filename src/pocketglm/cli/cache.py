"""The step cache of compress: where it is, how large, and clearing it."""

from __future__ import annotations

from typing import Annotated

import typer

from pocketglm.artifacts.schemas import CacheResult
from pocketglm.cli._common import Json, emit, megabytes
from pocketglm.stages import _cache


def main(
    clear: Annotated[bool, typer.Option("--clear", help="Delete every cached step.")] = False,
    json: Json = False,
) -> None:
    """Show, or clear, the finished steps that compress can reuse ($POCKETGLM_CACHE)."""
    folder = _cache.cache_root()
    entries, size = _cache.usage(folder)
    if clear:
        _cache.clear(folder)
    result = CacheResult(path=str(folder), entries=entries, bytes=size, cleared=clear)

    def words() -> None:
        state = "cleared " if clear else ""
        print(f"{state}{entries} steps, {megabytes(size)}: {folder}")

    emit(result, json, words)


SPEC = main
