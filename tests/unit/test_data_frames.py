"""Commands with intent and slots: BIO files, slots by name, the embedded set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pocketglm.contracts import DataOptions
from pocketglm.data import commands
from pocketglm.data.frames import FrameRow, action, grammar_of, read_frames
from pocketglm.data.readers import Split, read_split
from pocketglm.errors import DataError
from pocketglm.text.frame import Frame, is_boundary, read, write

Row = Mapping[str, Any]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def folder(root: Path, *rows: Row) -> DataOptions:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "test.jsonl").write_text(lines, encoding="utf-8")
    return DataOptions(root)


def one(root: Path, row: Row) -> FrameRow:
    (found,) = read_frames(folder(root, row), "test")
    return found


def test_bio_tags_give_slots_and_their_places(tmp_path: Path) -> None:
    row = one(
        tmp_path,
        {
            "tokens": ["wake", "Ann", "Lee", "Bo", "at", "7", "!"],
            "slots": ["O", "B-who", "I-who", "B-who", "O", "B-time", "O"],
            "intent": "alarm",
        },
    )
    assert row.text == "wake Ann Lee Bo at 7 !"
    assert row.frame == Frame("alarm", (("who", "Ann Lee"), ("who", "Bo"), ("time", "7")))
    assert row.spans == ((5, 12), (13, 15), (19, 20))
    assert [row.text[a:b] for a, b in row.spans] == [value for _, value in row.frame.slots]
    assert row.action == 'do(action="alarm", who=["Ann Lee", "Bo"], time="7")'
    assert (row.label, row.language) == ("alarm", "")


def test_chinese_characters_are_joined_without_blanks(tmp_path: Path) -> None:
    row = one(
        tmp_path,
        {"tokens": list("客厅23度"), "slots": ["B-a", "I-a", "B-t", "I-t", "O"], "intent": "x"},
    )
    assert row.text == "客厅23度"
    assert row.frame.slots == (("a", "客厅"), ("t", "23"))
    few = ["find", "PlayStation", "官", "方", "a", "song"]
    row = one(tmp_path, {"tokens": few, "slots": ["O"] * 6, "intent": "x"})
    assert row.text == "find PlayStation 官 方 a song"


@pytest.mark.parametrize(
    "slots",
    [
        {"to": "Bo", "at": "7", "on": "May 7"},
        [["on", "May 7"], ["at", "7"], ["to", "Bo"]],
        {"on": ["May 7"], "to": "Bo", "at": "7"},
    ],
)
def test_slots_by_name_are_put_in_the_order_of_the_text(tmp_path: Path, slots: Any) -> None:
    text = " tell Bob and Bo\non May 7 at 7 "
    row = one(tmp_path, {"text": text, "slots": slots, "label": "say", "language": "en"})
    assert row.text == "tell Bob and Bo on May 7 at 7"
    assert row.frame.slots == (("to", "Bo"), ("on", "May 7"), ("at", "7"))
    assert [row.text[a:b] for a, b in row.spans] == ["Bo", "May 7", "7"]
    assert row.spans[0] == (13, 15)  # not the one within Bob
    assert row.language == "en"


def test_rows_may_have_no_slots_and_an_action_of_their_own(tmp_path: Path) -> None:
    row = one(tmp_path, {"text": "stop", "slots": {}, "intent": "halt", "action": "HALT"})
    assert (row.frame, row.spans, row.action) == (Frame("halt"), (), "HALT")
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.csv").write_text('text,slots,label\nat 7,"{""t"": ""7""}",x\nstop,,y\n')
    rows = read_frames(DataOptions(tmp_path), "test")
    assert [row.frame for row in rows] == [Frame("x", (("t", "7"),)), Frame("y")]


BAD: list[tuple[Row, str]] = [
    ({"tokens": ["a", "b"], "slots": ["O", "I-x"]}, r"token 2 has the tag 'I-x', and no x goes on"),
    ({"tokens": ["a", "b"], "slots": ["B-y", "I-x"]}, "token 2 has the tag 'I-x', and no x"),
    ({"tokens": ["a", "b"], "slots": ["O", "S-x"]}, "token 2 has the tag 'S-x'"),
    ({"tokens": ["a", "b"], "slots": ["O", "B-"]}, "token 2 has the tag 'B-'"),
    ({"tokens": ["a", "b"], "slots": ["O"]}, "2 tokens and 1 tags"),
    ({"tokens": ["a", " "], "slots": ["O", "O"]}, r'the tokens are \["a", " "\]'),
    ({"text": "a b", "slots": ["O", "O"]}, "BIO tags, and the tokens are null"),
    ({"text": "a b"}, "no column 'slots'"),
    ({"text": "a b", "slots": 3}, "the slots are 3"),
    ({"text": "a b", "slots": [["x"]]}, r"the slots are \[\["),
    ({"text": "a b", "slots": "{"}, "which is no JSON"),
    ({"text": "a b", "slots": {"x": 3}}, r'slot "x" has the value 3'),
    ({"text": "a b", "slots": {"x": " "}}, r'slot "x" has the value " "'),
    ({"text": "a b", "slots": [[1, "a"]]}, r'slot 1 has the value "a"'),
    ({"text": "a b", "slots": {"x": "c"}}, "value of slot 'x', 'c', is not in the text 'a b'"),
    ({"text": "an apple", "slots": {"x": "app"}}, "'app', is within a word of the text"),
    ({"text": "a b c", "slots": {"x": "a b", "y": "b"}}, "slot 'y', 'b', overlaps with another"),
    ({"text": "a b", "slots": {"x|y": "a"}}, r"the slot 'x\|y' cannot be written"),
    ({"tokens": ["a"], "slots": ["B-x|"]}, r"the slot 'x\|' cannot be written"),
    ({"tokens": [*"北京天a", "b"], "slots": [*"OOO", "B-x", "O"]}, "'a', is within a word of the"),
    ({"tokens": [*"北京天1", "2"], "slots": [*"OOOO", "B-x"]}, "'2', is within a word of the text"),
    ({"text": "a b", "slots": {"x\n": "a"}}, r"the slot 'x\\n' cannot be written"),
    ({"text": "a b", "slots": {"": "a"}}, "the slot '' cannot be written"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: Row, message: str) -> None:
    good: Row = {"text": "hi", "slots": {}, "intent": "x"}
    if "tokens" in row:
        good = {"tokens": ["hi"], "slots": ["O"], "intent": "x"}
    options = folder(tmp_path, good, {"intent": "x", **row})
    with pytest.raises(DataError, match=rf"test\.jsonl:2: .*{message}") as error:
        read_frames(options, "test")
    assert error.value.hint


def test_intents_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for intent in ("a\nb", "a|b", "|>", "\ud800"):
        with pytest.raises(DataError, match=r"the intent '.+' cannot be written"):
            one(tmp_path, {"text": "hi", "slots": {}, "intent": intent})


def test_names_may_hold_other_signs(tmp_path: Path) -> None:
    row = one(tmp_path, {"text": "hi ho", "slots": {"x=y <a>": "ho"}, "intent": "a=b:c d 天"})
    assert read(write(row.text, row.frame, row.spans)) == row.frame
    assert row.frame == Frame("a=b:c d 天", (("x=y <a>", "ho"),))


def test_a_single_file_is_divided_as_for_labels(tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    rows = [{"text": f"play number {i}", "slots": {"n": str(i)}, "intent": "p"} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(file)
    for split in SPLITS:
        frames = read_frames(options, split, training=True)
        texts = [row.text for row in read_split(options, split, training=True)]
        assert [row.text for row in frames] == texts
        assert 0 < len(frames) < 60
    assert len(read_frames(options, "test")) == 60
    held_out = DataOptions(file, divided_by=("text", "intent"))
    assert len(read_frames(held_out, "test")) == len(read_frames(options, "test", training=True))
    assert len(read_frames(DataOptions(file, limit=7), "test")) == 7


def test_the_embedded_commands_are_frames() -> None:
    rows = read_frames(DataOptions(Path("commands")), "test")
    made = commands.generate("test", "both")
    assert [(r.text, r.action, r.language) for r in rows] == [
        (c.text, c.action, c.language) for c in made
    ]
    for row, command in zip(rows, made, strict=True):
        assert dict(row.frame.slots) == command.slots
        assert [row.text[a:b] for a, b in row.spans] == [value for _, value in row.frame.slots]
        assert all(is_boundary(row.text, i) for span in row.spans for i in span)
        assert row.action == action(row.frame.intent, row.frame.slots)
        assert read(write(row.text, row.frame, row.spans)) == row.frame


def test_the_grammar_holds_every_intent_with_its_slots(tmp_path: Path) -> None:
    rows = read_frames(
        folder(
            tmp_path,
            {"text": "b 1", "slots": {"n": "1"}, "intent": "b"},
            {"text": "b x", "slots": {"m": "x"}, "intent": "b"},
            {"text": "a", "slots": {}, "intent": "a"},
        ),
        "test",
    )
    assert grammar_of(rows).intents == {"a": [], "b": ["m", "n"]}


def test_actions_are_those_of_the_phone_or_name_the_intent() -> None:
    assert action("app_open", [("app", "Maps")]) == 'do(action="Launch", app="Maps")'
    assert action("oos", []) == 'finish(message="out of scope")'
    assert action("GetWeather", [("city", "北京")]) == 'do(action="GetWeather", city="北京")'
    assert action("Play", [("by", "A"), ("by", 'B"')]) == r'do(action="Play", by=["A", "B\""])'


@pytest.mark.parametrize(
    ("name", "intents", "slots"),
    [("snips", 7, 39), ("ha_intents_en", 33, 22), ("ha_intents_zh", 25, 17)],
)
def test_the_shared_sets_are_read(shared_data: Path, name: str, intents: int, slots: int) -> None:
    options = DataOptions(shared_data / name)
    rows = [row for split in SPLITS for row in read_frames(options, split)]
    grammar = grammar_of(rows).intents
    assert len(grammar) == intents
    assert len({name for names in grammar.values() for name in names}) == slots
    texts = [row.text for split in SPLITS for row in read_split(options, split)]
    assert [row.text for row in rows] == texts
    for row in rows:
        assert read(write(row.text, row.frame, row.spans)) == row.frame
        assert [row.text[a:b] for a, b in row.spans] == [value for _, value in row.frame.slots]
