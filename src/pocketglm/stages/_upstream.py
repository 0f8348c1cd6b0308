"""What `transformers` can open: the `quantization_config` of a checkpoint, and the verdict.

Format: compressed-tensors' `QuantizationConfig` (https://github.com/vllm-project/compressed-tensors).
What opens was found by trying (tests/unit/test_upstream.py repeats it): transformers creates packed
zero points with unpacked shapes, cannot run a packed embedding, and with `dequantize=True` reads
every layer by the first config group.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.model.causal import EMBEDDING_WEIGHT, HEAD
from pocketglm.model.hf import POCKETGLM, is_embedding

YES = "yes"
WITH_DEQUANTIZE = "with dequantize=True"


def opens_in_transformers(ckpt: Checkpoint) -> str:
    """'yes', 'with dequantize=True' or 'no, because ...', from config and schemes alone.

    Opening means: `from_pretrained` gives exactly our dequantized weights.
    """
    schemes = ckpt.manifest.schemes
    packed = [name for name, scheme in schemes.items() if scheme.bits == 4]
    asymmetric = [name for name in packed if not schemes[name].symmetric]
    if asymmetric:
        # Their scales are float32 (ops/stored.py), so dequantizing while loading is exact; but it
        # reads every layer by one scheme.
        kinds = {(s.bits, s.group_size, s.symmetric) for s in schemes.values()}
        if len(kinds) > 1:
            return "no, because asymmetric INT4 is mixed with another scheme"
    elif any(is_embedding(name) for name in packed):
        return "no, because an INT4 embedding is packed"
    if ckpt.config.get("model_type") == POCKETGLM:
        return "no, because model_type pocketglm is not its own (import pocketglm.model.auto first)"
    return WITH_DEQUANTIZE if asymmetric else YES


def quantization_config(
    schemes: Mapping[str, TensorScheme], names: Collection[str]
) -> dict[str, Any]:
    """The entry of config.json for weights `schemes` of a checkpoint with tensors `names`."""
    members: dict[TensorScheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": _targets(weights, names),
            "weights": _weights(scheme),
            "input_activations": _activations(scheme),
            "output_activations": None,
            "format": "int-quantized" if scheme.bits == 8 else "pack-quantized",
        }
        for i, (scheme, weights) in enumerate(members.items())
    }
    formats = {str(group["format"]) for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(scheme: TensorScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }


def _activations(scheme: TensorScheme) -> dict[str, Any] | None:
    """The forms that upstream can express; the others are in pocketglm.json alone.

    With one of these transformers rounds the inputs too, as the runtime will: the weights are
    ours exactly, the logits are not those of the float computation.
    """
    forms = {"dynamic_tensor": "tensor", "dynamic_token": "token", "static": "tensor"}
    strategy = forms.get(scheme.activation)
    if strategy is None:
        return None
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": False,
        "strategy": strategy,
        "dynamic": scheme.activation != "static",
        "observer": None,
    }


def _targets(weights: list[str], names: Collection[str]) -> list[str]:
    """Module patterns that match exactly `weights` among all weights.

    Layer numbers become \\d+ where the whole column of layers is in. The prefix `bert.` or
    `model.` is optional: transformers drops or adds it when a body is opened without its head or
    with it. A tied head is named beside its embedding.
    """
    chosen = set(weights)
    columns: dict[str, list[str]] = {}
    for name in names:
        columns.setdefault(re.sub(r"\.\d+\.", ".0.", name), []).append(name)
    patterns: dict[str, None] = {}
    for column in columns.values():
        inside = [name for name in column if name in chosen]
        whole = len(inside) == len(column)
        for name in inside:
            patterns[_pattern(name, whole)] = None
    if EMBEDDING_WEIGHT in chosen and HEAD not in names:
        patterns[_pattern(HEAD, False)] = None
    return list(patterns)


def _pattern(name: str, any_layer: bool) -> str:
    body = name.removeprefix("bert.").removeprefix("model.")
    module = re.escape(body.removesuffix(".weight"))
    if any_layer:
        module = re.sub(r"\.\d+\\\.", r".\\d+\\.", module)
    return rf"re:(.*\.)?{module}$"
