"""The readers: what they accept, and what they say about what they do not."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pocketglm.contracts import DataOptions
from pocketglm.data.readers import Example, read_split, read_texts
from pocketglm.errors import DataError

GOOD = '{"text": "hello", "label": "greet"}\n'


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["test.jsonl", "test.jsonl.gz", "test.csv"])
def test_reads_every_form(tmp_path: Path, name: str) -> None:
    rows = "text,label\nhi,greet\n" if name.endswith("csv") else GOOD.replace("hello", "hi")
    write(tmp_path / name, rows)
    assert read_split(DataOptions(tmp_path), "test") == [Example("hi", "greet")]
    assert read_split(DataOptions(tmp_path / name), "test") == [Example("hi", "greet")]


def test_csv_quotes_and_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    with file.open("w", encoding="utf-8-sig", newline="") as handle:
        csv.writer(handle).writerows([["text", "label"], ['say "hi", twice\nplease', "greet"], []])
    assert read_split(DataOptions(file), "test") == [Example('say "hi", twice\nplease', "greet")]
    file = write(tmp_path / "a.jsonl", "\n" + GOOD + "\n")
    assert read_split(DataOptions(file), "test") == [Example("hello", "greet")]


def test_blanks_around_a_label_are_no_other_label(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "text,label\na ,x\nb, x \n")
    assert read_split(DataOptions(file), "test") == [Example("a ", "x"), Example("b", "x")]
    file = write(tmp_path / "a.jsonl", '{"text": "a", "label": "x\\t"}\n')
    assert read_split(DataOptions(file), "test") == [Example("a", "x")]


def test_a_csv_of_texts_alone_may_hold_other_marks(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / "a.csv", "text\na; b\tc|d\n")) == ["a; b\tc|d"]


def test_own_columns_and_integer_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"q": "hello", "class": 3}\n')
    options = DataOptions(file, text_column="q", label_column="class")
    assert read_split(options, "test") == [Example("hello", "3")]
    assert read_texts(file, "q") == ["hello"]


def test_tokens_and_intent_stand_in_for_text_and_label(tmp_path: Path) -> None:
    rows = [{"tokens": ["play", "it"], "intent": "p"}, {"tokens": [*"播放", "ABBA"], "intent": "p"}]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [e.text for e in read_split(DataOptions(file), "test")] == ["play it", "播放ABBA"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text_column": "utterance"}, "no column 'utterance'; found: utterence, tokens, intent"),
        ({"label_column": "intnt"}, "no column 'intnt'; found: utterence, tokens, intent"),
    ],
)
def test_a_misspelled_column_is_an_error_whatever_stands_in(
    tmp_path: Path, columns: dict[str, str], said: str
) -> None:
    row = {"utterence": "play it now", "tokens": ["play", "it"], "intent": "p"}
    file = write(tmp_path / "a.jsonl", json.dumps(row) + "\n")
    options = DataOptions(file, **columns)  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        read_split(options, "test")
    assert f"{file}:1: {said}" in caught.value.message
    assert "did you mean" in caught.value.hint
    if "text_column" in columns:
        with pytest.raises(DataError, match="no column 'utterance'"):
            read_texts(file, "utterance")
    named = DataOptions(file, text_column="tokens", label_column="intent")
    assert read_split(named, "test") == [Example("play it", "p")]


def test_the_first_row_decides_the_columns(tmp_path: Path) -> None:
    tokens, text = '{"tokens": ["a", "b"], "intent": "x"}\n', '{"text": "c", "label": "y"}\n'
    for first, second, column in ((tokens, text, "tokens"), (text, tokens, "text")):
        file = write(tmp_path / "a.jsonl", first + second)
        with pytest.raises(DataError, match=f"jsonl:2: no column '{column}'"):
            read_split(DataOptions(file), "test")
        with pytest.raises(DataError, match=f"jsonl:2: no column '{column}'"):
            read_texts(file)
    file = write(tmp_path / "a.jsonl", GOOD + '{"text": "c", "intent": "y"}\n')
    with pytest.raises(DataError, match="jsonl:2: no column 'label'"):
        read_split(DataOptions(file), "test")


BAD = [
    ("a.jsonl", "", 0, "no rows"),
    ("a.csv", "", 0, "no rows"),
    ("a.csv", "text,label\n", 0, "no rows"),
    ("a.jsonl", GOOD + '{"text": "x"', 2, "malformed JSON"),
    ("a.jsonl", GOOD + '["x"]\n', 2, "a list instead of an object"),
    ("a.jsonl", GOOD + '{"txt": "x", "label": "y"}\n', 2, "no column 'text'; found: txt, label"),
    ("a.jsonl", GOOD + '{"text": "x", "lable": "y"}\n', 2, "no column 'label'; found: text, lable"),
    ("a.jsonl", GOOD + '{"text": " ", "label": "y"}\n', 2, "is empty"),
    ("a.jsonl", GOOD + '{"text": 5, "label": "y"}\n', 2, "is 5, not a string"),
    ("a.jsonl", GOOD + '{"text": null, "label": "y"}\n', 2, "is null, not a string"),
    ("a.jsonl", GOOD + '{"text": "x", "label": ""}\n', 2, "the label in column 'label' is \"\""),
    ("a.jsonl", GOOD + '{"text": "x", "label": true}\n', 2, "the label in column 'label' is true"),
    ("a.jsonl", GOOD.encode() + b'{"text": "\xff", "label": "y"}\n', 2, "not UTF-8"),
    ("a.csv", "hello,greet\nbye,leave\n", 2, "no column 'text'; found: hello, greet"),
    ("a.csv", "text,\nhello,greet\n", 1, "unnamed column"),
    ("a.csv", "text;label\nhello, you;greet\n", 1, "separated by semicolons, not commas: text;"),
    ("a.csv", '"text";"label"\n"hello";"greet"\n', 1, "separated by semicolons, not commas"),
    ("a.csv", "text\tlabel\nhello\tgreet\n", 1, "separated by tabs, not commas: text\tlabel"),
    ("a.csv", "text|label\nhello|greet\n", 1, "separated by bars, not commas: text|label"),
    ("a.csv", "text,label,text\na,b,c\n", 1, "has the column 'text' more than once: text, label"),
    ("a.csv", "text,label\nhello\n", 2, "fewer fields"),
    ("a.csv", "text,label\nhello, you,greet\n", 2, "more fields"),
    ("a.csv", 'text,label\n"hello,greet\n', 2, "malformed CSV"),
    ("a.xml", "<a/>", 0, "unknown kind of file 'a.xml'"),
]


@pytest.mark.parametrize(("name", "content", "line", "said"), BAD)
def test_error_names_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, line: int, said: str
) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read_split(DataOptions(file), "test")
    assert caught.value.message.startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert said in caught.value.message
    assert caught.value.hint


def test_missing_column_hint_has_the_nearest_name(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"txt": "x", "label": "y"}\n')
    with pytest.raises(DataError) as caught:
        read_split(DataOptions(file), "test")
    assert "did you mean 'txt'?" in caught.value.hint
    assert "--text-column" in caught.value.hint


def test_truncated_gzip(tmp_path: Path) -> None:
    file = write(tmp_path / "test.jsonl.gz", GOOD * 50)
    file.write_bytes(file.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        read_split(DataOptions(file), "test")


def test_missing_path_and_missing_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there"):
        read_split(DataOptions(tmp_path / "nothing"), "test")
    with pytest.raises(DataError, match="is not there"):
        read_texts(tmp_path / "nothing.txt")
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no test split in this folder; it holds: train\.jsonl"):
        read_split(DataOptions(tmp_path), "test")


def test_one_file_is_divided_for_training_only(tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 200}", "q": f"q{i}", "label": "ab"[i % 2]} for i in range(400)]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(file)
    divided = replace(options, divided_by=("text", "label"))
    train = read_split(options, "train", training=True)
    validation = read_split(options, "validation", training=True)
    test = read_split(divided, "test")
    assert len(train) + len(validation) + len(test) == 400
    assert len(read_split(options, "test")) == len(read_split(options, "train")) == 400
    assert all(20 <= len(part) <= 70 for part in (validation, test))
    texts = [{e.text for e in part} for part in (train, validation, test)]
    assert len(set.union(*texts)) == sum(len(part) for part in texts)  # equal texts stay together
    assert train == read_split(options, "train", training=True)
    # Other columns, the same rows.
    other = read_split(replace(divided, text_column="q"), "test")
    assert [f"text {int(e.text[1:]) % 200}" for e in other] == [e.text for e in test]
    assert len(read_split(replace(divided, limit=7), "test")) == 7


def test_a_rare_label_is_trained_not_held_out(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": str(i)} for i in range(100)]
    rows += [{"text": f"text {i}", "label": "often"} for i in range(100)]  # the same texts
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    options = DataOptions(file)
    assert len(read_split(options, "train", training=True)) == 200
    assert read_split(options, "validation", training=True) == []
    with pytest.raises(DataError, match="no row was held out for test") as caught:
        read_split(replace(options, divided_by=("text", "label")), "test")
    assert caught.value.hint


def test_limit_covers_a_file_sorted_by_label(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": str(i // 100)} for i in range(500)]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    some = read_split(DataOptions(file, limit=60), "test")
    assert len(some) == 60
    assert {e.label for e in some} == set("01234")
    assert some == read_split(DataOptions(file, limit=60), "test")
    assert some[:20] == read_split(DataOptions(file, limit=20), "test")
    assert len(read_split(DataOptions(file, limit=9999), "test")) == 500


def test_embedded_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    english = read_split(DataOptions(Path("commands-en")), "test")
    chinese = read_split(DataOptions(Path("commands-zh"), limit=10), "test")
    both = read_split(DataOptions(Path("commands")), "validation")
    assert (len(english), len(chinese), len(both)) == (1000, 10, 1000)
    write(tmp_path / "test.jsonl", GOOD)
    (tmp_path / "commands-en").mkdir()  # a real folder of that name comes first
    write(tmp_path / "commands-en" / "test.jsonl", GOOD)
    assert len(read_split(DataOptions(Path("commands-en")), "test")) == 1


def test_plain_texts(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / "a.txt", "one\n\n two \n")) == ["one", "two"]
    with pytest.raises(DataError, match="no rows"):
        read_texts(write(tmp_path / "a.txt", "\n"))
