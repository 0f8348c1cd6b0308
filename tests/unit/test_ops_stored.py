"""ops/stored: what is written is read back, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import MANIFEST, Manifest, write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.errors import CheckpointError
from pocketglm.ops.affine import dequantize, quantize
from pocketglm.ops.stored import (
    as_array,
    as_tensor,
    parameter_counts,
    precision_of,
    read_quantized,
    read_weight,
    store,
    stored_layout,
)

NAME = "layer.weight"
SCHEMES = [
    TensorScheme(bits=bits, group_size=group, symmetric=symmetric)
    for bits, group in ((8, None), (8, 32), (4, 32), (4, None))
    for symmetric in (True, False)
]


def checkpoint(folder: Path, scheme: TensorScheme | None, **extra: np.ndarray) -> Checkpoint:
    """A folder with one weight [11, 96], stored by `scheme`, and a float32 `norm` [96]."""
    w = torch.randn(11, 96, generator=torch.Generator().manual_seed(3))
    arrays = store(NAME, *quantize(w, scheme), scheme) if scheme else {NAME: as_array(w)}
    arrays |= {"norm": np.ones(96, np.float32)} | extra
    folder.mkdir(exist_ok=True)
    safetensors.write_file(folder / "model.safetensors", arrays.items())
    (folder / "config.json").write_text("{}")
    write_json(folder / MANIFEST, Manifest(schemes={NAME: scheme} if scheme else {}))
    return Checkpoint.open(folder)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_stored_is_read_back(scheme: TensorScheme, tmp_path: Path) -> None:
    w = torch.randn(11, 96, generator=torch.Generator().manual_seed(3))
    q, scales, zeros = quantize(w, scheme)
    ckpt = checkpoint(tmp_path, scheme)
    found = read_quantized(ckpt, NAME)
    assert torch.equal(found.q, q)
    assert torch.equal(found.scales, scales)
    assert (found.zero_points is None) == (zeros is None)
    if found.zero_points is not None and zeros is not None:
        assert torch.equal(found.zero_points, zeros)
    assert found.scheme == scheme
    assert torch.equal(read_weight(ckpt, NAME), dequantize(q, scales, zeros, scheme))


@pytest.mark.parametrize("scheme", [None, *SCHEMES], ids=str)
def test_the_layout_is_what_is_stored(scheme: TensorScheme | None, tmp_path: Path) -> None:
    ckpt = checkpoint(tmp_path, scheme)
    layout = stored_layout(NAME, (11, 96), scheme, "F32")
    found = {n: (i.dtype, i.shape) for n, i in ckpt.tensors.items() if n != "norm"}
    assert found == layout
    assert parameter_counts(ckpt) == {NAME: 11 * 96, "norm": 96}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_float_weights_are_read_as_float32(dtype: np.dtype, tmp_path: Path) -> None:
    values = np.linspace(-2, 2, 6).astype(dtype).reshape(2, 3)
    ckpt = checkpoint(tmp_path, None, other=values)
    read = read_weight(ckpt, "other")
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read.numpy(), values.astype(np.float32))
    np.testing.assert_array_equal(as_array(as_tensor(values)), values)


def test_precision_names(tmp_path: Path) -> None:
    assert precision_of(checkpoint(tmp_path, None)) == "fp32"
    assert precision_of(checkpoint(tmp_path, SCHEMES[0])) == "int8"
    four = checkpoint(tmp_path, SCHEMES[4])
    assert precision_of(four) == "int4"
    four.manifest.schemes["x"] = SCHEMES[0]
    assert precision_of(four) == "mixed"
    half = np.ones((40, 40), np.float16)
    assert precision_of(checkpoint(tmp_path, None, half=half)) == "fp16"


def test_a_float_weight_has_no_integers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'layer.weight' is not quantized"):
        read_quantized(checkpoint(tmp_path, None), NAME)


def test_integers_of_another_tool_are_refused(tmp_path: Path) -> None:
    ckpt = checkpoint(tmp_path, None, other=np.ones((2, 2), np.int8))
    with pytest.raises(CheckpointError, match="'other' is stored as I8 without a scheme") as error:
        read_weight(ckpt, "other")
    assert "another tool" in error.value.hint


@pytest.mark.parametrize(
    ("scheme", "drop", "message"),
    [
        (SCHEMES[4], f"{NAME}_scale", r"'layer.weight_scale' should be BF16 \[11, 3\], it is miss"),
        (SCHEMES[4], f"{NAME}_packed", r"'layer.weight_packed' should be I32 \[11, 12\]"),
        (SCHEMES[0], NAME, r"'layer.weight' has no stored \[N, K\] integers"),
        (SCHEMES[4], f"{NAME}_shape", "has no tensor 'layer.weight_shape'"),
    ],
)
def test_a_missing_part_is_named(
    scheme: TensorScheme, drop: str, message: str, tmp_path: Path
) -> None:
    ckpt = checkpoint(tmp_path, scheme)
    del ckpt.tensors[drop]
    with pytest.raises(CheckpointError, match=message):
        read_weight(ckpt, NAME)


def test_a_part_of_another_shape_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, TensorScheme(bits=8, group_size=32))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["schemes"][NAME]["group_size"] = None
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"should be BF16 \[11, 1\], it is BF16 \[11, 3\]"):
        read_weight(Checkpoint.open(tmp_path), NAME)
