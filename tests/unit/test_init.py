"""The family's sizes, and new checkpoints of them."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.schemas import InitResult, SizesResult
from pocketglm.cli._main import main
from pocketglm.data.commands import generate
from pocketglm.errors import OutputExistsError, UsageError
from pocketglm.model import decoder
from pocketglm.model.decoder import Decoder, init_decoder
from pocketglm.model.hf import check_tensors, decoder_spec_of, eos_ids_of, load_decoder
from pocketglm.model.sizes import SIZES, shapes, spec_of_size, weight_bytes
from pocketglm.stages.init import init
from pocketglm.text.tokenizer import Tokenizer

MILLIONS = {
    "autoglm-nano": 3.0,
    "autoglm-15m": 15,
    "autoglm-tiny": 98,
    "autoglm-mini": 210,
    "autoglm-300m": 300,
    "autoglm-base": 1100,
    "autoglm-teacher": 1200,
    "glm-edge-1.5b": 1470,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_parameters_that_they_are_named_for(name: str) -> None:
    spec = SIZES[name]
    with torch.device("meta"):
        counted = sum(p.numel() for p in Decoder(spec).parameters())
    assert counted == sum(map(math.prod, shapes(spec).values()))
    assert counted / 1e6 == pytest.approx(MILLIONS[name], rel=0.01)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_suit_every_kernel(name: str) -> None:
    spec = SIZES[name]
    widths = [spec.vocab_size, spec.hidden_size, spec.intermediate_size]
    widths.append(spec.num_heads * spec.head_dim)
    if spec.family == "glm" and name != "glm-edge-1.5b":
        assert all(width % 128 == 0 for width in widths)
    assert all(width % 32 == 0 for width in widths)
    assert spec.head_dim in (64, 128)
    assert spec.tied


def test_glm_edge_is_the_published_config() -> None:
    spec = spec_of_size("glm-edge-1.5b")
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size) == (59264, 2048, 6144)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (28, 16, 4, 128)
    assert (spec.rope.dims, spec.rope.theta, spec.rope.interleaved) == (128, 1e4, True)
    assert (spec.rms_norm_eps, spec.max_position_embeddings) == (1e-5, 8192)
    assert spec.eos_ids == (59246, 59253, 59255)
    assert spec.kv_bytes_per_token == 56 * 1024


def test_bytes_by_precision() -> None:
    spec = spec_of_size("autoglm-nano")
    size = weight_bytes(spec)
    matrices = {n: s for n, s in shapes(spec).items() if len(s) == 2}
    assert size["fp16"] == 2 * 3_016_960
    body = sum(math.prod(s) for n, s in matrices.items() if n != "tokens.weight")
    norms = 2 * (3_016_960 - body - 3072 * 256)
    assert size["int4"] == body // 2 + 2 * body // 32 + 3072 * 256 + 2 * 3072 + norms


def test_an_unknown_size_is_answered_with_the_known() -> None:
    with pytest.raises(UsageError, match="unknown size 'autoglm-tini'") as error:
        spec_of_size("autoglm-tini")
    assert "did you mean 'autoglm-tiny'" in error.value.hint


# --- init ----------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir()}


def test_init_is_seeded_atomic_and_opens_upstream(tmp_path: Path) -> None:
    result = init("autoglm-nano", tmp_path / "a", seed=3, dtype="float32")
    assert (result.parameters, result.tokenizer, result.tokens) == (3_016_960, "bytes", 264)
    ckpt = Checkpoint.open(tmp_path / "a")
    check_tensors(ckpt)
    ours = load_decoder(ckpt)
    expected = init_decoder(decoder_spec_of(ckpt), 3).state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in ours.state_dict().items())
    auto: Any = AutoModelForCausalLM
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        theirs = auto.from_pretrained(tmp_path / "a").eval()(ids).logits
        assert (theirs - ours(ids)).abs().max() < 1e-4
    assert eos_ids_of(ckpt) == (1, 5, 7)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer.decode(tokenizer("hi 你好")["input_ids"]) == "hi 你好"

    assert init("autoglm-nano", tmp_path / "a", seed=3, dtype="float32").already_done
    init("autoglm-nano", tmp_path / "b", seed=3, dtype="float32")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(OutputExistsError):
        init("autoglm-nano", tmp_path / "a", seed=4, dtype="float32")
    init("autoglm-nano", tmp_path / "a", seed=4, dtype="float32", force=True)
    assert not list(tmp_path.glob("*.partial"))
    weights = contents(tmp_path / "a")["model.safetensors"]
    assert weights != contents(tmp_path / "b")["model.safetensors"]


def test_init_trains_a_tokenizer_on_texts(tmp_path: Path) -> None:
    texts = [row.text for row in generate("train", "both", n=300)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    result = init(
        "autoglm-nano",
        tmp_path / "a",
        vocab_size=640,
        tokenizer_data=tmp_path / "texts.txt",
    )
    assert (result.tokenizer, result.tokens, result.vocab_size) == ("trained", 640, 640)
    again = init("autoglm-nano", tmp_path / "b", vocab_size=640, tokenizer=tmp_path / "a")
    assert again.tokens == 640
    for file in ("tokenizer.json", "chat_template.jinja", "config.json"):
        assert contents(tmp_path / "a")[file] == contents(tmp_path / "b")[file]
    assert Tokenizer.load(tmp_path / "b").encode(texts[:1], 99).unknown == 0


def test_init_takes_over_the_ids_of_another_kind_of_tokenizer(tmp_path: Path, minilm: Path) -> None:
    init("autoglm-nano", tmp_path / "a", vocab_size=30592, tokenizer=minilm)
    spec = decoder_spec_of(Checkpoint.open(tmp_path / "a"))
    assert (spec.vocab_size, spec.pad_id, spec.eos_ids) == (30592, 0, ())


def test_init_refuses(tmp_path: Path, minilm: Path) -> None:
    with pytest.raises(UsageError, match="30522 tokens, the model's embedding 3072 rows") as error:
        init("autoglm-nano", tmp_path / "a", tokenizer=minilm)
    assert "--vocab-size 30592" in error.value.hint
    with pytest.raises(UsageError, match="exclude each other"):
        init("autoglm-nano", tmp_path / "a", tokenizer=minilm, tokenizer_data=minilm)
    with pytest.raises(UsageError, match="none does not exist"):
        init("autoglm-nano", tmp_path / "a", tokenizer=tmp_path / "none")
    assert not (tmp_path / "a").exists()


def test_init_holds_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_CHUNK", 1 << 15)
    init("autoglm-nano", tmp_path / "warm")
    tracemalloc.start()
    init("autoglm-nano", tmp_path / "a", seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6, "the largest tensor alone is 3.1 MB in float32"


# --- the verbs -----------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = SizesResult.model_validate_json(run(capsys, "sizes", "--json"))
    assert [size.name for size in listed.sizes] == list(SIZES)
    words = run(capsys, "sizes")
    assert "glm-edge-1.5b" in words
    assert max(map(len, words.splitlines())) <= 80
    made = run(capsys, "init", "autoglm-nano", "--out", tmp_path / "m", "--seed", 2, "--json")
    assert InitResult.model_validate_json(made).seed == 2
    assert "already done" in run(
        capsys, "init", "autoglm-nano", "--out", tmp_path / "m", "--seed", 2
    )
    found = json.loads(run(capsys, "inspect", tmp_path / "m", "--json"))
    assert (found["parameters"], found["precision"]) == (3_016_960, "bf16")
    assert np.isclose(found["bytes"], 2 * 3_016_960, rtol=0.01)


def test_init_never_overwrites_the_tokenizer_that_it_copies(tmp_path: Path) -> None:
    init("autoglm-nano", tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(UsageError, match="would overwrite"):
        init("autoglm-nano", tmp_path / "a", tokenizer=tmp_path / "a", force=True)
    assert contents(tmp_path / "a") == before
