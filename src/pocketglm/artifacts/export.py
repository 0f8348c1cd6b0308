"""`export.json`: everything an app or a runtime must know about an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pocketglm.artifacts.manifest import Step, digest_file
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import Config
from pocketglm.errors import CheckpointError

EXPORT = "export.json"


class Parity(Config):
    """Worst difference between checkpoint and file, over `n` rows of sample input.

    `blocks` is the worst absolute difference of each block, activation quantization off;
    `output` the whole model's, activation quantization as shipped. `optimizer_max_abs` compares
    the runtime's graph optimizer on and off. `agreement`: share of rows with the same label, or
    the smallest cosine of two embeddings.
    """

    scope: Literal["whole", "blocks"]
    n: int
    output_max_abs: float
    output_std: float
    tolerance: float
    agreement: float
    optimizer_max_abs: float = 0.0
    blocks: dict[str, float] = {}


class FileEntry(Config):
    sha256: str
    bytes: int


class ExportManifest(Config):
    """`kind`: encoder or decoder. `output`: the name of the graph's result.

    `parameters`: bytes of the weights in `model_file` by part: embedding, attention, ffn, ...
    `max_length`: where texts are cut; the file computes no longer rows. `threads`: to open it with
    unless the caller says otherwise; None: all usable cores.
    """

    format: Literal[1] = 1
    request: str = ""
    target: str
    runtime: str
    kind: Literal["encoder", "decoder"]
    output: str
    precision: str
    model_file: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    labels: list[str] = []
    pooling: str = ""
    max_length: int
    vocab_size: int = 0
    activation: str = "none"
    threads: int | None = None
    task: str | None = None
    schemes: dict[str, TensorScheme] = {}
    tokenizer_sha256: str
    operators: dict[str, int]
    minimum: dict[str, str] = {}
    checkpoint: str
    origin: dict[str, str] = {}
    lineage: list[Step] = []
    parameters: dict[str, int] = {}
    parity: Parity
    files: dict[str, FileEntry]


def is_export(folder: Path) -> bool:
    return (folder / EXPORT).is_file()


def read_export(folder: Path) -> ExportManifest:
    """The folder's `export.json`.

    Raises:
        CheckpointError: missing, or not of this version.
    """
    file = folder / EXPORT
    try:
        return ExportManifest.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder} is not an export: it has no {EXPORT}",
            "make one with: pocketglm export CKPT --target onnx --out DIR",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise CheckpointError(
            f"{file} is not an export manifest of this version: {where}: {first['msg']}",
            "export the checkpoint again",
        ) from error


def list_files(folder: Path) -> dict[str, FileEntry]:
    """sha256 and size of every file below `folder`, except `export.json` and hidden files."""
    return {
        file.relative_to(folder).as_posix(): FileEntry(
            sha256=digest_file(file), bytes=file.stat().st_size
        )
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and file.name != EXPORT
    }


def check_files(folder: Path, manifest: ExportManifest) -> None:
    """Compare the folder with its manifest.

    Raises:
        CheckpointError: a file is missing or changed; the message names it.
    """
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing", "export the checkpoint again")
        if file.stat().st_size != entry.bytes or digest_file(file) != entry.sha256:
            raise CheckpointError(
                f"{file} is not the file that was exported (sha256 differs)",
                "copy the folder again, or export the checkpoint again",
            )
