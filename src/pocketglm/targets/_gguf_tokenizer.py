"""A tokenizer.json as llama.cpp's metadata, or the reasons why llama.cpp would tokenize otherwise.

Byte-level BPE (`gpt2`): llama.cpp does not read the rule that splits a text into words, it knows
some by name. A wrong name loads and tokenizes wrongly, so a name is given only to a rule that is
exactly one that it stands for (src/llama-vocab.cpp, `llm_tokenizer_bpe`). WordPiece (`bert`): one
form, lower case. What special tokens and words become:

    tokenizer.json                          llama.cpp
    special token                           CONTROL
    other added token                       USER_DEFINED
    id without a token                      UNUSED, `[PADn]`
    tokens that end a text, up to three     eos, eot, eom (all of them end a generation)
    a token before every text               bos, with add_bos_token
    WordPiece `##ing`, `run`                `ing`, `▁run`

Differences that are left: NFC, which Qwen's tokenizer puts before, is not made. In WordPiece, words
of more than 100 letters are taken apart, where tokenizer.json says unknown; Korean syllables stay
whole; vowel signs (Hindi and the like) are dropped as if they were accents (`wordpiece_note`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint, read_json
from pocketglm.targets._gguf_file import Entry
from pocketglm.text.chat import read_template
from pocketglm.text.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
_KEY = "tokenizer.ggml."
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = _LETTERS + r"\p{N}{1,3}" + _REST
_ONE_DIGIT = _LETTERS + r"\p{N}" + _REST
_OPEN = ("ByteLevel", {"add_prefix_space": False, "use_regex": False})
_GPT2 = ("ByteLevel", {"add_prefix_space": False, "use_regex": True})
_DIGITS = ("Digits", {"individual_digits": True})
Step = tuple[str, dict[str, Any]]


def _split(pattern: str) -> Step:
    return "Split", {"pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# (the steps of the pre-tokenizer, ignore_merges) -> llama.cpp's name
_PRE: tuple[tuple[tuple[Step, ...], bool, str], ...] = (
    ((_split(_THREE_DIGITS), _OPEN), False, "chatglm-bpe"),
    ((_split(_THREE_DIGITS), _OPEN), True, "llama-bpe"),
    ((_split(_ONE_DIGIT), _OPEN), False, "qwen2"),
    ((_GPT2,), False, "gpt-2"),
    ((_DIGITS, _GPT2), False, "smollm"),
)
_UNSET = {"trim_offsets"}  # moves no token
_BERT = {"lowercase": True, "clean_text": True, "handle_chinese_chars": True}
_NAMES = ", ".join(sorted({name for _, _, name in _PRE}))


@dataclass(frozen=True, slots=True)
class _File:
    """tokenizer.json, and the tokenizer that it makes."""

    content: dict[str, Any]
    tokenizer: Tokenizer

    @classmethod
    def read(cls, ckpt: Checkpoint) -> _File:
        return cls(read_json(ckpt.path / "tokenizer.json"), Tokenizer.load(ckpt.path))

    @property
    def model(self) -> dict[str, Any]:
        found: dict[str, Any] = self.content["model"]
        return found

    @property
    def added(self) -> list[dict[str, Any]]:
        return self.content.get("added_tokens") or []

    @property
    def before(self) -> list[int]:
        """The tokens that stand before every text."""
        plain = self.tokenizer.encode_prompt("a", special=False)
        whole = self.tokenizer.encode_prompt("a")
        return whole[: len(whole) - len(plain)]

    def id(self, key: str) -> int | None:
        """The id of the special token that the config names so, e.g. `pad_token`."""
        token = self.tokenizer.special_tokens.get(key)
        return None if token is None else self.tokenizer.inner.token_to_id(token)


# --- refusals ------------------------------------------------------------------------------------


def bpe_reasons(ckpt: Checkpoint, eos: Sequence[int]) -> list[str]:
    """Why llama.cpp would split a decoder's texts otherwise, or end them elsewhere."""
    file = _File.read(ckpt)
    found = _ends(file, eos)
    kind = file.model.get("type")
    if kind != "BPE":
        return [f"tokenizer {kind}: carried is byte-level BPE", *found]
    for key, usual in (
        ("byte_fallback", False),
        ("continuing_subword_prefix", ""),
        ("end_of_word_suffix", ""),
        ("unk_token", None),
        ("dropout", None),
    ):
        value = file.model.get(key)
        if value and value != usual:
            found.append(
                f"tokenizer: {key} {value!r} of its BPE; carried is byte-level BPE without it"
            )
    if not found and pre_name(file.content) is None:
        found.append(
            "tokenizer: llama.cpp has no name for its rule of splitting into words "
            f"({_words(file.content)}); known here: {_NAMES}"
        )
    normalizer = file.content.get("normalizer")
    if normalizer and normalizer.get("type") != "NFC":
        found.append(f"tokenizer: normalizer {normalizer.get('type')}, which llama.cpp lacks")
    return found + _added(file)


def wordpiece_reasons(ckpt: Checkpoint) -> list[str]:
    """Why llama.cpp would split an encoder's texts otherwise."""
    file = _File.read(ckpt)
    kind = file.model.get("type")
    if kind != "WordPiece":
        return [f"tokenizer {kind}: carried is WordPiece, as BERT has it"]
    found = []
    if file.model.get("continuing_subword_prefix", "##") != "##":
        prefix = file.model["continuing_subword_prefix"]
        found.append(f"tokenizer: pieces continue with {prefix!r}, llama.cpp knows '##'")
    normalizer = file.content.get("normalizer") or {}
    wanted = {**_BERT, "type": "BertNormalizer"}
    wrong = [key for key, value in wanted.items() if normalizer.get(key) != value]
    if wrong or normalizer.get("strip_accents") is False:
        said = "no BertNormalizer" if "type" in wrong else ", ".join(wrong or ["strip_accents"])
        found.append(
            f"tokenizer: its normalizer differs ({said}): llama.cpp makes lower case, takes "
            "accents off and parts Chinese characters"
        )
    before = (file.content.get("pre_tokenizer") or {}).get("type")
    if before != "BertPreTokenizer":
        found.append(f"tokenizer: pre-tokenizer {before}, llama.cpp knows BertPreTokenizer")
    ids = list(file.tokenizer.inner.encode("a").ids)
    around = [file.id("cls_token") or _named(file, "[CLS]"), *ids[1:-1]]
    around.append(file.id("sep_token") or _named(file, "[SEP]"))
    if ids != around:
        found.append("tokenizer: a text is not put between [CLS] and [SEP], llama.cpp does it")
    names = _phantom(file)
    if len(set(names.values())) < len(names):
        found.append("tokenizer: two tokens are the same without '##'")
    return found + _added(file)


def _ends(file: _File, eos: Sequence[int]) -> list[str]:
    if not eos and file.id("eos_token") is None:
        return [
            "no token ends a text (eos_token_id): llama.cpp would take number 11; name one in "
            "generation_config.json"
        ]
    if len(eos) > 3:
        return [f"{len(eos)} tokens end a text (eos_token_id {list(eos)}): GGUF has three places"]
    return []


def _added(file: _File) -> list[str]:
    odd = [
        str(token["content"])
        for token in file.added
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    ]
    if not odd:
        return []
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return [f"tokenizer: {odd[0]!r}{more} takes spaces beside it along, in llama.cpp it does not"]


# --- metadata ------------------------------------------------------------------------------------


def pre_name(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the splitting rule of a tokenizer.json with BPE, or None."""
    steps = _steps(content.get("pre_tokenizer"))
    ignores = bool(content["model"].get("ignore_merges"))
    return next((name for rule, merges, name in _PRE if (rule, merges) == (steps, ignores)), None)


def _steps(node: Mapping[str, Any] | None) -> tuple[Step, ...]:
    if node is None:
        return ()
    if node["type"] == "Sequence":
        return tuple(step for inner in node["pretokenizers"] for step in _steps(inner))
    fields = {k: v for k, v in node.items() if k != "type" and k not in _UNSET}
    if node["type"] == "ByteLevel":
        fields.setdefault("use_regex", True)
    return ((node["type"], fields),)


def _words(content: Mapping[str, Any]) -> str:
    names = [name for name, _ in _steps(content.get("pre_tokenizer"))]
    merges = ", ignore_merges" if content["model"].get("ignore_merges") else ""
    return (" + ".join(names) or "none") + merges


def bpe_metadata(
    ckpt: Checkpoint, vocab_size: int, eos: Sequence[int], bos: int | None
) -> dict[str, Entry]:
    """The tokenizer and chat template of a decoder without `bpe_reasons`."""
    file = _File.read(ckpt)
    names = file.tokenizer.inner.get_vocab(with_added_tokens=True)
    merges = [m if isinstance(m, str) else " ".join(m) for m in file.model["merges"]]
    before, usual = file.before, file.id("eos_token")
    ends = list(eos) if eos or usual is None else [usual]
    first = before[0] if len(before) == 1 else ends[0] if bos is None else bos
    ids: dict[str, int | None] = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    ids |= {"bos": first, "padding": file.id("pad_token")}
    found = {
        "model": Entry("str", "gpt2"),
        "pre": Entry("str", pre_name(file.content)),
        **_tokens({token: name for name, token in names.items()}, file, vocab_size),
        "merges": Entry("str[]", merges),
        **_special(ids),
        "add_bos_token": Entry("bool", len(before) == 1),
    }
    template = read_template(ckpt.path)
    chat = {"tokenizer.chat_template": Entry("str", template)} if template else {}
    return {f"{_KEY}{key}": entry for key, entry in found.items()} | chat


def prefix_note(ckpt: Checkpoint) -> str | None:
    """What to tell where more than one token stands before every text; GGUF has one place."""
    file = _File.read(ckpt)
    names = [str(file.tokenizer.inner.id_to_token(token)) for token in file.before]
    if len(names) < 2:
        return None
    return f"llama.cpp puts no {''.join(names)} before a text: the chat template has to"


def wordpiece_metadata(ckpt: Checkpoint, vocab_size: int) -> dict[str, Entry]:
    """The tokenizer of an encoder without `wordpiece_reasons`."""
    file = _File.read(ckpt)
    usual = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
    ids: dict[str, int | None] = {}
    for key, name in usual.items():
        found = file.id(f"{key}_token")
        ids[key] = _named(file, name) if found is None else found
    special = {
        "bos": ids["cls"],
        "eos": ids["sep"],
        "cls": ids["cls"],
        "seperator": ids["sep"],  # so spelt in the format
        "padding": ids["pad"],
        "unknown": ids["unk"],
        "mask": ids["mask"],
    }
    entries = {
        "model": Entry("str", "bert"),
        "pre": Entry("str", "default"),
        **_tokens(_phantom(file), file, vocab_size),
        **_special(special),
        "add_bos_token": Entry("bool", True),
        "add_sep_token": Entry("bool", True),
    }
    return {f"{_KEY}{key}": entry for key, entry in entries.items()}


def wordpiece_note(ckpt: Checkpoint) -> str | None:
    """What to tell of a vocabulary with Korean letters or vowel signs, else None."""
    names = _File.read(ckpt).tokenizer.inner.get_vocab(with_added_tokens=True)
    letters = set("".join(names))
    if not any("\u1100" <= c <= "\u11ff" or unicodedata.category(c) == "Mc" for c in letters):
        return None
    return (
        "llama.cpp's own tokenizer takes Korean, and scripts with vowel signs such as Hindi, apart "
        "in another way; tokens made by tokenizer.json are right"
    )


def _named(file: _File, token: str) -> int | None:
    found: int | None = file.tokenizer.inner.token_to_id(token)
    return found


def _phantom(file: _File) -> dict[int, str]:
    """Tokens with a mark where a word begins, instead of one where it goes on."""
    names = {}
    for name, token in file.tokenizer.inner.get_vocab(with_added_tokens=True).items():
        if name.startswith("[") and name.endswith("]"):
            names[token] = name
        else:
            names[token] = name[2:] if name.startswith("##") else f"▁{name}"
    return names


def _tokens(names: Mapping[int, str], file: _File, vocab_size: int) -> dict[str, Entry]:
    kinds = {token["id"]: CONTROL if token.get("special") else USER_DEFINED for token in file.added}
    if file.tokenizer.unk_id is not None and file.model["type"] == "WordPiece":
        kinds[file.tokenizer.unk_id] = UNKNOWN
    listed = [names.get(token, f"[PAD{token}]") for token in range(vocab_size)]
    types = [kinds.get(t, NORMAL) if t in names else UNUSED for t in range(vocab_size)]
    return {"tokens": Entry("str[]", listed), "token_type": Entry("i32[]", types)}


def _special(ids: Mapping[str, int | None]) -> dict[str, Entry]:
    known = {key: token for key, token in ids.items() if token is not None}
    return {f"{key}_token_id": Entry("u32", token) for key, token in known.items()}
