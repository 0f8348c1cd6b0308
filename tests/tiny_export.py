"""Tiny decoders with a tokenizer, quantized in place, as every decoder export's test begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_decoder import save_tiny_decoder
from tiny_encoder import quantize_weights
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from pocketglm.artifacts.scheme import TensorScheme

# variant of tiny_decoder -> fields beside its own: GroupQueryAttention turns 16 features at a time
WIDE: dict[str, dict[str, Any]] = {
    "glm-half-bias": {"head_dim": 32},
    "glm-wide": {},
    "glm4": {"head_dim": 32},
    "llama": {},
    "llama-tied-biased": {"head_dim": 32},
    "llama-stretched": {},
    "qwen2": {},
    "qwen3": {},
}


def save_wide(folder: Path, name: str, **over: Any) -> Path:
    """A tiny decoder that the ONNX target can carry; its tokens are letters. 2 layers, 64 wide."""
    save_tiny_decoder(folder, name, **(WIDE[name] | over))
    letters = {chr(32 + index): index for index in range(95)} | {"unknown": 95}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def body(**scheme: Any) -> dict[str, TensorScheme]:
    """A scheme for all linear layers of the body."""
    return {"_proj.weight": TensorScheme(**scheme)}


def quantized(folder: Path, schemes: Mapping[str, TensorScheme]) -> Path:
    """Weights stored as integers, in place; a key is the end of stored names."""
    return quantize_weights(folder, schemes)
