"""The trained WordPiece tokenizer: BERT's conventions, deterministic, readable by both readers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pocketglm.data.commands import generate
from pocketglm.data.tokenizer_training import SPECIAL, save_tokenizer, train_wordpiece
from pocketglm.errors import DataError, UsageError
from pocketglm.text.tokenizer import Tokenizer

TEXTS = [row.text for row in generate("train", "both", n=300)]


def test_conventions_and_round_trip_through_both_readers(tmp_path: Path) -> None:
    trained = train_wordpiece(TEXTS, 900)
    save_tokenizer(trained, tmp_path, 64)
    assert trained.get_vocab_size() <= 900
    assert [trained.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]

    ours = Tokenizer.load(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.pad_id, ours.unk_id, theirs.model_max_length) == (0, 1, 64)
    texts = ["Play 打开灯 please", "定一个闹钟"]
    encoded = ours.encode(texts, 64)
    assert encoded.unknown == 0
    assert encoded.ids.tolist() == theirs(texts, padding=True)["input_ids"]
    assert encoded.ids[0, 0] == SPECIAL.index("[CLS]")
    tokens = trained.encode(texts[1]).tokens
    assert tokens == ["[CLS]", *texts[1], "[SEP]"]  # one token a character
    assert trained.encode("a", "b").type_ids == [0, 0, 0, 1, 1]


def test_deterministic(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_tokenizer(train_wordpiece(TEXTS, 700), tmp_path / name, 64)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="vocab_size 5 leaves no room"):
        train_wordpiece(TEXTS, 5)
    with pytest.raises(DataError, match="no text"):
        train_wordpiece(["", " "])
