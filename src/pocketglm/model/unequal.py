"""What upstream's config cannot have, of `model_type: pocketglm`: sizes of pruned and factorized
layers, and a decoder's shared blocks, unified blocks and top-k attention.

head_dim                    features of a head, where heads do not fill the hidden size
layer_num_attention_heads   heads of each layer (encoders)
layer_intermediate_size     FFN channels of each layer
layer_ranks                 for each layer, the rank of every linear layer that is a product of two:
                            {"attention.query": 64, ...}
layer_blocks                the block, from 0, that each layer uses; blocks are stored as layers are
unified_blocks              attention and FFN side by side
attention_top_k             keys that a query looks at
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketglm.errors import CheckpointError
from pocketglm.model.spec import DecoderSpec, EncoderSpec

# our field -> config key
_LISTS = {"layer_heads": "layer_num_attention_heads", "layer_ffn": "layer_intermediate_size"}
_HEAD_DIM, _RANKS = "head_dim", "layer_ranks"
_BLOCKS, _UNIFIED, _TOP_K = "layer_blocks", "unified_blocks", "attention_top_k"
LAYER_KEYS = (*_LISTS.values(), _RANKS)
KEYS = (_HEAD_DIM, *LAYER_KEYS)
DECODER_KEYS = (*LAYER_KEYS, _BLOCKS, _UNIFIED, _TOP_K)
_HINT = "compare it with the config.json that `pocketglm compress` wrote"


def read_sizes(config: Mapping[str, Any], file: Path, layers: int) -> dict[str, Any]:
    """The fields of a spec that a config has; `layers` of them in each list.

    Raises:
        CheckpointError: a value is no positive whole number, or a list of another length.
    """
    sizes: dict[str, Any] = {}
    for ours, key in ({_HEAD_DIM: _HEAD_DIM} | _LISTS).items():
        value = config.get(key)
        if value is None:
            continue
        listed, wanted = ours in _LISTS, "a positive whole number"
        if listed:
            wanted = f"a list of {layers} positive whole numbers, one for each layer"
        counts = value if listed else [value]
        if (
            not isinstance(counts, list)
            or (listed and len(counts) != layers)
            or not all(map(_positive, counts))
        ):
            raise _wrong(file, key, wanted, value)
        sizes[ours] = tuple(counts) if listed else value
    return sizes | _read_ranks(config, file, layers)


def _read_ranks(config: Mapping[str, Any], file: Path, layers: int) -> dict[str, Any]:
    value = config.get(_RANKS)
    if value is None:
        return {}
    if (
        not isinstance(value, list)
        or len(value) != layers
        or not all(isinstance(ranks, dict) for ranks in value)
        or not all(_positive(rank) for ranks in value for rank in ranks.values())
    ):
        raise CheckpointError(
            f"{file}: '{_RANKS}' should be a list of {layers} mappings of linear layers to "
            f"positive whole numbers, it is {value!r}",
            _HINT,
        )
    return {_RANKS: tuple(tuple(ranks.items()) for ranks in value)}


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_structure(config: Mapping[str, Any], file: Path, layers: int) -> dict[str, Any]:
    """As `read_sizes`, of a decoder: its layers' FFNs may differ, their heads may not; and what it
    has of shared and unified blocks and top-k attention.

    Raises:
        CheckpointError: as `read_sizes`, or there are heads by layer.
    """
    sizes = read_sizes(config, file, layers)
    if "layer_heads" in sizes:
        raise CheckpointError(
            f"{file}: '{_LISTS['layer_heads']}' is not supported in a decoder: its cache has the "
            "same heads in every layer",
            f"known for decoders: {', '.join(DECODER_KEYS[1:])}",
        )
    found = {ours: value for ours, value in sizes.items() if ours != _HEAD_DIM}
    top_k, unified, blocks = (config.get(key) for key in (_TOP_K, _UNIFIED, _BLOCKS))
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise _wrong(file, _TOP_K, "a positive whole number", top_k)
    if unified is not None and not isinstance(unified, bool):
        raise _wrong(file, _UNIFIED, "true or false", unified)
    if blocks is not None:
        if not isinstance(blocks, list) or not all(type(n) is int for n in blocks):
            raise _wrong(file, _BLOCKS, "a list of whole numbers, one for each layer", blocks)
        found["layer_blocks"] = tuple(blocks)
    return found | {"top_k": top_k, "unified": bool(unified)}


def _wrong(file: Path, key: str, wanted: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{file}: '{key}' should be {wanted}, it is {value!r}", _HINT)


def own_fields(spec: EncoderSpec | DecoderSpec) -> dict[str, Any]:
    """The config fields of a spec; none where upstream can express it."""
    if spec.regular:
        return {}
    lists = {key: list(getattr(spec, ours, ())) for ours, key in _LISTS.items()}
    fields: dict[str, Any] = {key: sizes for key, sizes in lists.items() if sizes}
    fields |= {_RANKS: [dict(ranks) for ranks in spec.layer_ranks]} if spec.layer_ranks else {}
    if isinstance(spec, DecoderSpec):
        fields |= {_BLOCKS: list(spec.layer_blocks)} if spec.layer_blocks else {}
        fields |= {_UNIFIED: True} if spec.unified else {}
        fields |= {_TOP_K: spec.top_k} if spec.top_k else {}
    return {_HEAD_DIM: spec.head_dim} | fields
