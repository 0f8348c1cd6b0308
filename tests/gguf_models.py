"""Tiny decoders with trained byte-level BPE, by each splitting rule that GGUF has a name of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_decoder import save_tiny_decoder
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pocketglm.data.tokenizer_training import CHAT_EOS, CHAT_SPECIAL, save_chat_tokenizer
from pocketglm.stages._parity import SAMPLES

VOCAB = 420
IDS = [5, 60, 17, 233, 301, 8, 8, 411, 64, 99, 30]
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    *SAMPLES,
    "I'm sure it's 1234567 or 89, isn't it?  They'LL say 3.14159!",
    "  two spaces,\ttabs\n\nand lines \r\n end   ",
    "für Mañana: Ελλάδα, Москва, 한국어, हिन्दी, 12,5 € — “quotes” …",
    "emoji 👍🏽 and 日本語の文 mixed123with456digits",
    "x=a[i]+b->c; // code_style CamelCase",
]
# llama.cpp's name -> the pre-tokenizer that it stands for, and ignore_merges
RULES = ("chatglm-bpe", "llama-bpe", "qwen2", "gpt-2", "smollm")
# One size for all: heads fill the width, rows divide by 32.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def bpe(rule: str, vocab: int = VOCAB) -> Tokenizer:
    """Trained on `TEXTS`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    digits = r"\p{N}" if rule == "qwen2" else r"\p{N}{1,3}"
    split = pre_tokenizers.Split(Regex(LETTERS + digits + REST), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps: list[Any] = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if rule in ("gpt-2", "smollm"):
        steps = [pre_tokenizers.Digits(individual_digits=True), whole][rule == "gpt-2" :]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(CHAT_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return tokenizer


def save_bpe_decoder(
    folder: Path, name: str = "glm-half-bias", rule: str = "chatglm-bpe", **over: Any
) -> Path:
    """Write one of `tiny_decoder.VARIANTS`; returns its folder. Six ids have no token."""
    tokenizer = bpe(rule)
    ends = [tokenizer.token_to_id(token) for token in CHAT_EOS]
    fields = SIZES | {"eos_token_id": ends, "bos_token_id": None, "pad_token_id": 0} | over
    if name == "llama-tied-biased":
        fields["head_dim"] = 24  # 96 features beside a width of 128
    save_tiny_decoder(folder, name, vocab_size=tokenizer.get_vocab_size() + 6, **fields)
    save_chat_tokenizer(tokenizer, folder, 64)
    return folder


def edit_tokenizer(folder: Path, **fields: Any) -> Path:
    """Change fields of tokenizer.json; returns the folder."""
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder
