"""A dense decoder's stored tensors in shared and unified blocks, in float64 numpy; imports nothing
of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Tensors = Mapping[str, Array]


def one_block(
    tensors: Tensors, layers: Sequence[int], source: str, unify: bool
) -> dict[str, Array]:
    """The tensors of the block that stands for these layers, by what follows `model.layers.N.`."""
    found = []
    for layer in layers:
        at = f"model.layers.{layer}."
        own = {n[len(at) :]: t for n, t in tensors.items() if n.startswith(at)}
        found.append(side_by_side(own) if unify else own)
    if source == "average":
        return {n: np.mean([block[n] for block in found], axis=0) for n in found[0]}
    return found[{"first": 0, "last": -1}[source]]


def side_by_side(w: Tensors) -> dict[str, Array]:
    """A unified block that gives x + attention(norm x) + ffn(other norm x)."""
    first, second = w["input_layernorm.weight"], w["post_attention_layernorm.weight"]
    hidden = len(first)
    ffn = (
        ["mlp.gate_up_proj"] if "mlp.gate_up_proj.weight" in w else ["mlp.gate_proj", "mlp.up_proj"]
    )
    reads = [(f"self_attn.{n}_proj", first) for n in "qkv"] + [(n, second) for n in ffn]
    writes = ["self_attn.o_proj", "mlp.down_proj"]
    out = {
        "input_layernorm.weight": np.ones(hidden),
        "unified.in_proj.weight": np.vstack(
            [w[f"{n}.weight"] @ np.diag(gamma) for n, gamma in reads]
        ),
        "unified.out_proj.weight": np.hstack([w[f"{n}.weight"] for n in writes]),
    }
    if any(f"{n}.bias" in w for n, _ in reads):
        parts = [w.get(f"{n}.bias", np.zeros(len(w[f"{n}.weight"]))) for n, _ in reads]
        out["unified.in_proj.bias"] = np.concatenate(parts)
    if any(f"{n}.bias" in w for n in writes):
        out["unified.out_proj.bias"] = sum(
            (w.get(f"{n}.bias", np.zeros(hidden)) for n in writes), np.zeros(hidden)
        )
    for name in ("q_norm", "k_norm"):
        if f"self_attn.{name}.weight" in w:
            out[f"unified.{name}.weight"] = w[f"self_attn.{name}.weight"]
    return out
