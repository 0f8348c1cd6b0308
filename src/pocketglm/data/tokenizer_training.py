"""Trains tokenizers for small models of one's own; the result depends on the texts and size alone.

Encoders: BERT-style WordPiece: lower case, one token per Chinese character (Devlin et al. 2019,
arXiv:1810.04805; WordPiece after Schuster and Nakajima 2012). Decoders: byte-level BPE (Sennrich et
al. 2016, arXiv:1508.07909; over bytes: GPT-2), which has a token for every text, with GLM-4's
splitting rule, special tokens and form of chat.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pocketglm.errors import DataError, UsageError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4


def train_wordpiece(texts: Iterable[str], vocab_size: int = 8000) -> tokenizers.Tokenizer:
    """A tokenizer whose vocabulary has at most `vocab_size` entries, the special tokens first.

    Raises:
        UsageError: `vocab_size` does not even hold the special tokens.
        DataError: there is no text to train on.
    """
    if vocab_size <= len(SPECIAL):
        raise UsageError(
            f"vocab_size {vocab_size} leaves no room beside {len(SPECIAL)} special tokens",
            "a few thousand suit a small encoder",
        )
    rows = [text for text in texts if text.strip()]
    if not rows:
        raise DataError("no text to train a tokenizer on", "give at least one row with text")
    draft = _bert(models.WordPiece(unk_token="[UNK]"))
    # The trainer numbers the continuing letters in hash order and breaks ties by number; named
    # beforehand, they have fixed numbers.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *_continuing_letters(draft, rows)],
        show_progress=False,
    )
    draft.train_from_iterator(rows, trainer)
    tokenizer = _bert(models.WordPiece(draft.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))],
    )
    return tokenizer


def _bert(model: models.WordPiece) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _continuing_letters(tokenizer: tokenizers.Tokenizer, rows: Iterable[str]) -> list[str]:
    """`##x` for each character that stands inside a word, sorted."""
    words = {
        word
        for row in rows
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
            tokenizer.normalizer.normalize_str(row)
        )
    }
    return sorted({f"##{letter}" for word in words for letter in word[1:]})


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `AutoTokenizer` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": max_length,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


# --- byte-level BPE ------------------------------------------------------------------------------

PAD, END = "<|pad|>", "<|endoftext|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
CHAT_SPECIAL = (PAD, END, "[gMASK]", "<sop>", *ROLES)  # ids 0 to 7
CHAT_EOS = (END, "<|user|>", "<|observation|>")  # any of them ends an answer, as in GLM-4
BYTES = 256
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages %}
{%- if message.role not in ["system", "user", "assistant", "observation"] %}
{{- raise_exception("unknown role: " ~ message.role) }}
{%- endif %}
{{- "<|" ~ message.role ~ "|>\\n" ~ message.content }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|assistant|>\\n" }}
{%- endif %}
"""
# GLM-4's rule: contractions, words with the sign before them, up to three digits, signs, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int = 32000) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens: CHAT_SPECIAL, bytes, merges.

    Encoding adds no special tokens: the chat template, or the task, writes them.

    Raises:
        UsageError: `vocab_size` does not even hold the special tokens and the bytes.
        DataError: there is no text to train on.
    """
    least = len(CHAT_SPECIAL) + BYTES
    if vocab_size < least:
        raise UsageError(
            f"vocab_size {vocab_size} leaves no room: {len(CHAT_SPECIAL)} special tokens and "
            f"{BYTES} bytes are {least}",
            "a few thousand suit a small decoder",
        )
    rows = [text for text in texts if text.strip()]
    if not rows:
        raise DataError("no text to train a tokenizer on", "give at least one row with text")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CHAT_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(rows, trainer)
    return tokenizer


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, after CHAT_SPECIAL: what a decoder starts with when there is no text."""
    names = [*CHAT_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = _byte_level(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.add_special_tokens(list(CHAT_SPECIAL))
    return tokenizer


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_chat_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja for `AutoTokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "pad_token": PAD,
        "eos_token": END,
        "extra_special_tokens": list(CHAT_SPECIAL[2:]),
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
