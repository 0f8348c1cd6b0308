"""The task `lm` on tiny decoders, against a token-by-token oracle through transformers."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from oracles import perplexity
from tiny_decoder import save_tiny_decoder

from pocketglm.artifacts.manifest import Manifest, Step, write_json
from pocketglm.contracts import DataOptions, DecoderSession, Metric, RunOptions, Scores
from pocketglm.data.tokenizer_training import byte_tokenizer, save_chat_tokenizer
from pocketglm.errors import DataError, UsageError
from pocketglm.eval import lm
from pocketglm.eval._evaluate import evaluate
from pocketglm.eval._stats import ratio_metric
from pocketglm.runtimes import open_decoder
from pocketglm.text.tokenizer import Tokenizer

ONE = RunOptions(threads=1)
POSITIONS = 32
EOS = 1
TEXTS = ["To be, or not", " to be: that ", "is", "the question 问题?"]


class Said:
    """A reporter that keeps the words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def say(self, text: str) -> None:
        self.words.append(text)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, spread in (("a", 0.2), ("b", 0.1)):
        save_tiny_decoder(
            root / name, "qwen3", vocab_size=264, max_position_embeddings=POSITIONS,
            eos_token_id=[EOS, 5], bos_token_id=None, initializer_range=spread,
        )  # fmt: skip
        save_chat_tokenizer(byte_tokenizer(), root / name, POSITIONS)
    return root / "a", root / "b"


def oracle(folder: Path) -> perplexity.Logits:
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()

    def logits(ids: list[int]) -> list[list[float]]:
        with torch.inference_mode():
            found: list[list[float]] = model(torch.tensor([ids])).logits[0].double().tolist()
        return found

    return logits


def save_texts(file: Path, texts: list[str]) -> DataOptions:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataOptions(file)


def run(
    model: Path, data: DataOptions, length: int | None = None, reporter: Any = None, **info: Any
) -> Scores:
    session = open_decoder(model, ONE)
    session.info = replace(session.info, **info)
    return lm.score(model, session, Tokenizer.load(model), data, length, reporter or Said())


def stream(texts: list[str]) -> list[int]:
    inner = byte_tokenizer()
    return [token for text in texts for token in [*inner.encode(text).ids, EOS]]


@pytest.mark.parametrize(("length", "stride"), [(None, 16), (32, 16), (9, 4), (1, 1)])
def test_perplexity_is_that_of_sliding_windows(
    tmp_path: Path, models: tuple[Path, Path], length: int | None, stride: int
) -> None:
    data = save_texts(tmp_path / "x.jsonl", TEXTS)
    said = Said()
    scores = run(models[0], data, length, said)
    nats = perplexity.nats(oracle(models[0]), stream(TEXTS), length or POSITIONS, stride)
    mean = math.fsum(nats) / len(nats)
    nll = scores.metrics["nll"]
    assert nll.n == len(nats) == len(stream(TEXTS)) - 1
    assert nll.value == pytest.approx(mean, abs=1e-5)
    assert nll.low < mean < nll.high
    found = scores.metrics["perplexity"]
    assert (found.value, found.low) == pytest.approx((math.exp(mean), math.exp(nll.low)), rel=1e-5)
    assert scores.primary == "perplexity"
    ends = np.cumsum([len(text.encode()) + 1 for text in TEXTS]) - 1
    expected = [float(np.mean(part)) for part in np.split(nats, ends[:-1])]
    np.testing.assert_allclose(scores.rows["nll"], expected, atol=1e-5)
    note = f"{len(nats)} tokens of 4 texts; windows of {length or POSITIONS} tokens that move by "
    assert scores.notes == said.words == [f"{note}{stride}"]


def test_bits_per_byte_do_not_depend_on_the_tokens(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    scores = run(models[0], save_texts(tmp_path / "x.jsonl", TEXTS))
    bits, nll = scores.metrics["bits_per_byte"], scores.metrics["nll"]
    # With one token a byte it is the same figure in another unit.
    assert bits.value == pytest.approx(nll.value / math.log(2), rel=1e-9)
    assert (bits.unit, nll.unit) == ("bits/byte", "nats/token")


def test_blank_lines_are_no_texts(tmp_path: Path, models: tuple[Path, Path]) -> None:
    filled = run(models[0], save_texts(tmp_path / "x.jsonl", [" ", *TEXTS, ""]))
    plain = run(models[0], save_texts(tmp_path / "y.jsonl", TEXTS))
    assert filled.metrics == plain.metrics


def test_tokens_before_each_text_are_context_only(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    data = save_texts(tmp_path / "x.jsonl", TEXTS[:2])
    session, tokenizer = open_decoder(models[0], ONE), Tokenizer.load(models[0])
    tokenizer.config |= {"bos_token": "<sop>", "add_bos_token": True}
    scores = lm.score(models[0], session, tokenizer, data, None, Said())
    start = tokenizer.encode_prompt("a")[0]
    assert start == tokenizer.inner.token_to_id("<sop>")
    ids = [start, *stream(TEXTS[:1]), start, *stream(TEXTS[1:2])]
    nats = perplexity.nats(oracle(models[0]), ids, POSITIONS, POSITIONS // 2)
    del nats[ids.index(start, 1) - 1]  # the second beginning
    assert scores.metrics["nll"].n == len(nats) == len(ids) - 2
    assert scores.metrics["nll"].value == pytest.approx(float(np.mean(nats)), abs=1e-5)


@pytest.mark.parametrize("template", [True, False])
def test_targets_count_after_their_sources(
    tmp_path: Path, models: tuple[Path, Path], template: bool
) -> None:
    pairs = [("hi", "你好"), ("a long source, so long that", "x" * 40), ("b", "goodbye now")]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in pairs))
    folder = models[0] if template else tmp_path
    session, tokenizer = open_decoder(models[0], ONE), Tokenizer.load(models[0])
    found = lm.score(folder, session, tokenizer, DataOptions(tmp_path), None, Said())
    model, inner = oracle(models[0]), byte_tokenizer()
    nats = []
    for source, target in pairs:
        text = f"[gMASK]<sop><|user|>\n{source}<|assistant|>\n" if template else f"{source}\n"
        answer = [*inner.encode(target).ids, EOS][:POSITIONS]
        before = inner.encode(text).ids[-(POSITIONS + 1 - len(answer)) :]
        ids = before + answer
        nats += perplexity.nats(model, ids, POSITIONS, POSITIONS)[len(before) - 1 :]
    assert found.metrics["nll"].n == len(nats) == 7 + 32 + 12
    assert found.metrics["nll"].value == pytest.approx(float(np.mean(nats)), abs=1e-5)
    assert found.truncated == pytest.approx(1 / 3)


def test_a_template_gets_the_special_tokens(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """As `run` gives them to it."""
    (tmp_path / "test.jsonl").write_text('{"source": "hi", "target": "ho"}\n')
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}")
    session, tokenizer = open_decoder(models[0], ONE), Tokenizer.load(models[0])
    found = lm.score(tmp_path, session, tokenizer, DataOptions(tmp_path), None, Said())
    ids = byte_tokenizer().encode("hi").ids, byte_tokenizer().encode("ho").ids
    nats = perplexity.nats(oracle(models[0]), [EOS, *ids[0], *ids[1], EOS], POSITIONS, POSITIONS)
    expected = float(np.mean(nats[len(ids[0]) :]))
    assert tokenizer.special_tokens["eos_token"]
    assert found.metrics["nll"].value == pytest.approx(expected, abs=1e-5)


def test_a_baseline_gives_divergence_and_flips(tmp_path: Path, models: tuple[Path, Path]) -> None:
    data = save_texts(tmp_path / "x.jsonl", TEXTS)
    scores, result = evaluate(models[0], "lm", data, options=ONE, baseline=models[1])
    ours, theirs, ids = oracle(models[0]), oracle(models[1]), stream(TEXTS)
    before = [perplexity.context(ids, place, 32, 16) for place in range(1, len(ids))]
    rows = [(theirs(part)[-1], ours(part)[-1]) for part in before]
    kl = float(np.mean([perplexity.divergence(p, q) for p, q in rows]))
    flips = np.mean([perplexity.first_choice(p) != perplexity.first_choice(q) for p, q in rows])
    found = scores.metrics["kl"]
    assert found.value == pytest.approx(kl, rel=1e-5)
    assert found.low < kl < found.high
    assert (found.n, found.unit) == (len(rows), "nats/token")
    assert scores.metrics["flip_rate"].value == pytest.approx(float(flips))
    assert 0 < flips < 1
    assert result.baseline == str(models[1])
    assert result.notes == list(scores.notes)
    assert result.metrics["kl"].unit == "nats/token"
    assert set(scores.rows) == {"nll", "kl", "flip_rate", "baseline_nll", "tokens"}
    np.testing.assert_allclose(scores.rows["baseline_nll"], run(models[1], data).rows["nll"])
    assert scores.rows["tokens"].sum() == len(rows)
    same, _ = evaluate(models[0], "lm", data, options=ONE, baseline=models[0])
    assert same.metrics["kl"].value == same.metrics["flip_rate"].value == 0
    assert same.metrics["flip_rate"].high == pytest.approx(3 / 4)  # of four texts
    assert same.metrics["nll"] == scores.metrics["nll"]


def test_models_that_cannot_be_compared_are_refused(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    data = save_texts(tmp_path / "x.jsonl", TEXTS)
    save_tiny_decoder(tmp_path / "wide", "qwen3", vocab_size=272, max_position_embeddings=16)
    save_chat_tokenizer(byte_tokenizer(), tmp_path / "wide", 16)
    with pytest.raises(UsageError, match="the model has 264 token ids, the baseline 272"):
        evaluate(models[0], "lm", data, options=ONE, baseline=tmp_path / "wide")
    with pytest.raises(UsageError, match="--max-length 17 is more than this model's 16 tokens"):
        evaluate(tmp_path / "wide", "lm", data, max_length=17, options=ONE)
    other = byte_tokenizer()
    other.add_tokens(["abc"])
    save_chat_tokenizer(other, tmp_path / "wide", 16)
    with pytest.raises(UsageError, match="have different tokenizers"):
        evaluate(models[0], "lm", data, options=ONE, baseline=tmp_path / "wide")


def test_a_text_needs_a_token_to_predict(tmp_path: Path, models: tuple[Path, Path]) -> None:
    data = save_texts(tmp_path / "x.jsonl", ["a"])
    assert run(models[0], data).metrics["nll"].n == 1  # its end
    with pytest.raises(DataError, match=r"x\.jsonl: the texts hold no token to predict"):
        run(models[0], data, eos_ids=())


def test_files_that_score_one_token_at_a_time_are_scored_on_fewer(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm, "LAST_ONLY_TOKENS", 70)
    data = save_texts(tmp_path / "x.jsonl", TEXTS * 4)
    said = Said()
    scores = run(models[0], data, None, said, scores="last")
    assert scores.metrics["nll"].n == 70
    assert "only 70 tokens were scored; --limit" in said.words[1]
    bits = scores.metrics["bits_per_byte"].value  # of the last text too only what was scored
    assert bits == pytest.approx(scores.metrics["nll"].value / math.log(2), rel=1e-9)
    assert np.isnan(scores.rows["nll"]).any()
    assert run(models[0], data).metrics["nll"].n > 70
    for options in (replace(data, limit=14), replace(data, limit=16)):
        found = run(models[0], options, scores="last")
        assert found.metrics["nll"].n > 70
        assert len(found.notes) == 1
    short = run(models[0], save_texts(tmp_path / "y.jsonl", TEXTS[:2]), None, said, scores="last")
    assert short.metrics["nll"].n == len(stream(TEXTS[:2])) - 1
    assert len(short.notes) == 1
    session: DecoderSession = open_decoder(models[0], ONE)
    last = open_decoder(models[1], ONE)
    last.info = replace(last.info, scores="last")
    both = lm.against(models[0], session, last, Tokenizer.load(models[0]), data, None, said)
    assert both.metrics["kl"].n == 70


def test_rows_that_a_model_was_trained_on_are_left_out(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    data = save_texts(tmp_path / "x.jsonl", [f"text number {i}" for i in range(60)])
    step = Step(method="finetune", settings={"data": str(data.path), "text_column": "text"})
    every, _ = evaluate(models[0], "lm", data, options=ONE)
    save_tiny_decoder(tmp_path / "m", "qwen3", vocab_size=264, max_position_embeddings=POSITIONS)
    save_chat_tokenizer(byte_tokenizer(), tmp_path / "m", POSITIONS)
    write_json(tmp_path / "m" / "pocketglm.json", Manifest(lineage=[step]))
    for model, baseline in ((tmp_path / "m", None), (models[0], tmp_path / "m")):
        some, result = evaluate(model, "lm", data, options=ONE, baseline=baseline)
        assert 0 < len(some.rows["nll"]) < 20 < len(every.rows["nll"])
        assert "held out" in result.split


def test_the_verb_prints_units_and_compares(tmp_path: Path, models: tuple[Path, Path]) -> None:
    data = save_texts(tmp_path / "x.jsonl", TEXTS)
    command = [sys.executable, "-m", "pocketglm", "eval", str(models[0]), "--task", "lm"]
    command += ["--data", str(data.path), "--baseline", str(models[1]), "--threads", "1"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert re.search(r"perplexity .* \d+\.?\d* per token", shown.stdout)
    assert re.search(r"flip_rate .* \d+\.\d+ % ", shown.stdout)
    assert "windows of 32 tokens" in shown.stderr


def test_token_scores_are_exact_for_large_logits_and_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    ours = (rng.standard_normal((50, 11)) * 200).astype(np.float32)
    theirs = (rng.standard_normal((50, 11)) * 2).astype(np.float32)
    targets = rng.integers(0, 11, 50)
    monkeypatch.setattr(lm, "_VALUES", 40)  # three rows at a time
    nll, kl, flips, before = lm.token_scores(ours, targets, theirs)
    np.testing.assert_array_equal(before, lm.token_scores(theirs, targets)[0])
    for i in range(50):
        assert nll[i] == pytest.approx(
            -perplexity.log_probabilities(ours[i].tolist())[targets[i]], rel=1e-12, abs=1e-12
        )
        assert kl[i] == pytest.approx(perplexity.divergence(theirs[i].tolist(), ours[i].tolist()))
        first = perplexity.first_choice
        assert flips[i] == (first(ours[i].tolist()) != first(theirs[i].tolist()))
    assert not lm.token_scores(ours, targets)[1].any()


def test_a_ratio_resamples_rows() -> None:
    above, below = np.array([1.0, 4.0, 0.0, 9.0]), np.array([2.0, 2.0, 0.0, 3.0])
    found = ratio_metric(above, below, n=7, unit="nats/token")
    assert found == Metric(2.0, 7, found.low, found.high, "nats/token")
    assert 0.5 <= found.low < 2 < found.high <= 3
    n = 200
    rng = np.random.default_rng(0)
    x = rng.standard_normal(n) + 5
    spread = ratio_metric(x, np.ones(n), unit="x")
    assert (spread.high - spread.low) / 2 == pytest.approx(1.96 * x.std() / math.sqrt(n), rel=0.05)
    assert ratio_metric(np.zeros(30), np.ones(30)) == Metric(0.0, 30, 0.0, 0.1)
    assert ratio_metric(np.ones(30), np.ones(30)) == Metric(1.0, 30, 0.9, 1.0)
    assert ratio_metric(x, x**2, unit="x") == ratio_metric(x, x**2, unit="x")
    assert ratio_metric(x, x**2, unit="x") != ratio_metric(x, x**2, unit="x", seed=1)
    with pytest.raises(ValueError, match="something to divide by"):
        ratio_metric(np.ones(2), np.zeros(2))
    with pytest.raises(ValueError, match="unpaired"):
        ratio_metric(np.ones(2), np.ones(3))
