"""`prove` for decoders, end to end on a tiny random one, its claims, and how they are shown."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_decoder import edit
from oracles.slot_f1 import slot_scores
from tiny_decoder import save_tiny_decoder
from tiny_encoder import quantize_weights, save_tiny

from pocketglm.artifacts.manifest import CommandGrammar, Manifest, write_json
from pocketglm.artifacts.proof import Claim, Proof, read_proof
from pocketglm.artifacts.schemas import ProveResult
from pocketglm.artifacts.scheme import TensorScheme
from pocketglm.cli._main import main
from pocketglm.contracts import DataOptions, ExportOptions, Metric, RunOptions, Scores
from pocketglm.data.frames import FrameRow, action
from pocketglm.data.tokenizer_training import byte_tokenizer, save_chat_tokenizer
from pocketglm.errors import UsageError
from pocketglm.eval import lm
from pocketglm.eval._evaluate import evaluate
from pocketglm.eval.command import command_scores, parse
from pocketglm.report import card, html, markdown
from pocketglm.runtimes import open_decoder
from pocketglm.stages import _claims, _claims_decoder
from pocketglm.stages._claims import Builder, Gates
from pocketglm.stages._sides import open_side
from pocketglm.stages._timing import Timings
from pocketglm.stages.export import export
from pocketglm.stages.prove import prove
from pocketglm.text.frame import Frame, FrameTokens, mark_names
from pocketglm.text.tokenizer import Tokenizer

ONE = RunOptions(threads=1)
BUILD = Builder("Test CPU")
GRAMMAR = CommandGrammar(intents={"play": ["song", "by"], "stop": [], "wake": ["time"]})
CONTEXT = 96
WORDS = ["play", "Ann", "jazz", "stop", "it", "wake", "me", "at", "seven", "now"]
TEXTS = [
    " ".join(np.random.default_rng(seed).choice(WORDS, 3, replace=False)) for seed in range(40)
]
INT4 = TensorScheme(bits=4, group_size=32)


def save(folder: Path, grammar: CommandGrammar | None = GRAMMAR) -> Path:
    """A random decoder whose tokens are bytes and the grammar's marks."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(mark_names(grammar or GRAMMAR))
    size = tokenizer.get_vocab_size()
    save_tiny_decoder(
        folder, "llama", vocab_size=size, max_position_embeddings=128, eos_token_id=[1, 5],
        bos_token_id=None,
    )  # fmt: skip
    save_chat_tokenizer(tokenizer, folder, 128)
    write_json(folder / "pocketglm.json", Manifest(command=grammar))
    return folder


@dataclass(frozen=True)
class World:
    """A checkpoint, its exports with 4 bits (`small`: last logits) and the rows that it parses."""

    ckpt: Path
    small: Path
    every: Path
    data: DataOptions


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("prove")
    ckpt = save(root / "ckpt")
    quantized = quantize_weights(shutil.copytree(ckpt, root / "quantized"), {"_proj.weight": INT4})
    options = ExportOptions(max_length=CONTEXT)
    for name in ("last", "all"):
        form = replace(options, logits=name)
        assert export(quantized, ["onnx"], root / name, options=form).targets[0].ok
    session, tokenizer = open_decoder(ckpt, ONE), Tokenizer.load(ckpt)
    frames = [parse(session, FrameTokens(GRAMMAR, tokenizer), text) for text in TEXTS]
    rows = [
        {"text": text, "intent": frame.intent, "slots": [list(slot) for slot in frame.slots]}
        for text, frame in zip(TEXTS, frames, strict=True)
    ]
    assert any(frame.slots for frame in frames)
    file = root / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(ckpt, root / "last" / "onnx", root / "all" / "onnx", DataOptions(file))


def claims_of(result: ProveResult) -> dict[str, Claim]:
    return {claim.metric: claim for claim in result.claims}


@pytest.fixture(scope="module")
def commands(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[ProveResult, Proof]:
    """A proof against the checkpoint, by exact match and speed."""
    out = tmp_path_factory.mktemp("commands") / "p"
    gates = Gates(max_accuracy_drop=0.5, min_speedup=1e-6, max_latency_ms=1e6, max_memory_mb=1)
    result = prove(
        world.every, world.ckpt, "command", world.data, out, gates=gates, threads=1, pairs=7
    )
    return result, read_proof(out)


@pytest.fixture(scope="module")
def texts(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[ProveResult, Proof]:
    """A proof against the checkpoint by perplexity, of a file with the last logits only."""
    out = tmp_path_factory.mktemp("texts") / "p"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "LAST_ONLY_TOKENS", 400)
        result = prove(
            world.small, world.ckpt, "lm", world.data, out, threads=1, pairs=7,
            gates=Gates(max_perplexity_increase=1e6),
        )  # fmt: skip
    return result, read_proof(out)


def test_commands_that_a_worse_model_spoils(commands: tuple[ProveResult, Proof]) -> None:
    result, proof = commands
    claims = claims_of(result)
    assert list(claims)[:4] == [
        "exact_match_drop", "intent_accuracy_drop", "slot_f1_drop", "flips",
    ]  # fmt: skip
    drop = claims["exact_match_drop"]
    assert (drop.baseline, drop.n, drop.verdict) == (100, len(TEXTS), "fail")
    flips = proof.details["flips"]
    assert drop.value == pytest.approx(100 * flips["to_wrong"] / len(TEXTS))
    assert claims["flips"].value == pytest.approx(100 * flips["changed"] / len(TEXTS))
    spoiled = proof.details["spoiled"]
    assert 1 <= len(spoiled) == min(8, flips["to_wrong"])
    assert all(s["text"] in TEXTS and s["gold"] != s["predicted"] for s in spoiled)
    assert proof.data["n"] == len(TEXTS)
    assert result.verdict == proof.verdict == "fail"


def test_speed_is_of_new_tokens_and_of_prompts(commands: tuple[ProveResult, Proof]) -> None:
    result, proof = commands
    claims = claims_of(result)
    for name in ("decode_speedup", "prefill_speedup", "latency_p50", "first_token"):
        assert claims[name].n == 7
    assert "speedup" not in claims
    assert claims["decode_speedup"].verdict == claims["latency_p50"].verdict == "pass"
    assert claims["peak_memory"].verdict == "fail"
    latency = proof.details["latency"]
    assert (latency["tokens"], latency["new_tokens"]) == (CONTEXT // 2, CONTEXT // 4)
    assert len(latency["candidate"]) % (CONTEXT // 4) == 0
    p50 = float(np.median(latency["candidate"]))
    assert claims["latency_p50"].value == proof.candidate["p50_ms"] == pytest.approx(p50, abs=1e-3)
    assert claims["decode_speedup"].candidate == pytest.approx(1e3 / p50, rel=1e-2)
    assert claims["first_token"].value > claims["latency_p50"].value
    assert proof.details["notes"][-1].startswith("speed and memory: prompts of 48 tokens, 24 new")


def test_the_baseline_is_exported_as_the_candidate_was(
    commands: tuple[ProveResult, Proof], texts: tuple[ProveResult, Proof]
) -> None:
    for (_, proof), logits in ((commands, "all"), (texts, "last")):
        for side in (proof.baseline, proof.candidate):
            assert (side["kind"], side["max_length"], side["logits"]) == (
                "decoder", CONTEXT, logits,
            )  # fmt: skip
        assert (proof.baseline["precision"], proof.candidate["precision"]) == ("fp32", "int4")
        assert proof.candidate["model_bytes"] < proof.baseline["model_bytes"]
        assert sum(proof.candidate["parts"].values()) == proof.candidate["model_bytes"]


def test_perplexity_on_the_same_tokens(
    world: World, texts: tuple[ProveResult, Proof], monkeypatch: pytest.MonkeyPatch
) -> None:
    result, proof = texts
    claims = claims_of(result)
    increase = claims["perplexity_increase"]
    assert increase.verdict == result.verdict == "pass"
    assert increase.low < increase.value < increase.high
    assert increase.value == pytest.approx(
        100 * (proof.candidate["metrics"]["perplexity"]["value"]
               / proof.baseline["metrics"]["perplexity"]["value"] - 1)
    )  # fmt: skip
    assert {claims[name].n for name in ("perplexity_increase", "kl", "flips")} == {400}
    assert (proof.data["n"], proof.data["unit"]) == (400, "tokens")
    assert 10 < proof.data["texts"] < len(TEXTS)
    assert "only 400 tokens were scored" in proof.details["notes"][1]
    monkeypatch.setattr(lm, "LAST_ONLY_TOKENS", 400)
    alone = evaluate(world.small, "lm", world.data, options=ONE)[0].metrics["perplexity"]
    assert increase.candidate == pytest.approx(alone.value)
    other, _ = evaluate(world.small, "lm", world.data, options=ONE, baseline=world.ckpt)
    assert claims["kl"].value == pytest.approx(other.metrics["kl"].value, rel=1e-3)
    assert claims["flips"].value == pytest.approx(100 * other.metrics["flip_rate"].value)


# --- what is shown -------------------------------------------------------------------------------


def test_the_report_of_commands(commands: tuple[ProveResult, Proof]) -> None:
    _, proof = commands
    page = html.render(proof)
    for shown in (
        "exact match lost", "tokens/s", "Time to first token", "Latency per new token",
        "Commands that became wrong", "became wrong, 0 became right", f"{len(TEXTS)} test rows",
        "24 after each prompt of 48 tokens", "Exact match",
    ):  # fmt: skip
        assert shown in page
    spoiled = proof.details["spoiled"][0]
    assert spoiled["text"] in page
    assert spoiled["predicted"].replace('"', "&quot;") in page
    assert "Latency, p50" not in page
    none = proof.model_copy(update={"details": proof.details | {"spoiled": []}})
    assert "No command became wrong." in html.render(none)
    text = card.render(proof)
    assert "pipeline_tag: text-generation" in text
    assert "transformers.js" not in text
    assert "- onnxruntime-genai" in text
    assert "96 tokens, prompt and answer together" in text
    assert "of all positions" in text
    assert "3: play, stop, wake" in text


def test_the_report_of_texts(texts: tuple[ProveResult, Proof]) -> None:
    _, proof = texts
    page = html.render(proof)
    for shown in ("400 tokens of ", "Perplexity is paired", " nats"):
        assert shown in page
    for text in (page, markdown.render(proof), card.render(proof)):
        assert "This export computes one token at a time, so only 400 tokens were scored" in text
        assert "Prompts of 48 tokens" in text or "prompts of 48 tokens" in text
    assert "became wrong" not in page


@pytest.mark.parametrize(("value", "word"), [(3.0, "higher"), (-3.0, "lower")])
def test_perplexity_may_fall(texts: tuple[ProveResult, Proof], value: float, word: str) -> None:
    change = {"value": value, "low": value - 1, "high": value + 1}
    claim = texts[1].claims[0].model_copy(update=change | {"limit": 2.0})
    page = html.render(texts[1].model_copy(update={"claims": [claim]}))
    assert f"{word} perplexity" in page
    assert f"3.00 % {word}" in page
    plot = page.split('class="plot">')[1].split("</svg>")[0]
    assert not re.search(r'="-', plot)  # nothing lies left of the axis


def test_the_card_s_program_runs(
    world: World, texts: tuple[ProveResult, Proof], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    program = card.render(texts[1]).split("```python\n")[1].split("```")[0]
    (tmp_path / "model").symlink_to(world.small, target_is_directory=True)
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)


# --- bad input -----------------------------------------------------------------------------------


def test_models_and_tasks_of_two_kinds(world: World, tmp_path: Path) -> None:
    encoder = save_tiny(tmp_path / "encoder")
    assert export(encoder, ["onnx"], tmp_path / "e").targets[0].ok
    classifier = tmp_path / "e" / "onnx"
    out = tmp_path / "p"
    for task in ("intent", "embed"):
        with pytest.raises(UsageError, match=f"kind decoder, the task '{task}' is for") as error:
            prove(world.small, world.ckpt, task, world.data, out)
        assert error.value.hint == "tasks for it: command, lm"
    for task in ("command", "lm"):
        with pytest.raises(UsageError, match=f"kind encoder, the task '{task}' is for") as error:
            prove(classifier, encoder, task, world.data, out)
        assert error.value.hint == "tasks for it: embed, intent"
        for baseline in (encoder, classifier):
            with pytest.raises(UsageError, match=rf"{baseline} is a model of kind encoder"):
                prove(world.small, baseline, task, world.data, out)
    assert not out.exists()


def test_decoders_that_cannot_be_compared(world: World, tmp_path: Path) -> None:
    def refused(match: str, export: Path, baseline: Path, task: str) -> None:
        with pytest.raises(UsageError, match=match):
            prove(export, baseline, task, world.data, tmp_path / "p")

    refused("logits of positions: last, the candidate: all", world.every, world.small, "lm")
    copy = shutil.copytree(world.small, tmp_path / "copy")
    edit(copy / "export.json", runtime="other")
    refused("the baseline runs in other", world.small, copy, "lm")
    less = save(tmp_path / "less", CommandGrammar(intents={"play": ["song"]}))
    refused("different intents .*1 and 3.*, among them stop, wake", world.small, less, "command")
    refused("different tokenizers", world.small, less, "lm")
    plain = save(tmp_path / "plain", None)
    refused("was not trained for commands", world.small, plain, "command")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("task", "gates", "match"),
    [
        ("lm", {"max_accuracy_drop": 1}, "--max-accuracy-drop: the task 'lm' has no accuracy"),
        ("lm", {"max_oos_recall_drop": 1}, "'lm' has no out-of-scope recall"),
        ("command", {"max_perplexity_increase": 1}, "'command' has no perplexity"),
    ],
)
def test_gates_of_another_task(
    world: World, tmp_path: Path, task: str, gates: dict[str, float], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        prove(world.small, world.ckpt, task, world.data, tmp_path / "p", gates=Gates(**gates))


def test_too_few_texts(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"has 9 text\(s\) to score; an interval needs 10"):
        prove(world.small, world.ckpt, "lm", replace(world.data, limit=9), tmp_path / "p")
    command = ["prove", str(world.small), "--baseline", str(world.ckpt), "--task", "lm"]
    command += ["--data", str(world.data.path), "--out", str(tmp_path / "p"), "--limit", "9"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--max-perplexity-increase", "2"])
    assert stop.value.code == 2
    assert "an interval needs 10" in capsys.readouterr().err


def test_another_grammar_or_form_of_logits_is_another_proof(world: World, tmp_path: Path) -> None:
    copy = shutil.copytree(world.small, tmp_path / "copy")
    before = open_side(copy).identity
    assert before == open_side(world.small).identity
    changes: list[dict[str, Any]] = [
        {"logits": "all"}, {"command": {"intents": {"a": []}}}, {"eos_ids": [3]},
    ]  # fmt: skip
    for fields in changes:
        old = (copy / "export.json").read_text()
        edit(copy / "export.json", **fields)
        assert open_side(copy).identity != before
        (copy / "export.json").write_text(old)


# --- claims --------------------------------------------------------------------------------------


def frames(tagged: list[list[str]]) -> list[Frame]:
    """Frames of words w0, w1, ... with one-word BIO tags."""
    return [
        Frame("a", tuple((tag[2:], f"w{i}") for i, tag in enumerate(tags) if tag != "O"))
        for tags in tagged
    ]


def scores_of(gold: list[Frame], said: list[Frame]) -> Scores:
    rows = [FrameRow("text", f, (), action(f.intent, f.slots)) for f in gold]
    return command_scores(rows, said)


def drops(gold: list[Frame], before: list[Frame], after: list[Frame]) -> dict[str, Claim]:
    found = _claims_decoder.command_claims(
        BUILD, scores_of(gold, before), scores_of(gold, after), Gates()
    )
    return {claim.metric: claim for claim in found}


def test_slot_f1_drop_is_the_difference_of_the_oracles() -> None:
    rng = np.random.default_rng(0)

    def noisy(tags: list[list[str]], share: float) -> list[list[str]]:
        names = ["O", "B-x", "B-y"]
        return [[str(rng.choice(names)) if rng.random() < share else t for t in r] for r in tags]

    gold = noisy([["O"] * 5 for _ in range(150)], 0.6)
    before, after = noisy(gold, 0.1), noisy(gold, 0.4)
    claim = drops(*(frames(tags) for tags in (gold, before, after)))["slot_f1_drop"]
    a, b = (100 * slot_scores(gold, said)[2] for said in (before, after))
    assert (claim.baseline, claim.candidate) == pytest.approx((a, b))
    assert claim.value == pytest.approx(a - b)
    assert 5 < claim.low < claim.value < claim.high < 40
    assert (claim.high - claim.low) < 20
    assert claim.n <= 150


def test_slots_without_a_difference_have_the_interval_of_the_rule_of_three() -> None:
    slot, none = Frame("a", (("x", "1"),)), Frame("a")
    same = drops([slot] * 20 + [none] * 5, [slot] * 20 + [none] * 5, [slot] * 20 + [none] * 5)
    claim = same["slot_f1_drop"]
    assert (claim.value, claim.n) == (0, 20)  # rows with slots
    assert (claim.low, claim.high) == pytest.approx((-15, 15))
    worse = drops([slot] * 20, [slot] * 20, [none] * 10 + [slot] * 10)["slot_f1_drop"]
    assert worse.value == pytest.approx(100 * (1 - 2 / 3))
    assert worse.low < worse.value - 15  # nothing became better: that may be unseen
    nothing = drops([slot] * 20, [slot] * 20, [none] * 20)["slot_f1_drop"]
    assert (nothing.value, nothing.high) == (100, 100)
    made_up = drops([slot] * 20, [none] * 20, [Frame("a", (("y", "2"),))] * 20)["slot_f1_drop"]
    assert (made_up.value, made_up.low, made_up.high) == pytest.approx((0, -15, 15))  # no hit
    assert "slot_f1_drop" not in drops([none] * 5, [none] * 5, [none] * 5)


def test_flips_are_told_by_what_matches_exactly() -> None:
    slots = (("x", "1"), ("y", "2"))
    gold, turned = Frame("a", slots), Frame("a", slots[::-1])
    wrong, other = Frame("a"), Frame("b")
    before = scores_of([gold] * 5, [gold, gold, wrong, wrong, wrong])
    after = scores_of([gold] * 5, [turned, wrong, gold, other, wrong])
    assert _claims_decoder.command_flips(before, after) == {
        "changed": 4, "to_wrong": 1, "to_right": 1, "wrong_to_wrong": 1,
    }  # fmt: skip
    (entry,) = _claims_decoder.spoiled(before, after)
    assert entry["gold"] == action("a", slots)
    assert entry["predicted"] == action("a", ())
    many = scores_of([gold] * 20, [gold] * 20), scores_of([gold] * 20, [wrong] * 20)
    assert len(_claims_decoder.spoiled(*many)) == 8


def lm_scores(before: Any, after: Any, tokens: Any) -> Scores:
    rows = {"tokens": np.asarray(tokens, np.float64)}
    rows |= {"nll": np.asarray(after), "baseline_nll": np.asarray(before)}
    some = Metric(0.1, 100, 0.05, 0.2)
    perplexity = Metric(math.exp(np.nansum(after * tokens) / np.sum(tokens)), 1, 0, 1)
    metrics = {"kl": some, "flip_rate": some, "perplexity": perplexity}
    return Scores("perplexity", metrics, rows)


def test_perplexity_weighs_tokens_and_leaves_out_texts_without_any() -> None:
    tokens = np.array([10.0, 30.0] * 10 + [0.0])
    before = np.array([2.0, 3.0] * 10 + [np.nan])
    after = before + np.array([0.04, 0.0] * 10 + [np.nan])
    gates = Gates(max_perplexity_increase=1.5)
    first, kl, flips = _claims_decoder.lm_claims(BUILD, lm_scores(before, after, tokens), gates)
    assert first.value == pytest.approx(100 * (math.exp(0.01) - 1))
    assert first.baseline == pytest.approx(math.exp(2.75))
    assert first.candidate == pytest.approx(math.exp(2.76))
    assert (first.n, first.verdict) == (400, "inconclusive")
    assert 0 < first.low < first.value < first.high < 100 * (math.exp(0.04) - 1)
    assert (kl.value, kl.unit, flips.value, flips.unit) == (0.1, "nats", 10, "%")
    _claims.check_gates([first, kl, flips], gates)
    same = _claims_decoder.lm_claims(BUILD, lm_scores(before, before, tokens), gates)[0]
    assert (same.value, same.low, same.high, same.verdict) == (0, 0, 0, "pass")
    with pytest.raises(UsageError, match=r"has 9 text\(s\)"):
        _claims_decoder.lm_claims(
            BUILD, lm_scores(before[:10], after[:10], [*tokens[:9], 0]), gates
        )


def test_speed_of_prompts_and_of_new_tokens() -> None:
    slow = Timings([[8.0, 8.2, 9.0]] * 9, [1] * 6, [50.0] * 6, [[100.0, 120.0, 140.0]] * 9)
    fast = Timings([[4.0, 4.1, 99.0]] * 9, [1] * 6, [9.0] * 6, [[50.0, 40.0, 30.0]] * 9)
    gates = Gates(min_speedup=1.9, max_latency_ms=4)
    found = {c.metric: c for c in _claims_decoder.speed_claims(BUILD, slow, fast, 128, gates)}
    decode, prefill = found["decode_speedup"], found["prefill_speedup"]
    assert decode.value == pytest.approx(2)
    assert (decode.verdict, decode.n) == ("pass", 9)
    assert (decode.baseline, decode.candidate) == pytest.approx((1e3 / 8.2, 1e3 / 4.1))
    assert (prefill.value, prefill.candidate) == pytest.approx((3, 128e3 / 40))
    assert (found["latency_p50"].value, found["latency_p50"].verdict) == (4.1, "fail")
    assert (found["first_token"].baseline, found["first_token"].value) == (120, 40)
    assert found["load_time"].value == 9
    _claims.check_gates(list(found.values()), gates)
