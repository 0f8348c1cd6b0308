"""How a command is written for a decoder: the text once more, with a mark behind every word.

    prompt   " wake me at 7" and a line break
    answer   <|intent:alarm|> wake<|out|> me<|out|> at<|out|> 7<|slot:time|>

A mark is one token: the intent, or what the word before it belongs to - no slot, a slot that begins
here, or the slot of the word before. So a model decides once a word, with the whole command before
it and the word in question last; the words themselves are given. This is the tagging scheme of
Ramshaw and Marcus 1995, arXiv:cmp-lg/9505040, for a model that reads from left to right. Small
models learn it in a fraction of the steps that writing values out takes them.

`FrameConstraint` lets a decoder write nothing else, so an answer always has a meaning, and every
value is a piece of the text. A word is encoded by itself, in prompt and answer alike; a text that
holds a mark's name is thus no mark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pocketglm.artifacts.manifest import CommandGrammar
from pocketglm.contracts import Ids
from pocketglm.errors import CheckpointError, DataError
from pocketglm.text.tokenizer import Tokenizer

# Scripts that put no blanks between words, as ranges of first and last character: South-East Asian
# ones, Hangul (particles are part of the word), kana and ideographs with their signs, full width.
_UNSPACED = (
    ("\u0e00", "\u0eff"),
    ("\u1000", "\u109f"),
    ("\u1100", "\u11ff"),
    ("\u1780", "\u17ff"),
    ("\u2e80", "\ua4cf"),
    ("\uac00", "\ud7af"),
    ("\uf900", "\ufaff"),
    ("\uff00", "\uffef"),
    ("\U00020000", "\U0003ffff"),
)
_END = "\n"
OUT, INSIDE = "<|out|>", "<|in|>"
_MARK = re.compile(r"<\|(out|in|(?:intent|slot):[^|]+)\|>")
Span = tuple[int, int]
Words = Sequence[Sequence[int]]  # the tokens of each word


@dataclass(frozen=True, slots=True)
class Frame:
    """What a command means; `slots` are (name, value) in the order of the text."""

    intent: str
    slots: tuple[tuple[str, str], ...] = ()


def clean(text: str) -> str:
    """The text as one line, without blanks at its ends; all else, and all positions, stay."""
    return text.replace("\n", " ").replace("\r", " ").strip()


def prompt(text: str) -> str:
    """What the decoder reads."""
    line = clean(text)
    return _blank(line) + line + _END


def write(text: str, frame: Frame, spans: Sequence[Span]) -> str:
    """What the decoder writes; `spans` are the first and the last character but one of each slot's
    value in the clean text, ascending."""
    line = clean(text)
    parts = [intent_mark(frame.intent)]
    for word, mark in zip(pieces(line), _marks_of(line, frame, spans), strict=True):
        parts += [word, mark]
    return "".join(parts)


def read(answer: str) -> Frame:
    """The frame that `write` made the answer from.

    Raises:
        DataError: the answer has another form.
    """
    head, *parts = _MARK.split(answer)
    if head or not parts or not parts[0].startswith("intent:") or parts[-1]:
        raise DataError(f"this is no answer to a command: {answer[:60]!r}", "is it cut?")
    words = parts[1:-1:2]
    return _frame(parts[0].removeprefix("intent:"), words, parts[2::2])


def intent_mark(name: str) -> str:
    return f"<|intent:{name}|>"


def slot_mark(name: str) -> str:
    """The mark of a slot's first word."""
    return f"<|slot:{name}|>"


def mark_names(grammar: CommandGrammar) -> list[str]:
    """All marks of a grammar, in one fixed order: each is a token."""
    slots = sorted({name for names in grammar.intents.values() for name in names})
    return [OUT, INSIDE, *map(slot_mark, slots), *map(intent_mark, sorted(grammar.intents))]


def words(text: str) -> list[Span]:
    """First and last character but one of each word of a clean text; a sign is a word, and so is
    each character of a script that separates no words.
    """
    ends = [index for index in range(1, len(text) + 1) if is_boundary(text, index)]
    pieces = zip([0, *ends], ends, strict=False)
    return [(start, end) for start, end in pieces if not text[start:end].isspace()]


def is_boundary(text: str, index: int) -> bool:
    """A value may begin or end before the character `index`: not within a word or a number."""
    if not 0 < index < len(text):
        return True
    before, after = text[index - 1], text[index]
    if _unspaced(before) or _unspaced(after):
        return True
    if before.isspace() and after.isspace():
        return False
    if before.isdecimal() and after.isdecimal():
        return False
    return not (_is_letter(before) and _is_letter(after))


def _is_letter(character: str) -> bool:
    # A mark (accent, vowel sign) belongs to the letter before it; it is no letter, nor printable
    # as an identifier's start, but may continue one.
    return ("a" + character).isidentifier() and not character.isdecimal() and character != "_"


def _unspaced(character: str) -> bool:
    if character < _UNSPACED[0][0]:
        return False
    return any(first <= character <= last for first, last in _UNSPACED)


def _blank(text: str) -> str:
    return " " if text and not _unspaced(text[0]) else ""


def pieces(line: str) -> Iterator[str]:
    """The words of a clean text, each with the blanks before it."""
    start = 0
    for _, end in words(line):
        yield (_blank(line) if not start else "") + line[start:end]
        start = end


def _marks_of(line: str, frame: Frame, spans: Sequence[Span]) -> list[str]:
    """The mark of each word."""
    marks = []
    for start, end in words(line):
        owner = next((i for i, (a, b) in enumerate(spans) if a <= start and end <= b), None)
        if owner is None:
            marks.append(OUT)
        else:
            begins = spans[owner][0] == start
            marks.append(slot_mark(frame.slots[owner][0]) if begins else INSIDE)
    return marks


def _frame(intent: str, pieces: Sequence[str], marks: Sequence[str]) -> Frame:
    """`marks` without their brackets: `out`, `in`, `slot:NAME`."""
    slots: list[tuple[str, str]] = []
    open_slot = False
    for piece, mark in zip(pieces, marks, strict=True):
        if mark.startswith("slot:"):
            slots.append((mark.removeprefix("slot:"), piece))
            open_slot = True
        elif mark == "in" and open_slot:
            slots[-1] = (slots[-1][0], slots[-1][1] + piece)
        elif mark == "out":
            open_slot = False
        else:
            raise DataError(f"'{mark}' stands where no slot is open", "decode with FrameConstraint")
    return Frame(intent, tuple((name, value.strip()) for name, value in slots))


# --- tokens --------------------------------------------------------------------------------------


class FrameTokens:
    """Commands of one grammar as tokens. `marks`: the ids of `mark_names`, in that order, int64.

    Raises:
        CheckpointError: the tokenizer does not have the grammar's marks.
    """

    def __init__(self, grammar: CommandGrammar, tokenizer: Tokenizer) -> None:
        names = mark_names(grammar)
        found = {name: tokenizer.inner.token_to_id(name) for name in names}
        if missing := [name for name, token in found.items() if token is None]:
            raise CheckpointError(
                f"the tokenizer has no token for {len(missing)} marks of the commands, such as "
                f"{missing[0]}",
                "was tokenizer.json replaced? use the one that training wrote",
            )
        self.id = {name: int(token) for name, token in found.items() if token is not None}
        self.marks: Ids = np.array([self.id[name] for name in names], np.int64)
        self.grammar = grammar
        self._encode = tokenizer.encode_prompt
        whole, plain = self._encode("a"), self._encode("a", special=False)
        self._begin = whole[: len(whole) - len(plain)]
        self._break = self._encode(_END, special=False)
        self._known: dict[str, list[int]] = {}
        self._end = self._word(_END)

    def words(self, text: str) -> list[list[int]]:
        """The tokens of each word.

        Raises:
            DataError: the text is not Unicode.
        """
        return [self._word(piece) for piece in pieces(clean(text))]

    def _word(self, piece: str) -> list[int]:
        if piece not in self._known:
            # Some tokenizers put a blank before every text, hence behind a line break.
            ids, before = self._encode(_END + piece, special=False), len(self._break)
            alone = ids[:before] != self._break
            self._known[piece] = self._encode(piece, special=False) if alone else ids[before:]
        return self._known[piece]

    def prompt(self, text: str, words: Words | None = None) -> list[int]:
        """The tokens of `prompt`; `words`: other ones for the words of the text."""
        words = self.words(text) if words is None else words
        return [*self._begin, *(token for word in words for token in word), *self._end]

    def answer(
        self, text: str, frame: Frame, spans: Sequence[Span], words: Words | None = None
    ) -> list[int]:
        """The tokens of `write`; `words` as in `prompt`."""
        words = self.words(text) if words is None else words
        ids = [self.id[intent_mark(frame.intent)]]
        marks = _marks_of(clean(text), frame, spans)
        for word, mark in zip(words, marks, strict=True):
            ids += [*word, self.id[mark]]
        return ids

    def length(self, text: str) -> int:
        """Tokens of prompt and answer together, whatever the answer is."""
        found = self.words(text)
        return len(self._begin) + len(self._end) + 1 + len(found) + 2 * sum(map(len, found))


class FrameConstraint:
    """The tokens that may come next, so that the answer is a frame of the grammar.

    Implements `generate.Constraint` for one text. There is always one that may come, until the last
    word has its mark.
    """

    def __init__(self, tokens: FrameTokens, text: str) -> None:
        self._tokens = tokens
        self._names = {token: name for name, token in tokens.id.items()}
        self._pieces = list(pieces(clean(text)))
        self._words = tokens.words(text)
        self._intent = ""
        self._marks: list[str] = []
        self._left: list[int] = []  # what is not yet written of the word

    @property
    def frame(self) -> Frame:
        """Of the words that have a mark.

        Raises:
            DataError: there is not even an intent.
        """
        if not self._intent:
            raise DataError("the answer has no intent", "give it more room: --max-length")
        return _frame(self._intent, self._pieces[: len(self._marks)], self._marks)

    def allowed(self) -> Ids:
        """Token ids; none when the answer is complete."""
        names, grammar = self._tokens.id, self._tokens.grammar
        if self._left:
            return np.array(self._left[:1], np.int64)
        if not self._intent:
            return np.array([names[intent_mark(i)] for i in grammar.intents], np.int64)
        if len(self._marks) == len(self._words):
            return np.empty(0, np.int64)
        found = [OUT, *map(slot_mark, grammar.intents[self._intent])]
        if self._marks and self._marks[-1] != "out":
            found.append(INSIDE)
        return np.array([names[name] for name in found], np.int64)

    def advance(self, token: int) -> None:
        """`token`, one of those allowed, was written.

        Raises:
            ValueError: it is not allowed.
        """
        if token not in self.allowed():
            raise ValueError(f"token {token} is not allowed here")
        if self._left:
            self._left = self._left[1:]
            return
        name = self._names[token][2:-2]
        if self._intent:
            self._marks.append(name)
        else:
            self._intent = name.removeprefix("intent:")
        if len(self._marks) < len(self._words):
            self._left = self._words[len(self._marks)]
