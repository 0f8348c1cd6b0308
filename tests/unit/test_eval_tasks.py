"""The tasks `intent` and `embed`, `evaluate` and `predict`, on real sessions of a tiny encoder."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sklearn.metrics

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest, Step
from pocketglm.contracts import DataOptions, RunOptions, SessionInfo, Task
from pocketglm.data.readers import read_split
from pocketglm.data.tokenizer_training import save_tokenizer, train_wordpiece
from pocketglm.errors import DataError, OutputExistsError, UsageError
from pocketglm.eval._evaluate import evaluate, held_out
from pocketglm.eval._predict import _whole_file, predict
from pocketglm.eval._run import logits_of, outputs_of, softmax
from pocketglm.eval.embed import cosine_parity, nearest_rows
from pocketglm.eval.intent import intent_scores
from pocketglm.model.encoder import init_encoder, with_classifier
from pocketglm.model.hf import load_encoder, save_encoder
from pocketglm.model.spec import EncoderSpec
from pocketglm.runtimes import open_encoder
from pocketglm.stages.export import export
from pocketglm.text.tokenizer import Tokenizer

ONE = RunOptions(threads=1)  # threads only slow down a model this small
LABELS = ["alarm", "music", "oos"]
TEXTS = [
    "wake me at seven in the morning please", "play", "a song", "ring the bell now", "stop",
    "the band of the year", "wake", "turn the volume down and play the album again", "who are you",
]  # fmt: skip


class Bars:
    """A reporter that keeps the progress and the words it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        self.told.append((label, done, total))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a random embedding model and of a classifier on it."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_wordpiece(TEXTS, 300)
    spec = EncoderSpec(tokenizer.get_vocab_size(), 16, 1, 2, 32, max_position_embeddings=16)
    body = init_encoder(spec, seed=3)
    for name, model, labels in (
        ("embedder", body, []),
        ("classifier", with_classifier(body, 3, seed=5), LABELS),
    ):
        save_encoder(model, root / name, source=None, labels=labels, manifest=Manifest())
        save_tokenizer(tokenizer, root / name, 16)
    return root / "embedder", root / "classifier"


def write(file: Path, labels: list[str], texts: list[str] = TEXTS) -> Path:
    rows = [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def one_by_one(folder: Path) -> npt.NDArray[np.float32]:
    """The model's outputs, each text alone: no padding, no order."""
    session, tokenizer = open_encoder(folder, ONE), Tokenizer.load(folder)
    rows = [tokenizer.encode([text], 16) for text in TEXTS]
    return np.concatenate([session.logits(row.ids, row.mask) for row in rows])


def test_logits_keep_the_order_whatever_the_batch(models: tuple[Path, Path]) -> None:
    session, tokenizer = open_encoder(models[1], ONE), Tokenizer.load(models[1])
    expected = one_by_one(models[1])
    bars = Bars()
    for size in (1, 2, 4, 32):
        found = logits_of(session, tokenizer, TEXTS, batch_size=size, reporter=bars)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert bars.told[-1] == ("eval", 9, 9)
    assert [done for _, done, _ in bars.told[9:14]] == [2, 4, 6, 8, 9]
    short = logits_of(session, tokenizer, TEXTS, max_length=4)
    assert np.abs(short - expected).max() > 1e-3  # longer texts are cut
    with pytest.raises(UsageError, match=r"--max-length 17 is more than this model's 16 tokens"):
        logits_of(session, tokenizer, TEXTS, max_length=17)
    np.testing.assert_array_equal(outputs_of(session, tokenizer, TEXTS, max_length=4).values, short)
    lengths = [tokenizer.encode([text], 16).mask.sum() for text in TEXTS]
    cut = outputs_of(session, tokenizer, TEXTS, max_length=4, batch_size=2).truncated
    assert cut == sum(length > 4 for length in lengths) > 0
    assert len(logits_of(session, tokenizer, [])) == 0


@pytest.mark.parametrize("activation", ["dynamic_tensor", "mixed"])
def test_dynamic_activations_are_scored_one_text_at_a_time(
    models: tuple[Path, Path], activation: str
) -> None:
    session, tokenizer = open_encoder(models[1], ONE), Tokenizer.load(models[1])
    info: SessionInfo = replace(session.info, activation=activation)
    session.info = info
    bars = Bars()
    logits_of(session, tokenizer, TEXTS, reporter=bars)
    assert len(bars.told) == len(TEXTS)


def test_softmax_is_stable() -> None:
    shares = softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3.0)]], np.float32))
    np.testing.assert_allclose(shares, [[0.5, 0.5], [0.25, 0.75]], atol=1e-7)


def test_intent_metrics_are_those_of_the_paper() -> None:
    gold = ["a", "a", "b", "b", "oos", "oos", "oos", "b"]
    said = ["a", "b", "b", "oos", "oos", "a", "oos", "b"]
    labels = ["b", "oos", "a", "unused"]
    predicted = np.array([labels.index(label) for label in said])
    scores = intent_scores(gold, predicted, labels, "oos", list("12345678"))
    values = {name: (round(m.value, 9), m.n) for name, m in scores.metrics.items()}
    assert values["accuracy"] == (3 / 5, 5)  # in scope: right are a, b, b of five
    assert values["accuracy_all"] == (5 / 8, 8)
    assert values["oos_recall"] == (round(2 / 3, 9), 3)
    assert values["oos_precision"] == (round(2 / 3, 9), 3)
    expected = sklearn.metrics.f1_score(gold, said, average="macro")
    assert scores.metrics["macro_f1"].value == pytest.approx(expected)
    assert scores.primary == "accuracy"
    np.testing.assert_array_equal(scores.rows["accuracy"], [1, 0, 1, 0, np.nan, np.nan, np.nan, 1])
    np.testing.assert_array_equal(scores.rows["oos_recall"][4:7], [1, 0, 1])
    assert np.isnan(scores.rows["oos_precision"][0])
    assert (scores.predictions, scores.gold) == (said, gold)
    assert scores.metrics["accuracy"].low < 0.6 < scores.metrics["accuracy"].high


def test_intent_metrics_without_or_with_only_oos_rows() -> None:
    plain = intent_scores(["a", "b"], np.array([0, 0]), ["a", "b"], "oos")
    assert set(plain.metrics) == {"accuracy", "accuracy_all", "macro_f1"}
    assert plain.metrics["accuracy"].value == 0.5
    only = intent_scores(["oos", "oos"], np.array([0, 0]), ["a", "oos"], "oos")
    assert set(only.metrics) == {"accuracy_all", "oos_recall", "macro_f1"}
    assert only.primary == "accuracy_all"
    assert only.metrics["oos_recall"].value == 0.0


def test_evaluate_intent_end_to_end(models: tuple[Path, Path], tmp_path: Path) -> None:
    said = [LABELS[i] for i in one_by_one(models[1]).argmax(axis=1)]
    wrong = [LABELS[(LABELS.index(label) + 1) % 3] for label in said[:2]]
    write(tmp_path / "data" / "test.jsonl", [*wrong, *said[2:]])
    data = DataOptions(tmp_path / "data", oos_label="none")
    scores, result = evaluate(models[1], "intent", data, options=ONE)
    assert list(scores.predictions) == said
    assert result.metrics["accuracy"].value == pytest.approx(7 / 9)
    assert (result.split, result.primary, result.metrics["accuracy"].n) == ("test", "accuracy", 9)
    assert result.data == str(tmp_path / "data")
    limited, _ = evaluate(models[1], "intent", replace(data, limit=4))
    assert limited.metrics["accuracy_all"].n == 4


def test_evaluate_embed_end_to_end(models: tuple[Path, Path], tmp_path: Path) -> None:
    vectors = one_by_one(models[0]).astype(np.float64)
    train, labels = [0, 1, 2, 3, 4], ["a", "b", "b", "c", "oos"]
    queries, gold = [5, 6, 7, 8], ["a", "a", "b", "oos"]
    write(tmp_path / "d" / "train.jsonl", labels, [TEXTS[i] for i in train])
    write(tmp_path / "d" / "test.jsonl", gold, [TEXTS[i] for i in queries])
    nearest = [max(train[:4], key=lambda i: vectors[i] @ vectors[q]) for q in queries[:3]]
    scores, result = evaluate(models[0], "embed", DataOptions(tmp_path / "d"))
    assert list(scores.predictions) == [labels[i] for i in nearest]  # out-of-scope rows left out
    right = np.mean([labels[i] == g for i, g in zip(nearest, gold, strict=False)])
    assert result.metrics["nn_accuracy"].value == pytest.approx(right)
    assert result.metrics["nn_accuracy"].n == 3
    one = write(tmp_path / "one.jsonl", ["a"] * 9)
    with pytest.raises(UsageError, match=r"one\.jsonl is one file") as caught:
        evaluate(models[0], "embed", DataOptions(one))
    assert "train.jsonl" in caught.value.hint


def test_nearest_rows_in_parts() -> None:
    rng = np.random.default_rng(0)
    index = rng.normal(size=(50, 4)).astype(np.float32)
    index /= np.linalg.norm(index, axis=1, keepdims=True)
    order = rng.integers(0, 50, 1200)  # more queries than are compared at a time
    assert nearest_rows(index[order], index).tolist() == order.tolist()


def test_cosine_parity(models: tuple[Path, Path]) -> None:
    embedder, tokenizer = open_encoder(models[0], ONE), Tokenizer.load(models[0])
    same = cosine_parity(embedder, embedder, tokenizer, TEXTS)
    np.testing.assert_allclose(same, 1.0, atol=1e-6)
    # Outputs that are not of unit length: class logits; the other side sees cut texts.
    classifier = open_encoder(models[1], ONE)
    whole = one_by_one(models[1]).astype(np.float64)
    cut = logits_of(classifier, tokenizer, TEXTS, max_length=4).astype(np.float64)
    short = open_encoder(models[1], ONE)
    short.info = replace(short.info, max_length=4)
    lengths = np.linalg.norm(whole, axis=1) * np.linalg.norm(cut, axis=1)
    expected = (whole * cut).sum(axis=1) / lengths
    found = cosine_parity(classifier, short, tokenizer, TEXTS)
    assert found.min() < 0.9999
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_tasks_are_registered() -> None:
    assert registry.names("eval") == ["command", "embed", "intent", "lm"]
    for name in registry.names("eval"):
        assert isinstance(registry.load("eval", name), Task)


def test_predict_returns_or_writes_the_rows(models: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS * 130))  # more than are labelled at a time
    bars = Bars()
    result = predict(models[1], file, options=ONE, reporter=bars)
    expected = one_by_one(models[1])
    assert (result.rows, result.out) == (1170, None)
    assert [row["text"] for row in result.predictions] == TEXTS * 130
    assert [row["label"] for row in result.predictions[:9]] == [
        LABELS[i] for i in expected.argmax(axis=1)
    ]
    scores = [row["score"] for row in result.predictions[-9:]]
    np.testing.assert_allclose(scores, softmax(expected).max(axis=1), atol=2e-6)
    assert bars.told == [("predict", 1024, 1170), ("predict", 1170, 1170)]
    for name in ("out.jsonl", "new/out.csv"):
        out = tmp_path / name
        written = predict(models[1], file, out=out, options=ONE)
        assert (written.rows, written.predictions, written.out) == (1170, [], str(out))
        lines = out.read_text().splitlines()
        rows = (
            [json.loads(line) for line in lines]
            if name == "out.jsonl"
            else [{**row, "score": float(row["score"])} for row in csv.DictReader(lines)]
        )
        assert rows == result.predictions
        assert list(out.parent.glob(".*")) == []


def test_predict_refuses(models: tuple[Path, Path], tmp_path: Path) -> None:
    file, out = write(tmp_path / "d" / "rows.jsonl", ["a"] * 9), tmp_path / "out.jsonl"
    with pytest.raises(UsageError, match="has no labels") as caught:
        predict(models[0], file)
    assert "pocketglm train" in caught.value.hint
    with pytest.raises(UsageError, match="no known suffix"):
        predict(models[1], file, out=tmp_path / "out.txt")
    with pytest.raises(DataError):
        predict(models[1], file, out=out, text_column="sentence")
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(OutputExistsError):
        predict(models[1], file, out=out)
    assert out.read_text() == "mine"
    predict(models[1], file, out=out, force=True)
    assert len(out.read_text().splitlines()) == 9


def test_the_share_of_cut_texts_is_told(models: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(models[1])
    share = np.mean([tokenizer.encode([text], 16).mask.sum() > 5 for text in TEXTS])
    assert 0 < share < 1
    write(tmp_path / "d" / "test.jsonl", ["alarm"] * 9)
    write(tmp_path / "d" / "train.jsonl", ["alarm"] * 9)
    data, bars = DataOptions(tmp_path / "d"), Bars()
    for task, model in (("embed", models[0]), ("intent", models[1])):
        _, result = evaluate(model, task, data, max_length=5, options=ONE, reporter=bars)
        assert result.truncated == pytest.approx(share)
    predict(models[1], tmp_path / "d" / "test.jsonl", max_length=5, options=ONE, reporter=bars)
    said = f"{share:.2%} of the texts are longer than the limit and were cut"
    assert bars.said == [said] * 3
    bars = Bars()
    write(tmp_path / "d" / "test.jsonl", ["alarm"], ["play"])
    _, result = evaluate(models[1], "intent", data, reporter=bars)
    assert (result.truncated, bars.said) == (0.0, [])
    with pytest.raises(UsageError, match="this model's 16 tokens"):
        evaluate(models[1], "intent", data, max_length=17)


def trained_on(models: tuple[Path, Path], folder: Path, *steps: dict[str, Any]) -> Path:
    """A copy of the classifier whose history has fine-tuning steps with these settings."""
    source = Checkpoint.open(models[1])
    lineage = [Step(method="finetune", settings=settings) for settings in steps]
    lineage.append(Step(method="quantize_rtn", settings={"bits": 8}))
    manifest = Manifest(lineage=lineage)
    save_encoder(load_encoder(source), folder, source=source, labels=LABELS, manifest=manifest)
    return folder


def test_a_file_that_was_trained_on_is_scored_on_its_held_out_rows(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{text} {i}" for i in range(20) for text in TEXTS]
    file = write(tmp_path / "rows.jsonl", [LABELS[i % 3] for i in range(180)], texts)
    monkeypatch.chdir(tmp_path)
    data, bars = DataOptions(file), Bars()
    columns = {"text_column": "text", "label_column": "label"}
    model = trained_on(
        models, tmp_path / "m", {"data": "rows.jsonl", **columns}, {"data": "other.jsonl"}
    )
    training = {e.text for s in ("train", "validation") for e in read_split(data, s, training=True)}
    assert export(model, ["onnx"], tmp_path / "e").targets[0].ok
    for path in (model, tmp_path / "e" / "onnx"):
        scores, result = evaluate(path, "intent", data, options=ONE, reporter=bars)
        assert not training & set(scores.texts)
        assert len(scores.texts) == 180 - len(training) > 5
        assert result.split == "test (held out of rows.jsonl)"
        assert f"{path} was trained on {file}" in bars.said[0]
        bars.said.clear()
    chosen = held_out(model, data)
    assert read_split(chosen, "test") == read_split(held_out(models[1], chosen), "test")
    # A separate file, and a model that was trained on another, are scored whole.
    copy = write(tmp_path / "mine.jsonl", ["alarm"] * 9)
    elsewhere = trained_on(models, tmp_path / "n", {"data": str(copy), **columns})
    for path, rows, n in ((model, copy, 9), (elsewhere, file, 180), (models[1], file, 180)):
        _, result = evaluate(path, "intent", DataOptions(rows), options=ONE, reporter=bars)
        assert (result.split, result.metrics["accuracy_all"].n) == ("test", n)
    assert bars.said == []


def test_two_writers_of_one_output_do_not_meet(tmp_path: Path) -> None:
    out, mine = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    mine.write_text("the user's own")
    with _whole_file(out) as first:
        first.write("first " * 5000)
        with _whole_file(out) as second:
            second.write("second")
        assert out.read_text() == "second"
    assert out.read_text() == "first " * 5000
    writer = _whole_file(out)
    writer.__enter__().write("third")
    assert writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) is False
    assert out.read_text() == "first " * 5000
    assert mine.read_text() == "the user's own"
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, mine.name]
    assert out.stat().st_mode == mine.stat().st_mode


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "o.csv"
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pocketglm.eval._predict import _whole_file\n"
        "with _whole_file(Path(sys.argv[1])) as stream:\n"
        "    stream.write('text'); stream.flush()\n"
        "    print(len(os.listdir(Path(sys.argv[1]).parent)), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(out)], capture_output=True, text=True)
    assert done.stdout == "1\n"  # the temporary file was there
    assert "KeyboardInterrupt" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_models_and_data_that_do_not_fit(models: tuple[Path, Path], tmp_path: Path) -> None:
    labels = ["z1", "z2", "z3", "z4", "z5", "z6", "alarm", "alarm", "alarm"]
    data = DataOptions(write(tmp_path / "rows.jsonl", labels))
    with pytest.raises(DataError) as caught:
        evaluate(models[1], "intent", data)
    assert "6 label(s) that the model was not trained on: 'z1'" in caught.value.message
    assert "'z5' and 1 more" in caught.value.message
    with pytest.raises(UsageError, match="no labels") as refused:
        evaluate(models[0], "intent", data)
    assert "pocketglm train" in refused.value.hint
    with pytest.raises(UsageError, match="classifier"):
        evaluate(models[1], "embed", data)
    with pytest.raises(UsageError, match="unknown task 'intnt'"):
        evaluate(models[1], "intnt", data)
    write(tmp_path / "oos" / "test.jsonl", ["oos"] * 9)
    empty = DataOptions(tmp_path / "oos")
    with pytest.raises(DataError, match="no in-scope row"):
        evaluate(models[0], "embed", empty)
