"""sha256 of files and JSON values. `begin` takes that of a model's files while a verb's modules are
imported, which keeps one core busy for more than a second.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

_PIECE = 64 << 20  # bytes of a file that one thread digests at a time
_THREADS = 4
_BUFFER = 1 << 20
_WIDE = 32 << 20  # the buffer beside an import, which gives way to other threads only now and then
Place = tuple[Path, int, int, int]  # a piece: file, its first byte, the file's size and time

_begun: dict[Place, Future[str]] = {}


def digest_value(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(file: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_files(root: Path, files: Iterable[Path]) -> str:
    """One sha256 over names (relative to `root`) and contents; symlinks are followed.

    Of a file it takes the sha256 of each piece of 64 MiB: so that threads share the work.
    """
    places = [place for file in files for place in _places(file)]
    digests: dict[str, list[str]] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for (file, *_), digest in zip(places, pool.map(_digest, places), strict=True):
            digests.setdefault(file.relative_to(root).as_posix(), []).append(digest)
    return digest_value(digests)


def begin(folder: Path) -> threading.Thread:
    """Let a thread digest the weights in `folder`: `digest_files` takes what it has by then, and
    does the rest. The process may end before it.
    """
    places: dict[Place, Future[str]] = {}
    with suppress(OSError):
        whole = folder / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
        places = {place: Future() for file in files for place in _places(file)}
    _begun.update(places)
    thread = threading.Thread(target=_work, args=(places,), daemon=True)
    thread.start()
    return thread


def _work(places: dict[Place, Future[str]]) -> None:
    for place, future in places.items():
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(_digest_piece(place, _WIDE))
            except OSError as error:
                future.set_exception(error)


def _places(file: Path) -> list[Place]:
    status = file.stat()
    size, changed = status.st_size, status.st_mtime_ns
    return [(file, start, size, changed) for start in range(0, max(size, 1), _PIECE)]


def _digest(place: Place) -> str:
    begun = _begun.pop(place, None)
    if begun is None or begun.cancel():  # nobody has come to it yet
        return _digest_piece(place, _BUFFER)
    return begun.result()


def _digest_piece(place: Place, size: int) -> str:
    file, start, *_ = place
    found, left, buffer = hashlib.sha256(), _PIECE, memoryview(bytearray(size))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left and (count := stream.readinto(buffer[:left])):
            found.update(buffer[:count])
            left -= count
    return found.hexdigest()
