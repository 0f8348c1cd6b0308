"""Tiny random decoders of every family, written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> model_type, fields beside BASE
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm-half-bias": ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "glm-wide": (
        "glm",
        {
            "head_dim": 32,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "glm4": ("glm4", {"head_dim": 16, "rope_theta": 700.0, "num_key_value_heads": 1}),
    "llama": ("llama", {}),
    "llama-tied-biased": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "llama-stretched": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_theta": 1e6}),
}


def tiny(name: str, **over: Any) -> Any:
    """transformers' own model of a variant, in eval mode; every tensor is far from its default."""
    kind, fields = VARIANTS[name]
    config = transformers.AutoConfig.for_model(kind, **(BASE | fields | over))
    torch.manual_seed(1)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(2)
    for part, parameter in model.named_parameters():
        if parameter.ndim == 1:
            centre = 1.0 if "norm" in part else 0.0
            torch.nn.init.normal_(parameter, centre, 0.2, generator=generator)
    return model


def save_tiny_decoder(folder: Path, name: str = "glm-wide", **over: Any) -> Path:
    """Write one; returns its folder."""
    tiny(name, **over).save_pretrained(folder)
    return folder
