"""The export stage: what it writes, what it refuses, and that nothing false or half is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import scipy
import torch
import transformers
from tiny_encoder import VOCAB, quantize_weights, save_tiny, save_tokenizer

import pocketglm.targets
from pocketglm import registry
from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import Difference, check_files, read_export
from pocketglm.artifacts.manifest import digest_file
from pocketglm.artifacts.output import output_folder
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import ExportOptions, Floats, RunOptions, Silent
from pocketglm.errors import CheckpointError, ParityError, UsageError
from pocketglm.model.encoder import Encoder
from pocketglm.model.layers import Block
from pocketglm.runtimes import open_encoder
from pocketglm.stages import _parity
from pocketglm.stages import export as export_stage
from pocketglm.stages.export import export
from pocketglm.text.tokenizer import Tokenizer

DYNAMIC = TensorScheme(bits=8, activation="dynamic_tensor")
LINEARS = {f".{name}.weight": DYNAMIC for name in ("query", "key", "value", "dense")}
EXPORT = ["onnx"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("export") / "tiny", max_length=24)


@pytest.fixture(scope="module")
def tiny8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("export") / "tiny8")
    words = {"word_embeddings.weight": TensorScheme(bits=8)}
    return quantize_weights(folder, words | LINEARS)


def test_writes_the_folder_and_its_manifest(tiny: Path, tmp_path: Path) -> None:
    result = export(tiny, EXPORT, tmp_path / "out")
    entry = result.targets[0]
    assert (entry.ok, entry.exit_code, entry.precision) == (True, 0, "fp32")
    folder = tmp_path / "out" / "onnx"
    assert entry.out == str(folder)
    manifest = read_export(folder)
    check_files(folder, manifest)
    assert set(manifest.files) == {
        "config.json",
        "onnx/model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert entry.bytes == sum(file.bytes for file in manifest.files.values())
    assert (manifest.kind, manifest.output, manifest.task) == ("encoder", "logits", "intent")
    assert (manifest.max_length, manifest.vocab_size, manifest.pooling) == (24, 57, "mean")
    assert manifest.tokenizer_sha256 == digest_file(tiny / "tokenizer.json")
    assert manifest.checkpoint == Checkpoint.open(tiny).digest()
    assert manifest.operators["com.microsoft.Attention"] == 2
    stored = Checkpoint.open(tiny).tensors.values()
    assert manifest.parameter_count == sum(tensor.size for tensor in stored)
    parity = manifest.parity
    assert parity == entry.parity
    assert parity.n == len(_parity.SAMPLES) + 1
    assert parity.output_max_abs < 1e-5
    assert parity.tolerance == pytest.approx(1e-4 * max(1, parity.output_std))
    assert parity.agreement == 1.0
    assert list(parity.blocks) == ["embeddings", "block.0", "block.1", "head"]
    assert 0 < max(parity.blocks.values()) < 1e-5
    assert not list((tmp_path / "out").glob("*.partial"))


def test_int8_parity_is_exact_by_block_and_bounded_as_shipped(tiny8: Path, tmp_path: Path) -> None:
    entry = export(tiny8, EXPORT, tmp_path / "out").targets[0]
    assert entry.ok, entry.error
    manifest = read_export(tmp_path / "out" / "onnx")
    assert (manifest.precision, manifest.activation) == ("int8", "dynamic_tensor")
    assert manifest.schemes == Checkpoint.open(tiny8).manifest.schemes
    parity = manifest.parity
    assert max(parity.blocks.values()) < 2e-5
    assert 1e-4 < parity.output_max_abs < parity.tolerance
    session = open_encoder(tmp_path / "out" / "onnx")
    assert session.info.activation == "dynamic_tensor"


def test_opset_13_and_length_are_part_of_the_request(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ExportOptions(opset=13, max_length=10, threads=1)
    assert export(tiny, EXPORT, out, options=options).targets[0].ok
    manifest = read_export(out / "onnx")
    assert (manifest.max_length, manifest.minimum["opset"], manifest.threads) == (10, "13", 1)
    assert export(tiny, EXPORT, out, options=options).targets[0].already_done
    refused = export(tiny, EXPORT, out).targets[0]
    assert (refused.ok, refused.exit_code) == (False, 2)
    assert "was not made by this command" in str(refused.error)
    assert "--force" in refused.hint
    assert read_export(out / "onnx") == manifest
    assert export(tiny, EXPORT, out, force=True).targets[0].ok
    assert read_export(out / "onnx").max_length == 24


def test_the_same_command_gives_the_same_bytes(tiny8: Path, tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        export(tiny8, EXPORT, tmp_path / name)
        files = sorted((tmp_path / name).rglob("*"))
        digests.append([digest_file(file) for file in files if file.is_file()])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["onxx"], ExportOptions(), "unknown target 'onxx'"),
        ([], ExportOptions(), "no target named"),
        (EXPORT, ExportOptions(max_length=49), "--max-length 49: the model has 48 positions"),
        (EXPORT, ExportOptions(max_length=1), "--max-length 1"),
    ],
)
def test_bad_usage(
    targets: list[str], options: ExportOptions, message: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(tiny, targets, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


def test_a_refusal_names_its_reasons_and_writes_nothing(tiny8: Path, tmp_path: Path) -> None:
    entry = export(tiny8, EXPORT, tmp_path / "out", options=ExportOptions(opset=13)).targets[0]
    assert (entry.ok, entry.exit_code) == (False, 2)
    assert "opset 13 is float32 or static INT8 only" in str(entry.error)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "ckpt")
    save_tokenizer(folder, [*VOCAB, "extra"])
    with pytest.raises(CheckpointError, match="largest id is 57, the model's embedding has 57"):
        export(folder, EXPORT, tmp_path / "out")


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "ckpt")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        export(folder, EXPORT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_loses_the_model_is_not_written(tmp_path: Path) -> None:
    """One huge activation channel takes the whole int8 range of its tensor from the others."""

    def outlier(model: Encoder) -> None:
        for block in model.blocks:
            assert isinstance(block, Block)
            block.ffn.up.weight[3] *= 1e5
            block.ffn.down.weight *= 5
            block.ffn.down.weight[:, 3] = 0

    folder = save_tiny(tmp_path / "ckpt", change=outlier)
    assert export(folder, EXPORT, tmp_path / "float").targets[0].ok
    quantize_weights(folder, LINEARS)
    entry = export(folder, EXPORT, tmp_path / "out").targets[0]
    assert (entry.ok, entry.exit_code) == (False, 1)
    assert "dynamic_tensor" in str(entry.error)
    assert "activation=dynamic_block" in entry.hint
    assert not (tmp_path / "out").exists()


def altered(folder: Path, initializer: str, byte: int) -> Path:
    """Flip one bit of one initializer of an exported file."""
    file = folder / read_export(folder).model_file
    model = onnx.load(str(file))
    tensor = next(t for t in model.graph.initializer if t.name == initializer)
    raw = bytearray(tensor.raw_data)
    raw[byte] ^= 0x20
    tensor.raw_data = bytes(raw)
    onnx.save(model, str(file))
    return folder


@pytest.mark.parametrize(
    ("initializer", "block"),
    [
        ("encoder.layer.0.intermediate.dense.weight", "block.0"),
        ("encoder.layer.1.attention.self.query|encoder.layer.1.attention.self.key|"
         "encoder.layer.1.attention.self.value.weight", "block.1"),
        ("classifier.weight", "head"),
    ],
)  # fmt: skip
def test_parity_names_the_block_with_a_changed_weight(
    initializer: str, block: str, tiny8: Path, tmp_path: Path
) -> None:
    export(tiny8, EXPORT, tmp_path / "out")
    folder = tmp_path / "out" / "onnx"
    ckpt, target = Checkpoint.open(tiny8), registry.load("targets", "onnx")
    manifest = read_export(folder)
    again = _parity.check_parity(ckpt, folder, manifest, target, Silent())
    assert again == manifest.parity
    # Byte 259: the exponent of a float, and the 260th of many int8 weights.
    altered(folder, initializer, 259)
    with pytest.raises(ParityError, match=f"'{block}' of the written file differs"):
        _parity.check_parity(ckpt, folder, manifest, target, Silent())


def test_a_bad_weight_of_an_encoder_is_the_checkpoints_fault(tiny8: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny8, tmp_path / "bad")
    ckpt = Checkpoint.open(tiny8)
    arrays = {name: ckpt.read(name) for name in ckpt.tensors}
    name = next(name for name in arrays if name.endswith("0.output.LayerNorm.bias"))
    arrays[name][3] = np.nan
    safetensors.write_file(tmp_path / "bad" / "model.safetensors", arrays.items())
    (result,) = export(tmp_path / "bad", EXPORT, tmp_path / "out").targets
    assert result.exit_code == 2
    assert result.error
    assert f"'{name}' holds NaN or infinity, first in row 3" in result.error


def test_low_agreement_fails_although_no_value_is_far_off(tiny8: Path, tmp_path: Path) -> None:
    export(tiny8, EXPORT, tmp_path / "out")
    manifest = read_export(tmp_path / "out" / "onnx").model_copy(update={"labels": []})
    noise = np.random.default_rng(0)
    wanted = (noise.choice([-1.0, 1.0], size=(20, 384)) / 384**0.5).astype(np.float32)
    found = wanted + noise.uniform(-0.075, 0.075, wanted.shape).astype(np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    with pytest.raises(ParityError, match=r"agrees with the checkpoint to 0\.\d+ only"):
        _parity.judge(manifest, wanted, found, found, {}, classes=False)
    assert _parity.judge(manifest, wanted, wanted, wanted, {}, classes=False).output_max_abs == 0
    with pytest.raises(ParityError, match="optimizer on differs from off"):
        _parity.judge(manifest, wanted, wanted, -wanted, {}, classes=False)


@pytest.mark.parametrize(
    ("activation", "share", "limit"),
    [("none", 2e-4, 1e-4), ("dynamic_block", 0.11, 0.1), ("dynamic_tensor", 0.31, 0.3)],
)
def test_a_wrong_fusion_is_not_excused_by_int8(
    activation: str, share: float, limit: float, tiny8: Path, tmp_path: Path
) -> None:
    """One value, far below what the form itself may cost, moved by the graph optimizer."""
    export(tiny8, EXPORT, tmp_path / "out")
    manifest = read_export(tmp_path / "out" / "onnx").model_copy(update={"activation": activation})
    wanted = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    wanted /= wanted.std()
    plain = wanted.copy()
    plain[3, 1] += share
    with pytest.raises(ParityError, match=rf"optimizer on differs from off.*limit.* {limit:.3g} "):
        _parity.judge(manifest, wanted, wanted, plain, {}, classes=True)
    plain[3, 1] = wanted[3, 1] + 0.4 * share
    _parity.judge(manifest, wanted, wanted, plain, {}, classes=True)


def test_the_optimizer_changes_nothing_in_our_int8_files(tiny8: Path, tmp_path: Path) -> None:
    parity = export(tiny8, EXPORT, tmp_path / "out").targets[0].parity
    assert parity is not None
    assert parity.optimizer_max_abs <= 0.3 * parity.output_std < parity.tolerance


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_export_leaves_nothing_in_its_place_and_runs_again(
    number: signal.Signals, tiny: Path, tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pocketglm.stages.export import export\n"
        "class Kill:\n"
        "    def say(self, text): pass\n"
        "    def progress(self, label, *state):\n"
        "        if label == 'checking parity':\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        f"export(Path({str(tiny)!r}), ['onnx'], Path({str(tmp_path / 'out')!r}), reporter=Kill())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -number
    # Ctrl-C still lets us clean up.
    left = [str(f.relative_to(tmp_path)) for f in sorted((tmp_path).glob("out/*"))]
    assert left == (["out/onnx.partial"] if number == signal.SIGKILL else [])
    assert (tmp_path / "out").exists() == (number == signal.SIGKILL)
    assert export(tiny, EXPORT, tmp_path / "out").targets[0].ok
    assert os.listdir(tmp_path / "out") == ["onnx"]
    export(tiny, EXPORT, tmp_path / "calm")
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): digest_file(file) for file in files}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with less room than the export needs; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("not allowed to mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(tiny: Path, tiny_disk: Path) -> None:
    entry = export(tiny, EXPORT, tiny_disk / "out").targets[0]
    assert (entry.ok, entry.exit_code) == (False, 4)
    assert "no space left" in str(entry.error)
    assert list(tiny_disk.iterdir()) == []


def test_force_never_overwrites_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    """OUT/onnx would be the checkpoint itself."""
    folder = tmp_path / "onnx"
    shutil.copytree(tiny, folder)
    (folder / "pocketglm.json").write_text("{}")
    before = contents(folder)
    entry = export(folder, EXPORT, tmp_path, force=True).targets[0]
    assert (entry.ok, entry.exit_code) == (False, 2)
    assert "would overwrite" in str(entry.error)
    assert contents(folder) == before


def test_a_target_without_its_package_names_the_pip_command(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target whose code needs a package of another name than its extra's."""
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "absent.py").write_text(
        "from dataclasses import replace\n"
        "from pocketglm.errors import require\n"
        "from pocketglm.targets.onnx import SPEC as ONNX\n"
        "def lower(*_): require('no_such_package_here', extra='litert')\n"
        "SPEC = replace(ONNX, lower=lower)\n"
    )
    monkeypatch.setattr(
        pocketglm.targets, "__path__", [*pocketglm.targets.__path__, str(tmp_path / "targets")]
    )
    monkeypatch.setattr(registry, "_ROOT", tmp_path)
    entry = export(tiny, ["absent"], tmp_path / "out").targets[0]
    assert (entry.ok, entry.exit_code) == (False, 3)
    assert "pip install 'pocketglm[litert]'" in entry.hint
    assert not (tmp_path / "out").exists()
    for kind in ("targets", "runtimes"):  # names for the registry; the real files come first
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / "onnx.py").touch()
    both = export(tiny, ["absent", "onnx"], tmp_path / "out").targets
    assert [t.ok for t in both] == [False, True]
    assert os.listdir(tmp_path / "out") == ["onnx"]


def test_an_equal_export_that_was_quicker(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between our look and our lock."""
    original = output_folder
    quicker: list[Path] = []

    def late(out: Path, *arguments: Any) -> Any:
        if not quicker:
            quicker.append(out)
            assert export(tiny, EXPORT, out.parent).targets[0].ok
            stamp.append(out.stat().st_ino)
        return original(out, *arguments)

    stamp: list[int] = []
    monkeypatch.setattr(export_stage, "output_folder", late)
    entry = export(tiny, EXPORT, tmp_path / "out").targets[0]
    assert (entry.ok, entry.already_done) == (True, True)
    assert [(tmp_path / "out" / "onnx").stat().st_ino] == stamp
    assert os.listdir(tmp_path / "out") == ["onnx"]


def test_the_real_minilm_equals_transformers(minilm: Path, tmp_path: Path) -> None:
    entry = export(minilm, EXPORT, tmp_path / "out").targets[0]
    assert entry.ok, entry.error
    folder = tmp_path / "out" / "onnx"
    encoded = Tokenizer.load(folder).encode(["a walk in the rain", "hello"], 32)
    ids, mask = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.mask)
    model: Any = transformers.AutoModel.from_pretrained(minilm).eval()
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    wanted = torch.nn.functional.normalize(mean).numpy()
    assert np.abs(open_encoder(folder).logits(encoded.ids, encoded.mask) - wanted).max() < 1e-4


def test_requests_differ_by_checkpoint(tiny: Path, tiny8: Path, tmp_path: Path) -> None:
    export(tiny, EXPORT, tmp_path / "out")
    other = export(tiny8, EXPORT, tmp_path / "out").targets[0]
    assert (other.ok, other.exit_code) == (False, 2)


def test_parity_tells_error_divergence_and_flips_with_the_delegate_and_without(
    tiny8: Path, tmp_path: Path
) -> None:
    export(tiny8, EXPORT, tmp_path / "out")
    manifest = read_export(tmp_path / "out" / "onnx")
    assert manifest.parity.delegate_on is not None
    assert manifest.parity.delegate_off is not None
    assert manifest.parity.delegate_on.max_abs == manifest.parity.output_max_abs
    assert manifest.parity.delegate_on.flip_rate == 0.0

    wanted = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    wanted[0] = [0, 0.5, 0.45, 0]
    found = wanted + np.float32(0.01)  # probabilities do not see a shift of a whole row
    found[0, 2] += 0.1
    parity = _parity.judge(
        manifest.model_copy(update={"activation": "static"}),
        wanted, found, wanted, {}, classes=True,
    )  # fmt: skip
    p, q = (scipy.special.softmax(x.astype(np.float64), axis=1) for x in (wanted, found))
    assert parity.delegate_on is not None
    assert parity.delegate_on.kl == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-9)
    assert parity.delegate_on.flip_rate == pytest.approx(1 / 20)
    assert parity.delegate_on.max_abs == pytest.approx(0.11, rel=1e-5)
    assert parity.delegate_off == Difference(max_abs=0, kl=0, flip_rate=0)
    alone = _parity.judge(manifest, wanted, wanted, None, {}, classes=True)
    assert alone.delegate_off is None
    assert alone.optimizer_max_abs == 0


def test_only_a_runtime_with_a_switch_is_run_twice(tiny8: Path, tmp_path: Path) -> None:
    export(tiny8, EXPORT, tmp_path / "out")
    manifest = read_export(tmp_path / "out" / "onnx")
    for runtime, expected in (("onnx", [True, False]), ("gguf", [True])):
        asked: list[bool] = []

        def run(options: RunOptions, asked: list[bool] = asked) -> Floats:
            asked.append(options.optimize)
            return np.zeros((1, 2), np.float32)

        other = manifest.model_copy(update={"runtime": runtime})
        _, plain = _parity.on_and_off(other, run, Silent())
        assert asked == expected
        assert (plain is None) == (len(expected) == 1)
