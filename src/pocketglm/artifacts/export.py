"""`export.json`: everything an app or a runtime must know about an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import ValidationError

from pocketglm.artifacts.manifest import CommandGrammar, Step, digest_file
from pocketglm.artifacts.placement import Placement
from pocketglm.artifacts.scheme import CacheScheme, TensorScheme
from pocketglm.contracts import Config
from pocketglm.errors import CheckpointError

EXPORT = "export.json"


class Difference(Config):
    """A whole file's outputs against its checkpoint's in float32, over the rows of `Parity`.

    kl: mean divergence of the answers' probabilities, KL(checkpoint || file), in nats; flip_rate:
    share of the rows whose most likely answer is another. None: the outputs are embeddings.
    """

    max_abs: float
    kl: float | None = None
    flip_rate: float | None = None


class Parity(Config):
    """Worst difference between checkpoint and file, over `n` rows of sample input.

    `blocks` is the worst absolute difference of each block, activation quantization off;
    `output` the whole model's, activation quantization as shipped. `optimizer_max_abs` compares
    the runtime's graph optimizer on and off. `agreement`: share of rows with the same label, or
    the smallest cosine of two embeddings; None where only blocks were compared. `delegate_on` and
    `delegate_off`: with and without what the runtime's `RunOptions.optimize` switches, such as
    XNNPACK; None: not run, or the runtime has no such switch.
    """

    scope: Literal["whole", "blocks"]
    n: int
    output_max_abs: float
    output_std: float
    tolerance: float
    agreement: float | None
    optimizer_max_abs: float = 0.0
    delegate_on: Difference | None = None
    delegate_off: Difference | None = None
    blocks: dict[str, float] = {}


class FileEntry(Config):
    sha256: str
    bytes: int


class CacheLayout(Config):
    """A decoder's cache: per layer one tensor of keys and one of values,
    [batch, kv_heads, tokens, head_dim]. `scheme`: of an int8 one; its scales are in the file.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: Literal["float32", "float16", "int8"] = "float32"
    scheme: CacheScheme | None = None

    @property
    def bytes_per_token(self) -> int:
        size = {"float32": 4, "float16": 2, "int8": 1}[self.dtype]
        return 2 * size * self.layers * self.kv_heads * self.head_dim


class ExportManifest(Config):
    """`kind`: encoder or decoder. `output`: the name of the graph's result.

    `floats`: the type of constants that are not quantized; parity rounds the checkpoint's to it.
    `parameters`: bytes of the weights in the model file by part: embedding, attention, ffn, ...;
    `parameter_count`: how many the model has (0: made before this was recorded).
    `max_length`: of an encoder, where texts are cut; of a decoder, prompt and answer together; the
    file computes no longer rows. `threads`: to open it with unless the caller says otherwise;
    None: all usable cores.
    Of a decoder: `logits`, the positions that it computes logits of ("last" is right for one row at
    a time only); `eos_ids`, any of which ends a text; `cache`; `command`, what it was trained to
    parse. `placement`: where it was predicted to run on the device that it was made for. `links`:
    libraries of the runtime that the file needs beside its core, by their CMake names.
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
    floats: Literal["fp32", "fp16"] = "fp32"
    threads: int | None = None
    logits: Literal["last", "all"] | None = None
    bos_id: int | None = None
    eos_ids: list[int] = []
    cache: CacheLayout | None = None
    command: CommandGrammar | None = None
    task: str | None = None
    schemes: dict[str, TensorScheme] = {}
    tokenizer_sha256: str
    operators: dict[str, int]
    minimum: dict[str, str] = {}
    links: list[str] = []
    checkpoint: str
    origin: dict[str, str] = {}
    lineage: list[Step] = []
    parameters: dict[str, int] = {}
    parameter_count: int = 0
    parity: Parity
    placement: list[Placement] = []
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
        inside = sorted(found.parent for found in folder.glob(f"*/{EXPORT}"))
        raise CheckpointError(
            f"{folder} is not an export: it has no {EXPORT}",
            f"use {inside[0]}"
            if inside
            else "make one with: pocketglm export CKPT --target onnx --out DIR",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise CheckpointError(
            f"{file} is not an export manifest of this version: {where}: {first['msg']}",
            "export the checkpoint again",
        ) from error


def list_files(
    folder: Path, known: Mapping[str, str] = MappingProxyType({})
) -> dict[str, FileEntry]:
    """sha256 and size of every file below `folder`, except `export.json` and hidden files.

    known: the sha256 of some of them.
    """
    files = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and file.name != EXPORT
    }
    return {
        name: FileEntry(sha256=known.get(name) or digest_file(file), bytes=file.stat().st_size)
        for name, file in files.items()
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
