"""`pocketglm.json`: where a checkpoint comes from and how its tensors are stored."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pocketglm import __version__
from pocketglm.artifacts.digests import digest_file as digest_file
from pocketglm.artifacts.digests import digest_files as digest_files
from pocketglm.artifacts.digests import digest_value as digest_value
from pocketglm.artifacts.scheme import CacheScheme, TensorScheme
from pocketglm.contracts import Config
from pocketglm.errors import CheckpointError

MANIFEST = "pocketglm.json"


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
    `cache`: of a decoder whose keys and values are kept as integers; their scales are tensors.
    """

    format: Literal[1] = 1
    request: str = ""
    task: str | None = None
    max_length: int | None = None
    origin: dict[str, str] = {}
    command: CommandGrammar | None = None
    lineage: list[Step] = []
    schemes: dict[str, TensorScheme] = {}
    cache: CacheScheme | None = None


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
