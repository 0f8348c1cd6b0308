"""targets/_gguf_tokenizer: the file splits texts as tokenizer.json does, or is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_models import RULES, TEXTS, edit_tokenizer, save_bpe_decoder
from oracles.gguf_tokenizer import tokenize
from tiny_encoder import save_tiny
from tokenizers import processors

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.contracts import ExportOptions, Target
from pocketglm.data.tokenizer_training import CHAT_TEMPLATE, train_wordpiece
from pocketglm.registry import load
from pocketglm.targets import _gguf_tokenizer as tokens
from pocketglm.targets._gguf_file import Writer
from pocketglm.text.tokenizer import Tokenizer

TARGET: Target = load("targets", "gguf")
KOREAN, HINDI = "한국어", "हिन्दी"  # in one of TEXTS
MARKED = [*TEXTS, "<|user|>\nhello<|assistant|>\n 42<|endoftext|>"]


def metadata(folder: Path, tmp_path: Path, eos: tuple[int, ...] = (1,)) -> dict[str, Any]:
    """As the format's own package reads it."""
    ckpt = Checkpoint.open(folder)
    entries = tokens.bpe_metadata(ckpt, ckpt.config["vocab_size"], eos, None)
    return written(entries, tmp_path)


def written(entries: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    Writer(tmp_path / "words.gguf", entries, []).close()
    reader = gguf.GGUFReader(str(tmp_path / "words.gguf"))
    return {name: field.contents() for name, field in reader.fields.items()}


def reasons(folder: Path) -> str:
    return "\n".join(TARGET.supports(Checkpoint.open(folder), ExportOptions()))


# --- byte-level BPE ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_named_rule_splits_as_tokenizer_json(rule: str, tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m", "llama", rule)
    assert reasons(folder) == ""
    meta = metadata(folder, tmp_path)
    assert meta["tokenizer.ggml.pre"] == rule
    ours = Tokenizer.load(folder)
    for text in MARKED:
        assert tokenize(meta, text) == ours.encode_prompt(text), text


def test_a_wrong_name_would_split_otherwise(tmp_path: Path) -> None:
    """The check above can fail: rules differ on these texts."""
    folder = save_bpe_decoder(tmp_path / "m", "llama", "chatglm-bpe")
    meta, ours = metadata(folder, tmp_path), Tokenizer.load(folder)
    for wrong in ("qwen2", "gpt-2", "smollm"):
        other = meta | {"tokenizer.ggml.pre": wrong}
        assert any(tokenize(other, text) != ours.encode_prompt(text) for text in MARKED)


def test_what_special_tokens_become(tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m")
    meta = metadata(folder, tmp_path, (1, 5, 7))
    names, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    assert len(names) == len(types) == len(set(names)) == 426
    assert names[:2] == ["<|pad|>", "<|endoftext|>"]
    assert set(types[:8]) == {tokens.CONTROL}
    assert set(types[8:420]) == {tokens.NORMAL}
    assert (names[425], types[425]) == ("[PAD425]", tokens.UNUSED)
    keys = ("eos", "eot", "eom", "bos", "padding")
    assert [meta[f"tokenizer.ggml.{key}_token_id"] for key in keys] == [1, 5, 7, 1, 0]
    assert meta["tokenizer.ggml.add_bos_token"] is False
    assert meta["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert meta["tokenizer.ggml.merges"][0].count(" ") == 1


def test_a_token_before_every_text(tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m", "llama", "llama-bpe")
    file = folder / "tokenizer.json"
    inner = Tokenizer.load(folder).inner
    inner.post_processor = processors.TemplateProcessing(
        single="[gMASK] $A", special_tokens=[("[gMASK]", 2)]
    )
    inner.save(str(file))
    meta = metadata(folder, tmp_path)
    assert meta["tokenizer.ggml.add_bos_token"] is True
    assert meta["tokenizer.ggml.bos_token_id"] == 2
    assert tokenize(meta, "hello") == Tokenizer.load(folder).encode_prompt("hello")
    assert tokens.prefix_note(Checkpoint.open(folder)) is None
    inner.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 2), ("<sop>", 3)]
    )
    inner.save(str(file))
    assert metadata(folder, tmp_path)["tokenizer.ggml.add_bos_token"] is False
    note = tokens.prefix_note(Checkpoint.open(folder))
    assert note == "llama.cpp puts no [gMASK]<sop> before a text: the chat template has to"


def test_an_unknown_rule_has_no_name(tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m")
    spaces = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "use_regex": True,
        "trim_offsets": True,
    }
    for rule, words in (
        (None, "(none)"),
        (spaces, "(ByteLevel)"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, spaces]}, "Whitespace + "),
    ):
        edit_tokenizer(folder, pre_tokenizer=rule)
        found = reasons(folder)
        assert "llama.cpp has no name for its rule of splitting into words" in found
        assert words in found
        assert "chatglm-bpe, gpt-2, llama-bpe, qwen2, smollm" in found


def test_other_forms_of_bpe_are_refused(tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    edit_tokenizer(folder, model=model | {"byte_fallback": True, "unk_token": "<sop>"})
    assert "byte_fallback True" in reasons(folder)
    assert "unk_token '<sop>'" in reasons(folder)
    edit_tokenizer(folder, model=model, normalizer={"type": "NFC"})
    assert reasons(folder) == ""
    edit_tokenizer(folder, normalizer={"type": "Lowercase"})
    assert "normalizer Lowercase, which llama.cpp lacks" in reasons(folder)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit_tokenizer(folder, normalizer=None, added_tokens=[t | {"lstrip": True} for t in added])
    assert "'<|pad|>' and 7 more takes spaces beside it along" in reasons(folder)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m")
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    edit_tokenizer(folder, model=model, pre_tokenizer=None, added_tokens=[])
    assert "tokenizer WordLevel: carried is byte-level BPE" in reasons(folder)


def test_how_a_text_ends_must_be_known(tmp_path: Path) -> None:
    folder = save_bpe_decoder(tmp_path / "m", eos_token_id=[1, 2, 3, 5])
    assert "4 tokens end a text (eos_token_id [1, 2, 3, 5]): GGUF has three" in reasons(folder)
    folder = save_bpe_decoder(tmp_path / "n", eos_token_id=[])
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert reasons(folder) == ""  # the tokenizer's own eos_token
    assert metadata(folder, tmp_path, ())["tokenizer.ggml.eos_token_id"] == 1
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    assert "llama.cpp would take number 11" in reasons(folder)


# --- WordPiece -----------------------------------------------------------------------------------


def test_wordpiece_splits_as_tokenizer_json(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", pooling="cls", pooler=True, vocab_size=300)
    train_wordpiece(TEXTS, 300).save(str(folder / "tokenizer.json"))
    assert reasons(folder) == ""
    entries = tokens.wordpiece_metadata(Checkpoint.open(folder), 300)
    meta, ours = written(entries, tmp_path), Tokenizer.load(folder)
    assert meta["tokenizer.ggml.tokens"][:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for text in [*TEXTS, "Ünïcödé ǅ", "zzzz ξ unknown", KOREAN, HINDI]:
        same = tokenize(meta, text) == ours.encode_all([text])[0]
        assert same == (KOREAN not in text and HINDI not in text), text
    note = tokens.wordpiece_note(Checkpoint.open(folder))
    assert note is not None
    assert "Korean" in note


def test_letters_alone_need_no_note(tmp_path: Path) -> None:
    assert tokens.wordpiece_note(Checkpoint.open(save_tiny(tmp_path / "m"))) is None


def test_other_forms_of_wordpiece_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", pooling="cls", pooler=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    for fields, words in (
        ({"normalizer": content["normalizer"] | {"lowercase": False}}, "differs (lowercase)"),
        ({"normalizer": content["normalizer"] | {"strip_accents": False}}, "(strip_accents)"),
        ({"normalizer": None}, "no BertNormalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer Whitespace"),
        ({"post_processor": None}, "not put between [CLS] and [SEP]"),
        (
            {"model": content["model"] | {"continuing_subword_prefix": "@@"}},
            "continue with '@@'",
        ),
        (
            {"model": content["model"] | {"vocab": content["model"]["vocab"] | {"##▁a": 60}}},
            "two tokens are the same without '##'",
        ),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "WordLevel"),
    ):
        edit_tokenizer(folder, **(content | fields))
        assert words in reasons(folder), words
