"""Decoders with the structure of `methods/tiny.py`, of random weights, with a tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_export import save_wide

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.model.decoder import init_decoder
from pocketglm.model.hf import decoder_spec_of, save_decoder

# name -> fields of the spec, of four layers
STRUCTURES: dict[str, dict[str, Any]] = {
    "top-k": {"top_k": 3},
    "shared": {"layer_blocks": (0, 0, 1, 1)},
    "unified": {"unified": True},
    "all": {"layer_blocks": (0, 1, 1, 2), "unified": True, "top_k": 4},
}
FAMILIES = ("glm-half-bias", "glm-wide", "llama-tied-biased", "qwen2", "qwen3")


def save_structure(folder: Path, name: str = "glm-wide", std: float = 0.2, **own: Any) -> Path:
    """A tiny decoder of four layers, unless `own` (fields of the spec) says otherwise."""
    source = Checkpoint.open(save_wide(folder.with_name(f"{folder.name}-dense"), name))
    spec = replace(decoder_spec_of(source), **{"num_layers": 4, **own})
    save_decoder(init_decoder(spec, 3, std), folder, source=source, manifest=source.manifest)
    return folder
