"""Trimmed tokenizers: the corpus keeps its tokens, other texts still encode, a bug is caught."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import subword
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from pocketglm.contracts import DataOptions
from pocketglm.data.commands import generate
from pocketglm.data.readers import read_split
from pocketglm.data.tokenizer_training import (
    CHAT_SPECIAL,
    save_chat_tokenizer,
    save_tokenizer,
    train_bpe,
    train_wordpiece,
)
from pocketglm.errors import CheckpointError, DataError, UnsupportedError, WorkError
from pocketglm.text._renumber import model_of, side_files
from pocketglm.text._vocabularies import BPE, kind_of, vocabulary_of
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.text.trim import (
    Choice,
    Trimmed,
    compare,
    measure,
    reasons,
    renumbered_config,
    rewritten,
    trim,
)

TEXTS = [row.text for row in generate("train", "both", n=400)]
CORPUS, OTHERS = TEXTS[:60], TEXTS[60:]
ODD = [
    "don't\tgo  there",
    "🙂 naïve\u0301 日本",
    "",
    " ",
    "\x00\x7f",
    "Ünïcode 1234567\n",
    "<|user|>",
]
TIGHT = Choice(pad_to_multiple=1)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    save_chat_tokenizer(train_bpe(TEXTS, 900), folder, 64)
    return folder


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wordpiece")
    save_tokenizer(train_wordpiece(TEXTS, 900), folder, 64)
    return folder


def rows_of(folder: Path) -> int:
    return Tokenizer.load(folder).size


def saved(trimmed: Trimmed, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in trimmed.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def words_of(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    splitter = tokenizer.pre_tokenizer
    return [word for word, _ in splitter.pre_tokenize_str(normal)] if splitter else [normal]


def check_mapped(old: Tokenizer, new: Tokenizer, kept: Any, texts: list[str]) -> None:
    """The guarantee, spelled out."""
    place = {int(token): index for index, token in enumerate(kept)}
    for text in texts:
        before, after = old.inner.encode(text), new.inner.encode(text)
        assert [place[token] for token in before.ids] == after.ids, text
        assert before.tokens == after.tokens
        assert old.inner.decode(before.ids) == new.inner.decode(after.ids)


# --- the kinds -----------------------------------------------------------------------------------


def test_byte_level_bpe(bpe: Path, tmp_path: Path) -> None:
    found = trim(bpe, CORPUS, TIGHT, rows_of(bpe))
    assert 264 < len(found.kept) < 800
    assert found.kept[:8].tolist() == list(range(8))
    new = Tokenizer.load(saved(found, tmp_path / "new"))
    check_mapped(Tokenizer.load(bpe), new, found.kept, CORPUS)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert len(theirs) == len(found.kept)
    model = json.loads(found.files["tokenizer.json"])["model"]
    for text in [*CORPUS, *OTHERS, *ODD]:
        ids = new.inner.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert new.inner.decode(ids, skip_special_tokens=False) == text
        if text not in CHAT_SPECIAL:
            expected = [t for word in words_of(new.inner, text) for t in subword.bpe(model, word)]
            assert new.inner.encode(text).tokens == expected
    assert theirs.pad_token_id == 0
    assert theirs.eos_token_id == 1
    other = measure(found, OTHERS)
    assert other.unknown == 0
    assert other.tokens > other.tokens_before


def test_wordpiece(wordpiece: Path, tmp_path: Path) -> None:
    (wordpiece / "vocab.txt").write_text("stale", encoding="utf-8")
    old = Tokenizer.load(wordpiece)
    found = trim(wordpiece, CORPUS, TIGHT, rows_of(wordpiece))
    new = Tokenizer.load(saved(found, tmp_path / "new"))
    check_mapped(old, new, found.kept, CORPUS)
    content = json.loads(found.files["tokenizer.json"])
    for text in [*CORPUS, *OTHERS]:
        expected = [
            t
            for word in words_of(new.inner, text)
            for t in subword.wordpiece(content["model"], word)
        ]
        assert new.inner.encode(text, add_special_tokens=False).tokens == expected
    lines = found.files["vocab.txt"].splitlines()
    assert [new.inner.token_to_id(line) for line in lines] == list(range(len(found.kept)))
    assert content["post_processor"]["special_tokens"]["[SEP]"]["ids"] == [lines.index("[SEP]")]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == new.inner.encode(text).ids
    assert measure(found, OTHERS).unknown == 0  # single characters spell them


def test_fallback_of_wordpiece(wordpiece: Path) -> None:
    rows = rows_of(wordpiece)
    sizes, unknown = [], []
    for fallback in ("characters", "seen", "none"):
        choice = Choice(fallback=fallback, pad_to_multiple=1)
        found = trim(wordpiece, CORPUS[:10], choice, rows)
        sizes.append(len(found.kept))
        unknown.append(measure(found, OTHERS).unknown)
    assert sizes[0] > sizes[1] > sizes[2]
    assert unknown[0] == 0 < unknown[1] < unknown[2]
    ascii_only = [text for text in OTHERS if text.isascii()]
    seen = trim(wordpiece, CORPUS[:10], Choice(fallback="seen", pad_to_multiple=1), rows)
    assert measure(seen, ascii_only).unknown == 0


def _byte_fallback() -> tokenizers.Tokenizer:
    """In the manner of Llama 2: characters, the 256 bytes behind, no splitting."""
    draft = tokenizers.Tokenizer(models.BPE())
    draft.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    draft.train_from_iterator(TEXTS[:100], trainers.BpeTrainer(vocab_size=500, show_progress=False))
    content = json.loads(draft.to_str())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    by_id = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    vocab = {name: index for index, name in enumerate([*names, *by_id])}
    content["model"] |= {"vocab": vocab, "byte_fallback": True, "unk_token": "<unk>"}
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens(names[:3])
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def test_bpe_with_bytes_behind(tmp_path: Path) -> None:
    _byte_fallback().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"binary")
    found = trim(tmp_path, TEXTS[:20], TIGHT, rows_of(tmp_path))
    assert len(found.kept) < rows_of(tmp_path)
    assert found.dropped == ("tokenizer.model",)
    check_mapped(found.old, found.new, found.kept, TEXTS[:20])
    model = json.loads(found.files["tokenizer.json"])["model"]
    inner = found.new.inner
    for text in [*TEXTS[20:100], "žluťoučký 🙂"]:
        encoded = inner.encode(text, add_special_tokens=False)
        assert encoded.tokens == subword.bpe(model, "▁" + text.replace(" ", "▁"))
        assert inner.decode(encoded.ids) == text
    assert "<0x9F>" in inner.encode("🙂").tokens


def test_every_way_to_a_token_is_a_merge(bpe: Path, tmp_path: Path) -> None:
    """In the manner of Llama 3: all pairs that make a token are merges; whole words come first."""
    content = json.loads((bpe / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    ways = [
        [name[:cut], name[cut:]]
        for name in sorted(vocab, key=vocab.__getitem__)
        if name not in CHAT_SPECIAL
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    assert len(ways) > len(content["model"]["merges"])
    content["model"] |= {"merges": ways, "ignore_merges": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    found = trim(tmp_path, CORPUS, TIGHT, len(vocab))
    assert len(found.kept) < 800
    check_mapped(found.old, found.new, found.kept, CORPUS)
    model = json.loads(found.files["tokenizer.json"])["model"]
    for text in OTHERS[:50]:
        expected = [t for word in words_of(found.new.inner, text) for t in subword.bpe(model, word)]
        assert found.new.inner.encode(text).tokens == expected


def _unigram(texts: list[str]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<unk>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return made


def test_unigram(tmp_path: Path) -> None:
    texts = [row.text for row in generate("train", "en", n=300)]
    _unigram(texts).save(str(tmp_path / "tokenizer.json"))
    corpus = [*texts[:60], "strange ☃ sign"]
    found = trim(tmp_path, corpus, TIGHT, rows_of(tmp_path))
    assert len(found.kept) < 0.9 * rows_of(tmp_path)
    check_mapped(found.old, found.new, found.kept, corpus)
    assert measure(found, texts).unknown == 0
    model = json.loads(found.files["tokenizer.json"])["model"]
    scores = dict(model["vocab"])
    for text in texts[:150]:
        for word in words_of(found.new.inner, text):
            got = found.new.inner.model.tokenize(word)
            best, _ = subword.unigram(model, word)
            assert sum(scores[token.value] for token in got) == pytest.approx(best)


def test_minilm_on_clinc150(minilm: Path, shared_data: Path, tmp_path: Path) -> None:
    if not (shared_data / "clinc150").is_dir():
        pytest.skip("no clinc150 here")
    options = DataOptions(shared_data / "clinc150")
    train = [row.text for row in read_split(options, "train")]
    held_out = [row.text for row in read_split(options, "validation")]
    found = trim(minilm, train, Choice(), 30522)
    assert len(found.kept) == 7168
    assert (found.corpus.texts, found.corpus.changed, found.corpus.broken) == (15100, 0, [])
    other = measure(found, held_out)
    assert (other.unknown_before, other.unknown) == (0, 0)
    assert other.same > 0.8 * other.texts
    assert other.tokens < 1.05 * other.tokens_before
    more = measure(trim(minilm, train, Choice(extra=2000), 30522), held_out)
    assert more.tokens < other.tokens
    theirs = AutoTokenizer.from_pretrained(saved(found, tmp_path / "new"))
    before = AutoTokenizer.from_pretrained(minilm)
    assert theirs.mask_token_id == found.kept.tolist().index(103)
    for text in train[:200]:
        ids = found.kept[theirs(text)["input_ids"]].tolist()
        assert ids == before(text)["input_ids"]
        assert theirs.decode(theirs(text)["input_ids"]) == before.decode(ids)


# --- properties ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(), max_size=3), st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_survives_byte_level(bpe: Path, corpus: list[str], others: list[str]) -> None:
    found = trim(bpe, ["play", *corpus], TIGHT, 900)
    for text in [*corpus, *others]:
        ids = found.new.inner.encode(text).ids
        assert found.new.inner.decode(ids, skip_special_tokens=False) == text
    assert measure(found, others).unknown == 0


WORDS = st.lists(st.text("abcd", min_size=1, max_size=8), min_size=1, max_size=6)


def _plain(model: dict[str, Any]) -> tokenizers.Tokenizer:
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return tokenizers.Tokenizer.from_str(json.dumps(content))


@settings(max_examples=150, deadline=None)
@given(
    st.sets(st.text("abc", min_size=1, max_size=3)),
    st.sets(st.text("abc", min_size=1, max_size=3)),
    WORDS,
)
def test_any_wordpiece(
    tmp_path_factory: pytest.TempPathFactory, heads: set[str], tails: set[str], corpus: list[str]
) -> None:
    """Also words that are unknown, some of which would be found in the smaller vocabulary."""
    folder = tmp_path_factory.mktemp("any")
    names = ["[UNK]", *sorted(heads), *(f"##{tail}" for tail in sorted(tails))]
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {name: index for index, name in enumerate(names)},
    }
    _plain(model).save(str(folder / "tokenizer.json"))
    found = trim(folder, corpus, Choice(fallback="none", pad_to_multiple=1), len(names))
    small = json.loads(found.files["tokenizer.json"])["model"]
    for word in corpus:
        assert subword.wordpiece(small, word) == subword.wordpiece(model, word)


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans(), WORDS)
def test_any_bpe(
    tmp_path_factory: pytest.TempPathFactory, rng: random.Random, whole: bool, corpus: list[str]
) -> None:
    """Merges in any order, several for a token, and tokens that no merge reaches."""
    folder = tmp_path_factory.mktemp("any")
    names = list("abcd")
    merges: list[list[str]] = []
    for _ in range(rng.randrange(16)):
        pair = [rng.choice(names), rng.choice(names)]
        if pair not in merges:
            merges.append(pair)
            names += ["".join(pair)] if "".join(pair) not in names else []
    rng.shuffle(merges)
    model = {
        "type": "BPE",
        "vocab": {name: index for index, name in enumerate(names)},
        "merges": merges,
        "ignore_merges": whole,
    }
    _plain(model).save(str(folder / "tokenizer.json"))
    found = trim(folder, corpus, Choice(fallback="none", pad_to_multiple=1), len(names))
    small = json.loads(found.files["tokenizer.json"])["model"]
    for word in corpus:
        assert subword.bpe(small, word) == subword.bpe(model, word)


# --- choices -------------------------------------------------------------------------------------


def test_nothing_to_leave_out_is_the_identity(bpe: Path) -> None:
    found = trim(bpe, TEXTS, Choice(extra=900), 900)
    assert found.kept.tolist() == list(range(900))
    before = json.loads((bpe / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(found.files["tokenizer.json"]) == before


def test_filled_up_to_a_multiple(bpe: Path) -> None:
    for multiple in (32, 100):
        found = trim(bpe, CORPUS, Choice(pad_to_multiple=multiple), 900)
        assert len(found.kept) % multiple == 0
        assert len(found.new.inner.get_vocab()) == len(found.kept)
    # Rows of the embedding without a token: they go, or fill up when the tokens are used up.
    assert trim(bpe, CORPUS, Choice(), 1000).kept[-1] < 900
    found = trim(bpe, TEXTS, Choice(extra=700), 1000)
    assert len(found.kept) > 900
    assert (found.kept[:900] == np.arange(900)).all()
    assert len(trim(bpe, TEXTS, Choice(extra=5000), 1000).kept) == 1000
    assert trim(bpe, CORPUS, TIGHT, 1000, pinned=[899]).kept[-1] == 899


def test_least_uses_and_most_tokens(bpe: Path, wordpiece: Path) -> None:
    every = trim(bpe, CORPUS, TIGHT, 900)
    often = trim(bpe, CORPUS, Choice(min_count=2, pad_to_multiple=1), 900)
    assert len(often.kept) < len(every.kept)
    assert 0 < often.corpus.changed < len(CORPUS)
    assert often.corpus.lost == 0
    capped = trim(wordpiece, TEXTS, Choice(max_size=800, fallback="none"), rows_of(wordpiece))
    assert len(capped.kept) == 800
    assert capped.corpus.changed >= capped.corpus.lost > 0  # unknown ones do not come back
    with pytest.raises(UnsupportedError, match="max_size 200: special tokens"):
        trim(bpe, CORPUS, Choice(max_size=200), 900)


def test_numbers(wordpiece: Path) -> None:
    rows, corpus = rows_of(wordpiece), ["play"]
    few = trim(wordpiece, corpus, Choice(fallback="none", pad_to_multiple=1), rows)
    more = trim(
        wordpiece, corpus, Choice(fallback="none", pad_to_multiple=1, keep_numbers=True), rows
    )
    new = set(more.kept.tolist()) - set(few.kept.tolist())
    names = [name for name, token in more.old.inner.get_vocab().items() if token in new]
    assert names
    assert all(name.removeprefix("##").isdigit() for name in names)


# --- the proof -----------------------------------------------------------------------------------


def test_a_merge_too_few_is_caught(bpe: Path) -> None:
    found = trim(bpe, CORPUS, TIGHT, 900)
    content = json.loads(found.files["tokenizer.json"])
    used = {t for text in CORPUS for t in found.new.inner.encode(text).tokens}
    merges = content["model"]["merges"]
    place = next(i for i, merge in enumerate(merges) if "".join(merge) in used)
    del merges[place]
    broken = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), {})
    assert compare(found.old, found.new, found.kept, CORPUS).broken == []
    assert compare(found.old, broken, found.kept, CORPUS).broken
    # A wrong order of merges, and a wrong decoder.
    content["model"]["merges"] = json.loads(found.files["tokenizer.json"])["model"]["merges"][::-1]
    turned = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), {})
    assert compare(found.old, turned, found.kept, CORPUS).broken
    found.new.inner.decoder = decoders.WordPiece()
    assert len(compare(found.old, found.new, found.kept, CORPUS).broken) == len(set(CORPUS))


def test_pieces_of_an_unknown_word_come_back(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "a": 1, "ab": 2, "##bc": 3, "x": 4, "##x": 5}
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocab,
    }
    _plain(model).save(str(tmp_path / "tokenizer.json"))
    # Without `ab`, the unknown word `abc` would be `a ##bc`.
    found = trim(tmp_path, ["abc", "a", "xbc"], TIGHT, 6)
    assert found.new.inner.encode("abc").tokens == ["[UNK]"]
    assert 2 in found.kept


def test_a_text_that_stays_different_is_an_error(tmp_path: Path) -> None:
    """The added token `Q` divides `Qabc`, which the search for the pieces does not know."""
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "a": 1, "ab": 2, "##bc": 3, "x": 4},
    }
    made = _plain(model)
    made.add_tokens(["Q"])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(WorkError, match=r"1 texts of the corpus differ .* 'Qabc'"):
        trim(tmp_path, ["Qabc", "a", "xbc"], TIGHT, 6)
    trim(tmp_path, ["Qabc", "ab"], TIGHT, 6)


def test_ids_that_the_library_numbers_otherwise_are_refused(bpe: Path, tmp_path: Path) -> None:
    content = json.loads((bpe / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"][0]["id"] = 950
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="numbers its added tokens otherwise"):
        trim(tmp_path, CORPUS, TIGHT, 1000)


# --- bad input -----------------------------------------------------------------------------------


def test_refusals(bpe: Path, tmp_path: Path) -> None:
    assert reasons(bpe) == []
    level = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    level.save(str(tmp_path / "tokenizer.json"))
    assert "of kind WordLevel" in reasons(tmp_path)[0]
    with pytest.raises(UnsupportedError, match="kind WordLevel"):
        trim(tmp_path, ["a"], TIGHT, 2)
    content = json.loads((bpe / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert "by chance (dropout 0.1)" in reasons(tmp_path)[0]
    with pytest.raises(CheckpointError, match="largest id is 899"):
        trim(bpe, CORPUS, TIGHT, 899)
    with pytest.raises(DataError, match="not valid Unicode"):
        trim(bpe, ["\ud800"], TIGHT, 900)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        reasons(tmp_path / "none")
    with pytest.raises(CheckpointError, match="malformed"):
        vocabulary_of({"type": "BPE", "vocab": {}})


def test_older_files_do_not_state_the_kind() -> None:
    assert kind_of({"vocab": {}, "merges": []}) == "BPE"
    assert kind_of({"vocab": []}) == "Unigram"
    assert kind_of({"vocab": {}, "max_input_chars_per_word": 100}) == "WordPiece"
    assert kind_of({"vocab": {}}) == "WordLevel"
    both = [BPE({"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": m}) for m in (["a b"], [["a", "b"]])]
    assert both[0].needs(2) == both[1].needs(2) == {0, 1, 2}


def test_ids_in_every_place(bpe: Path) -> None:
    content = json.loads((bpe / "tokenizer.json").read_text(encoding="utf-8"))
    content["padding"] = {"pad_id": 5, "pad_token": "<|user|>"}
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel", "trim_offsets": True},
            {"type": "RobertaProcessing", "sep": ["<|user|>", 5], "cls": ["[gMASK]", 2]},
        ],
    }
    kept = np.array([*range(2, 264)])
    new = rewritten({**content, "added_tokens": content["added_tokens"][2:]}, kept)
    assert new["padding"]["pad_id"] == 3
    assert new["post_processor"]["processors"][1]["sep"] == ["<|user|>", 3]
    assert [token["id"] for token in new["added_tokens"]] == list(range(6))
    config = {"eos_token_id": [4, 5], "pad_token_id": None, "vocab_size": 9, "bad_words_ids": [[6]]}
    assert renumbered_config(config, lambda token: token - 2) == {
        "eos_token_id": [2, 3],
        "pad_token_id": None,
        "vocab_size": 9,
        "bad_words_ids": [[4]],
    }


def test_what_a_vocabulary_needs() -> None:
    """Parts of merges before an ending; of Unigram the bytes, and every piece of a word."""
    ending = {
        "type": "BPE", "end_of_word_suffix": "</w>", "merges": ["a b</w>"],
        "vocab": {"a": 0, "b</w>": 1, "ab</w>": 2},
    }  # fmt: skip
    assert vocabulary_of(ending).needs(2) == {0, 1, 2}
    pieces = {
        "type": "Unigram", "byte_fallback": True, "unk_id": None,
        "vocab": [["a", -1.0], ["<0x41>", -2.0], ["ab", -3.0], ["c", -9.0]],
    }  # fmt: skip
    unigram = vocabulary_of(pieces)
    assert unigram.fixed == {1, 3}
    assert unigram.tried("ab") == {0, 2}


def test_side_files_of_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model"):
        model_of({})
    side = {"added_tokens_decoder": {"0": {"content": "a"}, "1": {"content": "b"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(side))
    content = {"model": {"type": "WordPiece", "unk_token": "a", "vocab": {"a": 0}}}
    files, _ = side_files(tmp_path, content, np.array([1]))
    assert json.loads(files["tokenizer_config.json"]) == {
        "added_tokens_decoder": {"0": {"content": "b"}}
    }
