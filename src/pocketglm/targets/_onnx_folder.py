"""What the folders of encoders and decoders share."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint, read_json
from pocketglm.artifacts.manifest import write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.model.bert import CLASSIFIER, MODEL, config_of
from pocketglm.model.hf import labels_of, role_of
from pocketglm.model.spec import EncoderSpec
from pocketglm.targets._onnx_graph import MICROSOFT, GraphBuilder, Shape
from pocketglm.text.tokenizer import TOKENIZER_FILES, Tokenizer


def port(name: str, dtype: str, shape: Shape) -> dict[str, Any]:
    """One input or output, as export.json lists it."""
    return {"name": name, "dtype": dtype, "shape": list(shape)}


def part_bytes(g: GraphBuilder) -> dict[str, int]:
    """Bytes of the initializers by part of the model."""
    parts: dict[str, int] = {}
    for constant, size in g.constant_bytes().items():
        role = role_of(f"{constant.split('|')[0].removesuffix('.weight')}.weight")
        parts[role] = parts.get(role, 0) + size
    return dict(sorted(parts.items()))


def oldest_runtime(
    linear: Iterable[TensorScheme], operators: Mapping[str, int], *, int8_cache: bool = False
) -> str:
    """The oldest ONNX Runtime that such a file ran in when tried by hand with 1.15.1 to 1.23.2; an
    INT8 cache with 1.24 to 1.32 (1.25 and 1.26 open such a file, and fail when it runs).

    1.15.1 runs MultiHeadAttention, but its results are wrong; 1.16.3's are right.
    linear: the schemes of the linear layers.
    """
    if int8_cache:
        return "1.27"
    if f"{MICROSOFT}.GatherBlockQuantized" in operators:
        return "1.23"
    if f"{MICROSOFT}.MatMulNBits" in operators:
        activations = {scheme.activation for scheme in linear if scheme.bits == 8}
        return "1.23" if "none" in activations else "1.22" if activations else "1.19"
    if {f"{MICROSOFT}.GroupQueryAttention", f"{MICROSOFT}.RotaryEmbedding"} & set(operators):
        return "1.19"
    return "1.16" if f"{MICROSOFT}.MultiHeadAttention" in operators else "1.15"


def write_tokenizer(ckpt: Checkpoint, out: Path, max_length: int) -> None:
    """Copies, except that `model_max_length` becomes the length that the export was made for.

    vocab.txt stays behind: tokenizer.json holds it.
    """
    for name in TOKENIZER_FILES:
        if name != "vocab.txt" and (ckpt.path / name).is_file():
            shutil.copyfile(ckpt.path / name, out / name)
    file = out / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    tokenizer = Tokenizer.load(ckpt.path)
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config.setdefault("pad_token", tokenizer.inner.id_to_token(tokenizer.pad_id))
    write_json(file, config | {"model_max_length": max_length})


def encoder_config(ckpt: Checkpoint, spec: EncoderSpec, max_length: int) -> dict[str, Any]:
    """The nearest upstream config: structure and pooling are in the graph."""
    labels = labels_of(ckpt)
    config = {
        "architectures": [CLASSIFIER if labels else MODEL],
        "model_type": "bert",
        **config_of(spec),
        "max_position_embeddings": max_length,
    }
    if labels:
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
    return config
