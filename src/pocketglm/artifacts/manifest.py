"""`pocketglm.json`: where a checkpoint comes from and how its tensors are stored; and digests."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pocketglm import __version__
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import Config
from pocketglm.errors import CheckpointError

MANIFEST = "pocketglm.json"
_PIECE = 64 << 20  # bytes of a file that one thread digests at a time
_THREADS = 4
_BUFFER = 1 << 20


class Step(Config):
    """One step of a checkpoint's history. `effect` holds measured figures of the step."""

    method: str
    settings: dict[str, Any] = {}
    seed: int | None = None
    parent: str | None = None
    versions: dict[str, str] = {}
    effect: dict[str, float] = {}


class CommandGrammar(Config):
    """What a model was trained to parse: each intent with the slots that it may have."""

    intents: dict[str, list[str]]


class Manifest(Config):
    """`request` is the digest of the command that made the folder; `task` what it was trained for.

    `origin`: licence and base model, where they are known. `command`: of a model for commands.
    `schemes` maps weight names (`....weight`) to how they are stored; absent = as they are.
    """

    format: Literal[1] = 1
    request: str = ""
    task: str | None = None
    max_length: int | None = None
    origin: dict[str, str] = {}
    command: CommandGrammar | None = None
    lineage: list[Step] = []
    schemes: dict[str, TensorScheme] = {}


def read_manifest(folder: Path) -> Manifest:
    """The folder's manifest, or an empty one where the folder has none (a plain HF folder)."""
    file = folder / MANIFEST
    if not file.is_file():
        return Manifest()
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise CheckpointError(
            f"{file} is not a manifest of this version: {where}: {first['msg']}",
            "was it written by a newer PocketGLM? pip install -U pocketglm",
        ) from error


def write_json(file: Path, value: Config | Mapping[str, Any]) -> None:
    """Indented JSON with a final newline; the same value gives the same bytes."""
    data = value.model_dump(mode="json") if isinstance(value, Config) else value
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tool_versions(*packages: str) -> dict[str, str]:
    """Versions of PocketGLM, Python and the named packages, for the lineage."""
    return {
        "pocketglm": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


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
    places = [(f, start) for f in files for start in range(0, max(f.stat().st_size, 1), _PIECE)]
    digests: dict[str, list[str]] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for (file, _), digest in zip(places, pool.map(_digest_piece, places), strict=True):
            digests.setdefault(file.relative_to(root).as_posix(), []).append(digest)
    return digest_value(digests)


def _digest_piece(place: tuple[Path, int]) -> str:
    file, start = place
    found, left, buffer = hashlib.sha256(), _PIECE, memoryview(bytearray(_BUFFER))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left and (count := stream.readinto(buffer[:left])):
            found.update(buffer[:count])
            left -= count
    return found.hexdigest()
