"""Trained tokenizers: their conventions, deterministic, readable by both readers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pocketglm.data.commands import generate
from pocketglm.data.tokenizer_training import (
    CHAT_SPECIAL,
    SPECIAL,
    byte_tokenizer,
    save_chat_tokenizer,
    save_tokenizer,
    train_bpe,
    train_wordpiece,
)
from pocketglm.errors import CheckpointError, DataError, UsageError
from pocketglm.text.chat import read_template, render
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


# --- byte-level BPE ------------------------------------------------------------------------------

ODD = [
    "don't\tgo  there",
    "温度 25.5°C，1234567\n",
    "🙂 naïve\u0301",
    "",
    " ",
    "\x00\x7f",
    "<|user|>",
]


def test_bpe_round_trip_through_both_readers(tmp_path: Path) -> None:
    trained = train_bpe(TEXTS, 600)
    save_chat_tokenizer(trained, tmp_path, 128)
    assert trained.get_vocab_size() == 600
    assert [trained.token_to_id(token) for token in CHAT_SPECIAL] == list(range(8))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.pad_id, theirs.pad_token_id, theirs.eos_token_id) == (0, 0, 1)
    assert theirs.model_max_length == 128
    assert ours.size == len(theirs) == 600
    texts = [*TEXTS[:20], *ODD]
    encoded = ours.encode(texts, 128)
    rows = [row[:n].tolist() for row, n in zip(encoded.ids, encoded.mask.sum(1), strict=True)]
    assert rows == theirs(texts)["input_ids"]
    assert encoded.unknown == 0
    for text, row in zip(texts, rows, strict=True):
        assert theirs.decode(row) == text
        assert ours.inner.decode(row, skip_special_tokens=False) == text
    assert len(rows[-1]) == 1  # a special token is one token
    plain = byte_tokenizer().encode_batch(TEXTS)
    merged = trained.encode_batch(TEXTS)
    assert sum(map(len, merged)) < 0.6 * sum(map(len, plain))


def test_digits_go_in_threes_and_words_with_their_space() -> None:
    tokens = byte_tokenizer().pre_tokenizer.pre_tokenize_str("call 1234567 now!!")
    assert [word.replace("Ġ", " ") for word, _ in tokens] == [
        "call",
        " ",
        "123",
        "456",
        "7",
        " now",
        "!!",
    ]


def test_bytes_alone_spell_everything(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.get_vocab_size() == 264
    ids = tokenizer.encode("é定<|user|>").ids
    assert len(ids) == 2 + 3 + 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == "é定<|user|>"
    save_chat_tokenizer(tokenizer, tmp_path, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("é定<|user|>")["input_ids"] == ids


def test_chat_template_of_both_readers(tmp_path: Path) -> None:
    save_chat_tokenizer(byte_tokenizer(), tmp_path, 64)
    template = read_template(tmp_path)
    assert template is not None
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = render(template, messages)
    assert text == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi\n<|assistant|>\nHello<|user|>\nBye"
        "<|assistant|>\n"
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert not render(template, messages, add_generation_prompt=False).endswith("<|assistant|>\n")
    with pytest.raises(CheckpointError, match="unknown role: boss"):
        render(template, [{"role": "boss", "content": "?"}])


def test_bpe_is_deterministic(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_chat_tokenizer(train_bpe(TEXTS, 700), tmp_path / name, 64)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_bad_input_of_bpe() -> None:
    with pytest.raises(UsageError, match=r"vocab_size 263 leaves no room.*are 264"):
        train_bpe(TEXTS, 263)
    with pytest.raises(DataError, match="no text"):
        train_bpe(["", " "])
