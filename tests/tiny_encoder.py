"""A tiny random encoder checkpoint of ours with a tokenizer, made in milliseconds."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import MANIFEST, Manifest, write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.model.encoder import Encoder, init_encoder
from pocketglm.model.hf import save_encoder
from pocketglm.model.spec import EncoderSpec
from pocketglm.ops.affine import quantize
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.stored import read_weight, store

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GRID = InputGrid(0.05, -7)
VOCAB = [*SPECIAL, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]


def spec(**over: Any) -> EncoderSpec:
    """Two layers, 128 wide: every group size divides; three labels."""
    sizes: dict[str, Any] = {
        "vocab_size": len(VOCAB),
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 48,
        "pooling": "mean",
        "head": "classification",
        "num_labels": 3,
    }
    return EncoderSpec(**(sizes | over))


def save_tokenizer(folder: Path, vocab: list[str] = VOCAB) -> None:
    """A BERT tokenizer.json over single letters."""
    tokenizer = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))


def save_tiny(
    folder: Path,
    *,
    max_length: int | None = None,
    change: Callable[[Encoder], None] | None = None,
    **over: Any,
) -> Path:
    """Write the checkpoint; `change` edits the model first, `over` its spec."""
    wanted = spec(**over)
    model = init_encoder(wanted, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # large enough for every layer to matter
            torch.nn.init.normal_(parameter, 0, 0.15, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0, 0.1, generator=generator)
    if change:
        with torch.no_grad():
            change(model)
    labels = [f"label {index}" for index in range(wanted.num_labels)]
    manifest = Manifest(task="intent", max_length=max_length)
    save_encoder(model, folder, source=None, labels=labels, manifest=manifest)
    save_tokenizer(folder)
    return folder


def quantize_weights(
    folder: Path, schemes: Mapping[str, TensorScheme], grid: InputGrid = GRID
) -> Path:
    """Store weights as integers in place. A key is the end of stored names; the first one wins.

    grid: of every static layer's input.
    """
    ckpt = Checkpoint.open(folder)
    arrays: list[tuple[str, Any]] = []
    chosen: dict[str, TensorScheme] = {}
    for name in ckpt.tensors:
        scheme = next((s for end, s in schemes.items() if name.endswith(end)), None)
        if scheme is None or len(ckpt.tensors[name].shape) != 2:
            arrays.append((name, ckpt.read(name)))
            continue
        chosen[name] = scheme
        q, scales, zeros = quantize(read_weight(ckpt, name), scheme, search=False)
        arrays.extend(store(name, q, scales, zeros, scheme, grid).items())
    safetensors.write_file(folder / "model.safetensors", arrays)
    write_json(folder / MANIFEST, ckpt.manifest.model_copy(update={"schemes": chosen}))
    return folder
