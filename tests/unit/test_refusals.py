"""What a target that refuses a scheme names instead is a scheme that it carries."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from tiny_encoder import quantize_weights, save_tiny
from tiny_export import body, quantized, save_wide

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.scheme import Activation, TensorScheme
from pocketglm.contracts import ExportOptions
from pocketglm.registry import load
from pocketglm.targets import _executorch_layers, _gguf_tensors, _litert_linear, _onnx_linear
from pocketglm.targets._refusals import nearest

REFUSALS: dict[str, Callable[[TensorScheme, int], str]] = {
    "executorch": lambda s, k: _executorch_layers.refusal(s, k, linear=True),
    "litert": lambda s, k: _litert_linear.refusal(s, k, linear=True),
    "gguf": _gguf_tensors.refusal,
    "onnx": lambda s, k: _onnx_linear.refusal(s, linear=True),
}
ACTIVATIONS: tuple[Activation, ...] = ("none", "dynamic_token", "dynamic_block", "static")


def changed(scheme: TensorScheme, text: str) -> TensorScheme:
    """The scheme with the settings of a hint."""
    update: dict[str, int | str | bool | None] = {}
    for setting in text.split(", "):
        key, _, value = setting.partition(": ")
        if setting == "no group_size":
            update["group_size"] = None
        else:
            update[key] = {"true": True}.get(value, int(value) if value.isdigit() else value)
    return TensorScheme.model_validate(scheme.model_dump() | update)


@pytest.mark.parametrize("target", REFUSALS)
def test_the_nearest_scheme_works(target: str) -> None:
    refuses, refused = REFUSALS[target], 0
    for bits, group, symmetric, activation in product(
        (4, 8), (None, 16, 32, 96, 128, 256), (True, False), ACTIVATIONS
    ):
        scheme = TensorScheme(
            bits=bits, group_size=group, symmetric=symmetric, activation=activation
        )
        if not refuses(scheme, 768):
            continue
        refused += 1
        text = nearest(scheme, 768, lambda s: not refuses(s, 768))
        other = changed(scheme, text)
        assert not refuses(other, 768), (scheme, text)
        assert other.group_size in (None, 32, 64, 128)
        assert other.bits == 4 or bits == 8 or scheme.activation in ("none", "static")
    assert refused


@pytest.mark.parametrize(
    ("scheme", "columns", "text"),
    [
        ({"bits": 4, "group_size": 32}, 768, "activation: dynamic_block"),
        (
            {"bits": 4, "group_size": 32, "symmetric": False},
            768,
            "symmetric: true, activation: dynamic_block",
        ),
        ({"bits": 4, "group_size": 16, "activation": "dynamic_block"}, 768, "group_size: 32"),
        ({"bits": 8, "group_size": 32, "activation": "dynamic_block"}, 768, "no group_size"),
        ({"bits": 4, "activation": "dynamic_token"}, 48, "bits: 8"),
        ({"bits": 8, "symmetric": False, "activation": "dynamic_token"}, 768, "symmetric: true"),
    ],
)
def test_the_fewest_settings_change(
    scheme: dict[str, int | str | bool], columns: int, text: str
) -> None:
    own = TensorScheme.model_validate(scheme)
    refuses = REFUSALS["executorch"]
    assert nearest(own, columns, lambda s: not refuses(s, columns)) == text


def test_no_scheme_works() -> None:
    assert nearest(TensorScheme(bits=8), 72, lambda s: not REFUSALS["gguf"](s, 72)) == ""


@pytest.mark.parametrize(
    ("target", "group", "text"),
    [
        ("litert", 16, "group_size: 32"),
        ("litert", 256, "group_size: 128"),
        ("executorch", 16, "group_size: 32"),
        ("gguf", 16, "group_size: 32"),
    ],
)
def test_a_refusal_names_it(target: str, group: int, text: str, tmp_path: Path) -> None:
    scheme = TensorScheme(bits=4, group_size=group, activation="dynamic_block")
    folder = save_tiny(tmp_path / "ckpt", hidden_size=256)
    quantize_weights(folder, {".output.dense.weight": scheme})
    reasons = load("targets", target).supports(Checkpoint.open(folder), ExportOptions())
    (reason,) = [r for r in reasons if "group_size" in r]
    assert f"group_size {group}" in reason
    assert reason.endswith(f": compress with {text}")


def test_a_tied_head_goes_by_the_other_layers(tmp_path: Path) -> None:
    """An embedding has no activation form of its own."""
    schemes = {"embed_tokens.weight": TensorScheme(bits=4), **body(bits=8)}
    ckpt = Checkpoint.open(quantized(save_wide(tmp_path / "ckpt", "qwen2"), schemes))
    (reason,) = load("targets", "executorch").supports(ckpt, ExportOptions())
    assert reason.endswith("no kernel for them: compress with bits: 8")
