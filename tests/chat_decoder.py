"""A tiny random chat model: a decoder with the byte tokenizer and GLM's form of chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_decoder import save_tiny_decoder

from pocketglm.data.tokenizer_training import byte_tokenizer, save_chat_tokenizer

VOCAB = 264  # CHAT_SPECIAL and the bytes


def save_chat_decoder(
    folder: Path,
    name: str = "glm-half-bias",
    positions: int = 64,
    marks: Sequence[str] = (),
    **over: Any,
) -> Path:
    """Write one that names no end-of-text token; returns its folder. marks: more special tokens."""
    fields = {"head_dim": 32, "bos_token_id": None, "eos_token_id": [], "pad_token_id": 0} | over
    size = VOCAB + len(marks)
    save_tiny_decoder(folder, name, vocab_size=size, max_position_embeddings=positions, **fields)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(list(marks))
    save_chat_tokenizer(tokenizer, folder, positions)
    return folder


def edit(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file, or begin one."""
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(old | fields))
