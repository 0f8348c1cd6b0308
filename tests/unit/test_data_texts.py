"""Texts for a language model, and for training its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketglm.contracts import DataOptions
from pocketglm.data.commands import generate
from pocketglm.data.frames import read_frames
from pocketglm.data.texts import TextRow, read_text_rows, vocabulary_texts
from pocketglm.errors import DataError
from pocketglm.stages.init import init
from pocketglm.text.frame import prompt
from pocketglm.text.tokenizer import Tokenizer


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def test_plain_texts(tmp_path: Path) -> None:
    write_rows(tmp_path / "test.jsonl", [{"text": "one"}, {"text": "two\nlines"}])
    rows = read_text_rows(DataOptions(tmp_path), "test")
    assert rows == [TextRow("one"), TextRow("two\nlines")]
    file = tmp_path / "rows.csv"
    file.write_text("poem,label\nmoon,1\nsun,2\n")
    assert read_text_rows(DataOptions(file, text_column="poem"), "test")[1] == TextRow("sun")
    with pytest.raises(DataError, match="no column 'text'"):
        read_text_rows(DataOptions(file), "test")


def test_blank_texts_are_no_rows(tmp_path: Path) -> None:
    """As those between the paragraphs of a corpus."""
    rows = [{"text": t} for t in ("", " ", "one", "\t \n", "two ")]
    file = write_rows(tmp_path / "a.jsonl", rows)
    assert read_text_rows(DataOptions(file), "test") == [TextRow("one"), TextRow("two ")]
    for bad, message in (({"label": "x"}, ":6: no column 'text'"), ({"text": 3}, ":6: .* is 3")):
        with pytest.raises(DataError, match=message):
            read_text_rows(DataOptions(write_rows(tmp_path / "b.jsonl", [*rows, bad])), "test")


def test_sources_and_targets(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"source": "Hi.", "target": "嗨。", "by": 1}])
    assert read_text_rows(DataOptions(file), "test") == [TextRow("嗨。", "Hi.")]
    column = DataOptions(file, text_column="target")
    assert read_text_rows(column, "test") == [TextRow("嗨。")]
    broken = write_rows(tmp_path / "b.jsonl", [{"source": "Hi.", "target": "x"}, {"source": "Ho."}])
    with pytest.raises(DataError, match="no column 'target'"):
        read_text_rows(DataOptions(broken), "test")


def test_lines_of_a_text_file_are_divided(tmp_path: Path) -> None:
    file = tmp_path / "verse.txt"
    lines = [f"line {n}" for n in range(200)]
    file.write_text("\n".join(lines))
    options = DataOptions(file)
    assert [row.text for row in read_text_rows(options, "test")] == lines
    parts = [
        {row.text for row in read_text_rows(options, split, training=True)}
        for split in ("train", "validation", "test")
    ]
    assert set.union(*parts) == set(lines)
    assert sum(map(len, parts)) == 200
    assert min(map(len, parts)) > 5


def test_the_embedded_set_is_text_too() -> None:
    rows = read_text_rows(DataOptions(Path("commands-zh"), limit=7), "validation")
    assert len(rows) == 7
    assert {row.text for row in rows} <= {row.text for row in generate("validation", "zh")}


def test_what_a_tokenizer_learns_from(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\n")
    assert vocabulary_texts(file) == ["one", "two"]
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"source": "Hi.", "target": "嗨。"}])
    assert vocabulary_texts(pairs) == ["Hi.", "嗨。"]
    frame = {"text": "wake me at 7", "slots": {"time": "7"}, "intent": "alarm"}
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [frame])
    write_rows(folder / "test.jsonl", [{**frame, "text": "secret 7"}])
    assert vocabulary_texts(folder) == [" wake me at 7\n"]
    with pytest.raises(DataError, match="nothing-here"):
        vocabulary_texts(tmp_path / "nothing-here.jsonl")


def test_a_tokenizer_learns_from_training_commands_alone(tmp_path: Path) -> None:
    file = tmp_path / "all.csv"
    lines = [f"play number {n},p,n={n}" for n in range(60)]
    file.write_text("text,intent,slots\n" + "".join(_csv(*line.split(",")) for line in lines))
    texts = vocabulary_texts(file)
    rows = read_frames(DataOptions(file), "train", training=True)
    assert texts == [f" {row.text}\n" for row in rows]
    assert 30 < len(texts) < 60
    made = generate("train", "zh")
    assert len(vocabulary_texts(Path("commands-zh"))) == len(made)
    assert vocabulary_texts(Path("commands-zh"))[0] == prompt(made[0].text)


def _csv(text: str, intent: str, slot: str) -> str:
    name, value = slot.split("=")
    return f'{text},{intent},"{{""{name}"": ""{value}""}}"\n'


def test_a_tokenizer_for_the_embedded_commands(tmp_path: Path) -> None:
    """Few tokens a word; the same request is done."""
    out = tmp_path / "nano"
    result = init("autoglm-nano", out, tokenizer_data=Path("commands-en"))
    assert result.tokenizer == "trained"
    tokenizer = Tokenizer.load(out)
    texts = [row.text for row in generate("test", "en")]
    tokens = sum(len(tokenizer.encode_prompt(f" {text}")) for text in texts)
    assert tokens < 1.6 * sum(len(text.split()) for text in texts)
    assert init("autoglm-nano", out, tokenizer_data=Path("commands-en")).already_done
