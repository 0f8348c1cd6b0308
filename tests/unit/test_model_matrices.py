"""`model.matrices` counts what the models hold, without building them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch

from pocketglm.methods._tiny import tiny_spec
from pocketglm.methods.tiny import TinyConfig, _structure
from pocketglm.model.encoder import Encoder
from pocketglm.model.family import SIZES
from pocketglm.model.matrices import matrices_of, parameter_count
from pocketglm.model.sizes import shapes
from pocketglm.model.spec import DecoderSpec, EncoderSpec

NANO = SIZES["autoglm-nano"]
SHARED = tiny_spec(NANO, _structure(TinyConfig(share=2, top_k=8), NANO))
DECODERS: dict[str, DecoderSpec] = {
    **SIZES,
    "untied": replace(NANO, tied=False),
    "biases": replace(NANO, attention_bias=True, output_bias=True, ffn_bias=True),
    "gated, normalized heads": replace(NANO, fused_ffn=False, qk_norm=True),
    "four norms": replace(NANO, four_norms=True),
    "unequal": replace(NANO, layer_ffn=(128, 256, 512, 64)),
    "factorized": replace(NANO, layer_ranks=((("ffn.down", 32),), (), (), ())),
    "shared": SHARED,
    "shared, biases": replace(SHARED, attention_bias=True, output_bias=True, qk_norm=True),
}
BERT: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96,
}  # fmt: skip
ENCODERS = {
    "embedding": EncoderSpec(**BERT),
    "pooler": EncoderSpec(**BERT, pooler=True),
    "mean classifier": EncoderSpec(**BERT, head="classification", num_labels=7),
    "cls classifier": EncoderSpec(
        **BERT, head="classification", num_labels=7, pooler=True, pooling="cls"
    ),
    "pruned": EncoderSpec(**BERT, head_dim=16, layer_heads=(2, 4), layer_ffn=(32, 96)),
    "factorized": EncoderSpec(**BERT, layer_ranks=((("ffn.up", 8),), (("attention.key", 4),))),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_so_many_values(name: str) -> None:
    spec = DECODERS[name]
    assert parameter_count(matrices_of(spec)) == sum(map(prod, shapes(spec).values()))


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_so_many_values(name: str) -> None:
    spec = ENCODERS[name]
    with torch.device("meta"):
        counted = sum(value.numel() for value in Encoder(spec).state_dict().values())
    assert parameter_count(matrices_of(spec)) == counted


def test_shared_blocks_count_once_and_say_how_often_they_are_used() -> None:
    linear = [m for m in matrices_of(SHARED) if m.part == "linear"]
    assert {m.layers for m in linear} == {2}
    assert len(linear) == 2 * 2


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, pocketglm.model.family, pocketglm.model.matrices, pocketglm.model.families; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
