"""The `train` verb on a tiny encoder: what it writes, resume, warnings, bad input."""

from __future__ import annotations

import json
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.cli._main import main
from pocketglm.contracts import DataOptions
from pocketglm.data.tokenizer_training import save_tokenizer, train_wordpiece
from pocketglm.errors import (
    CheckpointError,
    DataError,
    MissingExtraError,
    OutputExistsError,
    UsageError,
    WorkError,
)
from pocketglm.eval._evaluate import evaluate
from pocketglm.model.encoder import init_encoder
from pocketglm.model.hf import labels_of, load_encoder, max_length_of, save_encoder
from pocketglm.model.spec import EncoderSpec
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._encoder_job import LabelledRows, prepare_classifier
from pocketglm.train._rows import choose_length, pad, read_rows, tokenize
from pocketglm.train.finetune import FinetuneConfig, finetune
from pocketglm.train.loop import CHECKPOINT

WORKER = Path(__file__).with_name("train_worker.py")
launch_two: Callable[..., str] = runpy.run_path(str(WORKER))["launch_two"]
WORDS = {
    "alarm": ["wake", "alarm", "morning", "ring"],
    "music": ["song", "play", "album", "band"],
    "oos": ["potato", "galaxy", "spoon", "fence"],
}
FILLERS = ["please", "now", "the", "my", "for", "me"]


class Told:
    """A reporter that keeps the words, and may be told to stop the run at a step."""

    def __init__(self, stop_at: int = 0) -> None:
        self.lines: list[str] = []
        self.stop_at = stop_at

    def say(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        if done == self.stop_at:
            raise KeyboardInterrupt


def sentences(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = sorted(WORDS)[number % 3]
        words = [*rng.sample(FILLERS, rng.randint(1, 4)), rng.choice(WORDS[label])]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_split(folder: Path, split: str, rows: list[dict[str, str]]) -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random embedding model of two blocks, with a tokenizer for `sentences`."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = train_wordpiece((row["text"] for row in sentences(200, 9)), 300)
    spec = EncoderSpec(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    save_encoder(init_encoder(spec), folder, source=None, labels=[], manifest=Manifest())
    save_tokenizer(tokenizer, folder, 32)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_split(folder, "train", sentences(96, 0))
    write_split(folder, "validation", sentences(30, 1))
    write_split(folder, "test", sentences(45, 2))
    return folder


def config(data: Path, **changes: Any) -> FinetuneConfig:
    values = {
        "data": data,
        "epochs": 4,
        "batch_size": 8,
        "learning_rate": 0.015,
        "precision": "fp32",
        "head_multiplier": 3,
    }
    return FinetuneConfig(**(values | changes))


@pytest.fixture(scope="module")
def trained(encoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "trained"
    finetune(encoder, config(data), out)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_it_learns_and_writes_a_whole_checkpoint(encoder: Path, data: Path, tmp_path: Path) -> None:
    told, out = Told(), tmp_path / "out"
    result = finetune(encoder, config(data), out, reporter=told)
    assert result.validation["accuracy"].value > 0.9
    assert result.validation["accuracy"].n == 20
    assert result.validation["oos_recall"].n == 10
    assert (result.steps, result.epochs, result.task) == (48, 4.0, "intent")
    ckpt = Checkpoint.open(out)
    assert labels_of(ckpt) == ["alarm", "music", "oos"]
    assert load_encoder(ckpt).spec.pooling == "mean"
    assert max_length_of(ckpt) == 32
    assert ckpt.manifest.task == "intent"
    step = ckpt.manifest.lineage[-1]
    assert (step.method, step.seed) == ("finetune", 0)
    assert step.parent == Checkpoint.open(encoder).digest()
    assert step.settings["max_length"] == 32
    assert step.settings["precision"] == "fp32"
    assert step.effect["validation_accuracy"] == result.validation["accuracy"].value
    assert {"torch", "accelerate", "pocketglm"} <= set(step.versions)
    assert Path(result.loss_plot).read_text().startswith("<svg")
    assert told.lines[0] == "96 training rows, 30 validation, 3 labels"
    assert told.lines[1] == "max length 32 tokens: 0.00% of the texts are cut"
    assert not [line for line in told.lines if "warning" in line]
    assert not (out / CHECKPOINT).exists()
    assert not (tmp_path / "out.partial").exists()
    scores, _ = evaluate(out, "intent", DataOptions(data))
    assert scores.metrics["accuracy"].value > 0.9


def test_the_same_command_is_already_done(encoder: Path, data: Path, trained: Path) -> None:
    before = files(trained)
    again = finetune(encoder, config(data), trained)
    assert again.already_done
    assert again.steps == 48
    assert again.validation["accuracy"].n == 20
    assert files(trained) == before
    with pytest.raises(OutputExistsError):
        finetune(encoder, config(data, seed=1), trained)


def test_an_interrupted_run_resumes_to_the_same_bytes(
    encoder: Path, data: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        finetune(encoder, config(data), out, reporter=Told(stop_at=17))
    assert not out.exists()
    assert (tmp_path / "out.partial" / CHECKPOINT).is_file()
    with pytest.raises(OutputExistsError, match="unfinished work of another command"):
        finetune(encoder, config(data, seed=1), out)
    told = Told()
    result = finetune(encoder, config(data), out, reporter=told)
    assert "resuming at step 17 of 48" in told.lines
    assert not result.already_done
    assert files(out) == files(trained)


def test_two_processes_train_what_one_trains(encoder: Path, data: Path, tmp_path: Path) -> None:
    """The command itself under `accelerate launch`: same weights, written and told once."""
    still = load_encoder(Checkpoint.open(encoder))
    still.spec = replace(still.spec, dropout=0.0, attention_dropout=0.0)
    source = tmp_path / "still"
    save_encoder(still, source, source=Checkpoint.open(encoder), labels=[], manifest=Manifest())
    settings = config(data, epochs=1.5, learning_rate=1e-3, head_multiplier=10.0, limit=90)
    finetune(source, settings, tmp_path / "one")
    command = ["-m", "pocketglm", "train", source, "--task", "intent", "--data", data]
    command += ["--epochs", 1.5, "--batch-size", 8, "--lr", 1e-3, "--precision", "fp32"]
    command += ["--limit", 90, "--out", tmp_path / "two", "--json"]
    printed = launch_two(*command)
    assert json.loads(printed)["steps"] == 18  # one JSON value: one process told
    one, two = (json.loads((tmp_path / n / "training.json").read_text()) for n in ("one", "two"))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert two["validation"] == one["validation"]
    ours, theirs = (
        load_encoder(Checkpoint.open(tmp_path / name)).state_dict() for name in ("one", "two")
    )
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert sorted(files(tmp_path / "two")) == sorted(files(tmp_path / "one"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "still", "two"]
    assert finetune(source, settings, tmp_path / "two").already_done


def test_only_new_layers_learn_faster(
    encoder: Path, data: Path, trained: Path, tmp_path: Path
) -> None:
    def fast(path: Path, name: str, **changes: Any) -> list[tuple[int, ...]]:
        """Shapes of the parameters that have ten times the rate."""
        groups: list[dict[str, Any]] = []
        hook = register_optimizer_step_pre_hook(lambda o, *_: groups.extend(o.param_groups))
        try:
            quick = config(data, epochs=0.05, learning_rate=1e-6, head_multiplier=10, **changes)
            finetune(path, quick, tmp_path / name)
        finally:
            hook.remove()
        assert {g["initial_lr"] for g in groups} <= {1e-6, 1e-6 * 10}
        return sorted(tuple(p.shape) for g in groups if g["initial_lr"] > 2e-6 for p in g["params"])

    pooler, classifier = [(16,), (16, 16)], [(3,), (3, 16)]
    assert fast(encoder, "mean") == classifier
    assert fast(encoder, "cls", pooling="cls") == sorted([*classifier, *pooler])
    assert fast(trained, "continued") == []
    # As a BERT folder comes: a trained pooler, but a classifier of other labels.
    model = load_encoder(Checkpoint.open(tmp_path / "cls"))
    source = Checkpoint.open(tmp_path / "cls")
    save_encoder(model, tmp_path / "bert", source=source, labels=[*"abc"], manifest=Manifest())
    assert fast(tmp_path / "bert", "relabelled") == classifier


def test_the_command_takes_a_limit(
    encoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", encoder, "--task", "intent", "--data", data, "--out", tmp_path / "out"]
    command += ["--epochs", 0.1, "--limit", 12]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in command])
    assert not stop.value.code
    assert "12 training rows, 12 validation" in capsys.readouterr().err
    settings = Checkpoint.open(tmp_path / "out").manifest.lineage[-1].settings
    assert settings["limit"] == 12


def test_a_fitting_classifier_is_continued(data: Path, trained: Path, tmp_path: Path) -> None:
    weights = load_encoder(Checkpoint.open(trained)).state_dict()
    slow = config(data, epochs=0.1, learning_rate=1e-9, weight_decay=0)
    finetune(trained, slow, tmp_path / "more")
    ckpt = Checkpoint.open(tmp_path / "more")
    more = load_encoder(ckpt).state_dict()
    assert all(torch.allclose(more[name], weights[name], atol=1e-6) for name in weights)
    assert [step.method for step in ckpt.manifest.lineage] == ["finetune", "finetune"]
    # Other pooling: the head is a new one.
    cls = config(data, epochs=0.1, learning_rate=1e-9, pooling="cls")
    finetune(trained, cls, tmp_path / "cls")
    model = load_encoder(Checkpoint.open(tmp_path / "cls"))
    assert model.spec.pooling == "cls"
    assert not torch.allclose(model.state_dict()["classifier.weight"], weights["classifier.weight"])


def test_the_loss_is_weighted_cross_entropy(encoder: Path, tmp_path: Path) -> None:
    rows = sentences(300, 0)
    rare = [row for row in rows if row["label"] == "music"][:5]
    folder = tmp_path / "skewed"
    write_split(folder, "train", [row for row in rows if row["label"] == "alarm"] + rare)
    write_split(folder, "validation", rare)
    told, settings = Told(), config(folder, class_weights=True, label_smoothing=0.2)
    labelled = LabelledRows(*read_rows(settings.options))
    job = prepare_classifier(Checkpoint.open(encoder), settings, labelled, told)
    assert told.lines[2:] == [
        "warning: label 'alarm' has 20 times the rows of 'music' (100 and 5); "
        "consider --class-weights or more rows"
    ]
    chosen = np.array([0, 1, 103])  # two alarms, one music
    batch = job.collate(chosen)
    total, weight = job.loss(settings)(job.model, batch)
    logits = job.model(batch["ids"], batch["mask"]).detach().double().numpy()
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    shares = np.array([105 / (2 * 100), 105 / (2 * 5)])  # n / (classes * rows of the class)
    truth = np.eye(2)[[0, 0, 1]] * 0.8 + 0.1
    assert total.item() == pytest.approx(-(truth * shares * logs).sum(), rel=1e-5)
    assert weight.item() == pytest.approx(shares[[0, 0, 1]].sum())
    plain, count = job.loss(config(folder))(job.model, batch)
    assert plain.item() == pytest.approx(-logs[[0, 1, 2], [0, 0, 1]].sum(), rel=1e-5)
    assert count.item() == 3


def test_unknown_tokens_and_cut_texts_are_reported(encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"請 播放 {'the ' * (n % 20)}", "label": "ab"[n % 2]} for n in range(40)]
    write_split(tmp_path / "zh", "train", rows)
    write_split(tmp_path / "zh", "validation", rows[:4])
    told = Told()
    settings = config(tmp_path / "zh", epochs=0.1, max_length=16)
    finetune(encoder, settings, tmp_path / "out", reporter=told)
    assert told.lines[1] == "max length 16 tokens: 40.00% of the texts are cut"
    assert "of the tokens are unknown to this model's tokenizer" in told.lines[2]


def test_a_single_file_is_divided(encoder: Path, tmp_path: Path) -> None:
    file, told = tmp_path / "rows.csv", Told()
    rows = {row["text"]: row["label"] for row in sentences(150, 4)}
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows.items()))
    finetune(encoder, config(file, epochs=0.1), tmp_path / "out", reporter=told)
    train, validation = (int(told.lines[0].split()[n]) for n in (0, 3))
    scores, result = evaluate(tmp_path / "out", "intent", DataOptions(file))
    assert result.split == "test (held out of rows.csv)"
    assert train + validation + len(scores.texts) == len(rows)
    assert all(0.02 < held_out / len(rows) < 0.25 for held_out in (validation, len(scores.texts)))


def test_minutes_bound_the_run(encoder: Path, data: Path, tmp_path: Path) -> None:
    settings = config(data, epochs=10_000, minutes=0.02, patience=10_000)
    result = finetune(encoder, settings, tmp_path / "out")
    assert 0.3 < result.seconds < 8
    assert 1 <= result.steps < 100_000


def test_choosing_a_length() -> None:
    lengths = np.full(1000, 5, np.int64)
    assert choose_length(lengths, 512) == 64
    lengths[:20] = 97  # 2 % are longer
    assert choose_length(lengths, 512) == 104
    assert choose_length(lengths, 20) == 20
    lengths[:20] = 5
    lengths[:2] = 400  # 0.2 % are
    assert choose_length(lengths, 512) == 64


def test_tokenize_and_pad(encoder: Path) -> None:
    tokenizer = Tokenizer.load(encoder)
    texts = ["wake me", "play the song for me", "the 請"] * 500  # more than one chunk
    tokens = tokenize(tokenizer, texts, 6)
    assert tokens.lengths.tolist() == [4, 6, 4] * 500
    assert (tokens.truncated, tokens.unknown, tokens.tokens) == (500, 500, 500 * (2 + 4 + 2))
    batch = pad(tokens.ids, [0, 1], tokenizer.pad_id)
    expected = tokenizer.encode(texts[:2], 6)
    assert batch["ids"].tolist() == expected.ids.tolist()
    assert batch["mask"].tolist() == expected.mask.tolist()


@pytest.mark.parametrize(
    ("validation", "train", "message"),
    [
        ("alarm zebra ape boa cat dog eel", "alarm music", "6 label(s) in validation that training "
         "never shows: 'ape', 'boa', 'cat', 'dog', 'eel' and 1 more"),
        ("alarm", "alarm alarm", "the training rows have 1 label(s) (alarm)"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_learned(
    encoder: Path, tmp_path: Path, validation: str, train: str, message: str
) -> None:
    for split, labels in (("train", train), ("validation", validation)):
        rows = [{"text": "wake me", "label": label} for label in labels.split()]
        write_split(tmp_path / "data", split, rows)
    with pytest.raises(DataError) as caught:
        finetune(encoder, config(tmp_path / "data"), tmp_path / "out")
    assert message in caught.value.message
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == []


def test_bad_requests(encoder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="train --task embed is not available"):
        finetune(encoder, config(data, task="embed"), out)
    with pytest.raises(UsageError, match="unknown task 'intend'") as caught:
        finetune(encoder, config(data, task="intend"), out)
    assert "did you mean 'intent'?" in caught.value.hint
    with pytest.raises(UsageError, match="--max-length 99 is more than this model's 32"):
        finetune(encoder, config(data, max_length=99), out)
    with pytest.raises(WorkError, match="training loss is nan"):
        finetune(encoder, config(data, learning_rate=1e30), out)
    for bad in ({"epochs": 0}, {"learning_rate": -1}, {"speed": 3}):
        with pytest.raises(ValidationError):
            config(data, **bad)
    assert list(tmp_path.iterdir()) == []


def test_without_accelerate(
    encoder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match="'accelerate', which is not installed") as caught:
        finetune(encoder, config(data), tmp_path / "out")
    assert caught.value.hint == "pip install 'pocketglm[train]'"
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model(encoder: Path, data: Path, tmp_path: Path) -> None:
    model = load_encoder(Checkpoint.open(encoder))
    folder = tmp_path / "model"
    save_encoder(model, folder, source=None, labels=[], manifest=Manifest())
    texts = [f"word{n} {chr(0x4E00 + n)}" for n in range(300)]
    save_tokenizer(train_wordpiece(texts, 2000), folder, 32)
    with pytest.raises(CheckpointError, match="the tokenizer's largest id"):
        finetune(folder, config(data), tmp_path / "out")
