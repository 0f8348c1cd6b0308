"""Trains a BERT-style WordPiece tokenizer for a small encoder of one's own.

Lower case, one token per Chinese character, as BERT does (Devlin et al. 2019, arXiv:1810.04805);
WordPiece after Schuster and Nakajima 2012. The result depends on the texts and size alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

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
