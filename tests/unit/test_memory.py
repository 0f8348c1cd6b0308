"""`--max-memory`: sizes are read, work is refused up front, and a child process stays below."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_export import save_wide

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.cli._main import main
from pocketglm.errors import MemoryCeilingError, UsageError
from pocketglm.stages import _step
from pocketglm.stages._memory import Ceiling, parse_size, resident
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan

INT4: dict[str, Any] = {"bits": 4, "embeddings": 4}
# A fresh process: its peak as the kernel counted it, and the bytes that its verb reports.
CHILD = """
import json, re, sys
from pathlib import Path
from pocketglm.contracts import ExportOptions
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan

verb, source, out, limit = sys.argv[1:]
if verb == "compress":
    plan = Plan.single("quantize_rtn", {"bits": 4, "embeddings": 4})
    compress(Path(source), plan, Path(out), max_memory=int(limit))
else:
    options = ExportOptions(max_memory=int(limit), threads=1)
    (result,) = export(Path(source), ["onnx"], Path(out), options=options).targets
    assert result.ok, result.error
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps({"peak": int(peak[1]) * 1024}))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 million parameters in bf16, most of them in two blocks."""
    folder = tmp_path_factory.mktemp("memory") / "wide"
    return save_wide(
        folder, "llama", hidden_size=768, intermediate_size=4096, head_dim=64, dtype=torch.bfloat16
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("800MB", 800_000_000),
        ("1.5 gb", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("2kib", 2048),
        (" 1000000 ", 1_000_000),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_no_size_is_no_limit() -> None:
    assert parse_size(None) is None
    assert Ceiling(None, "compress").room() is None
    Ceiling(None, "compress").require(10**18, "everything")
    Ceiling(None, "compress").check()


@pytest.mark.parametrize(
    "text", ["", "much", "-5MB", "0", "0.1b", "5 parsecs", "1e9", "8,5GB", "9" * 400]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as error:
        parse_size(text)
    assert "800MB" in error.value.hint


def test_a_limit_says_what_is_needed() -> None:
    held = resident()
    with pytest.raises(MemoryCeilingError, match=r"compress needs up to \d+ MB here") as error:
        Ceiling(held + 10_000_000, "compress").require(50_000_000, "chunks")
    assert "(" in error.value.message
    assert "50 MB for chunks" in error.value.message
    needed = parse_size(error.value.hint.split()[3])
    assert needed
    assert held + 45_000_000 < needed < held + 80_000_000
    with pytest.raises(MemoryCeilingError, match="stopped"):
        Ceiling(held // 2, "compress").check()


def test_chunks_shrink_before_the_work_is_refused(wide: Path) -> None:
    ckpt = Checkpoint.open(wide)
    most = _step._buffers(ckpt, _step.CHUNK)
    least = _step._buffers(ckpt, _step._LEAST)
    assert least < most / 2
    assert _step.chunk_size(ckpt, Ceiling(None, "compress")) == _step.CHUNK
    middle = Ceiling(resident() + (least + most) // 2, "compress")
    assert _step._LEAST <= _step.chunk_size(ckpt, middle) < _step.CHUNK
    with pytest.raises(MemoryCeilingError, match="for the chunks of the weights in work"):
        _step.chunk_size(ckpt, Ceiling(resident() + least // 2, "compress"))


def test_a_tensor_without_dimensions_is_copied(tmp_path: Path) -> None:
    source = save_wide(tmp_path / "m", "llama")
    weights = load_file(source / "model.safetensors") | {"logit_scale": torch.tensor(2.5)}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    plan = Plan.single("quantize_rtn", {"bits": 8})
    compress(source, plan, tmp_path / "out", cache=tmp_path / "cache", max_memory=1 << 40)
    assert load_file(tmp_path / "out" / "model.safetensors")["logit_scale"].item() == 2.5


def peak(verb: str, source: Path, out: Path, limit: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, verb, str(source), str(out), str(limit)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["peak"])


def test_the_limit_is_honoured(wide: Path, tmp_path: Path) -> None:
    """Measured in child processes; and the bytes are those of a run without a limit."""
    limit = 450_000_000
    assert peak("compress", wide, tmp_path / "small", limit) <= limit
    compress(wide, Plan.single("quantize_rtn", INT4), tmp_path / "free", cache=tmp_path / "c")
    for name in ("model.safetensors", "pocketglm.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "free" / name).read_bytes()
    limit = 650_000_000
    assert peak("export", tmp_path / "small", tmp_path / "out", limit) <= limit


def test_work_that_does_not_fit_is_refused_up_front(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(wide), "--out", str(tmp_path / "out"), "--max-memory"]
    for arguments, code, message in (
        (["compress", *common, "50MB", "--method", "quantize_rtn"], 4, "allows 50 MB"),
        (["export", *common, "50MB"], 4, "allows 50 MB"),
        (["export", *common, "some"], 2, "--max-memory 'some' is not a size"),
        (["compress", *common, "0", "--method", "quantize_rtn"], 2, "is not a size"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_the_estimate_covers_the_wide_model(wide: Path) -> None:
    """Buffers of a chunk are at least its elements in float32 in every thread."""
    ckpt = Checkpoint.open(wide)
    largest = max(math.prod(info.shape) for info in ckpt.tensors.values())
    assert _step._buffers(ckpt, largest) >= 4 * largest * (_step._threads() + 1)
