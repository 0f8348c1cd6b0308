"""stages/compress: sizes, bytes, cache, resume after kill -9, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_decoder import edit, save_chat_decoder
from text_data import save_texts
from tiny_bert import save_tiny_bert
from tiny_encoder import save_tiny

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import MANIFEST
from pocketglm.artifacts.schemas import CompressResult
from pocketglm.contracts import DataOptions
from pocketglm.errors import (
    CheckpointError,
    DiskFullError,
    LockedError,
    OutputExistsError,
    UnsupportedError,
    UsageError,
)
from pocketglm.model.hf import load_encoder
from pocketglm.ops.affine import dequantize, quantize
from pocketglm.ops.stored import read_weight
from pocketglm.stages import _cache, _step
from pocketglm.stages.compress import compress
from pocketglm.stages.export import export
from pocketglm.stages.plan import Plan

PLANS = sorted((Path(__file__).parents[2] / "plans").glob("*.yaml"))
DECODERS = {"tiny"}  # run by the test of their method
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
INT4 = {"bits": 4, "symmetric": False, "embeddings": 8, "head": 8}
STOPPED = """
import os, signal, sys
from pathlib import Path
from pocketglm.contracts import Silent
from pocketglm.stages.compress import compress
from pocketglm.stages.plan import Plan

class Kill(Silent):
    def progress(self, label, done, total, note=""):
        if done == total // 2:
            os.kill(os.getpid(), int(sys.argv[3]))

compress(Path(sys.argv[1]), Plan.single("quantize_rtn"), Path(sys.argv[2]), reporter=Kill())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("compress") / "tiny")


def run(source: Path, out: Path, **settings: Any) -> CompressResult:
    return compress(source, Plan.single("quantize_rtn", settings), out)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def edited(source: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of `source` in which one element of a tensor is `value`."""
    shutil.copytree(source, folder)
    ckpt = Checkpoint.open(source)
    arrays = {n: ckpt.read(n) for n in ckpt.tensors}
    arrays[name][3, 5] = value
    safetensors.write_file(folder / "model.safetensors", arrays.items())
    return folder


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("plans") / "six", num_layers=6)


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("validation", 8)):
        rows = [
            {"text": " ".join(rng.choice(["ab", "bc", "ca"], 3)), "label": f"label {n % 3}"}
            for n in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return DataOptions(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GLM for texts; groups of 128 divide its widths."""
    folder = tmp_path_factory.mktemp("plans") / "decoder"
    path = save_chat_decoder(folder, hidden_size=128, intermediate_size=128, num_attention_heads=4)
    edit(path / "config.json", eos_token_id=5)
    edit(path / MANIFEST, task="lm")
    return path


@pytest.mark.parametrize("plan", [p for p in PLANS if p.stem not in DECODERS], ids=lambda p: p.stem)
def test_every_plan_file_runs(
    plan: Path, six_layers: Path, few_rows: DataOptions, decoder: Path, tmp_path: Path
) -> None:
    """On a model and rows that are small enough to try; exported, too."""
    model, rows = six_layers, few_rows
    if "decoder" in plan.stem:
        model, rows = decoder, DataOptions(save_texts(tmp_path / "texts"))
    result = compress(model, Plan.from_file(plan), tmp_path / "out", data=rows)
    assert result.bytes_after < 0.45 * result.bytes_before
    (exported,) = export(tmp_path / "out", ["onnx"], tmp_path / "exported").targets
    assert exported.ok, exported.error


def test_there_are_plan_files() -> None:
    assert {p.stem for p in PLANS} >= {"int8", "int4"}


def test_the_real_minilm(minilm: Path, tmp_path: Path) -> None:
    plan = Plan.single("quantize_rtn", {"embeddings": 8, "head": 8, "search": False})
    claim = compress(minilm, plan, tmp_path / "out", dry_run=True)
    result = compress(minilm, plan, tmp_path / "out")
    assert claim.bytes_after == result.bytes_after
    assert result.bytes_before / result.bytes_after > 3.8
    assert 0.001 < result.steps[0].effect["weight_error"] < 0.02


def test_weights_files_and_manifest(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out", **INT4)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    lost = total = 0.0
    for name in before.tensors:
        weight, found = read_weight(before, name), read_weight(after, name)
        scheme = after.manifest.schemes.get(name)
        if scheme is None:
            assert torch.equal(weight, found)
            continue
        assert torch.equal(found, dequantize(*quantize(weight, scheme), scheme))
        lost += float((found - weight).double().square().sum())
        total += float(weight.double().square().sum())
    assert len(after.manifest.schemes) == 15
    effect = result.steps[0].effect
    assert effect["weight_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert effect["bytes_after"] == result.bytes_after
    kept = {"vocab.txt", "1_Pooling/config.json"}
    assert all((tmp_path / "out" / f).read_bytes() == (source / f).read_bytes() for f in kept)
    step = after.manifest.lineage[0]
    assert step.parent == before.digest()
    assert step.versions.keys() >= {"pocketglm", "python", "torch"}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("settings", [{}, INT4], ids=["int8", "int4"])
def test_a_dry_run_tells_the_real_size_and_writes_nothing(
    settings: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    plan = Plan.single("quantize_rtn", settings)
    claim = compress(source, plan, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    result = compress(source, plan, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert claim.dry_run
    assert claim.bytes_after == result.bytes_after == file.stat().st_size - header


@pytest.mark.parametrize(
    ("settings", "chunk"), [({"search": False}, 1), (INT4, 128 * 48)], ids=["int8", "int4"]
)
def test_bytes_do_not_depend_on_the_chunk(
    settings: dict[str, Any],
    chunk: int,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan.single("quantize_rtn", {**settings, "skip": ["*.layer.1.*"]})
    compress(source, plan, tmp_path / "whole", cache=tmp_path / "c1")
    monkeypatch.setattr(_step, "CHUNK", chunk)
    compress(source, plan, tmp_path / "chunks", cache=tmp_path / "c2")
    assert files(tmp_path / "whole") == files(tmp_path / "chunks")


def test_bf16_and_sharded_sources(source: Path, tmp_path: Path) -> None:
    ckpt = Checkpoint.open(source)
    half, shards = tmp_path / "half", tmp_path / "shards"
    for folder in (half, shards):
        shutil.copytree(source, folder)
    rounded = {n: ckpt.read(n).astype(safetensors.DTYPES["BF16"]) for n in ckpt.tensors}
    safetensors.write_file(half / "model.safetensors", rounded.items())
    run(half, tmp_path / "out-half")
    weight = read_weight(Checkpoint.open(half), QUERY)
    scheme = Checkpoint.open(tmp_path / "out-half").manifest.schemes[QUERY]
    expected = dequantize(*quantize(weight, scheme), scheme)
    assert torch.equal(read_weight(Checkpoint.open(tmp_path / "out-half"), QUERY), expected)

    (shards / "model.safetensors").unlink()
    names = list(ckpt.tensors)
    index = {"weight_map": {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}}
    for i in range(2):
        part = [(n, ckpt.read(n)) for n in names[i::2]]
        safetensors.write_file(shards / f"part-{i}.safetensors", part)
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    run(shards, tmp_path / "out-shards")
    assert sorted(f.name for f in (tmp_path / "out-shards").glob("*.safetensors*")) == [
        "model.safetensors"
    ]
    assert load_encoder(Checkpoint.open(tmp_path / "out-shards"))


def test_the_same_command_is_already_done(source: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "out")
    before = files(tmp_path / "out")
    again = run(source, tmp_path / "out")
    assert (first.already_done, again.already_done) == (False, True)
    assert again.steps[0].effect == first.steps[0].effect
    assert again.bytes_after == first.bytes_after
    assert files(tmp_path / "out") == before
    with pytest.raises(OutputExistsError, match="was not made by this command"):
        run(source, tmp_path / "out", bits=4)
    compress(source, Plan.single("quantize_rtn", {"bits": 4}), tmp_path / "out", force=True)
    assert Checkpoint.open(tmp_path / "out").manifest.schemes[QUERY].bits == 4


def test_a_finished_step_is_reused_and_outputs_stay_independent(
    source: Path, tmp_path: Path
) -> None:
    names = ("first", "second", "third", "fourth")
    first, second, third, fourth = (tmp_path / name for name in names)
    assert not run(source, first).steps[0].reused
    kept = files(first)
    again = run(source, second)
    assert again.steps[0].reused
    assert again.steps[0].effect["weights"] == 12
    (second / "model.safetensors").write_bytes(b"edited in place")
    assert files(first) == kept
    assert run(source, third).steps[0].reused
    assert files(third) == kept
    assert not run(source, tmp_path / "other", search=False).steps[0].reused
    # The first output's weights are the cache's file: an edit is seen, and reaches no other output.
    (first / "model.safetensors").write_bytes(b"edited in place")
    assert not run(source, fourth).steps[0].reused
    assert files(fourth) == files(third) == kept


def test_weights_are_written_once_or_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linked to the first output; copied to the second, and where there are no links."""
    run(source, tmp_path / "a")
    run(source, tmp_path / "b")
    (entry,) = (f for f in _cache.cache_root().iterdir() if (f / _cache.SEAL).exists())
    cached, a, b = (
        folder / "model.safetensors" for folder in (entry, *map(tmp_path.joinpath, "ab"))
    )
    assert a.samefile(cached)
    assert not b.samefile(cached)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    shutil.rmtree(tmp_path / "a")
    run(source, tmp_path / "a")
    assert not a.samefile(cached)
    assert a.read_bytes() == b.read_bytes() == cached.read_bytes()


@pytest.mark.parametrize(
    "file", ["model.safetensors", "vocab.txt", "step.sha256", "pocketglm.json"]
)
def test_a_damaged_cache_entry_is_built_again(file: str, source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "a")
    (entry,) = _cache.cache_root().iterdir()
    data = bytearray((entry / file).read_bytes())
    data[len(data) // 2] ^= 1
    (entry / file).unlink()  # which may be a link
    (entry / file).write_bytes(data)
    assert not run(source, tmp_path / "b").steps[0].reused
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert run(source, tmp_path / "c").steps[0].reused


def test_usage_and_clear_touch_only_entries(source: Path, tmp_path: Path) -> None:
    root = _cache.cache_root()
    assert _cache.usage(root) == (0, 0)
    run(source, tmp_path / "a")
    run(source, tmp_path / "b", bits=4)
    (root / "mine").mkdir()
    entries, size = _cache.usage(root)
    assert entries == 2
    assert size > sum((tmp_path / x / "model.safetensors").stat().st_size for x in "ab")
    _cache.clear(root)
    assert _cache.usage(root) == (0, 0)
    assert [f.name for f in root.iterdir()] == ["mine"]


def test_the_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POCKETGLM_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert _cache.cache_root() == Path("/home/someone/.cache/pocketglm/steps")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stop_and_run_again_gives_the_same_bytes(
    number: signal.Signals, source: Path, tmp_path: Path
) -> None:
    out, cache = tmp_path / "out", _cache.cache_root()
    stopped = subprocess.run(
        [sys.executable, "-c", STOPPED, str(source), str(out), str(int(number))],
        env=os.environ,
        check=False,
        capture_output=True,
    )
    assert stopped.returncode == -number
    assert not out.exists()
    assert _cache.usage(cache)[0] == 0
    run(source, out)
    compress(source, Plan.single("quantize_rtn"), tmp_path / "calm", cache=tmp_path / "cache2")
    assert files(out) == files(tmp_path / "calm")
    assert not [f for f in (*tmp_path.iterdir(), *cache.iterdir()) if f.suffix == ".partial"]


@pytest.mark.parametrize("where", ["itself", "parent"])
def test_force_never_overwrites_the_checkpoint(where: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "ckpt"
    shutil.copytree(source, folder)
    (folder / "pocketglm.json").write_text("{}")
    before = files(folder)
    out = folder if where == "itself" else folder.parent
    with pytest.raises(UsageError, match="would overwrite"):
        compress(folder, Plan.single("quantize_rtn"), out, force=True)
    assert files(folder) == before


@pytest.mark.parametrize("edit", ["ops/affine.py", "methods/quantize_rtn.py", "ops/new.py"])
def test_edited_numeric_code_makes_a_step_new(
    edit: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "a")
    package = tmp_path / "package"
    for part in ("ops", "methods"):
        shutil.copytree(_step._PACKAGE / part, package / part)
    monkeypatch.setattr(_step, "_PACKAGE", package)
    for reused in (True, False):
        _step.code_digest.cache_clear()
        assert run(source, tmp_path / str(reused)).steps[0].reused is reused
        with (package / edit).open("a") as file:
            file.write("# edited\n")
    _step.code_digest.cache_clear()


def test_a_cache_entry_that_lost_most_of_its_files_is_built_again(
    source: Path, tmp_path: Path
) -> None:
    """As `rm` or a cleaner of old files leaves it when it is stopped half-way."""
    run(source, tmp_path / "a")
    (entry,) = _cache.cache_root().iterdir()
    for name in ("pocketglm.json", "config.json", "step.sha256"):
        (entry / name).unlink()
    assert not run(source, tmp_path / "b").steps[0].reused
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_two_writers_of_one_step_and_of_one_output(source: Path, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(out: str) -> None:
        try:
            run(source, tmp_path / out)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"out{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []  # one wrote the step, the others waited for it
    assert files(tmp_path / "out0") == files(tmp_path / "out1") == files(tmp_path / "out2")
    same = [threading.Thread(target=work, args=("same",)) for _ in range(4)]
    for thread in same:
        thread.start()
    for thread in same:
        thread.join()
    assert all(isinstance(error, LockedError) for error in errors)
    assert files(tmp_path / "same") == files(tmp_path / "out0")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_weight_is_named_and_nothing_stays(
    value: float, source: Path, tmp_path: Path
) -> None:
    bad = edited(source, tmp_path / "bad", QUERY, value)
    with pytest.raises(CheckpointError, match=rf"'{QUERY}' holds NaN or infinity, first in row 3"):
        run(bad, tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bad"]


def test_a_quantized_checkpoint_is_refused(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="already quantized"):
        run(tmp_path / "out", tmp_path / "twice")
    plan = Plan.from_text("steps: [{quantize_rtn: {}}, {quantize_rtn: {}}]")
    with pytest.raises(UnsupportedError, match=r"step 2, quantize_rtn, cannot process"):
        compress(source, plan, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_group_that_does_not_divide_is_refused_before_any_work(tmp_path: Path) -> None:
    odd = save_tiny_bert(tmp_path / "odd", hidden_size=96)
    with pytest.raises(UnsupportedError) as error:
        run(odd, tmp_path / "out", bits=4, group_size=128)
    assert len(error.value.reasons) == 10  # each layer that has K = 96
    assert f"{QUERY}: K = 96 is not a multiple of group_size 128" in str(error.value)
    assert [f.name for f in tmp_path.iterdir()] == ["odd"]


def test_a_full_disk_is_seen_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match=r"need [0-9,]+ bytes, the disk has 1,000 bytes free"):
        run(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_what_will_be_written_needs_space(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is in the cache: room for the copy is enough."""
    size = run(source, tmp_path / "a").bytes_after
    usage = shutil.disk_usage(tmp_path)
    free = size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    assert run(source, tmp_path / "b").steps[0].reused
    with pytest.raises(DiskFullError, match=f"need {2 * size:,} bytes"):
        compress(source, Plan.single("quantize_rtn"), tmp_path / "c", cache=tmp_path / "cache2")
    free = size - 1
    with pytest.raises(DiskFullError, match=f"need {size:,} bytes"):
        run(source, tmp_path / "d")
