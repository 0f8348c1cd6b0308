"""A tokenizer's files, and a model's configs, with token ids left out and numbered anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pocketglm.artifacts.checkpoint import read_json
from pocketglm.contracts import Ids
from pocketglm.errors import CheckpointError
from pocketglm.text._vocabularies import vocabulary_of

Renumber = Callable[[int], int]

_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
_BINARY = "tokenizer.model"  # of sentencepiece; tokenizer.json says the same


def model_of(data: Mapping[str, Any]) -> Mapping[str, Any]:
    model = data.get("model")
    if not isinstance(model, dict):
        raise CheckpointError("tokenizer.json has no model", "download it again")
    return model


def rewritten(data: Mapping[str, Any], kept: Ids) -> dict[str, Any]:
    """A tokenizer.json with the ids `kept` alone, numbered by their places."""
    new = {int(token): place for place, token in enumerate(kept)}
    content = renumbered(data, new.__getitem__)
    content["model"] = vocabulary_of(model_of(data)).rewritten(new)
    return content


def renumbered(data: Mapping[str, Any], of: Renumber) -> dict[str, Any]:
    """tokenizer.json with the ids outside its model changed."""
    content = dict(data)
    added = data.get("added_tokens") or []
    content["added_tokens"] = [{**token, "id": of(token["id"])} for token in added]
    if processor := data.get("post_processor"):
        content["post_processor"] = _processor(processor, of)
    if padding := data.get("padding"):
        content["padding"] = {**padding, "pad_id": of(padding["pad_id"])}
    return content


def _processor(processor: Mapping[str, Any], of: Renumber) -> dict[str, Any]:
    content = dict(processor)
    for name in ("sep", "cls"):
        if name in content:  # ["[SEP]", 102]
            content[name] = [content[name][0], of(content[name][1])]
    if isinstance(tokens := content.get("special_tokens"), dict):
        content["special_tokens"] = {
            name: {**token, "ids": [of(part) for part in token["ids"]]}
            for name, token in tokens.items()
        }
    if "processors" in content:
        content["processors"] = [_processor(part, of) for part in content["processors"]]
    return content


def renumbered_config(config: Mapping[str, Any], of: Renumber) -> dict[str, Any]:
    """config.json or generation_config.json with its token ids changed."""
    return {
        key: _numbers(value, of) if key.endswith("_token_id") or key in _ID_LISTS else value
        for key, value in config.items()
    }


def _numbers(value: Any, of: Renumber) -> Any:
    if isinstance(value, list):
        return [_numbers(inner, of) for inner in value]
    return of(value) if type(value) is int else value


def side_files(
    folder: Path, content: dict[str, Any], kept: Ids
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The new files by name, and the old ones that are no more."""
    files = {"tokenizer.json": _json(content)}
    config = folder / "tokenizer_config.json"
    if config.is_file():
        new = {str(int(token)): str(place) for place, token in enumerate(kept)}
        side = read_json(config)
        if isinstance(named := side.get("added_tokens_decoder"), dict):
            side["added_tokens_decoder"] = {new[k]: v for k, v in named.items() if k in new}
        files[config.name] = _json(side)
    vocab = vocabulary_of(content["model"]).tokens
    by_id = sorted(vocab, key=vocab.__getitem__)
    merges = (m if isinstance(m, str) else " ".join(m) for m in content["model"].get("merges", []))
    others = {
        "vocab.txt": "".join(f"{name}\n" for name in by_id),
        "vocab.json": json.dumps({name: vocab[name] for name in by_id}, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges),
    }
    files |= {name: text for name, text in others.items() if (folder / name).is_file()}
    return files, ((_BINARY,) if (folder / _BINARY).is_file() else ())


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
