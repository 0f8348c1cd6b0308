"""How llama.cpp splits a text, from a GGUF file's metadata alone; imports nothing of ours.

After src/llama-vocab.cpp: special tokens first (as with parse_special), then words by the regular
expressions that stand behind `tokenizer.ggml.pre`, merges by rank in each (`llm_tokenizer_bpe`); or
BERT's words and their longest pieces (`llm_tokenizer_wpm`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import regex

CONTROL, USER_DEFINED, UNKNOWN = 3, 4, 2
_CASES = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
PRE: dict[str, list[str]] = {
    "chatglm-bpe": [_CASES + _WORD + r"\p{N}{1,3}" + _END],
    "llama-bpe": [_CASES + _WORD + r"\p{N}{1,3}" + _END],
    "qwen2": [_CASES + _WORD + r"\p{N}" + _END],
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
}
IGNORE_MERGES = ("llama-bpe",)


def alphabet() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(other)}


def words(text: str, patterns: list[str]) -> list[str]:
    """Each pattern in turn cuts the pieces so far into its matches and what is between them."""
    pieces = [text]
    for pattern in patterns:
        cut: list[str] = []
        for piece in pieces:
            start = 0
            for match in regex.finditer(pattern, piece):
                cut += [piece[start : match.start()], match[0]]
                start = match.end()
            cut.append(piece[start:])
        pieces = [piece for piece in cut if piece]
    return pieces


def merged(symbols: list[str], ranks: Mapping[str, int]) -> list[str]:
    """The pair of the lowest rank first, the leftmost of equal ones."""
    symbols = list(symbols)
    while True:
        found = [
            (ranks[f"{a} {b}"], i)
            for i, (a, b) in enumerate(pairwise(symbols))
            if f"{a} {b}" in ranks
        ]
        if not found:
            return symbols
        at = min(found)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def partition(text: str, special: Mapping[str, int]) -> Iterator[str | int]:
    """Special tokens, the longest first, and the texts between them."""
    for token in sorted(special, key=len, reverse=True):
        before, found, after = text.partition(token)
        if found:
            yield from partition(before, special)
            yield special[token]
            yield from partition(after, special)
            return
    if text:
        yield text


def tokenize(meta: Mapping[str, Any], text: str) -> list[int]:
    """Token ids, with those that stand before and behind every text."""
    key = "tokenizer.ggml."
    names = {name: i for i, name in enumerate(meta[f"{key}tokens"])}
    if meta[f"{key}model"] == "bert":
        inner = [i for word in bert_words(text) for i in pieces(word, names, meta)]
        return [meta[f"{key}bos_token_id"], *inner, meta[f"{key}seperator_token_id"]]
    types = meta[f"{key}token_type"]
    special = {n: i for n, i in names.items() if types[i] in (CONTROL, USER_DEFINED, UNKNOWN)}
    ranks = {merge: rank for rank, merge in enumerate(meta[f"{key}merges"])}
    letters, pre = alphabet(), meta[f"{key}pre"]
    ids = [meta[f"{key}bos_token_id"]] if meta.get(f"{key}add_bos_token") else []
    for part in partition(text, special):
        if isinstance(part, int):
            ids.append(part)
            continue
        for word in words(part, PRE[pre]):
            spelled = "".join(letters[byte] for byte in word.encode())
            if pre in IGNORE_MERGES and spelled in names:
                ids.append(names[spelled])
            else:
                ids += [names[s] for s in merged(list(spelled), ranks) if s in names]
    return ids


def bert_words(text: str) -> list[str]:
    """Lower case without accents; punctuation and Chinese characters stand alone."""
    found = [""]
    for letter in decomposed(text):
        kind, code = unicodedata.category(letter), ord(letter)
        if letter.isspace():
            found.append("")
        elif code in (0, 0xFFFD) or kind in ("Cc", "Cf") or kind.startswith("M"):
            continue
        elif kind.startswith("P") or (code < 0x7F and kind.startswith("S")) or is_chinese(code):
            found += [letter.lower(), ""]
        else:
            found[-1] += letter.lower()
    return [word for word in found if word]


def decomposed(text: str) -> str:
    """Letters and their accents one by one; its table has no Korean syllables."""
    korean = range(0xAC00, 0xD7A4)
    return "".join(c if ord(c) in korean else unicodedata.normalize("NFD", c) for c in text)


def is_chinese(code: int) -> bool:
    ranges = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0xF900, 0xFAFF))
    return any(low <= code <= high for low, high in ranges)


def pieces(word: str, names: Mapping[str, int], meta: Mapping[str, Any]) -> list[int]:
    """Longest first, from a mark where the word begins; or the unknown token."""
    rest, ids = f"▁{word}", []
    while rest:
        end = next((e for e in range(len(rest), 0, -1) if rest[:e] in names), 0)
        if not end:
            return [meta["tokenizer.ggml.unknown_token_id"]]
        ids.append(names[rest[:end]])
        rest = rest[end:]
    return ids
