"""The `train` verb on tiny decoders: commands, texts, adapters, resume, what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.manifest import Manifest
from pocketglm.cli._main import main
from pocketglm.contracts import DataOptions, RunOptions
from pocketglm.data.frames import FrameRow, read_frames
from pocketglm.data.texts import vocabulary_texts
from pocketglm.data.tokenizer_training import save_chat_tokenizer, train_bpe
from pocketglm.errors import CheckpointError, DataError, UsageError
from pocketglm.eval._evaluate import evaluate
from pocketglm.eval.command import parse
from pocketglm.model.decoder import init_decoder
from pocketglm.model.encoder import init_encoder
from pocketglm.model.hf import load_decoder, save_decoder, save_encoder
from pocketglm.model.spec import DecoderSpec, EncoderSpec, RopeSpec
from pocketglm.runtimes import open_decoder
from pocketglm.text.frame import Frame, read, write
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train import _sequences
from pocketglm.train._command_job import (
    CommandJob,
    prepare_command,
    read_commands,
    slot_values,
    swapped,
)
from pocketglm.train._lm_job import prepare_lm, read_lm
from pocketglm.train._sequences import NextToken, Sequences, score_rows
from pocketglm.train.finetune import FinetuneConfig, finetune
from pocketglm.train.loop import CHECKPOINT, Rows

SPEC = DecoderSpec(
    family="glm",
    vocab_size=384,
    hidden_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=24,
    intermediate_size=64,
    rope=RopeSpec(24, interleaved=True),
    max_position_embeddings=64,
    fused_ffn=True,
    tied=True,
    eos_ids=(1, 5),
    pad_id=0,
)
PLACES = ("kitchen", "hall", "bath", "big room")
THINGS = ("lamp", "fan", "heater")


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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def commands() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for place in PLACES:
        for thing in THINGS:
            slots = {"thing": thing, "place": place}
            rows.append(
                {"text": f"turn the {thing} on in the {place}", "slots": slots, "intent": "on"}
            )
        rows.append(
            {"text": f"is anybody in the {place}", "slots": {"place": place}, "intent": "ask"}
        )
    rows.append({"text": "never mind", "slots": {}, "intent": "oos"})
    return rows


def write_rows(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same commands in every split: a model that fits them has learned the form."""
    rows = commands()
    return write_rows(tmp_path_factory.mktemp("data"), train=rows, validation=rows, test=rows)


@pytest.fixture(scope="module")
def decoder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder of two blocks in float32, with a tokenizer for the commands."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_decoder(init_decoder(SPEC, std=0.1), folder, source=None, manifest=Manifest())
    save_chat_tokenizer(train_bpe(vocabulary_texts(data), 384), folder, 64)
    return folder


def config(data: Path, **changes: Any) -> FinetuneConfig:
    values = {
        "task": "command",
        "data": data,
        "epochs": 30,
        "batch_size": 4,
        "learning_rate": 0.006,
        "precision": "fp32",
        "patience": 99,
    }
    return FinetuneConfig(**(values | changes))


@pytest.fixture(scope="module")
def trained(decoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "trained"
    torch.set_num_threads(1)
    finetune(decoder, config(data), out)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def command_job(decoder: Path, data: Path, **changes: Any) -> CommandJob:
    settings = config(data, **changes)
    return prepare_command(Checkpoint.open(decoder), settings, read_commands(settings), Told())


# --- commands ------------------------------------------------------------------------------------


def test_it_learns_commands_by_heart(decoder: Path, data: Path, trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    assert record["validation"]["exact_match"] == {
        "value": 1.0, "n": 17, "low": pytest.approx(0.816, abs=1e-3), "high": 1.0,
        "unit": "fraction",
    }  # fmt: skip
    assert record["validation"]["nll"]["value"] < 0.3
    assert record["parameters"] == record["trained_parameters"]
    ckpt = Checkpoint.open(trained)
    assert ckpt.manifest.task == "command"
    assert ckpt.manifest.command is not None
    assert ckpt.manifest.command.intents == {"ask": ["place"], "on": ["place", "thing"], "oos": []}
    step = ckpt.manifest.lineage[-1]
    assert (step.method, step.parent) == ("finetune", Checkpoint.open(decoder).digest())
    assert step.settings["max_length"] == 64
    assert "exact match" in (trained / "loss.svg").read_text()
    # Written out freely, token by token, it is the same.
    scores, _ = evaluate(trained, "command", DataOptions(data))
    assert scores.metrics["exact_match"].value == 1.0


def test_what_validation_finds_right_is_right_in_use(
    decoder: Path, data: Path, tmp_path: Path
) -> None:
    """A row whose every mark is the model's first choice is written so by greedy decoding."""
    finetune(decoder, config(data, epochs=2), tmp_path / "out")
    job = command_job(tmp_path / "out", data)
    found = job.score_rows()
    exact = found.hits == found.tokens
    assert 2 <= exact.sum() <= 15
    session = open_decoder(tmp_path / "out", RunOptions(threads=1))
    said = [parse(session, job.tokens, row.text) for row in job.texts]
    right = np.array([frame == row.frame for frame, row in zip(said, job.texts, strict=True)])
    assert (right >= exact).all()


def test_an_interrupted_run_resumes_to_the_same_bytes(
    decoder: Path, data: Path, tmp_path: Path
) -> None:
    """Swapped slots and dropout too depend on the place in the run alone."""
    settings = config(data, epochs=3, slot_swap=0.7, dropout=0.1)
    finetune(decoder, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune(decoder, settings, tmp_path / "out", reporter=Told(stop_at=8))
    assert (tmp_path / "out.partial" / CHECKPOINT).is_file()
    told = Told()
    finetune(decoder, settings, tmp_path / "out", reporter=told)
    assert "resuming at step 8 of 15" in told.lines
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    again = finetune(decoder, settings, tmp_path / "out")
    assert again.already_done
    assert again.trained_parameters == again.parameters > 0


def test_the_rows_are_prompt_and_answer(decoder: Path, data: Path) -> None:
    """The marks of the answer count, each chosen among the marks."""
    job = command_job(decoder, data)
    rows, known = read_frames(DataOptions(data), "train"), job.tokens.marks.tolist()
    assert job.train.lengths.tolist() == [len(row) for row in job.train.ids]
    for row, ids, start in zip(rows, job.train.ids, job.train.starts, strict=True):
        assert ids[:start].tolist() == job.tokens.prompt(row.text)
        assert ids[start:].tolist() == job.tokens.answer(row.text, row.frame, row.spans)
    batch = job.train.collate(np.array([0, 3]))  # of different lengths
    width = max(len(job.train.ids[0]), len(job.train.ids[3])) - 1
    assert batch["ids"].shape[0] == 2
    assert width <= batch["ids"].shape[1] < width + 4
    for number, place in ((0, 0), (3, 1)):
        given = job.train.ids[number][:-1].tolist()
        assert batch["ids"][place, : len(given)].tolist() == given
    counts = batch["targets"] >= 0
    marks = [[t for t in job.train.ids[n].tolist() if t in known] for n in (0, 3)]
    found = batch["choices"][batch["targets"][counts]].tolist()
    assert found == marks[0] + marks[1]
    assert len(counts) == 64
    before = batch["ids"].flatten()[batch["places"][counts]].tolist()
    expected = [
        job.train.ids[n][i - 1]
        for n in (0, 3)
        for i in range(1, len(job.train.ids[n]))
        if job.train.ids[n][i] in known
    ]
    assert before == expected


def test_rows_that_are_too_long_are_left_out(decoder: Path, data: Path, tmp_path: Path) -> None:
    long = {"text": "turn it on " * 30, "slots": {}, "intent": "on"}
    folder = write_rows(tmp_path, train=[*commands(), long, long], validation=[*commands(), long])
    told = Told()
    settings = config(folder)
    job = prepare_command(Checkpoint.open(decoder), settings, read_commands(settings), told)
    assert len(job.train.ids) == 17
    assert told.lines[0] == "19 training rows, 18 validation, 3 intents, 2 slots"
    assert told.lines[1].endswith("2 training and 1 validation rows are too long and left out")
    with pytest.raises(DataError, match="all 19 rows are longer than 5 tokens"):
        command_job(decoder, folder, max_length=5)


def test_validation_rows_that_no_training_row_prepares_for(decoder: Path, tmp_path: Path) -> None:
    """An intent, or a slot of it, that training does not show: they are left out, and counted."""
    unseen: list[dict[str, Any]] = [
        {"text": "go to bed", "slots": {}, "intent": "sleep"},
        {"text": "turn it on at 7", "slots": {"time": "7"}, "intent": "on"},
        {"text": "is the lamp on", "slots": {"thing": "lamp"}, "intent": "ask"},  # not of `ask`
    ]
    folder = write_rows(tmp_path, train=commands(), validation=[*unseen, *commands()])
    told, settings = Told(), config(folder)
    job = prepare_command(Checkpoint.open(decoder), settings, read_commands(settings), told)
    assert told.lines[0] == "17 training rows, 20 validation, 3 intents, 2 slots"
    assert told.lines[1] == (
        "3 validation rows have an intent, or a slot of it, that no training row has: left out"
    )
    assert told.lines[2].endswith("0 training and 0 validation rows are too long and left out")
    assert job.metrics()["exact_match"].n == 17
    write_rows(tmp_path, validation=unseen)
    with pytest.raises(DataError, match="no validation row has an intent and slots") as caught:
        command_job(decoder, folder)
    assert "training rows" in caught.value.hint
    write_rows(tmp_path, one=commands()[:1])
    with pytest.raises(DataError, match="there are no validation rows"):
        command_job(decoder, tmp_path / "one.jsonl")


def test_a_swap_that_joins_words_is_not_made(decoder: Path, tmp_path: Path) -> None:
    """A number before its unit is a word of its own, a name there is not."""
    rows: list[dict[str, Any]] = [
        {"text": text, "slots": {"time": value}, "intent": "wake"}
        for text, value in (("wake me at 7am", "7"), ("wake me at noon", "noon"), ("at 12", "12"))
    ]
    folder = write_rows(tmp_path, train=rows, validation=rows)
    job = command_job(decoder, folder)
    made = {row.text: row for row in _epochs(job)}
    assert {"wake me at 12am", "wake me at 7", "at noon"} <= made.keys()
    assert "wake me at noonam" not in made
    for row in made.values():
        assert [row.text[a:b] for a, b in row.spans] == [value for _, value in row.frame.slots]
        assert read(write(row.text, row.frame, row.spans)) == row.frame


def test_swapped_slots(decoder: Path, data: Path) -> None:
    job = command_job(decoder, data, slot_swap=0.6, seed=4)
    rows = job.rows()
    assert not isinstance(rows, Rows)

    def said(epoch: int) -> list[tuple[int, ...]]:
        made = rows(epoch)
        assert len(made.lengths) == 17
        found = [made.collate(np.array([row]))["ids"][0].tolist() for row in range(17)]
        return [tuple(row[: n - 1]) for row, n in zip(found, made.lengths, strict=True)]

    first = said(0)
    assert first == said(0)  # of the epoch alone
    assert first != said(1)
    plain = [tuple(row[:-1].tolist()) for row in job.train.ids]
    new = [row for row, old in zip(first, plain, strict=True) if row != old]
    assert 4 <= len(new) <= 14
    # All values occur with all others, so a row that says what it means is one of those.
    assert set(first) <= set(plain)
    assert isinstance(command_job(decoder, data).rows(), Rows)


def test_a_quarter_of_the_new_values_are_made_of_two() -> None:
    text, value = "play hey jude now", "hey jude"
    start = text.index(value)
    row = FrameRow(text, Frame("play", (("song", value),)), ((start, start + len(value)),), "")
    pool = {("", "play", "song"): ["hey jude", "let it be"]}
    rng = np.random.default_rng(0)
    made = [swapped(row, pool, rng) for _ in range(400)]
    for one in made:
        assert [one.text[a:b] for a, b in one.spans] == [value for _, value in one.frame.slots]
    values = [one.frame.slots[0][1] for one in made]
    assert {"hey be", "let it jude", "hey jude let it be"} & set(values)
    new = sum(value not in pool["", "play", "song"] for value in values)
    assert 60 < new < 110
    single = {("", "play", "song"): ["jude", "be"]}
    assert {swapped(row, single, rng).frame.slots[0][1] for _ in range(50)} == {"jude", "be"}


def test_a_swap_that_becomes_too_long_is_not_made(decoder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"call {name}", "slots": {"name": name}, "intent": "call"}
        for name in ("Bo", "Al", "x " * 9 + "x")
    ]
    rows[2]["text"] = rows[2]["slots"]["name"]  # the value in the other texts is longer
    folder = write_rows(tmp_path, train=rows, validation=rows)
    longest = int(command_job(decoder, folder).train.lengths.max())
    made = command_job(decoder, folder, slot_swap=1.0, max_length=longest).rows()
    free = command_job(decoder, folder, slot_swap=1.0).rows()
    assert not isinstance(made, Rows)
    assert not isinstance(free, Rows)
    assert max(free(epoch).lengths.max() for epoch in range(20)) > longest
    assert max(made(epoch).lengths.max() for epoch in range(20)) <= longest


def test_made_up_words_are_others_in_each_epoch(decoder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"call {name}", "slots": {"name": name}, "intent": "call"}
        for name in ("Bo", "Al", "Zed", "Yvonne")
    ]
    folder = write_rows(tmp_path, train=rows, validation=rows)
    job = command_job(decoder, folder, made_up=1.0)
    made, plain = job.rows(), command_job(decoder, folder).rows()
    assert isinstance(plain, Rows)
    assert not isinstance(made, Rows)
    every = np.arange(len(rows))
    texts = [made(epoch).collate(every)["ids"].tolist() for epoch in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    assert plain.collate(every)["ids"].tolist() not in texts
    longest = int(job.train.lengths.max())
    short = command_job(decoder, folder, made_up=1.0, max_length=longest).rows()
    assert not isinstance(short, Rows)
    assert max(short(epoch).lengths.max() for epoch in range(9)) <= longest


def test_languages_keep_their_values(decoder: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{verb} {name}", "slots": {"name": name}, "intent": "call", "language": language}
        for verb, name, language in (
            ("call", "Bo", "en"),
            ("ruf", "Uwe", "de"),
            ("call", "Al", "en"),
        )
    ]
    folder = write_rows(tmp_path, train=rows, validation=rows)
    job = command_job(decoder, folder, slot_swap=1.0)
    assert {(row.language, row.text) for row in _epochs(job)} <= {
        ("en", "call Bo"), ("en", "call Al"), ("de", "ruf Uwe")
    }  # fmt: skip


def test_intents_keep_their_values(decoder: Path, tmp_path: Path) -> None:
    """`kind` alone tells the two apart: a value of the other intent would make a row wrong."""
    rows = [
        {"text": f"find the {kind}", "slots": {"kind": kind}, "intent": intent}
        for kind, intent in (
            ("movie times", "screening"),
            ("showings", "screening"),
            ("album", "work"),
            ("tv show", "work"),
        )
    ]
    folder = write_rows(tmp_path, train=rows, validation=rows)
    made = _epochs(command_job(decoder, folder, slot_swap=1.0))
    kinds = {
        intent: {r.text for r in made if r.label == intent} for intent in ("screening", "work")
    }
    assert {"find the movie times", "find the showings"} <= kinds["screening"]
    assert {"find the album", "find the tv show"} <= kinds["work"]
    assert "album" not in " ".join(kinds["screening"])
    assert "showings" not in " ".join(kinds["work"])


def test_losses_on_the_text_learn(decoder: Path, data: Path) -> None:
    """They reach the batches of both kinds of rows, and the gradient of the text's own tokens."""
    for swap in (0.0, 0.5):
        plain, more = (
            command_job(decoder, data, slot_swap=swap, **weights)
            for weights in ({}, {"early_intent": 0.2, "text_loss": 0.2})
        )
        losses = []
        for job in (plain, more):
            rows = job.rows()
            made = rows if isinstance(rows, Rows) else rows(0)
            losses.append(job.trainee(made.collate(np.arange(4))).item())
        assert losses[1] > losses[0] + 1


def _epochs(job: CommandJob) -> list[FrameRow]:
    rng = np.random.default_rng(0)
    return [swapped(row, slot_values(job.texts), rng) for _ in range(9) for row in job.texts]


# --- the loss ------------------------------------------------------------------------------------


def sequences() -> Sequences:
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, 384, n).astype(np.int32) for n in (9, 4, 12, 7)]
    return Sequences(ids, np.array([3, 1, 11, 5]), 0)


def logs_of(model: nn.Module, row: Any) -> Any:
    with torch.inference_mode():
        logits = model(torch.from_numpy(row.astype(np.int64))[None])[0].double().numpy()
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_the_tokens_that_count(smoothing: float) -> None:
    model, rows = init_decoder(SPEC, std=0.2), sequences()
    expected, expected_hits = [], []
    for row, start in zip(rows.ids, rows.starts, strict=True):
        logs, truth = logs_of(model, row)[start - 1 : -1], row[start:]
        likely = logs[np.arange(len(truth)), truth]
        smooth = (1 - smoothing) * likely + smoothing * logs.mean(axis=1)
        expected.append(-smooth.sum())
        expected_hits.append((logs.argmax(axis=1) == truth).sum())
    total = NextToken(model, smoothing)(rows.collate(np.arange(4)))
    assert total.item() == pytest.approx(sum(expected), rel=1e-5)
    if not smoothing:
        found = score_rows(model, rows)
        assert found.nll == pytest.approx(expected, rel=1e-5)
        assert found.hits.tolist() == expected_hits
        assert found.tokens.tolist() == [6, 3, 1, 2]


def test_many_logits_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = init_decoder(SPEC, std=0.2), sequences()
    losses, gradients, scores = [], [], []
    for values in (1 << 25, 384 * 5):
        monkeypatch.setattr(_sequences, "_LOGITS", values)
        model.zero_grad()
        loss = NextToken(model)(rows.collate(np.arange(4)))
        loss.backward()
        losses.append(loss.item())
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
        scores.append(score_rows(model, rows).nll)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_short_rows_in_bf16_have_the_loss_of_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute attention."""
    model, batch, losses = (
        NextToken(init_decoder(SPEC, std=0.2)),
        sequences().collate(np.arange(4)),
        [],
    )
    for short in (128, 0):
        monkeypatch.setattr(_sequences, "_SHORT", short)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] == pytest.approx(model(batch).item(), rel=2e-2)


def test_dropout_is_for_training_alone(decoder: Path, data: Path, tmp_path: Path) -> None:
    job = command_job(decoder, data, dropout=0.3)
    batch = job.train.collate(np.arange(4))
    plain = command_job(decoder, data).trainee(batch)
    with torch.no_grad():
        assert torch.equal(job.trainee.eval()(batch), plain)
        first, second = (job.trainee.train()(batch).item() for _ in range(2))
    assert first != second
    only = job.model.tokens(torch.zeros(100, dtype=torch.long))  # embeddings too
    assert 0.2 < (only == 0).float().mean() < 0.4
    finetune(decoder, config(data, epochs=0.2, dropout=0.3), tmp_path / "out")
    assert load_decoder(Checkpoint.open(tmp_path / "out")).spec == SPEC


# --- texts ---------------------------------------------------------------------------------------


def verses(count: int) -> list[dict[str, str]]:
    rng = random.Random(3)
    return [{"text": f"{rng.choice(THINGS)} in the {rng.choice(PLACES)}"} for _ in range(count)]


def test_it_learns_texts(decoder: Path, tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "data", train=verses(80), validation=verses(20))
    settings = config(folder, task="lm", epochs=8, max_length=24)
    told = Told()
    result = finetune(decoder, settings, tmp_path / "out", reporter=told)
    assert told.lines[0].startswith("80 training texts, 20 validation; ")
    losses = json.loads((tmp_path / "out" / "training.json").read_text())["losses"]
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5])
    assert 1 < result.validation["perplexity"].value < 6  # of 384 tokens
    nll = result.validation["nll"]
    assert np.exp(nll.value) == pytest.approx(result.validation["perplexity"].value)
    assert nll.low < nll.value < nll.high
    assert Checkpoint.open(tmp_path / "out").manifest.task == "lm"
    assert "log-likelihood" in result.model_dump_json() + (tmp_path / "out/loss.svg").read_text()


def test_texts_are_joined_and_cut(decoder: Path, tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "data", train=verses(9), validation=verses(2))
    settings = config(folder, task="lm", max_length=10)
    job = prepare_lm(Checkpoint.open(decoder), settings, read_lm(settings), Told())
    tokenizer = Tokenizer.load(decoder)
    stream = [t for row in verses(9) for t in [*tokenizer.encode_prompt(row["text"]), 1]]
    rows = [row.tolist() for row in job.train.ids]
    assert [len(row) for row in rows[:-1]] == [11] * (len(rows) - 1)
    assert rows[0][:1] + [token for row in rows for token in row[1:]] == stream
    assert [row[0] for row in rows[1:]] == [row[-1] for row in rows[:-1]]
    assert job.train.starts.tolist() == [1] * len(rows)


@pytest.mark.parametrize("template", [True, False])
def test_answers_to_sources(decoder: Path, tmp_path: Path, template: bool) -> None:
    model = tmp_path / "model"
    ckpt = Checkpoint.open(decoder)
    save_decoder(load_decoder(ckpt), model, source=ckpt, manifest=Manifest())
    if not template:
        (model / "chat_template.jinja").unlink()
    rows = [
        {"source": "the lamp", "target": "the fan"},
        {"source": "hall " * 99, "target": "bath"},
        {"source": "hall", "target": "bath " * 99},
    ]
    folder = write_rows(tmp_path / "data", train=rows, validation=rows)
    settings, told = config(folder, task="lm", max_length=20), Told()
    job = prepare_lm(Checkpoint.open(model), settings, read_lm(settings), told)
    assert told.lines[0].endswith("in 3 rows of at most 20, 2 of them cut")
    tokenizer = Tokenizer.load(decoder)
    source = "[gMASK]<sop><|user|>\nthe lamp<|assistant|>\n" if template else "the lamp\n"
    before = tokenizer.encode_prompt(source)
    assert job.train.ids[0].tolist() == [*before, *tokenizer.encode_prompt("the fan"), 1]
    assert job.train.starts[0] == len(before)
    assert [len(row) for row in job.train.ids[1:]] == [21, 21]
    assert job.train.ids[1][job.train.starts[1] :].tolist() == [*tokenizer.encode_prompt("bath"), 1]
    assert job.train.starts[2] == 1  # the last token of the prompt stays


def test_a_template_gets_the_special_tokens(decoder: Path, tmp_path: Path) -> None:
    """As `run` gives them to it."""
    model = tmp_path / "model"
    ckpt = Checkpoint.open(decoder)
    save_decoder(load_decoder(ckpt), model, source=ckpt, manifest=Manifest())
    (model / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}")
    rows = [{"source": "the lamp", "target": "the fan"}]
    settings = config(write_rows(tmp_path / "data", train=rows, validation=rows), task="lm")
    job = prepare_lm(Checkpoint.open(model), settings, read_lm(settings), Told())
    tokenizer = Tokenizer.load(model)
    eos = tokenizer.inner.token_to_id(tokenizer.special_tokens["eos_token"])
    assert job.train.ids[0].tolist()[: int(job.train.starts[0])] == [
        eos,
        *tokenizer.encode_prompt("the lamp", special=False),
    ]


# --- adapters, stored types ----------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, 4])
def test_what_is_stored_is_what_was_validated(
    decoder: Path, data: Path, tmp_path: Path, lora: int | None
) -> None:
    """A bf16 model is written as bf16, and scored as it is written."""
    ckpt, source = Checkpoint.open(decoder), tmp_path / "bf16"
    save_decoder(load_decoder(ckpt), source, source=ckpt, manifest=Manifest(), dtype=torch.bfloat16)
    settings = config(data, epochs=4, lora=lora)
    result = finetune(source, settings, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    assert {info.dtype for info in written.tensors.values()} == {"BF16"}
    assert written.tensors.keys() == ckpt.tensors.keys()
    job = prepare_command(written, config(data), read_commands(settings), Told())
    assert job.metrics()["nll"].value == pytest.approx(result.validation["nll"].value, rel=1e-6)
    losses = json.loads((tmp_path / "out" / "training.json").read_text())["losses"]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    old = Checkpoint.open(source)
    embedding = "model.embed_tokens.weight"
    kept = written.read(embedding)[: Tokenizer.load(source).size]
    changed = {
        name
        for name in old.tensors
        if name != embedding and (old.read(name) != written.read(name)).any()
    }
    linear = {n for n, i in old.tensors.items() if "layers" in n and len(i.shape) == 2}
    assert changed == (linear if lora else set(old.tensors) - {embedding})
    assert (kept == old.read(embedding)[: len(kept)]).all() == bool(lora)


def test_adapters_alone_are_kept_and_resumed(decoder: Path, data: Path, tmp_path: Path) -> None:
    settings, out = config(data, epochs=2, lora=2, lora_alpha=3.0), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        finetune(decoder, settings, out, reporter=Told(stop_at=7))
    state = torch.load(tmp_path / "out.partial" / CHECKPOINT, weights_only=True)
    # Two for each of six linear layers in two blocks; and the rows of the new tokens.
    assert len(state["model"]) == len(state["optimizer"]["state"]) == 2 * 2 * 6 + 1
    assert all(name.endswith((".down", ".up", ".rows")) for name in state["model"])
    told = Told()
    result = finetune(decoder, settings, out, reporter=told)
    assert "resuming at step 7 of 10" in told.lines
    learned = sum(t.numel() for t in state["model"].values())
    assert result.trained_parameters == learned < result.parameters
    assert f"adapters: {learned:,} parameters learn" in told.lines[2]
    finetune(decoder, settings, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_an_encoder_with_adapters(tmp_path: Path, data: Path, decoder: Path) -> None:
    encoder, tokenizer = tmp_path / "encoder", Tokenizer.load(decoder)
    spec = EncoderSpec(384, 32, 1, 2, 32, max_position_embeddings=64)
    save_encoder(init_encoder(spec), encoder, source=None, labels=[], manifest=Manifest())
    tokenizer.inner.save(str(encoder / "tokenizer.json"))
    old = Checkpoint.open(encoder)
    finetune(encoder, config(data, task="intent", epochs=1, lora=2), tmp_path / "out")
    new = Checkpoint.open(tmp_path / "out")
    same = {n for n in old.tensors if np.array_equal(old.read(n), new.read(f"bert.{n}"))}
    assert {n for n in old.tensors if "weight" in n} - same == {
        n for n, i in old.tensors.items() if ".layer." in n and len(i.shape) == 2
    }
    assert new.tensors["classifier.weight"].shape == (3, 32)


# --- refusals, the command -----------------------------------------------------------------------


def test_tasks_and_kinds_of_model(decoder: Path, data: Path, tmp_path: Path) -> None:
    spec = EncoderSpec(384, 16, 1, 2, 16)
    encoder, out = tmp_path / "encoder", tmp_path / "out"
    save_encoder(init_encoder(spec), encoder, source=None, labels=[], manifest=Manifest())
    with pytest.raises(UsageError, match="of kind decoder, the task 'intent'") as caught:
        finetune(decoder, config(data, task="intent"), out)
    assert "train it for lm, command" in caught.value.hint
    for task in ("command", "lm"):
        with pytest.raises(UsageError, match=f"of kind encoder, the task '{task}'") as caught:
            finetune(encoder, config(data, task=task), out)
        assert "train it for intent" in caught.value.hint
    assert not out.exists()


def test_what_cannot_be_trained(decoder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="--max-length 65 is more than this model's 64"):
        finetune(decoder, config(data, max_length=65), out)
    with pytest.raises(UsageError, match="--max-length 65 is more than this model's 64"):
        finetune(decoder, config(data, task="lm", max_length=65), out)
    with pytest.raises(UsageError, match="--lora 25 is more than the rank"):
        finetune(decoder, config(data, lora=25), out)
    only = write_rows(tmp_path / "only", train=commands(), validation=[])
    for task in ("command", "lm"):
        with pytest.raises(DataError):
            finetune(decoder, config(only, task=task), out)
    endless = tmp_path / "endless"
    model = load_decoder(Checkpoint.open(decoder))
    model.spec = replace(SPEC, eos_ids=())
    save_decoder(model, endless, source=Checkpoint.open(decoder), manifest=Manifest())
    with pytest.raises(CheckpointError, match="names no end-of-text token"):
        finetune(endless, config(data), out)
    bare = tmp_path / "bare"
    save_decoder(model, bare, source=None, manifest=Manifest())
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        finetune(bare, config(data), out)
    assert not out.exists()


def test_init_and_train_from_the_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> None:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        assert not stop.value.code

    model, out = tmp_path / "nano", tmp_path / "out"
    run("init", "autoglm-nano", "--tokenizer-data", data, "--vocab-size", 384, "--out", model)
    train = ["train", model, "--task", "command", "--data", data, "--out", out]
    capsys.readouterr()
    run(*train, "--epochs", 0.3, "--augment", 0.5, "--dropout", 0.1, "--lora", 2, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 1
    assert printed["validation"]["exact_match"]["n"] == 17
    assert printed["trained_parameters"] < printed["parameters"]
    settings = Checkpoint.open(out).manifest.lineage[-1].settings
    assert (settings["slot_swap"], settings["dropout"], settings["lora"]) == (0.5, 0.1, 2)
    run(*train, "--epochs", 0.3, "--augment", 0.5, "--dropout", 0.1, "--lora", 2)
    printed_words = capsys.readouterr().out
    assert "exact_match" in printed_words
    assert "already done" in printed_words
