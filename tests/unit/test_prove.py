"""`prove` end to end on a tiny real classifier, and its claims as pure functions."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketglm.artifacts import manifest as manifest_module
from pocketglm.artifacts.export import EXPORT, read_export
from pocketglm.artifacts.manifest import Manifest
from pocketglm.artifacts.proof import Claim, read_proof
from pocketglm.artifacts.schemas import ProveResult
from pocketglm.contracts import DataOptions, Scores, Silent
from pocketglm.data.tokenizer_training import save_tokenizer, train_wordpiece
from pocketglm.errors import (
    CheckpointError,
    InputError,
    MissingExtraError,
    OutputExistsError,
    UsageError,
)
from pocketglm.eval._run import logits_of
from pocketglm.eval.intent import intent_scores
from pocketglm.model.encoder import init_encoder, with_classifier
from pocketglm.model.hf import save_encoder
from pocketglm.model.spec import EncoderSpec
from pocketglm.report import _format
from pocketglm.runtimes import open_encoder
from pocketglm.stages import _claims, _timing
from pocketglm.stages._claims import Builder, Gates
from pocketglm.stages._measure import Worker
from pocketglm.stages._sides import model_bytes, parts_of
from pocketglm.stages._timing import Timings
from pocketglm.stages.export import export
from pocketglm.stages.prove import exit_code, prove
from pocketglm.text.tokenizer import Tokenizer

LABELS = ["alarm", "music", "oos", "weather"]
WORDS = ["set", "alarm", "play", "music", "will", "it", "rain", "stop", "song", "wake", "me", "at"]
BUILD = Builder("Test CPU")


def texts_of(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 4)) for _ in range(count)]


def save(folder: Path, *, oos_bias: float = 0.0, head: bool = True) -> None:
    """A random model whose classes are about equally frequent; `oos_bias` makes it worse."""
    tokenizer = train_wordpiece(texts_of(200), 120)
    spec = EncoderSpec(tokenizer.get_vocab_size(), 16, 2, 4, 24, max_position_embeddings=24)
    model = init_encoder(spec, 1)
    if head:
        model = with_classifier(model, len(LABELS), "mean", seed=2)
        rows = [torch.tensor([tokenizer.encode(t).ids]) for t in texts_of(200)]
        with torch.no_grad():
            assert model.classifier is not None
            logits = torch.cat([model(ids, torch.ones_like(ids)) for ids in rows])
            model.classifier.weight.div_(logits.std(0)[:, None])
            model.classifier.bias.sub_((logits / logits.std(0)).mean(0))
            model.classifier.bias[LABELS.index("oos")].add_(oos_bias)
    labels = LABELS if head else []
    save_encoder(model, folder, source=None, labels=labels, manifest=Manifest(task="intent"))
    save_tokenizer(tokenizer, folder, 24)


@dataclass(frozen=True)
class World:
    good: Path
    good_export: Path
    bad_export: Path
    data: DataOptions


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two classifiers, their exports, and 120 rows that the good one labels without a mistake."""
    root = tmp_path_factory.mktemp("prove")
    save(root / "good")
    save(root / "bad", oos_bias=1.5)
    for name in ("good", "bad"):
        assert export(root / name, ["onnx"], root / f"{name}-export").targets[0].ok
    texts = texts_of(120)
    session = open_encoder(root / "good")
    best = logits_of(session, Tokenizer.load(root / "good"), texts).argmax(1)
    file = root / "rows.jsonl"
    rows = [{"text": t, "label": LABELS[b]} for t, b in zip(texts, best, strict=True)]
    assert {row["label"] for row in rows} == set(LABELS)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(
        root / "good",
        root / "good-export" / "onnx",
        root / "bad-export" / "onnx",
        DataOptions(file),
    )


def claims_of(result: ProveResult) -> dict[str, Claim]:
    return {claim.metric: claim for claim in result.claims}


def test_a_model_against_itself(world: World, tmp_path: Path) -> None:
    gates = Gates(max_accuracy_drop=10, max_oos_recall_drop=0, min_speedup=50, max_size_mb=10)
    out = tmp_path / "proof"
    result = prove(
        world.good_export, world.good, "intent", world.data, out, gates=gates, threads=1, pairs=7
    )
    claims = claims_of(result)
    drop = claims["accuracy_drop"]
    assert (drop.value, drop.verdict) == (0, "pass")
    assert drop.high == pytest.approx(300 / drop.n)
    assert (drop.baseline, drop.candidate) == (100, 100)
    assert claims["accuracy_all_drop"].n == 120
    assert drop.n + claims["oos_recall_drop"].n == 120
    # No difference on a few rows does not prove that there is none at all.
    assert claims["oos_recall_drop"].verdict == "inconclusive"
    assert claims["flips"].value == 0
    assert claims["size_ratio"].value == 1
    assert claims["size"].verdict == "pass"
    assert 0.2 < claims["speedup"].value < 5
    assert claims["speedup"].verdict == "fail"
    assert claims["peak_memory"].n == claims["memory_ratio"].n == claims["load_time"].n == 6
    assert claims["latency_p50"].n == claims["speedup"].n == 7
    assert -claims["macro_f1_drop"].low == claims["macro_f1_drop"].high == pytest.approx(300 / 120)
    assert claims["peak_memory"].value < 400
    assert (result.verdict, exit_code(result)) == ("fail", 1)

    assert not (tmp_path / "proof.partial").exists()
    assert sorted(f.name for f in out.iterdir()) == [
        "README.md", "proof.json", "report.html", "report.md",
    ]  # fmt: skip
    proof = read_proof(out)
    assert proof.claims == result.claims
    assert proof.baseline["precision"] == "fp32"
    assert (proof.baseline["name"], proof.candidate["name"]) == ("good", "good-export")
    assert sum(proof.candidate["parts"].values()) == proof.candidate["model_bytes"]
    assert proof.details["confusions"] == []
    assert len(proof.details["latency"]["candidate"]) >= 70
    command = proof.details["command"]
    assert "--min-speedup 50.0" in command
    assert "--threads 1" in command
    assert "--oos-label" not in command

    again = prove(
        world.good_export, world.good, "intent", world.data, out, gates=gates, threads=1, pairs=7
    )
    assert again.already_done
    assert again.claims == result.claims
    with pytest.raises(OutputExistsError):
        prove(world.good_export, world.good, "intent", world.data, out, pairs=7)


def test_a_worse_model_fails_with_evidence(world: World, tmp_path: Path) -> None:
    told: list[str] = []

    class Told(Silent):
        def say(self, text: str) -> None:
            told.append(text)

    result = prove(
        world.bad_export, world.good_export, "intent", world.data, tmp_path / "p",
        gates=Gates(max_accuracy_drop=1.0), threads=1, pairs=7, reporter=Told(),
    )  # fmt: skip
    drop = claims_of(result)["accuracy_drop"]
    assert drop.verdict == "fail"
    assert 1 < drop.low < drop.value < drop.high
    assert exit_code(result) == 1
    details = read_proof(tmp_path / "p").details
    worst = details["confusions"][0]
    assert worst["predicted"] == "oos"
    assert worst["after"] > worst["before"] == 0
    assert 1 <= len(worst["examples"]) <= 3
    assert details["flips"]["to_wrong"] == details["flips"]["changed"] > 0
    assert details["classes"][0]["candidate"] < details["classes"][0]["baseline"]
    page = (tmp_path / "p" / "report.html").read_text()
    assert worst["examples"][0] in page
    assert any("scoring" in line for line in told)


def test_both_models_run_with_the_threads_that_the_candidate_records(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    real = Worker.__enter__

    def spy(self: Worker) -> Worker:
        used.append(real(self).used_threads)
        return self

    monkeypatch.setattr(Worker, "__enter__", spy)
    copy = shutil.copytree(world.good_export, tmp_path / "copy")
    trained = {"method": "finetune", "settings": {"data": str(world.data.path)}}
    edit(copy, "export.json", threads=3, lineage=[trained])

    def run() -> ProveResult:
        return prove(copy, world.good_export, "intent", world.data, tmp_path / "p", pairs=7)

    result = run()
    assert set(used) == {3}
    assert len(used) == 2 + 2 * _timing.PROCESSES
    assert all(", 3 threads, " in claim.device for claim in result.claims)
    details = read_proof(tmp_path / "p").details
    assert details["latency"]["threads"] == 3
    assert "--threads 3" in details["command"]
    # Only the candidate was trained on the file; both are scored on the rows held out of it.
    assert 0 < read_proof(tmp_path / "p").data["n"] < 40
    assert "divided" not in details["command"]
    assert run().already_done
    # The same files exported with another setting, or by another version, are not proved yet.
    for fields in ({"threads": 2}, {"activation": "dynamic"}, {"max_length": 20}):
        before = (copy / "export.json").read_text()
        edit(copy, "export.json", **fields)
        with pytest.raises(OutputExistsError):
            run()
        (copy / "export.json").write_text(before)
    assert run().already_done
    monkeypatch.setattr(manifest_module, "__version__", "0")
    with pytest.raises(OutputExistsError):
        run()


class Interrupts(Silent):
    """Ctrl-C at the first round of the speed measurement."""

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        if label == "speed":
            raise KeyboardInterrupt


def test_an_interrupted_proof_is_made_again(world: World, tmp_path: Path) -> None:
    out, partial = tmp_path / "p", tmp_path / "p.partial"

    def run(limit: float, reporter: Silent) -> ProveResult:
        return prove(
            world.good_export, world.good, "intent", world.data, out,
            gates=Gates(max_accuracy_drop=limit), threads=1, pairs=7, reporter=reporter,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(1, Interrupts())
    assert list(tmp_path.iterdir()) == []

    options = ["--data", world.data.path, "--task", "intent", "--max-accuracy-drop", 10]
    options += ["--threads", 1, "--pairs", 7, "--baseline", world.good, "--out", out]
    command = [sys.executable, "-m", "pocketglm", "prove", world.good_export, *options]
    child = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (partial / "baseline" / "onnx").exists():
        assert child.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert (partial / "baseline").exists()
    assert not out.exists()

    assert run(10, Silent()).verdict == "pass"
    assert not partial.exists()
    assert not (out / "baseline").exists()


def test_embeddings(tmp_path: Path) -> None:
    save(tmp_path / "embedder", head=False)
    assert export(tmp_path / "embedder", ["onnx"], tmp_path / "e").targets[0].ok
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"text": t, "label": t.split()[0]} for t in texts_of(60)]
    for split, part in (("train", rows[:40]), ("test", rows[40:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    result = prove(
        tmp_path / "e" / "onnx", tmp_path / "embedder", "embed", DataOptions(folder),
        tmp_path / "p", gates=Gates(max_accuracy_drop=16), threads=1, pairs=7,
    )  # fmt: skip
    claims = claims_of(result)
    assert claims["nn_accuracy_drop"].verdict == result.verdict == "pass"
    assert claims["cosine"].value == pytest.approx(1, abs=1e-6)
    assert claims["cosine_min"].value <= claims["cosine"].value
    assert "| exact |" in (tmp_path / "p" / "report.md").read_text().split("worst row")[1]
    assert "macro_f1_drop" not in claims
    assert exit_code(result) == 0


# --- bad input ---------------------------------------------------------------------------------


def test_bad_input_leaves_nothing(world: World, tmp_path: Path) -> None:
    out = tmp_path / "p"

    def run(**change: Any) -> None:
        arguments: dict[str, Any] = {
            "export": world.good_export,
            "baseline": world.good_export,
            "task": "intent",
            "data": world.data,
            "out": out,
        } | change
        prove(**arguments)

    with pytest.raises(UsageError, match="--pairs 3 is too few"):
        run(pairs=3)
    with pytest.raises(CheckpointError, match="not an export"):
        run(export=world.good)
    with pytest.raises(UsageError, match="unknown task 'intend'"):
        run(task="intend")
    with pytest.raises(UsageError, match="does not exist"):
        run(baseline=tmp_path / "nothing")
    with pytest.raises(InputError):
        run(data=DataOptions(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="would overwrite"):
        run(out=world.good_export, force=True)
    with pytest.raises(UsageError, match="no test row has the label 'beyond'"):
        run(
            data=DataOptions(world.data.path, oos_label="beyond"),
            gates=Gates(max_oos_recall_drop=1),
        )
    with pytest.raises(UsageError, match="'embed' has no out-of-scope recall"):
        run(task="embed", gates=Gates(max_oos_recall_drop=1))
    file = tmp_path / "oos.jsonl"
    file.write_text('{"text": "rain", "label": "oos"}\n' * 3)
    with pytest.raises(UsageError, match=r"--max-oos-recall-drop: every test row .* 'oos'"):
        run(data=DataOptions(file), gates=Gates(max_oos_recall_drop=1))
    file.unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_changed_export_is_refused(world: World, tmp_path: Path) -> None:
    copy = shutil.copytree(world.good_export, tmp_path / "copy")
    with (copy / "config.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(CheckpointError, match="sha256 differs"):
        prove(copy, world.good, "intent", world.data, tmp_path / "p")


def edit(folder: Path, name: str, **fields: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_runtime_that_is_missing_is_told_first(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the baseline is exported."""
    copy = shutil.copytree(world.good_export, tmp_path / "copy")
    edit(copy, EXPORT, runtime="litert")
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    said: list[str] = []
    reporter = Silent()
    monkeypatch.setattr(reporter, "say", said.append)
    with pytest.raises(MissingExtraError, match=r"ai_edge_litert.*not installed"):
        prove(copy, world.good, "intent", world.data, tmp_path / "p", reporter=reporter)
    assert said == []
    assert not (tmp_path / "p").exists()
    assert not (tmp_path / "p.partial").exists()


def test_models_that_cannot_be_compared(world: World, tmp_path: Path) -> None:
    other = shutil.copytree(world.good_export, tmp_path / "other")
    edit(other, "export.json", labels=["alarm", "jazz", "oos", "weather"])
    with pytest.raises(UsageError, match="different labels"):
        prove(other, world.good, "intent", world.data, tmp_path / "p")
    edit(other, "export.json", labels=LABELS, runtime="other")
    with pytest.raises(UsageError, match="runs in onnx, the candidate in other"):
        prove(other, world.good_export, "intent", world.data, tmp_path / "p")
    quantized = shutil.copytree(world.good, tmp_path / "quantized")
    edit(quantized, "pocketglm.json", schemes={"x.weight": {"bits": 8}})
    with pytest.raises(UsageError, match="is itself quantized"):
        prove(world.good_export, quantized, "intent", world.data, tmp_path / "p")


def test_an_inconclusive_proof_passes_only_if_allowed() -> None:
    result = ProveResult(out="o", report="r", verdict="inconclusive", claims=[])
    assert exit_code(result) == 1
    assert exit_code(result, allow_inconclusive=True) == 0
    assert exit_code(result.model_copy(update={"verdict": "stated"})) == 0


# --- claims ------------------------------------------------------------------------------------


def scores(predicted: list[int], gold: list[int]) -> Scores:
    names = [LABELS[g] for g in gold]
    texts = [f"text {index}" for index in range(len(gold))]
    return intent_scores(names, np.array(predicted), LABELS, "oos", texts)


def test_drops_are_baseline_minus_candidate_in_points() -> None:
    gold = [0, 1, 3, 2] * 50
    wrong = [g if i >= 20 else (g + 1) % 4 for i, g in enumerate(gold)]
    claims = _claims.task_claims(BUILD, scores(gold, gold), scores(wrong, gold), Gates())
    found = {c.metric: c for c in claims}
    assert found["accuracy_drop"].value == pytest.approx(100 * 15 / 150)
    assert found["oos_recall_drop"].value == pytest.approx(100 * 5 / 50)
    assert found["accuracy_all_drop"].value == pytest.approx(10)
    assert found["flips"].value == pytest.approx(10)
    assert found["macro_f1_drop"].low < found["macro_f1_drop"].value < found["macro_f1_drop"].high
    assert all(c.low < c.value < c.high for c in claims)
    assert all(c.verdict == "stated" for c in claims)


def test_without_out_of_scope_rows_there_is_one_accuracy() -> None:
    gold = [0, 1, 3] * 5
    claims = _claims.task_claims(
        BUILD, scores(gold, gold), scores(gold, gold), Gates(max_accuracy_drop=0.1)
    )
    assert [c.metric for c in claims] == ["accuracy_drop", "macro_f1_drop", "flips"]
    assert claims[1].value == 0
    assert (claims[1].low, claims[1].high) == pytest.approx((-100 / 5, 100 / 5))  # rule of three
    only_oos = _claims.task_claims(BUILD, scores([2], [2]), scores([2], [2]), Gates())
    assert [c.metric for c in only_oos] == ["accuracy_drop", "macro_f1_drop", "flips"]
    assert (only_oos[1].low, only_oos[1].high) == (-100, 100)


@pytest.mark.parametrize("gate", sorted({*Gates.model_fields} - {"max_perplexity_increase"}))
def test_no_gate_vanishes(gate: str) -> None:
    gates = Gates(**{gate: 1.0})
    gold = [0, 1, 2] * 5
    some = Timings([[1.0]] * 7, [1] * 6, [1.0] * 6)
    claims = [
        *_claims.task_claims(BUILD, scores(gold, gold), scores(gold, gold), gates),
        *_claims.speed_claims(BUILD, some, some, gates),
        *_claims.memory_claims(BUILD, some, some, gates),
        *_claims.size_claims(BUILD, (1, 1), (1, 1), gates),
    ]
    _claims.check_gates(claims, gates)
    assert sum(claim.limit is not None for claim in claims) == 1
    words = f"--{gate.replace('_', '-')}: "
    with pytest.raises(UsageError, match=words):
        _claims.check_gates([c for c in claims if c.limit is None], gates)


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (7, 1), (8, 1), (9, 2), (12, 3), (40, 14)])
def test_median_interval_is_that_of_the_tables(n: int, rank: int) -> None:
    """Ranks of the 95 % sign-test interval, as printed in tables of nonparametric statistics."""
    values = np.random.default_rng(0).permutation(np.arange(1, n + 1, dtype=np.float64))
    assert _claims.median_interval(values) == (rank, n + 1 - rank)
    missed = 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n
    assert missed <= 0.05 < missed + 2 * math.comb(n, rank) / 2**n


def test_median_interval_needs_six() -> None:
    with pytest.raises(ValueError, match="needs 6 values, got 5"):
        _claims.median_interval(np.arange(5, dtype=np.float64))


def test_speed_and_memory_verdicts() -> None:
    slow = Timings([[8.0, 8.2, 9.0]] * 9, [200_000_000] * 6, [50.0, 60.0, 70.0] * 2)
    fast = Timings([[4.0, 4.1, 99.0]] * 9, [100_000_000, 110_000_000, 90_000_000] * 2, [9.0] * 6)
    speed = {c.metric: c for c in _claims.speed_claims(BUILD, slow, fast, Gates(min_speedup=1.9))}
    assert speed["speedup"].value == pytest.approx(2)
    assert speed["speedup"].verdict == "pass"
    assert (speed["latency_p50"].baseline, speed["latency_p50"].value) == (8.2, 4.1)
    assert (speed["speedup"].n, speed["latency_p50"].n) == (9, 9)  # rounds, not calls
    assert (speed["load_time"].value, speed["load_time"].n) == (9, 6)
    memory = {
        c.metric: c for c in _claims.memory_claims(BUILD, slow, fast, Gates(max_memory_mb=105))
    }
    assert memory["peak_memory"].verdict == "inconclusive"
    assert memory["memory_ratio"].low == pytest.approx(200 / 110)
    assert memory["memory_ratio"].high == pytest.approx(200 / 90)
    back = _claims.speed_claims(BUILD, fast, slow, Gates(min_speedup=1.9))
    assert back[0].verdict == "fail"


def test_the_range_of_a_few_processes_is_no_interval() -> None:
    few = Timings([[1.0]] * 7, [1] * 5, [1.0] * 5)
    for claims_of_few in (_claims.memory_claims, _claims.speed_claims):
        with pytest.raises(ValueError, match="needs 6 values, got 5"):
            claims_of_few(BUILD, few, few, Gates())


def test_an_outlier_among_many_processes_does_not_decide() -> None:
    peaks = [100_000_000 + i for i in range(11)]
    usual, once = (Timings([[1.0]] * 7, p, [1.0] * 11) for p in (peaks, [*peaks, 900_000_000][1:]))
    peak, ratio = _claims.memory_claims(BUILD, usual, once, Gates(max_memory_mb=101))
    assert peak.verdict == "pass"
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.low == pytest.approx(1, abs=1e-6)


def test_size_verdicts() -> None:
    gates = Gates(min_size_ratio=3.8, max_size_mb=20)
    ratio, whole, size = _claims.size_claims(
        BUILD, (90_000_000, 23_000_000), (92_000_000, 24_000_000), gates
    )
    assert ratio.verdict == "pass"
    assert whole.verdict == "stated"
    assert size.verdict == "fail"


def test_cosine_interval_holds_the_mean() -> None:
    mean, worst = _claims.cosine_claims(BUILD, np.array([1.0, 0.9, 0.95, 1.0]))
    assert mean.low < mean.value < mean.high
    assert worst.value == 0.9
    assert _format.interval(worst) == "exact"
    assert _format.interval(mean) != "exact"


def test_confusions_count_only_what_got_worse() -> None:
    gold = [0, 0, 0, 0, 1, 1]
    before = scores([0, 0, 0, 1, 0, 1], gold)
    after = scores([3, 3, 0, 1, 1, 1], gold)
    assert _claims.confusions(before, after) == [
        {"gold": "alarm", "predicted": "weather", "before": 0, "after": 2,
         "examples": ["text 0", "text 1"]}
    ]  # fmt: skip
    assert _claims.flips(before, after) == {
        "changed": 3, "to_wrong": 2, "to_right": 1, "wrong_to_wrong": 0,
    }  # fmt: skip
    assert [c["label"] for c in _claims.classes(before, after)] == ["alarm", "music"]
    many = [0] * 20
    assert len(_claims.confusions(scores(many, many), scores([1] * 20, many))[0]["examples"]) == 3


def test_rounds_alternate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    calls: dict[int, int] = {}
    real = Worker.texts

    def spy(self: Worker, runs: int = 1, seconds: float = 0.0) -> tuple[list[float], list[float]]:
        order.append("a" if self.path == world.good_export else "b")
        calls[self.pid] = calls.get(self.pid, 0) + runs
        return real(self, runs, seconds)

    monkeypatch.setattr(Worker, "texts", spy)
    monkeypatch.setattr(_timing, "PROCESSES", 2)
    a, b = _timing.interleave(world.good_export, world.bad_export, 8, 1, 4, Silent())
    assert "".join(order) == "ab" + "abbaabba" + "abba"
    assert len(a.rounds) == len(b.rounds) == 4
    assert len(a.peaks) == len(a.loads) == len(b.peaks) == 2
    assert len(set(list(calls.values())[2:])) == 1  # memory: each process makes as many calls


def test_parts_add_up_to_the_file(world: World) -> None:
    manifest = read_export(world.good_export)
    parts = parts_of(manifest)
    assert sum(parts.values()) == model_bytes(manifest)
    assert all(size > 0 for size in parts.values())
    assert parts["embedding"] > parts["head"]
    assert parts_of(manifest.model_copy(update={"parameters": {}})) == {}


def test_an_emulated_runtime_gets_no_claim_of_speed_or_memory(world: World, tmp_path: Path) -> None:
    """Core ML away from a Mac: what it computes is proved, and how fast is not made up."""
    pytest.importorskip("coremltools", reason="needs the extra 'coreml'")
    if sys.platform == "darwin":
        pytest.skip("Core ML itself runs here")
    entry = export(world.good, ["coreml"], tmp_path / "out").targets[0]
    assert entry.ok, entry.error
    folder = tmp_path / "out" / "coreml"
    for gate in ("min_speedup", "max_latency_ms", "max_memory_mb"):
        limit = Gates(**{gate: 1.0})
        with pytest.raises(UsageError, match="coreml does not run on this machine"):
            prove(folder, world.good, "intent", world.data, tmp_path / "no", gates=limit)
    gates = Gates(max_accuracy_drop=10, max_size_mb=10)
    out = tmp_path / "proof"
    result = prove(folder, world.good, "intent", world.data, out, gates=gates)
    found = claims_of(result)
    assert found["accuracy_drop"].verdict == found["size"].verdict == "pass"
    assert not found.keys() & {"speedup", "latency_p50", "peak_memory", "memory_ratio", "load_time"}
    proof = read_proof(out)
    assert "latency" not in proof.details
    assert "p50_ms" not in proof.candidate
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "reference evaluator: no speed, no memory" in page
    assert "with fp16" in page
