"""The ExecuTorch target: the real runtime computes what the checkpoint does, in every form."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch_file import REASON
from tiny_encoder import quantize_weights, save_tiny
from tiny_export import body, quantized, save_wide
from tiny_structure import save_structure
from torch import Tensor, nn

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import ExportManifest, read_export
from pocketglm.artifacts.manifest import MANIFEST, write_json
from pocketglm.artifacts.scheme import CacheScheme, TensorScheme
from pocketglm.contracts import ExportOptions, Silent, Target
from pocketglm.errors import CheckpointError, ParityError
from pocketglm.ops.affine import quantize
from pocketglm.ops.fake_quant import InputGrid
from pocketglm.ops.stored import Quantized
from pocketglm.runtimes._executorch_method import Method
from pocketglm.stages._parity_decoder import check_decoder_parity
from pocketglm.stages.export import export
from pocketglm.targets._executorch_layers import Integer, IntegerTable, activation, on_grid, refusal
from pocketglm.targets._executorch_lower import (
    DELEGATE,
    LoweredModule,
    before_partition,
    edge_nodes,
    lower_module,
)
from pocketglm.targets._executorch_read import PteFile

pytest.importorskip("executorch", reason=REASON)

TARGET: Target = registry.load("targets", "executorch")
INT8 = {"bits": 8, "activation": "dynamic_block"}
INT4 = {"bits": 4, "group_size": 32, "activation": "dynamic_token"}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def exported(folder: Path, **options: Any) -> tuple[Path, ExportManifest]:
    """The export's folder; parity has compared every block, the tables and the whole."""
    out = folder.with_name(f"{folder.name}-out")
    wanted = ExportOptions(threads=1, **options)
    (entry,) = export(folder, ["executorch"], out, options=wanted).targets
    assert entry.ok, entry.error
    manifest = read_export(out / "executorch")
    assert manifest.parity.scope == "whole"
    assert max(manifest.parity.blocks.values()) < 3e-5
    return out / "executorch", manifest


# --- decoders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ExportManifest]:
    """A checkpoint of Llama, one layer, its export's folder and manifest."""
    folder = save_wide(tmp_path_factory.mktemp("int4") / "ckpt", "llama", num_hidden_layers=1)
    quantized(folder, {EMBEDDING: TensorScheme(bits=4, group_size=32), **body(**INT4)})
    return folder, *exported(folder)


def check_operators(manifest: ExportManifest, pieces: int) -> None:
    """XNNPACK has every product, in so many pieces: between them the cache is written."""
    operators = manifest.operators
    assert operators[DELEGATE] == pieces
    assert operators["xnnpack:aten.linear.default"] >= 8
    assert not {"aten.linear.default", "aten.mm.default", "aten.addmm.default"} & operators.keys()
    assert operators["aten.index_put.default"] == 2


def test_int4(int4: tuple[Path, Path, ExportManifest]) -> None:
    _, out, manifest = int4
    assert {"rotary", "rows", "embeddings", "block.0", "head"} == manifest.parity.blocks.keys()
    assert (manifest.activation, manifest.precision) == ("dynamic_token", "int4")
    assert manifest.parity.output_max_abs > 1e-3
    check_operators(manifest, 3)
    # embedding_4bit is no part of the core's kernels
    assert manifest.links == ["backend_xnnpack", "kernels_optimized", "kernels_quantized"]
    plans = PteFile(out / "model.pte").program.execution_plan
    metadata = {plan.name: [plan.values[i].val for i in plan.outputs] for plan in plans[1:]}
    numbers = {
        name: [value.int_val if hasattr(value, "int_val") else value.bool_val for value in values]
        for name, values in metadata.items()
    }
    assert numbers == {
        "get_max_seq_len": [64],
        "get_max_context_len": [64],
        "get_vocab_size": [96],
        "get_n_layers": [1],
        "get_bos_id": [1],
        "get_eos_ids": [2, 5],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [False],
        "enable_dynamic_shape": [True],
    }


def test_a_changed_integer_is_found(
    int4: tuple[Path, Path, ExportManifest], tmp_path: Path
) -> None:
    """By parity, and where it is."""
    folder, out, manifest = int4
    shutil.copytree(out, tmp_path / "out")
    whole = bytearray((out / "model.pte").read_bytes())
    whole[whole.find(_largest_int4(PteFile(out / "model.pte"))) + 40] ^= 1
    (tmp_path / "out/model.pte").write_bytes(whole)
    ckpt = Checkpoint.open(folder)
    with pytest.raises(ParityError, match=r"'block.0' of the written file differs"):
        check_decoder_parity(ckpt, tmp_path / "out", manifest, TARGET, ExportOptions(), Silent())


def _largest_int4(read: PteFile) -> bytes:
    """The bytes of the largest INT4 weight, packed by the format's rule."""
    graphs = [read.graph(number) for number in range(len(read.plan.delegates))]
    found = [
        stored[0]
        for graph in graphs
        for place, value in graph.values.items()
        if value["datatype"] == "xnn_datatype_qbint4" and (stored := graph.constant(place))
    ]
    q = max(found, key=Tensor.numel).numpy().astype(np.int16) + 8
    packed: bytes = (q[:, 0::2] | q[:, 1::2] << 4).astype(np.uint8).tobytes()
    return packed


def test_int8_with_normalized_queries(tmp_path: Path) -> None:
    folder = save_wide(tmp_path / "ckpt", "qwen3", num_hidden_layers=1)
    quantized(folder, {HEAD: TensorScheme(**INT8), **body(**INT8)})
    _, manifest = exported(folder)
    assert manifest.activation == "dynamic_token"
    check_operators(manifest, 3)


def test_float_with_four_norms_and_factors(tmp_path: Path) -> None:
    ranks = ((("attention.query", 16), ("ffn.gate_up", 16)),)
    folder = save_structure(tmp_path / "ckpt", "glm4", num_layers=1, layer_ranks=ranks)
    _, manifest = exported(folder, logits="all")
    assert manifest.activation == "none"
    assert manifest.parity.output_max_abs < 2e-5
    check_operators(manifest, 2)


def test_the_structure_of_tiny(tmp_path: Path) -> None:
    """Layers that share a block, attention and FFN in one, top-k attention, a tied INT4 head; a
    shared weight is stored once.
    """
    own: dict[str, Any] = {"num_layers": 2, "layer_blocks": (0, 0), "unified": True, "top_k": 4}
    schemes = {EMBEDDING: TensorScheme(bits=4), "_proj.weight": TensorScheme(**INT4)}
    out, manifest = exported(quantized(save_structure(tmp_path / "ckpt", **own), schemes))
    assert manifest.operators["aten.topk.default"] == 2
    read = PteFile(out / "model.pte")
    assert (out / "model.pte").read_bytes().count(_largest_int4(read)) == 1


# --- encoders ------------------------------------------------------------------------------------


def test_a_static_encoder(tmp_path: Path) -> None:
    """Fixed grids, GELU's tanh form, an embedding of the mean."""
    own: dict[str, Any] = {"head": "embedding", "num_labels": 0, "activation": "gelu_new"}
    folder = save_tiny(tmp_path / "ckpt", num_layers=1, **own)
    quantize_weights(folder, {"dense.weight": TensorScheme(bits=8, activation="static")})
    _, manifest = exported(folder, max_length=20)
    assert (manifest.activation, manifest.max_length) == ("static", 20)
    assert manifest.output == "sentence_embedding"
    assert manifest.parity.agreement is not None
    assert manifest.parity.agreement > 0.99
    assert manifest.operators[DELEGATE] <= 2
    assert manifest.links == ["backend_xnnpack", "kernels_optimized"]


# --- one module ----------------------------------------------------------------------------------


class Products(nn.Module):
    """Products of one input, side by side, with integers of several forms."""

    def __init__(self, parts: dict[str, Quantized]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            Integer(
                p.q,
                p.scales,
                p.zero_points,
                p.scheme,
                None,
                inputs=None,
                results=None,
                dynamic=p.scheme.activation != "none",
            )
            for p in parts.values()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x.float()) for part in self.parts], -1)


def _parts() -> dict[str, Quantized]:
    schemes = {
        "int8": TensorScheme(**INT8),
        "int4 by 32": TensorScheme(**INT4),
        "int4 by 64": TensorScheme(**INT4 | {"group_size": 64}),
        "int4 per row": TensorScheme(bits=4, activation="dynamic_token"),
        "int8, exact, asymmetric": TensorScheme(bits=8, symmetric=False),
    }
    found = {}
    for index, (name, scheme) in enumerate(schemes.items()):
        weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(index)) + 0.3
        found[name] = Quantized(*quantize(weight, scheme, search=False), scheme)
    return found


@pytest.fixture(scope="module")
def products() -> tuple[dict[str, Quantized], LoweredModule]:
    parts = _parts()
    example = torch.zeros(128, 128, dtype=torch.int64)
    return parts, lower_module(Products(parts), (example,), (None,))


def test_the_identity_gives_the_weights(
    products: tuple[dict[str, Quantized], LoweredModule], tmp_path: Path
) -> None:
    """Rounding 0 and 1 per token changes nothing: what comes out, the runtime multiplies by."""
    parts, lowered = products
    (tmp_path / "m.pte").write_bytes(lowered.data)
    found = Method(tmp_path / "m.pte", 1)(np.eye(128, dtype=np.int64))
    for (name, part), values in zip(
        parts.items(), np.split(found, len(parts), axis=1), strict=True
    ):
        np.testing.assert_allclose(values.T, part.dequantized().numpy(), atol=2e-6, err_msg=name)


def test_the_nodes_say_what_the_delegate_takes(
    products: tuple[dict[str, Quantized], LoweredModule],
) -> None:
    """They are those that the partitioner was given, by the same names."""
    parts, lowered = products
    example = torch.zeros(128, 128, dtype=torch.int64)
    whole = before_partition(Products(parts), (example,), (None,))
    before = {node.name: node for node in edge_nodes(whole)}
    assert not any(node.delegated for node in before.values())
    after = {node.name: node for node in lowered.nodes}
    assert before.keys() == after.keys()
    assert {n.op for n in after.values() if n.delegated} >= {
        "aten.linear.default",
        "aten.cat.default",
    }
    outside = [n.op for n in after.values() if not n.delegated]
    assert outside.count("quantized_decomposed.dequantize_per_channel.default") == 1
    counts = lowered.operators
    assert counts["xnnpack:aten.linear.default"] == 4
    assert counts[DELEGATE] == len({n.delegate for n in after.values()} - {None})


def test_a_scale_that_xnnpack_would_round_is_refused() -> None:
    scales, q = torch.full((2, 1), 0.1), torch.zeros(2, 32, dtype=torch.int8)
    form: dict[str, Any] = {"inputs": None, "results": None, "dynamic": True}
    with pytest.raises(ValueError, match="no bf16 number"):
        Integer(q, scales, None, TensorScheme(**INT4), None, **form)


def test_tables_and_activations() -> None:
    """Eagerly: the kernels that the file calls are PyTorch's by the same names."""
    pytest.importorskip("executorch.exir.passes._quant_patterns_and_replacements")
    ids = torch.tensor([[3, 0, 7]])
    for bits, symmetric in ((8, True), (8, False), (4, True), (4, False)):
        scheme = TensorScheme(bits=bits, group_size=32 if bits == 4 else None, symmetric=symmetric)
        q, scales, zeros = quantize(torch.randn(8, 64), scheme, search=False)
        table = IntegerTable(q, scales, None if zeros is None else zeros.float(), bits)
        wanted = Quantized(q, scales, zeros, scheme).dequantized()[ids]
        torch.testing.assert_close(table(ids), wanted, atol=1e-6, rtol=1e-5)
    x = torch.linspace(-4, 4, 50)
    for kind, wanted in {
        "gelu": nn.functional.gelu(x),
        "gelu_new": nn.functional.gelu(x, approximate="tanh"),
        "silu": nn.functional.silu(x),
        "relu": nn.functional.relu(x),
    }.items():
        torch.testing.assert_close(activation(kind)(x), wanted)  # type: ignore[arg-type]
    grid = InputGrid(0.5, 3)
    assert on_grid(torch.tensor([0.2, 0.3, 99.0]), grid).tolist() == [0.0, 0.5, 62.0]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "columns", "linear", "words"),
    [
        ({**INT8, "symmetric": False}, 64, True, "XNNPACK drops them"),
        ({"bits": 8, "symmetric": False}, 64, True, ""),
        ({**INT8, "group_size": 32}, 64, True, "XNNPACK has none"),
        ({"bits": 4, "group_size": 32}, 64, True, "no kernel for them"),
        ({**INT4, "group_size": 16}, 64, True, "XNNPACK's groups are multiples of 32"),
        ({**INT4, "group_size": 96}, 96, True, ""),
        ({**INT4, "group_size": None}, 48, True, "INT4 per row with K = 48"),
        ({**INT4, "activation": "static"}, 64, True, "INT8 per channel"),
        ({"bits": 4, "group_size": 16, "symmetric": False}, 64, False, ""),
        ({"bits": 4}, 63, False, "two values share a byte"),
    ],
)
def test_refusals(scheme: dict[str, Any], columns: int, linear: bool, words: str) -> None:
    found = refusal(TensorScheme(**scheme), columns, linear=linear)
    assert words in found
    assert bool(found) == bool(words)


def test_what_a_checkpoint_is_refused_for(tmp_path: Path) -> None:
    """Every reason is named: static decoders, caches, a tied head that XNNPACK cannot read."""
    schemes = {EMBEDDING: TensorScheme(bits=4), **body(bits=8, activation="static")}
    ckpt = Checkpoint.open(quantized(save_wide(tmp_path / "ckpt", "qwen2"), schemes))
    write_json(ckpt.path / MANIFEST, ckpt.manifest.model_copy(update={"cache": CacheScheme()}))
    ckpt = Checkpoint.open(ckpt.path)
    reasons = TARGET.supports(ckpt, ExportOptions(opset=17))
    assert [r for r in reasons if "as the head" in r] == []
    for words in ("static activations are for encoders", "an INT8 cache", "opset 17"):
        assert any(words in reason for reason in reasons), reasons
    exact = quantized(save_wide(tmp_path / "b", "qwen2"), {EMBEDDING: TensorScheme(bits=4)})
    (reason,) = TARGET.supports(Checkpoint.open(exact), ExportOptions())
    assert "as the head: INT4 with float activations" in reason


def test_no_program(tmp_path: Path) -> None:
    (tmp_path / "m.pte").write_bytes(b"nothing of the kind, but long enough to be read" * 4)
    with pytest.raises(CheckpointError, match="is no ExecuTorch program"):
        PteFile(tmp_path / "m.pte")
