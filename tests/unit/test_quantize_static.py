"""quantize_static: what it keeps, what it refuses, and that each of its options does its work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import smoothquant as oracle
from pydantic import ValidationError
from tiny_decoder import save_tiny_decoder
from tiny_encoder import save_tiny
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import DataOptions, Silent, StepContext
from pocketglm.errors import CheckpointError, UnsupportedError
from pocketglm.methods._calibrate import StaticConfig
from pocketglm.methods._observe import SampleRows, channel_maxima, input_histograms
from pocketglm.methods._smooth import factors, smooth, smoothable
from pocketglm.methods._static import static_layers, units_of
from pocketglm.methods.quantize_static import SPEC
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import load_encoder
from pocketglm.ops.stored import parameter_counts, read_grid, read_quantized
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan
from pocketglm.text.tokenizer import Tokenizer

WORDS = ["abc", "bcd", "cab", "dab", "fig", "hij", "zyx", "qq"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4200), ("validation", 12)):
        rows = [
            {"text": " ".join(rng.choice(WORDS, 1 + n % 5)), "label": f"label {n % 3}"}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return DataOptions(folder)


def static(source: Path, out: Path, data: DataOptions, **settings: Any) -> Checkpoint:
    plan = Plan.single("quantize_static", {"rows": 64, **settings})
    compress(source, plan, out, data=data)
    return Checkpoint.open(out)


def effect(ckpt: Checkpoint) -> dict[str, float]:
    return ckpt.manifest.lineage[-1].effect


def outlier(model: Encoder) -> None:
    """One channel of an FFN is always near 200, and almost nothing reads it."""
    ffn: Any = model.blocks[1].ffn
    ffn.up.bias[3] = 200.0
    ffn.down.weight[:, 3] = 1e-4


def loud_values(model: Encoder) -> None:
    """Two channels of the values are large, and their readers small: the model is as before."""
    for block in model.blocks:
        attention: Any = block.attention
        for channel in (5, 70):
            attention.value.weight[channel] *= 60
            attention.value.bias[channel] *= 60
            attention.output.weight[:, channel] /= 60


def rows_of(path: Path, count: int = 64) -> SampleRows:
    texts = [" ".join(np.random.default_rng(n).choice(WORDS, 4)) for n in range(count)]
    return SampleRows.draw(texts, count, 0, Tokenizer.load(path), 48)


# --- what is stored ------------------------------------------------------------------------------


def test_every_linear_layer_has_integers_and_a_grid(data: DataOptions, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny")
    ckpt = static(source, tmp_path / "out", data, embeddings=8, head=8)
    before = Checkpoint.open(source)
    assert parameter_counts(ckpt) == parameter_counts(before)
    layers = static_layers(before, head=True)
    assert len(layers) == 13
    grids = {}
    for layer, name in layers.items():
        stored = read_quantized(ckpt, name)
        assert stored.grid is not None
        grids[layer] = stored.grid
        scale = ckpt.tensors[name.replace("weight", "input_scale")]
        zero = ckpt.tensors[name.replace("weight", "input_zero_point")]
        assert (scale.dtype, scale.shape, zero.dtype, zero.shape) == ("F32", (1,), "I8", (1,))
    # One input, one grid.
    at = "blocks.1.attention."
    assert grids[at + "query"] == grids[at + "key"] == grids[at + "value"]
    assert len(set(grids.values())) == 13 - 2 * 2
    words = "bert.embeddings.word_embeddings.weight"
    assert ckpt.manifest.schemes[words].activation == "none"
    assert read_grid(ckpt, words) is None
    assert set(effect(ckpt)) >= {"layers", "rows", "weight_error", "kl", "validation_accuracy"}
    assert effect(ckpt)["rows"] == 64
    assert 0 < effect(ckpt)["kl"] < 0.05


def test_the_grid_is_that_of_the_real_inputs(data: DataOptions, tmp_path: Path) -> None:
    """Against the greatest values of all tokens, watched directly; padding does not count."""
    source = save_tiny(tmp_path / "tiny")
    model, rows = load_encoder(Checkpoint.open(source)), rows_of(source, 40)
    seen: dict[str, list[float]] = {}

    def watch(name: str) -> Any:
        def see(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.setdefault(name, []).extend([float(args[0].min()), float(args[0].max())])

        return see

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    units = units_of(names)
    found = input_histograms(model, units, rows, Silent())
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.inference_mode():
        for ids in rows.ids:  # one row at a time: there is no padding
            one = torch.from_numpy(ids.astype(np.int64))[None]
            model(one, torch.ones_like(one))
    for unit, layers in units.items():
        for layer in layers:
            assert found[unit].low == pytest.approx(min(*seen[layer], 0), abs=1e-5)
            assert found[unit].high == pytest.approx(max(*seen[layer], 0), abs=1e-5)
    tokens = sum(len(ids) for ids in rows.ids)
    assert found["blocks.0.ffn.up"].total == tokens * 128
    assert found["classifier"].total == len(rows.ids) * 128


def test_embedding_models_are_measured_by_cosine(data: DataOptions, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", head="embedding", num_labels=0)
    plan = Plan.single("quantize_static", {"rows": 32})
    compress(source, plan, tmp_path / "out", task="intent", data=data)
    found = effect(Checkpoint.open(tmp_path / "out"))
    assert 0 < found["cosine_loss"] < 0.02
    assert "validation_accuracy" not in found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "entropy", "mse"])
def test_every_calibrator_works(
    calibrator: str, symmetric: bool, data: DataOptions, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "tiny")
    ckpt = static(source, tmp_path / "out", data, calibrator=calibrator, symmetric_inputs=symmetric)
    assert effect(ckpt)["kl"] < 0.1
    zeros = {read_quantized(ckpt, name).grid.zero_point for name in ckpt.manifest.schemes}  # type: ignore[union-attr]
    assert (zeros == {0}) == symmetric


# --- layers that stay float ----------------------------------------------------------------------


def test_the_sensitive_layer_stays_float(data: DataOptions, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", change=outlier)
    all_layers = static(source, tmp_path / "all", data, calibrator="minmax")
    one = static(source, tmp_path / "one", data, calibrator="minmax", float_layers=1)
    assert set(all_layers.manifest.schemes) - set(one.manifest.schemes) == {
        "bert.encoder.layer.1.output.dense.weight"
    }
    assert effect(one)["kl"] < 0.2 * effect(all_layers)["kl"]
    share = static(source, tmp_path / "share", data, calibrator="minmax", float_layers=0.4)
    kept = set(all_layers.manifest.schemes) - set(share.manifest.schemes)
    assert len(units_of(re.sub(r"\.weight$", "", name) for name in kept)) == 4  # 40 % of 8, up
    for end in ("query", "key", "value"):  # together, or not at all
        assert len([n for n in kept if n.endswith(f"{end}.weight")]) in (0, 1, 2)


def test_the_size_that_is_promised_is_the_most(data: DataOptions, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny")
    plan = Plan.single("quantize_static", {"rows": 32, "float_layers": 2})
    claim = compress(source, plan, tmp_path / "out", data=data, dry_run=True)
    real = compress(source, plan, tmp_path / "out", data=data)
    assert real.bytes_after <= claim.bytes_after


def test_skipped_layers_stay_float(data: DataOptions, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny")
    ckpt = static(source, tmp_path / "out", data, skip=["*.layer.0.*"])
    assert {".layer.1." in name for name in ckpt.manifest.schemes} == {True}
    name = "bert.encoder.layer.0.output.dense.weight"
    assert np.array_equal(ckpt.read(name), Checkpoint.open(source).read(name))


# --- SmoothQuant ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_smoothing_leaves_the_float_model_as_it_was(
    activation: str, alpha: float, tmp_path: Path
) -> None:
    path = save_tiny(tmp_path / "tiny", activation=activation, change=loud_values)
    model, rows = load_encoder(Checkpoint.open(path)), rows_of(path)
    pairs = smoothable(model.spec, [name for name, _ in model.named_modules()])
    assert len(pairs) == (4 if activation == "relu" else 2)
    ids, mask = next(rows.batches())
    with torch.inference_mode():
        before = model(ids, mask)
        smooth(model, pairs, channel_maxima(model, list(pairs), rows, Silent()), alpha)
        assert (model(ids, mask) - before).abs().max() <= 1e-5 * before.abs().max()


def smoothing_differs(path: Path, bug: str = "", alpha: float = 0.7) -> bool:
    model, rows = load_encoder(Checkpoint.open(path)), rows_of(path)
    pairs = smoothable(model.spec, ["blocks.0.attention.output"])
    attention: Any = model.blocks[0].attention
    old = [
        parameter.detach().double().numpy().copy()
        for parameter in (attention.value.weight, attention.value.bias, attention.output.weight)
    ]
    inputs: list[torch.Tensor] = []
    handle = attention.output.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.inference_mode():
        for ids in rows.ids:
            one = torch.from_numpy(ids.astype(np.int64))[None]
            model(one, torch.ones_like(one))
    handle.remove()
    x = torch.cat([i[0] for i in inputs]).double().numpy()
    maker, bias, reader = old
    wanted = oracle.smoothed(x, maker, bias, reader, alpha, bug)
    smooth(model, pairs, channel_maxima(model, list(pairs), rows, Silent()), alpha)
    found = (attention.value.weight, attention.value.bias, attention.output.weight)
    return any(
        np.abs(a.detach().double().numpy() - b).max() > 1e-5 * np.abs(b).max()
        for a, b in zip(found, wanted, strict=True)
    )


def test_smoothing_is_as_the_reference(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "tiny", change=loud_values)
    assert not smoothing_differs(path)
    assert all(smoothing_differs(path, bug) for bug in oracle.BUGS)


def test_channels_that_are_never_used_are_left_alone() -> None:
    s = factors(torch.tensor([0.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.0]), 0.5)
    assert s.tolist() == [1.0, 1.0, 1.0]


def test_smoothing_helps_against_outliers(data: DataOptions, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", change=loud_values)
    settings: dict[str, Any] = {"calibrator": "minmax", "symmetric_inputs": True}
    plain = static(source, tmp_path / "plain", data, **settings)
    smoothed = static(source, tmp_path / "smooth", data, **settings, smoothquant=0.5)
    assert effect(smoothed)["kl"] < 0.7 * effect(plain)["kl"]


# --- refusals ------------------------------------------------------------------------------------


@dataclass
class NoRows:
    train: tuple[()] = ()
    validation: tuple[()] = ()
    contents: tuple[()] = ()


def test_empty_calibration_data_is_refused(tmp_path: Path) -> None:
    ckpt = Checkpoint.open(save_tiny(tmp_path / "tiny"))
    rows: Any = NoRows()
    context = StepContext(ckpt, 0, Silent(), tmp_path, "intent", DataOptions(tmp_path), rows)
    assert SPEC.check(StaticConfig(), ckpt, context) == [
        "there are no training rows to calibrate with"
    ]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"skip": ["*nothing*"]}, "skip: '*nothing*' matches no tensor"),
        ({"skip": ["*"]}, "no layer to quantize"),
        ({"float_layers": 8}, "float_layers=8: it has 8 layers"),
        ({"float_layers": 0.95}, "nothing would be left"),
        ({"smoothquant": 0.5, "skip": ["*attention.output.dense*"]}, "smoothquant"),
    ],
)
def test_settings_that_leave_nothing(
    settings: dict[str, Any], reason: str, data: DataOptions, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "tiny")
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        static(source, tmp_path / "out", data, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"float_layers": 1.0},
        {"float_layers": -1},
        {"smoothquant": 1.5},
        {"percentile": 0},
        {"rows": 0},
        {"calibrator": "max"},
        {"head": 4},
    ],
    ids=str,
)
def test_values_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        StaticConfig(**settings)


def test_what_is_quantized_already_and_decoders_are_refused(
    data: DataOptions, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "tiny")
    static(source, tmp_path / "once", data)
    with pytest.raises(UnsupportedError, match="already quantized"):
        static(tmp_path / "once", tmp_path / "twice", data)
    decoder = Checkpoint.open(save_tiny_decoder(tmp_path / "decoder", "llama"))
    context = StepContext(decoder, 0, Silent(), tmp_path)
    (reason,) = SPEC.check(StaticConfig(), decoder, context)
    assert "decoder" in reason


def damaged(model: Encoder) -> None:
    block: Any = model.blocks[1]
    block.attention_norm.weight.fill_(3e38)


def nan_weight(model: Encoder) -> None:
    block: Any = model.blocks[0]
    block.attention.key.weight[4, 4] = float("nan")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (damaged, r"the inputs of blocks\.1\.ffn\.up' hold NaN or infinity"),
        (nan_weight, r"layer\.0\.attention\.self\.key\.weight' holds NaN"),
    ],
)
def test_what_is_not_finite_is_named(
    change: Any, name: str, data: DataOptions, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "tiny", change=change)
    with pytest.raises(CheckpointError, match=name):
        static(source, tmp_path / "out", data)
    assert not (tmp_path / "out").exists()


# --- memory --------------------------------------------------------------------------------------

CHILD = """
import re, sys
from pathlib import Path
from types import SimpleNamespace
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import DataOptions, Silent, StepContext
from pocketglm.data.readers import read_split
from pocketglm.methods._calibrate import StaticConfig
from pocketglm.methods.quantize_static import SPEC

source, data, out, rows = sys.argv[1:]
ckpt, folder = Checkpoint.open(source), Path(out)
folder.mkdir()
texts = SimpleNamespace(train=read_split(DataOptions(Path(data)), "train"))
context = StepContext(ckpt, 0, Silent(), folder, rows=texts)
effect = SPEC.run(StaticConfig(rows=int(rows), calibrator="minmax"), ckpt, folder, context)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(peak, int(effect["rows"]))
"""


def test_memory_does_not_grow_with_the_rows(data: DataOptions, tmp_path: Path) -> None:
    """One layer's inputs of all 4096 rows would be 22 MB."""
    # Without this, what the allocator keeps of blocks that were freed is 5 MB more or less.
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    source = save_tiny(tmp_path / "tiny")
    peaks = []
    for rows in (256, 4096):
        out = str(tmp_path / f"out-{rows}")
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(source), str(data.path), out, str(rows)],
            capture_output=True,
            text=True,
            check=True,
            env=given_back,
        )
        peak, seen = done.stdout.split()
        assert int(seen) == rows
        peaks.append(int(peak) * 1024)
    assert abs(peaks[1] - peaks[0]) < 3e6, peaks
