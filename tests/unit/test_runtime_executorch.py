"""runtimes/executorch: sessions are as PyTorch; ExecuTorch's LLM runner writes the same tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_decoder import save_chat_decoder
from executorch_file import REASON
from tiny_encoder import quantize_weights, save_tiny
from tiny_export import body, quantized

from pocketglm.artifacts import safetensors
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import EXPORT, read_export
from pocketglm.artifacts.manifest import write_json
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.contracts import DecoderSession, ExportOptions, Ids, RunOptions
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.runtimes import open_decoder, open_encoder
from pocketglm.runtimes._quiet import quiet
from pocketglm.stages.bench import bench
from pocketglm.stages.export import export
from pocketglm.text.tokenizer import Tokenizer

pytest.importorskip("executorch", reason=REASON)

POSITIONS = 64
STOP = 3
TEXT: Ids = np.random.default_rng(3).integers(6, 264, POSITIONS)
ONE = RunOptions(threads=1)
FORMS: dict[str, dict[str, TensorScheme]] = {
    "exact": body(bits=8),
    "int4": {
        "embed_tokens.weight": TensorScheme(bits=8),
        **body(bits=4, group_size=32, activation="dynamic_block"),
    },
}


def exported(folder: Path, out: Path, logits: Any) -> Path:
    options = ExportOptions(logits=logits, threads=1)
    (entry,) = export(folder, ["executorch"], out, options=options).targets
    assert entry.ok, entry.error
    return out / "executorch"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `exact` (INT8, float activations) and `int4`, whose answers are ASCII, and their
    exports: `exact-out` with all logits, `int4-out` with the last ones.
    """
    root = tmp_path_factory.mktemp("executorch")
    for form, logits in (("exact", "all"), ("int4", "last")):
        folder = save_chat_decoder(
            root / form, positions=POSITIONS, eos_token_id=[STOP], num_hidden_layers=1
        )
        only_ascii(folder)
        exported(quantized(folder, FORMS[form]), root / f"{form}-out", logits)
    return root


def only_ascii(folder: Path) -> None:
    """No other token is the most probable one: the runner's callback dies on half a character."""
    inner, ckpt = Tokenizer.load(folder).inner, Checkpoint.open(folder)
    arrays = {name: ckpt.read(name) for name in ckpt.tensors}
    head = arrays["lm_head.weight"].copy()
    for token in range(len(head)):
        text = inner.decode([token], skip_special_tokens=False)
        if not (len(text) == 1 and text.isascii() and text.isprintable()):
            head[token] = 0
    safetensors.write_file(
        folder / "model.safetensors", (arrays | {"lm_head.weight": head}).items()
    )


@pytest.fixture(params=["exact", "int4"])
def session(root: Path, request: pytest.FixtureRequest) -> DecoderSession:
    return open_decoder(root / f"{request.param}-out" / "executorch", ONE)


def same(a: object, b: object) -> bool:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) < 1e-4


def test_info(root: Path) -> None:
    info = open_decoder(root / "int4-out/executorch", ONE).info
    assert (info.runtime, info.kind, info.output) == ("executorch", "decoder", "logits")
    assert (info.max_length, info.vocab_size, info.threads) == (POSITIONS, 264, 1)
    assert (info.bos_id, info.eos_ids, info.scores) == (None, (STOP,), "last")
    assert info.activation == "dynamic_token"


def test_pieces_equal_the_checkpoint(root: Path) -> None:
    """Of any length, up to the last position, and once more: the cache keeps nothing of before."""
    wanted = open_decoder(root / "exact", ONE).score(TEXT.tolist())
    session = open_decoder(root / "exact-out/executorch", ONE)
    for _ in range(2):
        at = 0
        for count in (7, 1, 40, 2, 1):
            logits = session.prefill(TEXT[at : at + count].tolist())
            at += count
            assert logits.shape == (264,)
            assert same(logits, wanted[at - 1])
        for token in TEXT[at:]:
            at += 1
            assert same(session.step(int(token)), wanted[at - 1])
        with pytest.raises(UsageError, match="the cache holds 64"):
            session.step(7)
        session.rewind(POSITIONS)


def test_rewind_fork_and_score(session: DecoderSession) -> None:
    """Sessions of one file share its cache: none notices the other."""
    text = TEXT[:40].tolist()
    wanted = session.score(text)
    assert wanted.shape == (40, 264)
    session.prefill(text[:30])
    other = session.fork()
    session.rewind(10)
    assert (session.length, other.length) == (20, 30)
    changed = session.step(9)
    assert same(other.prefill(text[30:35]), wanted[34])
    session.rewind(1)
    assert same(session.step(text[20]), wanted[20])
    assert same(other.step(text[35]), wanted[35])
    assert same(session.score([*text[:20], 9])[-1], changed)
    assert (session.length, other.length) == (21, 36)
    with pytest.raises(UsageError, match="cannot rewind 22"):
        session.rewind(22)
    other.close()
    assert same(session.prefill(text[21:40]), wanted[39])


def test_contexts(root: Path) -> None:
    short = open_decoder(root / "int4-out/executorch", RunOptions(threads=1, context=10))
    assert short.info.max_length == 10
    with pytest.raises(UsageError, match="the cache holds 10"):
        short.prefill(TEXT[:11].tolist())
    with pytest.raises(UsageError, match="holds 64"):
        open_decoder(root / "int4-out/executorch", RunOptions(context=65))


def test_a_manifest_without_its_logits(root: Path, tmp_path: Path) -> None:
    out = root / "int4-out/executorch"
    (tmp_path / "model.pte").write_bytes((out / "model.pte").read_bytes())
    write_json(tmp_path / EXPORT, read_export(out).model_copy(update={"logits": None}))
    with pytest.raises(CheckpointError, match="does not say which logits"):
        open_decoder(tmp_path)


def test_a_broken_file_and_a_quiet_one(root: Path, tmp_path: Path) -> None:
    """ExecuTorch itself would tell what it reads about the processor."""
    out = root / "int4-out/executorch"
    code = f"from pocketglm.runtimes import *; open_decoder(Path('{out}')).prefill([7, 8])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    (tmp_path / EXPORT).write_bytes((out / EXPORT).read_bytes())
    size = (out / "model.pte").stat().st_size
    for bad in (b"\0" * size, (out / "model.pte").read_bytes()[: size // 2].ljust(size, b"\0")):
        (tmp_path / "model.pte").write_bytes(bad)
        with pytest.raises(CheckpointError, match="ExecuTorch cannot open"):
            open_decoder(tmp_path)
    (tmp_path / "model.pte").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 0 bytes, it was exported with"):
        open_decoder(tmp_path)


# --- ExecuTorch's LLM runner ---------------------------------------------------------------------


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    session = open_decoder(folder, ONE)
    logits = session.prefill(ids)
    found: list[int] = []
    while len(found) < count:
        found.append(int(logits.argmax()))
        if found[-1] == STOP:
            break
        logits = session.step(found[-1])
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_llm_runner_writes_what_pytorch_does(form: str, root: Path) -> None:
    """The real runner, over the folder's two files. With float activations its tokens are PyTorch's
    on the dequantized weights; INT4's are those of our session (its int8 inputs are rounded alike).
    """
    with quiet():
        llm: Any = pytest.importorskip("executorch.extension.llm.runner", reason=REASON)
        open_decoder(root / "int4-out/executorch", ONE).close()  # registers the kernels
        out = root / f"{form}-out" / "executorch"
        runner = llm.TextLLMRunner(str(out / "model.pte"), str(out / "tokenizer.json"))
        config = llm.GenerationConfig(echo=False, temperature=0.0, max_new_tokens=24)
        tokenizer = Tokenizer.load(out)
        for text in ("hi", "set an alarm for seven, please"):
            ids = tokenizer.encode([text], POSITIONS).ids[0].tolist()
            wanted = greedy(root / form if form == "exact" else out, ids, 24)
            written: list[str] = []
            runner.generate(text, config, written.append)
            runner.reset()
            assert "".join(written) == tokenizer.inner.decode(wanted)
            assert len(set(wanted)) > 3


_OPENED = """
import sys
from pathlib import Path
from pocketglm.contracts import RunOptions
from pocketglm.runtimes import open_session, runtime_of
path = Path(sys.argv[1])
runtime_of(path).prepare()
before = set(sys.modules)
open_session(path, RunOptions(threads=1))
print(sorted(name for name in set(sys.modules) - before if not name.startswith("pocketglm")))
"""


def test_the_load_time_is_the_models(root: Path) -> None:
    """Python has imported ExecuTorch before it is measured, and bench says what that adds."""
    out = root / "int4-out/executorch"
    found = subprocess.run(
        [sys.executable, "-c", _OPENED, str(out)], capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]", found.stderr
    assert found.stderr == ""
    result = bench(out, tokens=8, new_tokens=2, runs=1, warmup=0)
    assert result.load_ms < 1000
    assert "PyTorch" in result.extra_memory


# --- encoders ------------------------------------------------------------------------------------


def test_an_encoder(tmp_path: Path) -> None:
    """Rows of several lengths, padded, are as PyTorch's; what cannot be is refused by name."""
    folder = save_tiny(tmp_path / "ckpt", num_layers=1)
    quantize_weights(folder, {"dense.weight": TensorScheme(bits=8)})
    encoder = open_encoder(exported(folder, tmp_path / "out", "last"), ONE)
    ids = np.random.default_rng(1).integers(5, 50, (3, 9))
    mask = (np.arange(9) < np.array([[9], [4], [1]])).astype(np.int64)
    assert same(encoder.logits(ids, mask), open_encoder(folder, ONE).logits(ids, mask))
    assert encoder.info.labels == ("label 0", "label 1", "label 2")
    with pytest.raises(UsageError, match="token id 99 is outside"):
        encoder.logits(np.array([[99]]), np.array([[1]]))
    with pytest.raises(UsageError, match="exported for at most 48"):
        encoder.logits(np.zeros((1, 49), np.int64), np.ones((1, 49), np.int64))
    encoder.close()
