"""Opening ONNX exports: options, inputs, and folders that are broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_encoder import save_tiny

from pocketglm import registry
from pocketglm.artifacts.export import EXPORT, read_export
from pocketglm.artifacts.manifest import write_json
from pocketglm.contracts import Ids, RunOptions, Runtime
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.runtimes import open_encoder
from pocketglm.runtimes._cores import usable_cores
from pocketglm.stages.export import export

RUNTIME: Runtime = registry.load("runtimes", "onnx")
IDS: Ids = np.arange(12).reshape(2, 6) + 5
MASK: Ids = np.array([[1] * 6, [1] * 4 + [0] * 2])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runtime")
    folder = save_tiny(root / "ckpt", max_length=16)
    assert export(folder, ["onnx"], root / "out").targets[0].ok
    return root / "out" / "onnx"


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def rewrite(folder: Path, model: onnx.ModelProto) -> None:
    """Replace the model file, and its size in the manifest."""
    manifest = read_export(folder)
    file = folder / manifest.model_file
    onnx.save(model, str(file))
    entry = manifest.files[manifest.model_file].model_copy(update={"bytes": file.stat().st_size})
    files = manifest.files | {manifest.model_file: entry}
    write_json(folder / EXPORT, manifest.model_copy(update={"files": files}))


def test_session(exported: Path) -> None:
    session = open_encoder(exported)
    info = session.info
    assert (info.runtime, info.output, info.max_length) == ("onnx", "logits", 16)
    assert (info.labels, info.pooling) == (("label 0", "label 1", "label 2"), "mean")
    assert info.activation == "none"
    logits = session.logits(IDS, MASK)
    assert logits.shape == (2, 3)
    assert logits.dtype == np.float32
    session.close()


@pytest.mark.parametrize(
    "options", [RunOptions(threads=1), RunOptions(threads=2, spinning=True, optimize=False)]
)
def test_options_do_not_change_the_result(options: RunOptions, exported: Path) -> None:
    wanted = open_encoder(exported).logits(IDS, MASK)
    assert np.abs(open_encoder(exported, options).logits(IDS, MASK) - wanted).max() < 1e-5


def test_threads_are_the_callers_then_the_exports_then_all_cores(copy: Path) -> None:
    assert open_encoder(copy).info.threads == usable_cores()
    write_json(copy / EXPORT, read_export(copy).model_copy(update={"threads": 3}))
    assert open_encoder(copy).info.threads == 3
    assert open_encoder(copy, RunOptions(threads=1)).info.threads == 1


def test_other_integer_types_are_taken(exported: Path) -> None:
    session = open_encoder(exported)
    wanted = session.logits(IDS, MASK)
    narrow = session.logits(IDS.astype(np.int32), MASK.astype(np.int8))
    assert np.array_equal(narrow, wanted)


def test_token_types_are_fed_as_zeros_where_a_graph_declares_them(copy: Path) -> None:
    wanted = open_encoder(copy).logits(IDS, MASK)
    model = onnx.load(str(copy / read_export(copy).model_file))
    name, shape = "token_type_ids", ["batch", "sequence"]
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
    cast = helper.make_node("Cast", [name], ["types"], to=TensorProto.FLOAT)
    total = helper.make_node("ReduceSum", ["types", "ints_1"], ["type_sum"], keepdims=1)
    plus = helper.make_node("Add", ["plain_logits", "type_sum"], ["logits"])
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "plain_logits"
    model.graph.node.extend([cast, total, plus])
    rewrite(copy, model)
    assert np.array_equal(open_encoder(copy).logits(IDS, MASK), wanted)


def test_too_long_rows_and_strange_ids(exported: Path) -> None:
    session = open_encoder(exported)
    row = np.ones((1, 17), np.int64)
    with pytest.raises(UsageError, match=r"17 tokens .* exported for at most 16"):
        session.logits(row, row)
    for bad in (57, -1):
        with pytest.raises(UsageError, match=f"token id {bad} .* vocabulary \\(57 ids\\)"):
            session.logits(np.array([[1, bad]]), np.ones((1, 2), np.int64))


def test_missing_truncated_and_corrupt_files(copy: Path) -> None:
    file = copy / read_export(copy).model_file
    data = file.read_bytes()
    file.write_bytes(data[:1000])
    with pytest.raises(CheckpointError, match=f"has 1000 bytes, it was exported with {len(data)}"):
        open_encoder(copy)
    file.write_bytes(b"x" * len(data))
    with pytest.raises(CheckpointError, match="cannot open") as caught:
        open_encoder(copy)
    assert "onnxruntime>=" in caught.value.hint
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.onnx is missing"):
        open_encoder(copy)


def test_cores_respect_the_quota(tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    unlimited = usable_cores(file)
    assert unlimited >= 1
    for text, count in (
        ("max 100000\n", unlimited),
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),
        ("99900000 100000\n", unlimited),
    ):
        file.write_text(text)
        assert usable_cores(file) == count


def test_no_torch_is_needed(exported: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from pocketglm.runtimes import open_encoder\n"
        f"ids = np.ones((1, 4), np.int64); open_encoder(Path({str(exported)!r})).logits(ids, ids)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
