"""The files that sentence-transformers keeps beside a model: modules, pooling, maximum length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pocketglm.artifacts.checkpoint import read_json
from pocketglm.artifacts.manifest import write_json
from pocketglm.errors import CheckpointError
from pocketglm.model.spec import EncoderSpec, Pooling

_MODULES = "modules.json"
_POOLING = "1_Pooling/config.json"
_LENGTHS = (
    ("sentence_bert_config.json", "max_seq_length"),
    ("tokenizer_config.json", "model_max_length"),
)
_FLAGS: dict[str, Pooling] = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
_KINDS = ("Transformer", "Pooling", "Normalize")


def read_pooling(folder: Path) -> Pooling:
    """How the folder pools its tokens; "mean" where it is not a sentence-transformers folder.

    Raises:
        CheckpointError: another pooling than mean or cls, or modules after it that would change
            the embedding.
    """
    modules = folder / _MODULES
    if modules.is_file():
        kinds = [str(entry.get("type", "")).rsplit(".", 1)[-1] for entry in _read_list(modules)]
        if strange := [kind for kind in kinds if kind not in _KINDS]:
            raise CheckpointError(
                f"{modules}: the module '{strange[0]}' is not supported",
                f"known: {', '.join(_KINDS)}",
            )
    file = folder / _POOLING
    if not file.is_file():
        return "mean"
    config = read_json(file)
    # Written as one flag per mode in older versions, as one name or a list in newer ones.
    flags = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    named = config.get("pooling_mode", [_FLAGS.get(flag, flag) for flag in flags])
    modes = [named] if isinstance(named, str) else list(named)
    if modes == ["mean"]:
        return "mean"
    if modes == ["cls"]:
        return "cls"
    raise CheckpointError(
        f"{file}: pooling {' + '.join(map(str, modes)) or 'none'} is not supported",
        "known: mean, cls (one of them)",
    )


def read_max_length(folder: Path) -> int | None:
    """The longest row that the folder's side files allow, in tokens, or None."""
    for name, key in _LENGTHS:
        file = folder / name
        value = read_json(file).get(key) if file.is_file() else None
        if isinstance(value, int | float) and value >= 1:
            return int(value)
    return None


def write_sentence_files(folder: Path, spec: EncoderSpec, max_length: int) -> None:
    """Make a saved embedding model a sentence-transformers folder, for old and new versions."""
    parts = zip(_KINDS, ("", "1_Pooling", "2_Normalize"), strict=True)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(parts)
    ]
    (folder / _MODULES).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    (folder / _POOLING).parent.mkdir(exist_ok=True)
    flags = {flag: mode == spec.pooling for flag, mode in _FLAGS.items()}
    write_json(folder / _POOLING, {"word_embedding_dimension": spec.hidden_size, **flags})
    length = {"max_seq_length": max_length, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", length)


def _read_list(file: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}", "download it again") from error
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise CheckpointError(f"{file} should hold a list of modules", "download it again")
    return value
