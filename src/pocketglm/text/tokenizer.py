"""A `tokenizer.json`, torch-free: text in, right-padded numpy ids and mask out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from pocketglm.artifacts.checkpoint import read_json
from pocketglm.contracts import Ids
from pocketglm.errors import CheckpointError, DataError, UsageError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "chat_template.jinja",
)
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids and mask are [B, S] int64, padded on the right to the longest row.

    truncated: rows that were longer than the limit. unknown: unknown tokens among `tokens`,
    special tokens not counted.
    """

    ids: Ids
    mask: Ids
    truncated: int
    unknown: int
    tokens: int


class Tokenizer:
    """Wraps `tokenizers.Tokenizer`; padding and truncation stored in the file are ignored."""

    def __init__(self, inner: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        self.inner = inner
        self.config = config
        inner.no_padding()
        inner.no_truncation()
        self.pad_id = self._id("pad_token", "[PAD]", "<pad>") or 0
        self.unk_id = self._id("unk_token", "[UNK]", "<unk>")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Open the tokenizer of a model or export folder.

        Raises:
            CheckpointError: no tokenizer.json, or it cannot be read.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json",
                "save a fast tokenizer there: transformers.AutoTokenizer.from_pretrained(...)"
                f".save_pretrained('{folder}')",
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} cannot be read: {error}", "download it again") from error
        config_file = folder / "tokenizer_config.json"
        return cls(inner, read_json(config_file) if config_file.is_file() else {})

    def _id(self, key: str, *usual: str) -> int | None:
        for token in (self._token(key), *usual):
            if token is not None and (found := self.inner.token_to_id(token)) is not None:
                return int(found)
        return None

    def _token(self, key: str) -> str | None:
        value = self.config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    @property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, ... as a chat template names them; those that there are."""
        found = {key: self._token(key) for key in SPECIAL_TOKENS}
        return {key: token for key, token in found.items() if token is not None}

    @property
    def size(self) -> int:
        """One more than the largest token id."""
        return max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, texts: Sequence[str], max_length: int) -> Encoded:
        """Token ids with the model's special tokens, cut to `max_length`.

        A cut row keeps its closing special token, as the tokenizer's own truncation does.

        Raises:
            UsageError: `max_length` leaves no room for a token of text.
            DataError: a text is not Unicode.
        """
        special = self.inner.num_special_tokens_to_add(is_pair=False)
        if max_length <= special:
            raise UsageError(
                f"max_length {max_length} leaves no room for text: the tokenizer adds {special} "
                "special tokens",
                f"use a max_length of at least {special + 1}",
            )
        self.inner.enable_truncation(max_length)
        try:
            rows = self.inner.encode_batch(list(texts))
        except TypeError as error:  # what the library makes of half a surrogate pair
            raise _not_unicode(texts) from error
        finally:
            self.inner.no_truncation()
        width = max((len(row.ids) for row in rows), default=0)
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        unknown = tokens = 0
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = row.ids
            mask[index, : len(row.ids)] = 1
            plain = [t for t, s in zip(row.ids, row.special_tokens_mask, strict=True) if not s]
            unknown += sum(token == self.unk_id for token in plain)
            tokens += len(plain)
        truncated = sum(bool(row.overflowing) for row in rows)
        return Encoded(ids, mask, truncated, unknown, tokens)

    def encode_all(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Token ids of texts at any length; special: with the model's special tokens around them.

        Raises:
            DataError: a text is not Unicode.
        """
        try:
            rows = self.inner.encode_batch_fast(list(texts), add_special_tokens=special)
        except TypeError as error:
            raise _not_unicode(texts) from error
        return [list(row.ids) for row in rows]

    def encode_prompt(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text that a decoder shall continue, at any length.

        special: put the tokens before it that the tokenizer puts before every text (a
        beginning-of-text token); one that it puts behind is left out. A chat template writes its
        own.

        Raises:
            DataError: the text is not Unicode.
        """
        try:
            row = self.inner.encode(text, add_special_tokens=special)
        except TypeError as error:
            raise _not_unicode([text]) from error
        ids = list(row.ids)
        if not special:
            return ids
        own = [index for index, part in enumerate(row.sequence_ids) if part is not None]
        ids = ids[: own[-1] + 1] if own else ids
        bos = self._id("bos_token")
        if self.config.get("add_bos_token") is True and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; ids that it does not know are nothing."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def check_vocabulary(self, vocab_size: int, folder: Path) -> None:
        """Raises CheckpointError if the tokenizer can emit ids that the model has no row for."""
        if self.size > vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer's largest id is {self.size - 1}, the model's embedding "
                f"has {vocab_size} rows",
                "the tokenizer belongs to another model: copy the right tokenizer.json",
            )


def _not_unicode(texts: Sequence[str]) -> DataError:
    bad = next((ascii(t) for t in texts if not _is_unicode(t)), "")
    return DataError(f"a text is not valid Unicode: {bad[:80]}", "save it as UTF-8 and try again")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
