"""A Hugging Face model folder, opened lazily: config, tensor headers, tokenizer, manifest.

Never runs code from the folder and never unpickles. Opening reads headers only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.export import is_export, read_export
from pocketglm.artifacts.manifest import MANIFEST, Manifest, digest_files, read_manifest
from pocketglm.artifacts.safetensors import TensorInfo
from pocketglm.errors import CheckpointError, UsageError

__all__ = ["Checkpoint", "TensorInfo"]

# What belongs to a checkpoint; a repository may hold much more (other formats, pictures).
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Repositories that need their own Python code -> the same model in the Hugging Face format.
_HF_FORMAT = {
    name: f"zai-org/{name}-hf" for name in ("glm-4-9b", "glm-4-9b-chat", "glm-4-9b-chat-1m")
}
_SHOWN = 8  # folders that a message lists


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a model folder.

    Raises:
        CheckpointError: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist", "is this a model folder?") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}", "download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} should hold a JSON object, not {type(value).__name__}")
    return value


def model_folder(path: Path | str) -> Path:
    """`path` if it is a folder; else an error that tells a hub id from a wrong path."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() and folder.suffix == ".gguf":
        raise _gguf_error(f"{folder} is GGUF")
    if folder.exists():
        raise UsageError(f"{folder} is a file, not a model folder", "name the folder it lies in")
    parts = str(path).split("/")
    local = str(path).startswith((".", "~")) or Path(parts[0]).is_dir()
    if len(parts) == 2 and all(parts) and not local:
        raise UsageError(
            f"{path} is not a folder here, and PocketGLM does not download",
            f"hf download {path} --local-dir {parts[1]}   (pip install huggingface_hub), "
            f"then use ./{parts[1]}",
        )
    near = sorted(entry.name for entry in folder.parent.glob("*") if entry.is_dir())[:_SHOWN]
    listed = f"; {folder.parent} holds {', '.join(near)}" if near else ""
    raise UsageError(f"{folder} does not exist", f"check the path of the model folder{listed}")


def remote_code_hint(folder: Path, config: Mapping[str, Any]) -> str:
    """Which repository to use instead of one that needs its own Python code."""
    named = Path(str(config.get("_name_or_path"))).name.lower()
    twin = _HF_FORMAT.get(named) or _HF_FORMAT.get(folder.name.lower())
    if twin:
        return f"use {twin}, the same model in the Hugging Face format"
    if "glm" in f"{config.get('model_type')} {config.get('architectures')} {named}".lower():
        return (
            "use the model's repository in the Hugging Face format, whose name ends in -hf "
            "(zai-org/glm-4-9b-chat-hf), a later one (zai-org/GLM-4-9B-0414), or GLM-Edge "
            "(zai-org/glm-edge-1.5b-chat)"
        )
    return "use the model's repository in the Hugging Face format (its name often ends in -hf)"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: `tensors` lists what is stored, in file order."""

    path: Path
    config: dict[str, Any]
    manifest: Manifest
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Read the headers of a model folder.

        Raises:
            UsageError: there is no such folder (for a hub id: the download command).
            CheckpointError: no config, no safetensors, pickle only, remote code, bad shards, an
                export.
        """
        folder = model_folder(path)
        _refuse_gguf(folder)
        _refuse_parent(folder)
        if is_export(folder):
            raise CheckpointError(f"{folder} is an export, not a checkpoint", _needed(folder))
        config = read_json(folder / "config.json")
        tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(folder, config):
            for name, info in safetensors.read_header(file).items():
                if name in tensors:
                    raise CheckpointError(f"{folder}: tensor '{name}' is stored in two files")
                tensors[name] = info
        _check_index(folder, tensors)
        return cls(folder, config, read_manifest(folder), tensors)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows `start:stop` of a tensor, in its stored dtype.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor '{name}'")
        return safetensors.read(self.tensors[name], start, stop)

    @property
    def files(self) -> list[Path]:
        """The files that make up the checkpoint, sorted by name."""
        side = [self.path / name for name in (*SIDE_FILES, MANIFEST)]
        weights = {self.path / info.file.name for info in self.tensors.values()}
        index = self.path.glob("*.safetensors.index.json")
        return sorted({*(f for f in side if f.is_file()), *weights, *index})

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the checkpoint."""
        return sum(f.stat().st_size for f in self.files)

    def digest(self) -> str:
        """sha256 over the names and contents of `files`."""
        return digest_files(self.path, self.files)


def copy_side_files(ckpt: Checkpoint, folder: Path) -> None:
    """Tokenizer, pooling and the like: everything but weights, config and manifest."""
    weights = {info.file.name for info in ckpt.tensors.values()}
    for file in ckpt.files:
        name = file.relative_to(ckpt.path)
        if file.name in weights or name.name.endswith(".safetensors.index.json"):
            continue
        if str(name) not in ("config.json", MANIFEST):
            copy_file(file, folder / name)


def copy_file(file: Path, target: Path) -> None:
    """A copy, and the folder for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


def _refuse_gguf(folder: Path) -> None:
    gguf = sorted(folder.glob("*.gguf"))
    if gguf and not any(folder.glob("*.safetensors")):
        raise _gguf_error(f"{folder} holds GGUF only ({gguf[0].name})")


def _gguf_error(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}: an export, already quantized",
        "start from the model's safetensors: the original repository, without -GGUF",
    )


def _refuse_parent(folder: Path) -> None:
    """A folder of models, such as the one that `export --out` was given."""
    if (folder / "config.json").exists() or is_export(folder):
        return
    found = [inside for inside in sorted(folder.glob("*/")) if _is_model(inside)]
    if found:
        first = found[0]
        raise UsageError(
            f"{folder} is no model folder itself; it holds "
            + ", ".join(inside.name for inside in found[:_SHOWN]),
            f"use {first}" + (f"; {_needed(first)}" if is_export(first) else ""),
        )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or is_export(folder)


def _needed(export: Path) -> str:
    """Which checkpoint an export was made from."""
    manifest = read_export(export)
    base = manifest.origin.get("base_model")
    of = f", of {base}" if base else ""
    return (
        "train, compress and export take the checkpoint that it was exported from "
        f"(pocketglm inspect shows its sha256, {manifest.checkpoint}{of})"
    )


def _weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        shards = read_json(index[0]).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index[0]} has no weight_map", "download it again")
        files = sorted({folder / str(name) for name in shards.values()})
        for file in files:
            if file.parent != folder:
                raise CheckpointError(f"{index[0]} names a shard outside of the folder: {file}")
    else:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) > 1 and (folder / "model.safetensors").is_file():
            files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing", "the folder is incomplete: copy it again")
    if files:
        return files
    needs_code = "auto_map" in config or any(folder.glob("*.py"))
    pickles = [f.name for pattern in _PICKLES for f in sorted(folder.glob(pattern))]
    if needs_code or config.get("model_type") == "chatglm":
        raise CheckpointError(
            f"{folder} has no *.safetensors file, and needs its own Python code (remote code), "
            "which PocketGLM does not run",
            remote_code_hint(folder, config),
        )
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when opened",
            "save it as safetensors with its own library: model.save_pretrained(folder)",
        )
    raise CheckpointError(f"{folder} has no *.safetensors file", "is this a model folder?")


def _check_index(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    for index in sorted(folder.glob("*.safetensors.index.json"))[:1]:
        missing = sorted(set(read_json(index)["weight_map"]) - set(tensors))
        if missing:
            raise CheckpointError(
                f"{index} names {len(missing)} tensors that no shard holds, first '{missing[0]}'",
                "a shard is from another model or incomplete: copy the folder again",
            )
