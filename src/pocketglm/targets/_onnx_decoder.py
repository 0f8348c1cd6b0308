"""A decoder as an ONNX graph for ONNX Runtime, written while its weights stream to the data file.

Attention is one GroupQueryAttention a layer: rotary positions, cache and causality are inside it.
It wants rows that are padded on the right, and takes its positions from the attention mask. Query,
key and value are one packed product, except where each head is normalized first (Qwen3). The past
may be given as long as it is, or in a longer buffer that is also the present's: then the new keys
and values are written into it and nothing is copied. Top-k attention is `_onnx_sparse.py`'s, unless
k keys are all that the context has.

    weight       activation   nodes
    float                     FusedMatMul over the rows as they are stored (transB), Add
    INT8, INT4   dynamic_*    MatMulNBits, accuracy_level 4 (int8 activations by block)
    INT8, INT4   none         MatMulNBits, accuracy_level 1 (float activations)
    embedding                 Gather, or GatherBlockQuantized of INT8 and INT4
    INT8 cache                GroupQueryAttention's own, with scales by layer or by channel

One scale for a whole activation tensor (`dynamic_tensor`) is not used: it would make a token's
result depend on how many others are computed with it, so that prompt and single steps differ. One
scale per row is repeated for blocks of up to 128, the fastest when sizes were tried. A tied
embedding and head are one initializer: the Gather side sees it through a Reshape. A tied head's
inputs are quantized if those of any other layer are: its scheme is that of the embedding, whose
inputs are ids.

Layers that share a block read the same initializers; each has its own cache. A unified block is one
product of what reads the norm, and one of what writes to the residual stream.

The residual stream is named `embeddings`, `block.0`, `block.1`, ...; a layer's nodes use nothing
else of another layer's. Specs: ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch

from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import Floats, Reporter
from pocketglm.model.causal import cache_scale_names, hf_name
from pocketglm.model.layers import rotation, unified_widths
from pocketglm.model.spec import DecoderSpec
from pocketglm.targets._onnx_external import ExternalData
from pocketglm.targets._onnx_graph import MICROSOFT, GraphBuilder, Shape
from pocketglm.targets._onnx_rows import Rows, block_of
from pocketglm.targets._onnx_sparse import ROOM, SparseAttention

OPSET = 17
_POSITIONS = 4096  # of the rotary tables, computed at a time


def top_k_of(spec: DecoderSpec, context: int) -> int | None:
    """The keys that a query looks at; None: it may look at all that there are."""
    return spec.top_k if spec.top_k is not None and spec.top_k < context else None


class DecoderGraph:
    """Builds one model for texts of at most `context` tokens; its weights go to `data`.

    last: logits of the last position only, which is right for one row at a time.
    """

    def __init__(
        self, spec: DecoderSpec, rows: Rows, data: ExternalData, context: int, *, last: bool
    ) -> None:
        self.spec, self.rows, self.data, self.context, self.last = spec, rows, data, context, last
        self.g = GraphBuilder()
        batch: int | str = 1 if last else "batch"
        self.inputs: dict[str, Shape] = {
            "input_ids": (batch, "sequence"),
            "attention_mask": (batch, "total"),
        }
        self.outputs: dict[str, Shape] = {
            "logits": (batch, 1 if last else "sequence", spec.vocab_size)
        }
        self.past: dict[str, Shape] = {}
        whole = top_k_of(spec, context) is None
        past, present = ("past", "present") if whole else (ROOM, ROOM)
        for index in range(spec.num_layers):
            for part in ("key", "value"):
                sizes = (spec.num_kv_heads, spec.head_dim)
                self.past[f"past_key_values.{index}.{part}"] = (batch, sizes[0], past, sizes[1])
                self.outputs[f"present.{index}.{part}"] = (batch, sizes[0], present, sizes[1])

    def build(self, reporter: Reporter) -> onnx.ModelProto:
        """The whole model: int64 ids [B, S], mask [B, T], float32 past -> logits and present."""
        g, spec = self.g, self.spec
        self._cos, self._sin = self._rotary_tables()
        top_k = top_k_of(spec, self.context)
        if top_k is None:
            self._sparse = None
            tokens = g.op("ReduceSum", "attention_mask", g.ints(1), keepdims=0)
            last_slot = g.op("Sub", tokens, g.ints(1))
            self._last_slot = g.op("Cast", last_slot, to=onnx.TensorProto.INT32)
            total = g.op("Gather", g.op("Shape", "attention_mask"), g.number(1))
            self._total = g.op("Cast", total, to=onnx.TensorProto.INT32)
        else:
            self._sparse = SparseAttention(g, spec, top_k, self._cos, self._sin)
        x = self._embeddings()
        for index in range(spec.num_layers):
            reporter.progress("writing blocks", index, spec.num_layers, f"block.{index}")
            x = self._block(x, index)
        reporter.progress("writing blocks", spec.num_layers, spec.num_layers)
        self._head(x)
        present = list(self.outputs)[1:]
        int8 = [*self.past, *present] if self.rows.cache else ()
        return g.model(
            self.inputs, self.outputs, OPSET, name="decoder", caches=self.past, int8=int8
        )

    def _at(self, index: int) -> str:
        """The prefix of the parameters that a layer uses."""
        return f"blocks.{self.spec.blocks()[index]}."

    # --- parts -----------------------------------------------------------------------------------

    def _rotary_tables(self) -> tuple[str, str]:
        shape = (self.context, self.spec.rope.dims // 2)
        return (
            self._store("cos_cache", np.float32, shape, self._angles("cos")),
            self._store("sin_cache", np.float32, shape, self._angles("sin")),
        )

    def _angles(self, part: Literal["cos", "sin"]) -> Iterator[Floats]:
        for start in range(0, self.context, _POSITIONS):
            positions = torch.arange(start, min(start + _POSITIONS, self.context))[None]
            turn = rotation(self.spec.rope, positions, torch.float32)
            yield (turn.cos if part == "cos" else turn.sin)[0, 0].numpy()

    def _embeddings(self) -> str:
        g, scheme = self.g, self.rows.scheme("tokens")
        if scheme is None:
            return g.op("Gather", self._floats("tokens"), "input_ids", out="embeddings")
        size, columns = self.rows.shape("tokens")
        table, scales, zeros = self._integers(scheme, "tokens", flat=not self.spec.tied)
        if self.spec.tied:
            table = g.op("Reshape", table, g.ints(size, columns * scheme.bits // 8))
        return g.microsoft(
            "GatherBlockQuantized",
            table,
            "input_ids",
            scales,
            *([zeros] if zeros else []),
            out="embeddings",
            bits=scheme.bits,
            block_size=block_of(scheme, columns),
            gather_axis=0,
            quantize_axis=1,
        )

    def _block(self, x: str, index: int) -> str:
        g, at, four = self.g, self._at(index), self.spec.four_norms
        if self.spec.unified:
            y = self._unified(self._norm(x, at + "attention_norm"), index)
            return g.op("Add", x, y, out=f"block.{index}")
        y = self._attention(self._norm(x, at + "attention_norm"), index)
        y = self._linear(y, at + "attention.output", bias=self.spec.output_bias)
        y = self._norm(y, at + "attention_post_norm") if four else y
        gamma, epsilon = self._vector(f"{at}ffn_norm.weight"), self.spec.rms_norm_eps
        normed, *_, x = g.ops(
            "SkipSimplifiedLayerNormalization",
            4,
            *(y, x, gamma),
            domain=MICROSOFT,
            outs=("", "", f"attended.{index}"),
            epsilon=epsilon,
        )
        y = self._ffn(normed, index)
        y = self._norm(y, at + "ffn_post_norm") if four else y
        return g.op("Add", x, y, out=f"block.{index}")

    def _attention(self, x: str, index: int) -> str:
        """[B, S, H] -> [B, S, heads * head_dim]."""
        g, spec, at = self.g, self.spec, f"{self._at(index)}attention."
        layers = [at + name for name in ("query", "key", "value")]
        if not spec.qk_norm and self._alike(*layers):
            packed = self._linear(x, *layers, bias=spec.attention_bias)
            if self._sparse is None:
                return self._look([packed, "", ""], at, index)
            widths = unified_widths(spec.block(index))[:3]
            return self._look(g.ops("Split", 3, packed, g.ints(*widths), axis=-1), at, index)
        inputs = [self._linear(x, layer, bias=spec.attention_bias) for layer in layers]
        return self._look(inputs, at, index)

    def _unified(self, x: str, index: int) -> str:
        """[B, S, H] -> [B, S, H]."""
        g, spec, at = self.g, self.spec, f"{self._at(index)}unified."
        bias = spec.ffn_bias or spec.attention_bias
        packed = self._linear(x, f"{at}input", bias=bias)
        widths = unified_widths(spec.block(index))
        if self._sparse is None and not spec.qk_norm:
            parts = g.ints(sum(widths[:3]), *widths[3:])
            projected, gate, up = g.ops("Split", 3, packed, parts, axis=-1)
            inputs = [projected, "", ""]
        else:
            *inputs, gate, up = g.ops("Split", 5, packed, g.ints(*widths), axis=-1)
        seen = self._look(inputs, at, index)
        both = g.op("Concat", seen, g.op("Mul", self._activation(gate), up), axis=-1)
        return self._linear(both, f"{at}output", bias=spec.output_bias or spec.ffn_bias)

    def _look(self, inputs: list[str], at: str, index: int) -> str:
        """Query, key and value, or all in the first, [B, S, ...] -> [B, S, heads * head_dim]."""
        spec = self.spec
        if spec.qk_norm:
            for place, name in enumerate(("query_norm", "key_norm")):
                inputs[place] = self._head_norm(inputs[place], at + name)
        if self._sparse is not None:
            query, key, value = inputs
            return self._sparse.attend(query, key, value, index)
        scales, form = self._cache_scales(index)
        out, *_ = self.g.ops(
            "GroupQueryAttention",
            3,
            *inputs,
            f"past_key_values.{index}.key",
            f"past_key_values.{index}.value",
            self._last_slot,
            self._total,
            self._cos,
            self._sin,
            *scales,
            domain=MICROSOFT,
            outs=(f"present.{index}.key", f"present.{index}.value"),
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            scale=spec.head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=int(spec.rope.interleaved),
            **form,
        )
        return out

    def _cache_scales(self, index: int) -> tuple[list[str], dict[str, Any]]:
        """The inputs after `sin_cache` of an INT8 cache (positions, bias and sinks are absent), and
        the attributes that say how they are meant.
        """
        scheme = self.rows.cache
        if scheme is None:
            return [], {}
        names = []
        for name, scales in zip(
            cache_scale_names(index), self.rows.cache_scales(index), strict=True
        ):
            names.append(self._store(name, np.float32, scales.shape, iter([scales])))
        kind = {"tensor": "PER_TENSOR", "channel": "PER_CHANNEL"}[scheme.per]
        form = {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": scheme.bits}
        return ["", "", "", *names], form

    def _head_norm(self, x: str, layer: str) -> str:
        """Each head of [B, S, heads * head_dim] normalized by itself."""
        g = self.g
        heads = g.op("Reshape", x, g.ints(0, 0, -1, self.spec.head_dim))
        return g.op("Reshape", self._norm(heads, layer), g.ints(0, 0, -1))

    def _ffn(self, x: str, index: int) -> str:
        g, bias, at = self.g, self.spec.ffn_bias, self._at(index)
        width = self.spec.ffn()[index]
        parts = [at + "ffn.gate_up"] if self.spec.fused_ffn else [at + "ffn.gate", at + "ffn.up"]
        if self._alike(*parts):
            packed = self._linear(x, *parts, bias=bias)
            gate, up = g.ops("Split", 2, packed, g.ints(width, width), axis=-1)
        else:
            gate, up = (self._linear(x, part, bias=bias) for part in parts)
        return self._linear(g.op("Mul", self._activation(gate), up), at + "ffn.down", bias=bias)

    def _activation(self, x: str) -> str:
        kind = self.spec.activation
        if kind == "silu":
            return self.g.microsoft("QuickGelu", x, alpha=1.0)
        if kind == "relu":
            return self.g.op("Relu", x)
        return self.g.microsoft("Gelu" if kind == "gelu" else "FastGelu", x)

    def _head(self, x: str) -> None:
        g = self.g
        if self.last:
            x = g.op("Gather", x, g.ints(-1), axis=1)
        layer = "tokens" if self.spec.tied else "head"
        self._linear(self._norm(x, "norm"), layer, bias=False, out="logits")

    # --- nodes over stored weights ---------------------------------------------------------------

    def _norm(self, x: str, layer: str) -> str:
        gamma = self._vector(f"{layer}.weight")
        epsilon = self.spec.rms_norm_eps
        return self.g.op("SimplifiedLayerNormalization", x, gamma, axis=-1, epsilon=epsilon)

    def _linear(self, x: str, *layers: str, bias: bool, out: str = "") -> str:
        """x [..., K] -> [..., N]: `layers` side by side as one product; they are alike. A
        factorized one comes alone, and makes two products.
        """
        if self.rows.factored(layers[0]):
            x = self._product(x, f"{layers[0]}.factor_in", bias=False)
            layers = (f"{layers[0]}.factor_out",)
        return self._product(x, *layers, bias=bias, out=out)

    def _product(self, x: str, *layers: str, bias: bool, out: str = "") -> str:
        g, scheme = self.g, self.rows.scheme(layers[0])
        added = self._vector(*(f"{layer}.bias" for layer in layers)) if bias else ""
        if scheme is None:
            weight = self._floats(*layers)
            if not added:
                return g.microsoft("FusedMatMul", x, weight, out=out, transB=1)
            return g.op("Add", g.microsoft("FusedMatMul", x, weight, transB=1), added, out=out)
        tied_head = layers == ("tokens",)
        dynamic = self.rows.dynamic if tied_head else scheme.activation != "none"
        size, columns = self.rows.shape(*layers)
        weight, scales, zeros = self._integers(scheme, *layers)
        inputs = [x, weight, scales, zeros, "", added]
        while not inputs[-1]:
            inputs.pop()
        return g.microsoft(
            "MatMulNBits",
            *inputs,
            out=out,
            K=columns,
            N=size,
            bits=scheme.bits,
            block_size=block_of(scheme, columns),
            accuracy_level=4 if dynamic else 1,
        )

    def _alike(self, *layers: str) -> bool:
        """Whether they can be one product: all whole, and of one scheme."""
        if len(layers) > 1 and any(self.rows.factored(layer) for layer in layers):
            return False
        schemes = [self.rows.scheme(layer) for layer in layers]
        return schemes.count(schemes[0]) == len(schemes)

    # --- initializers ----------------------------------------------------------------------------

    def _vector(self, *names: str) -> str:
        name = "|".join(map(hf_name, names))
        return self._store(name, np.float32, (self.rows.size(*names),), self.rows.floats(*names))

    def _floats(self, *layers: str) -> str:
        name = f"{_label(layers)}.weight"
        weights = (f"{layer}.weight" for layer in layers)
        return self._store(name, np.float32, self.rows.shape(*layers), self.rows.floats(*weights))

    def _integers(
        self, scheme: TensorScheme, *layers: str, flat: bool = False
    ) -> tuple[str, str, str]:
        """Weight uint8 [N, blocks, bytes], or `flat` [N, bytes]; scales [N, blocks]; zero points
        ('' if symmetric).
        """
        rows, name = self.rows, _label(layers)
        size, columns = rows.shape(*layers)
        block, bits = block_of(scheme, columns), scheme.bits
        blocks = columns // block
        shape = (size, columns * bits // 8) if flat else (size, blocks, block * bits // 8)
        weight = self._store(f"{name}.weight", np.uint8, shape, rows.integers(*layers))
        scales = self._store(f"{name}.scales", np.float32, (size, blocks), rows.scales(*layers))
        if scheme.symmetric:
            return weight, scales, ""
        packed = (size, -(-blocks * bits // 8))
        zeros = rows.zero_points(*layers)
        return weight, scales, self._store(f"{name}.zero_points", np.uint8, packed, zeros)

    def _store(
        self,
        name: str,
        dtype: type[np.generic],
        shape: tuple[int, ...],
        chunks: Iterator[npt.NDArray[Any]],
    ) -> str:
        """An initializer in the data file; one that was stored before is used again."""
        if not self.g.holds(name):
            self.g.external(self.data.write(name, dtype, shape, chunks))
        return name


def _label(layers: tuple[str, ...]) -> str:
    """The name of a layer's initializers: the checkpoint's; packed layers joined by '|'."""
    return "|".join(hf_name(f"{layer}.weight").removesuffix(".weight") for layer in layers)
