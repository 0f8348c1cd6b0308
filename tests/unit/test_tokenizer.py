"""Text to ids: the real MiniLM tokenizer against transformers, and odd tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer

from pocketglm.data.tokenizer_training import byte_tokenizer
from pocketglm.errors import CheckpointError, DataError, UsageError
from pocketglm.text.tokenizer import TOKENIZER_FILES, Tokenizer

TEXTS = [
    "set an alarm for 7 am",
    "",
    "What's the weather in Zürich tomorrow?  ",
    "打开地图，去北京。",
    "supercalifragilisticexpialidocious " * 60,
    "emoji 🦜 and a rare sign ⅏",
    "[CLS] typed by a user [SEP]",
]


@pytest.fixture(scope="module")
def ours(minilm: Path) -> Tokenizer:
    return Tokenizer.load(minilm)


@pytest.fixture(scope="module")
def theirs(minilm: Path) -> Any:
    return AutoTokenizer.from_pretrained(minilm)


def save(folder: Path, inner: tokenizers.Tokenizer, config: object = None) -> Path:
    inner.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def words(vocab: dict[str, int], unk: str | None = None) -> tokenizers.Tokenizer:
    """A tokenizer of whole words; without `unk`, words that it does not know vanish."""
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk) if unk else models.WordLevel(vocab))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner


# --- against transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [3, 16, 128, 512])
def test_ids_and_mask_are_those_of_transformers(
    ours: Tokenizer, theirs: Any, max_length: int
) -> None:
    expected = theirs(
        TEXTS, padding=True, truncation=True, max_length=max_length, return_tensors="np"
    )
    got = ours.encode(TEXTS, max_length)
    assert got.ids.dtype == got.mask.dtype == np.int64
    assert np.array_equal(got.ids, expected["input_ids"])
    assert np.array_equal(got.mask, expected["attention_mask"])


def test_truncated_rows_are_those_that_were_longer(ours: Tokenizer, theirs: Any) -> None:
    lengths = [len(theirs(text)["input_ids"]) for text in TEXTS]
    for limit in (3, sorted(lengths)[3], max(lengths) - 1, max(lengths)):
        assert ours.encode(TEXTS, limit).truncated == sum(n > limit for n in lengths)


def test_padding_and_truncation_stored_in_the_file_are_ignored(minilm: Path) -> None:
    stored = json.loads((minilm / "tokenizer.json").read_bytes())
    assert stored["truncation"]["max_length"] == 128  # what makes this test mean something
    assert stored["padding"]["strategy"] == {"Fixed": 128}
    tokenizer = Tokenizer.load(minilm)
    assert tokenizer.inner.truncation is tokenizer.inner.padding is None
    assert tokenizer.encode(["hello"], 512).ids.tolist() == [[101, 7592, 102]]
    assert tokenizer.encode(["hello " * 300], 512).ids.shape == (1, 302)
    assert tokenizer.encode(["hello " * 300], 512).truncated == 0


def test_a_limit_does_not_outlive_its_call(ours: Tokenizer) -> None:
    assert ours.encode(["one two three four"], 4).ids.shape == (1, 4)
    assert ours.encode(["one two three four"], 64).ids.shape == (1, 6)
    assert ours.inner.truncation is None
    with pytest.raises(DataError):
        ours.encode(["half a pair \ud83d"], 4)
    assert ours.inner.truncation is None


def test_special_ids(ours: Tokenizer, theirs: Any) -> None:
    assert (ours.pad_id, ours.unk_id) == (theirs.pad_token_id, theirs.unk_token_id)
    assert ours.size == len(theirs)


# --- counting -----------------------------------------------------------------------------------


def test_unknown_tokens_are_counted_and_special_ones_are_not(ours: Tokenizer) -> None:
    got = ours.encode(["hello 🦜 world", "⅏⅏ 🦜"], 32)
    rows = [ours.inner.encode(text).tokens for text in ("hello 🦜 world", "⅏⅏ 🦜")]
    plain = [t for row in rows for t in row if t not in ("[CLS]", "[SEP]")]
    assert got.tokens == len(plain)
    assert got.unknown == plain.count("[UNK]") >= 3
    assert ours.encode(["hello world"], 32).unknown == 0


def test_unknown_tokens_count_where_the_file_calls_them_special(tmp_path: Path) -> None:
    inner = words({"a": 0, "[UNK]": 1, "[PAD]": 2}, unk="[UNK]")
    inner.add_special_tokens(["[UNK]", "[PAD]"])
    got = Tokenizer.load(save(tmp_path, inner)).encode(["a b c", "a"], 8)
    assert (got.unknown, got.tokens) == (2, 4)
    assert got.ids.tolist() == [[0, 1, 1], [0, 2, 2]]


def test_no_texts_and_no_tokens(ours: Tokenizer) -> None:
    none = ours.encode([], 16)
    assert none.ids.shape == none.mask.shape == (0, 0)
    assert (none.truncated, none.unknown, none.tokens) == (0, 0, 0)
    assert ours.encode([""], 16).ids.tolist() == [[101, 102]]
    assert ours.encode([""], 16).tokens == 0


# --- odd tokenizers -----------------------------------------------------------------------------


def test_without_pad_or_unknown_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(tmp_path, words({"a": 0, "b": 1})))
    assert tokenizer.unk_id is None
    assert tokenizer.pad_id == 0
    got = tokenizer.encode(["b a b", "b"], 8)
    assert got.ids.tolist() == [[1, 0, 1], [1, 0, 0]]
    assert got.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (got.unknown, got.tokens) == (0, 4)


@pytest.mark.parametrize("token", ["<nothing>", {"content": "<nothing>", "lstrip": False}])
def test_the_config_names_the_pad_token(tmp_path: Path, token: object) -> None:
    inner = words({"a": 0, "<pad>": 1, "<nothing>": 2})
    tokenizer = Tokenizer.load(save(tmp_path, inner, {"pad_token": token, "unk_token": None}))
    assert (tokenizer.pad_id, tokenizer.unk_id) == (2, None)


def test_a_pad_token_that_the_vocabulary_lacks_falls_back_to_the_usual(tmp_path: Path) -> None:
    inner = words({"a": 0, "<pad>": 1, "<unk>": 2}, unk="<unk>")
    tokenizer = Tokenizer.load(save(tmp_path, inner, {"pad_token": "<absent>"}))
    assert (tokenizer.pad_id, tokenizer.unk_id) == (1, 2)


def test_size_counts_added_tokens_and_holes(tmp_path: Path) -> None:
    assert Tokenizer.load(save(tmp_path, words({"a": 0, "b": 7}))).size == 8
    inner = words({"a": 0, "b": 1})
    inner.add_tokens(["extra"])
    assert Tokenizer.load(save(tmp_path, inner)).size == 3
    assert Tokenizer(tokenizers.Tokenizer(models.BPE()), {}).size == 0


def test_vocabulary_beyond_the_embedding(ours: Tokenizer, minilm: Path) -> None:
    ours.check_vocabulary(30522, minilm)
    ours.check_vocabulary(30592, minilm)  # padded embeddings are fine
    with pytest.raises(CheckpointError, match=r"largest id is 30521.* has 30521 rows") as caught:
        ours.check_vocabulary(30521, minilm)
    assert "tokenizer.json" in caught.value.hint


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [-1, 0, 1, 2])
def test_a_limit_without_room_for_text(ours: Tokenizer, max_length: int) -> None:
    with pytest.raises(UsageError, match=f"max_length {max_length} leaves no room") as caught:
        ours.encode(["hello"], max_length)
    assert "at least 3" in caught.value.hint
    assert ours.encode(["hello"], 3).tokens == 1


def test_a_limit_of_one_is_enough_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(tmp_path, words({"a": 0, "b": 1})))
    assert tokenizer.encode(["b a"], 1).ids.tolist() == [[1]]
    with pytest.raises(UsageError, match="max_length 0 leaves"):
        tokenizer.encode(["b"], 0)


def test_text_that_is_not_unicode_is_shown(ours: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"not valid Unicode: 'half a pair \\ud83d'"):
        ours.encode(["fine", "half a pair \ud83d"], 16)


def test_missing_tokenizer_says_how_to_save_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert f"save_pretrained('{tmp_path}')" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "Martian"}}'])
def test_unreadable_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: "):
        Tokenizer.load(tmp_path)


def test_unreadable_config(tmp_path: Path) -> None:
    save(tmp_path, words({"a": 0}))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(tmp_path)


def test_the_files_to_copy_are_enough(minilm: Path, tmp_path: Path, ours: Tokenizer) -> None:
    for name in TOKENIZER_FILES:
        if (minilm / name).is_file():
            shutil.copy(minilm / name, tmp_path / name)
    copied = Tokenizer.load(tmp_path)
    assert np.array_equal(copied.encode(TEXTS, 64).ids, ours.encode(TEXTS, 64).ids)
    expected = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0])["input_ids"]
    assert copied.encode(TEXTS[:1], 64).ids.tolist() == [expected]


def test_closing_token_survives_a_cut(tmp_path: Path) -> None:
    inner = words({"a": 0, "b": 1, "<s>": 2, "</s>": 3})
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    got = Tokenizer.load(save(tmp_path, inner)).encode(["a b a b a"], 4)
    assert got.ids.tolist() == [[2, 0, 1, 3]]
    assert got.truncated == 1


# --- prompts of decoders -------------------------------------------------------------------------


def decoder_tokenizer(single: str, config: dict[str, Any] | None = None) -> Tokenizer:
    inner = byte_tokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<sop>", 3), ("[gMASK]", 2), ("<|endoftext|>", 1)]
    )
    return Tokenizer(inner, config or {})


def test_a_prompt_has_the_tokens_before_a_text_and_none_behind() -> None:
    plain = Tokenizer(byte_tokenizer(), {})
    text = plain.encode_prompt("hi<|user|>")
    assert len(text) == 3
    for single, before in (
        ("$A", []),
        ("<sop> $A", [3]),
        ("[gMASK] <sop> $A <|endoftext|>", [2, 3]),
    ):
        tokenizer = decoder_tokenizer(single)
        assert tokenizer.encode_prompt("hi<|user|>") == before + text
        assert tokenizer.encode_prompt("hi<|user|>", special=False) == text
    assert decoder_tokenizer("<sop> $A").encode_prompt("") == [3]
    assert len(plain.encode_prompt("x" * 5000)) == 5000


def test_a_beginning_token_that_only_the_config_names() -> None:
    config = {"bos_token": {"content": "<sop>"}, "add_bos_token": True}
    assert decoder_tokenizer("$A", config).encode_prompt("h")[0] == 3
    assert decoder_tokenizer("<sop> $A", config).encode_prompt("h")[:2].count(3) == 1
    silent = config | {"add_bos_token": False}
    assert len(decoder_tokenizer("$A", silent).encode_prompt("h")) == 1


def test_a_prompt_that_is_not_unicode() -> None:
    with pytest.raises(DataError, match=r"not valid Unicode: 'a\\ud83d'"):
        Tokenizer(byte_tokenizer(), {}).encode_prompt("a\ud83d")


def test_decoding_leaves_special_and_unknown_ids_out() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), {})
    ids = tokenizer.encode_prompt("<|user|>打开 hi")
    assert tokenizer.decode([*ids, 99999]) == "打开 hi"
    assert tokenizer.decode([]) == ""


def test_special_tokens_by_name() -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None, "x": "y"}
    assert Tokenizer(byte_tokenizer(), config).special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
