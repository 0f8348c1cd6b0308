"""The task `command` on a tiny decoder, its metrics, and the nearest-neighbour baseline."""

from __future__ import annotations

import json
import random
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from oracles.slot_f1 import slot_scores
from tiny_decoder import save_tiny_decoder

from pocketglm.artifacts.manifest import CommandGrammar, Manifest, write_json
from pocketglm.contracts import DataOptions, DecoderSession, RunOptions
from pocketglm.data.frames import FrameRow, action, grammar_of, read_frames
from pocketglm.data.tokenizer_training import byte_tokenizer, save_chat_tokenizer
from pocketglm.errors import DataError, UsageError
from pocketglm.eval._evaluate import evaluate
from pocketglm.eval._nearest import nearest_frames
from pocketglm.eval.command import command_scores, parse, read_grammar
from pocketglm.runtimes import open_decoder
from pocketglm.text.frame import (
    INSIDE,
    OUT,
    Frame,
    FrameTokens,
    intent_mark,
    mark_names,
    read,
    slot_mark,
)
from pocketglm.text.tokenizer import Tokenizer

ONE = RunOptions(threads=1)
VOCABULARY = 288
ROWS = [
    {
        "text": "play Yesterday by Ann",
        "slots": {"song": "Yesterday", "artist": "Ann"},
        "intent": "play",
    },
    {"text": "play some jazz", "slots": {"genre": "jazz"}, "intent": "play"},
    {"text": "stop it", "slots": {}, "intent": "stop"},
    {"text": "wake me at 7 am", "slots": {"time": "7 am"}, "intent": "alarm_set"},
]


def save_model(folder: Path, grammar: CommandGrammar | None, positions: int = 128) -> Path:
    """A random decoder whose tokens are bytes and the grammar's marks."""
    tokenizer = byte_tokenizer()
    if grammar:
        tokenizer.add_special_tokens(mark_names(grammar))
    save_tiny_decoder(
        folder, "llama", vocab_size=VOCABULARY, max_position_embeddings=positions,
        eos_token_id=[1, 5], bos_token_id=None,
    )  # fmt: skip
    save_chat_tokenizer(tokenizer, folder, positions)
    write_json(folder / "pocketglm.json", Manifest(command=grammar))
    return folder


def save_rows(folder: Path) -> DataOptions:
    folder.mkdir(exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return DataOptions(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    return save_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: DataOptions) -> Path:
    grammar = grammar_of(read_frames(data, "test"))
    return save_model(tmp_path_factory.mktemp("model"), grammar)


def load(folder: Path) -> tuple[DecoderSession, FrameTokens]:
    return open_decoder(folder, ONE), FrameTokens(read_grammar(folder), Tokenizer.load(folder))


WORDS = [
    [" a", " b", " c"], [" xy", " qz", ",", " z"], [" EF"], [" 7", " 9"], [" m", "'", "n"],
    ["去", "北", "京", "西"], [" 9", "pm"],
]  # fmt: skip


def every_answer(grammar: CommandGrammar, words: list[str]) -> list[list[str]]:
    """All answers to a text of these words (with their blanks): marks and words in turn."""
    found = []
    for intent, slots in grammar.intents.items():
        choices = [OUT, INSIDE, *map(slot_mark, slots)]
        for marks in product(choices, repeat=len(words)):
            before = (OUT, *marks)
            if all(a != INSIDE or b != OUT for a, b in zip(marks, before, strict=False)):
                parts = [part for pair in zip(words, marks, strict=True) for part in pair]
                found.append([intent_mark(intent), *parts])
    return found


def greedy(
    session: DecoderSession, tokenizer: Tokenizer, words: list[str], left: list[list[str]]
) -> Frame:
    """Of the answers `left` the one that a greedy choice, token by token, ends up with."""
    encode = tokenizer.inner.encode
    ids = encode("".join(words) + "\n").ids
    answers = {"".join(parts): [t for part in parts for t in encode(part).ids] for parts in left}
    while len(answers) > 1:
        logits = session.score(ids)[-1]
        best = max({tokens[0] for tokens in answers.values()}, key=lambda token: logits[token])
        answers = {text: tokens[1:] for text, tokens in answers.items() if tokens[0] == best}
        ids.append(best)
    return read(*answers)


def test_parsing_is_a_greedy_choice_among_the_frames_of_the_text(tmp_path: Path) -> None:
    grammar = CommandGrammar(intents={"play": ["x", "by"], "stop": [], "go": ["to", "x"]})
    session, tokens = load(save_model(tmp_path / "model", grammar))
    tokenizer = Tokenizer.load(tmp_path / "model")
    seen = set()
    for words in WORDS:
        line = "".join(words)
        found = parse(session, tokens, line)
        assert found == greedy(session, tokenizer, words, every_answer(grammar, words))
        assert parse(session, tokens, f"{line}\n") == found  # whatever came before
        seen.add((found.intent, tuple(name for name, _ in found.slots)))
    assert len(seen) > 2
    assert len({intent for intent, _ in seen}) > 1


def test_the_task_scores_a_model_and_tells_actions(model: Path, data: DataOptions) -> None:
    scores, result = evaluate(model, "command", data, options=ONE)
    assert result.primary == scores.primary == "exact_match"
    session, tokens = load(model)
    frames = [parse(session, tokens, str(row["text"])) for row in ROWS]
    rows = read_frames(data, "test")
    right = [row.frame.intent == frame.intent for row, frame in zip(rows, frames, strict=True)]
    assert result.metrics["intent_accuracy"].value == np.mean(right)
    assert result.metrics["intent_accuracy"].n == 4
    assert scores.predictions == [action(frame.intent, frame.slots) for frame in frames]
    assert scores.gold[3] == 'do(action="SetAlarm", time="7 am")'
    assert scores.texts[0] == "play Yesterday by Ann"
    assert all(text.startswith("do(action=") for text in scores.predictions)
    assert scores.truncated == 0
    for row, frame in zip(rows, frames, strict=True):
        assert all(name in tokens.grammar.intents[frame.intent] for name, _ in frame.slots)
        assert all(value in row.text for _, value in frame.slots)


def test_long_texts_are_cut_and_counted(tmp_path: Path, model: Path) -> None:
    session, tokens = load(model)
    long = "play " + "la " * 200
    frame = parse(session, tokens, long)
    assert frame.intent in tokens.grammar.intents
    # " play" has 5 bytes, each " la" 3; each word comes twice and has a mark.
    fits = "play" + " la" * ((128 - 2 - 11) // 7)
    assert frame == parse(session, tokens, fits)
    assert tokens.length(fits) <= 128 < tokens.length(fits + " la")
    assert 120 < session.length <= 128
    (tmp_path / "test.jsonl").write_text(
        "".join(
            json.dumps({"text": text, "slots": {}, "intent": "stop"}) + "\n"
            for text in (long, "stop", "stop it", " stop ")
        )
    )
    _, result = evaluate(model, "command", DataOptions(tmp_path), options=ONE)
    assert result.truncated == 0.25
    _, short = evaluate(model, "command", DataOptions(tmp_path), max_length=13, options=ONE)
    assert short.truncated == 0.5
    assert parse(session, tokens, "stop it now", 13) == parse(session, tokens, "stop", 13)
    start = time.perf_counter()
    parse(session, tokens, "la " * 10_000)
    assert time.perf_counter() - start < 5  # 0.3 s on an idle core


def test_lengths_without_room_are_refused(model: Path) -> None:
    session, tokens = load(model)
    with pytest.raises(UsageError, match="--max-length 129 is more than this model's 128"):
        parse(session, tokens, "stop", 129)
    with pytest.raises(UsageError, match="a length of 12 tokens has no room for a command") as e:
        parse(session, tokens, "stop", 12)
    assert "--max-length" in e.value.hint
    assert parse(session, tokens, "stop", 13).intent in tokens.grammar.intents
    nothing = parse(session, tokens, " ")
    assert nothing.intent in tokens.grammar.intents
    assert nothing.slots == ()


def test_models_and_data_that_do_not_fit_are_refused(
    tmp_path: Path, model: Path, data: DataOptions
) -> None:
    plain = save_model(tmp_path / "plain", None)
    with pytest.raises(UsageError, match="was not trained for commands") as error:
        evaluate(plain, "command", data, options=ONE)
    assert "--task command" in error.value.hint
    other = save_model(tmp_path / "other", CommandGrammar(intents={"play": ["song"]}))
    with pytest.raises(
        DataError, match=r"2 label\(s\) that the model was not trained on: 'alarm_set'"
    ):
        evaluate(other, "command", data, options=ONE)
    with pytest.raises(UsageError, match="the task 'intent' is for kind encoder") as error:
        evaluate(model, "intent", data, options=ONE)
    assert "command" in error.value.hint
    with pytest.raises(UsageError, match="the task 'command' compares no two models") as error:
        evaluate(model, "command", data, options=ONE, baseline=model)
    assert "lm" in error.value.hint
    with pytest.raises(DataError, match="not valid Unicode"):
        parse(*load(model), "\ud800")


# --- metrics -------------------------------------------------------------------------------------


def row(intent: str, *slots: tuple[str, str], action: str = "") -> FrameRow:
    return FrameRow("", Frame(intent, slots), (), action or f'do(action="{intent}")')


def test_metrics_count_intents_slots_and_actions() -> None:
    gold = [
        row("a", ("x", "1"), ("y", "2")),
        row("a", ("x", "1"), ("x", "1")),
        row("b"),
        row("c", ("z", "3  4")),
    ]
    said = [
        Frame("a", (("y", "2"), ("x", "1"))),  # order does not matter
        Frame("a", (("x", "1"),)),  # one of two
        Frame("b"),
        Frame("b", (("z", "3 4"), ("z", "5"))),
    ]
    scores = command_scores(gold, said)
    value = {name: metric.value for name, metric in scores.metrics.items()}
    assert value["exact_match"] == 0.5
    assert value["intent_accuracy"] == 0.75
    assert value["slot_precision"] == pytest.approx(4 / 5)
    assert value["slot_recall"] == pytest.approx(4 / 5)
    assert value["slot_f1"] == pytest.approx(4 / 5)
    np.testing.assert_array_equal(scores.rows["exact_match"], [1, 0, 1, 0])
    assert scores.predictions[1] == 'do(action="a", x="1")'
    f1 = scores.metrics["slot_f1"]
    assert f1.low < f1.value < f1.high
    # Only row b states the action that it would have here.
    assert scores.metrics["action_match"].n == 1
    assert value["action_match"] == 1.0


def test_metrics_without_slots_or_actions_are_left_out() -> None:
    scores = command_scores([row("a", action="A!")], [Frame("a")])
    assert set(scores.metrics) == {"exact_match", "intent_accuracy"}
    none = command_scores([row("a", ("x", "1"))], [Frame("a")]).metrics
    assert "slot_precision" not in none
    assert none["slot_f1"].value == none["slot_recall"].value == 0
    perfect = command_scores([row("a", ("x", "1"))] * 30, [Frame("a", (("x", "1"),))] * 30).metrics
    assert (perfect["slot_f1"].value, perfect["slot_f1"].high) == (1.0, 1.0)
    assert perfect["slot_f1"].low == pytest.approx(0.9)  # the rule of three
    with pytest.raises(ValueError, match="shorter"):
        command_scores([row("a")], [])


def test_slot_scores_are_those_of_the_oracle_where_words_are_distinct() -> None:
    rng = random.Random(3)
    gold, said, gold_tags, said_tags = [], [], [], []
    for _ in range(200):
        words = rng.sample([f"w{i}" for i in range(50)], 8)
        true = tags(rng, 8)
        guess = true if rng.random() < 0.5 else tags(rng, 8)
        gold_tags.append(true)
        said_tags.append(guess)
        gold.append(row("a", *slots_of(words, true)))
        said.append(Frame("a", slots_of(words, guess)))
    metrics = command_scores(gold, said).metrics
    expected = slot_scores(gold_tags, said_tags)
    names = ("slot_precision", "slot_recall", "slot_f1")
    np.testing.assert_allclose([metrics[name].value for name in names], expected, rtol=1e-12)
    assert 0.4 < expected[2] < 0.9


def tags(rng: random.Random, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        name = rng.choice("xyz")
        length = rng.randint(1, 3)
        piece = ["O"] if rng.random() < 0.5 else [f"B-{name}", *[f"I-{name}"] * (length - 1)]
        found += piece
    return found[:count]


def slots_of(words: list[str], tagged: list[str]) -> tuple[tuple[str, str], ...]:
    slots: list[tuple[str, list[str]]] = []
    for word, tag in zip(words, tagged, strict=True):
        if tag.startswith("B-"):
            slots.append((tag[2:], [word]))
        elif tag.startswith("I-"):
            slots[-1][1].append(word)
    return tuple((name, " ".join(value)) for name, value in slots)


# --- the baseline --------------------------------------------------------------------------------


def test_the_nearest_command_lends_its_intent_and_slots(data: DataOptions) -> None:
    train = read_frames(data, "test")
    texts = [
        "please play Yesterday by Ann",  # known values
        "play Imagine by John Lennon",  # unknown ones, between the neighbour's words
        "stop it now",
        "wake me at 8 pm",
        "Ann",  # no slot of the neighbour fits twice
    ]
    found = nearest_frames(train, texts)
    assert found[0] == Frame("play", (("song", "Yesterday"), ("artist", "Ann")))
    assert found[1] == Frame("play", (("song", "Imagine"), ("artist", "John Lennon")))
    assert found[2] == Frame("stop")
    assert found[3] == Frame("alarm_set", (("time", "8 pm"),))
    assert found[4] == Frame("play", (("artist", "Ann"),))
    assert nearest_frames(train, [row.text for row in train]) == [row.frame for row in train]
    assert nearest_frames(train, ["", "???"])[0].intent in {"play", "stop", "alarm_set"}
    with pytest.raises(DataError, match="no training command"):
        nearest_frames([], ["play"])


def test_the_baseline_on_unseen_phrasings_is_weak_but_no_chance() -> None:
    options = DataOptions(Path("commands-en"))
    test = read_frames(DataOptions(Path("commands-en"), limit=150), "test")
    scores = command_scores(
        test, nearest_frames(read_frames(options, "train"), [r.text for r in test])
    )
    assert 0.3 < scores.metrics["intent_accuracy"].value < 0.7
    assert scores.metrics["exact_match"].value < 0.5
