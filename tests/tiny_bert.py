"""A tiny random BERT folder, written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers


def save_tiny_bert(folder: Path, kind: str = "BertForSequenceClassification", **over: Any) -> Path:
    """Two layers, 128 wide (every group size divides), 3 labels; weights are far from zero."""
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 16,
        "num_labels": 3,
    }
    generator = torch.Generator().manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**(sizes | over)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.01, 0.1, generator=generator)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(f"w{i}" for i in range(40)))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    return folder
