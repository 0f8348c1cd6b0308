"""How a command is written, and the constraint that lets a decoder write nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from pocketglm.artifacts.manifest import CommandGrammar
from pocketglm.data.frames import place
from pocketglm.data.tokenizer_training import byte_tokenizer, train_bpe
from pocketglm.errors import CheckpointError, DataError
from pocketglm.text.frame import (
    INSIDE,
    OUT,
    Frame,
    FrameConstraint,
    FrameTokens,
    Span,
    clean,
    intent_mark,
    is_boundary,
    mark_names,
    prompt,
    read,
    slot_mark,
    words,
    write,
)
from pocketglm.text.tokenizer import Tokenizer

GRAMMAR = CommandGrammar(
    intents={
        "play": ["song", "artist"],
        "play_next": [],
        "navigate": ["place", "via"],
        "天气": ["城市"],
    }
)
CORPUS = [
    " play Shape of You by Ed Sheeran.\n", " navigate to the old mill via Park Road\n",
    " play the song play by the players\n", "北京今天天气怎么样？\n", "打开 Maps 导航到北京西站\n",
]  # fmt: skip
# text, intent, slots
ROWS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("play Shape of You by Ed Sheeran.", "play", [("song", "Shape of You")]),
    ("play Shape of You by Ed Sheeran.", "play", [("song", "You"), ("artist", "Ed Sheeran.")]),
    ("play  Shape\tof You,please", "play", [("song", "Shape\tof You"), ("artist", "please")]),
    (" play\nit again ", "play_next", []),
    ("navigate to 221B Baker's via O'Hare", "navigate", [("place", "221B Baker's"), ("via", "O")]),
    ("打开Maps导航到北京西站", "navigate", [("via", "Maps"), ("place", "北京西站")]),
    ("北京今天天气", "天气", [("城市", "北京"), ("城市", "今天")]),  # side by side
    ("北京", "天气", [("城市", "北京")]),
    ("naïve cafe\u0301 🎵👨‍👩‍👧", "play", [("song", "cafe\u0301 🎵👨‍👩‍👧")]),
    ("play <|out|> by <|slot:song|>", "play", [("song", "<|out|>"), ("artist", "<|slot:song|>")]),
    ("play", "play", []),
    ("", "play", []),
]


def sentencepiece() -> tokenizers.Tokenizer:
    """A BPE tokenizer as SentencePiece makes them: `▁` for a blank and before every text, byte
    fallback, a token before and one behind."""
    letters = sorted({*"▁acdefghijlmnoprstuvwy=_.ESY", "京"})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "▁"), ("▁", "p"), ("▁p", "l"), ("a", "y"), ("▁pl", "ay"), ("o", "n")]
    names += [a + b for a, b in merges]
    ids = {name: number for number, name in enumerate(names)}
    inner = tokenizers.Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>"))
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return inner


def trained() -> tokenizers.Tokenizer:
    """Byte-level BPE with merges over the line break, and an added token that is not special."""
    inner = train_bpe(CORPUS * 5, 500)
    inner.add_tokens([AddedToken("<old>", special=False)])
    return inner


def joining() -> tokenizers.Tokenizer:
    """Has a token of a line break and what follows it."""
    merges = [("Ċ", "Ġ"), ("Ċ", "p"), ("Ġ", "p")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {name: number for number, name in enumerate([*letters, *(a + b for a, b in merges)])}
    inner = tokenizers.Tokenizer(models.BPE(ids, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def with_marks(inner: tokenizers.Tokenizer, grammar: CommandGrammar = GRAMMAR) -> Tokenizer:
    inner.add_special_tokens(mark_names(grammar))
    return Tokenizer(inner, {})


MAKERS = {
    "bytes": byte_tokenizer,
    "bpe": trained,
    "sentencepiece": sentencepiece,
    "joining": joining,
}
TOKENIZERS = {name: with_marks(make()) for name, make in MAKERS.items()}
TOKENS = {name: FrameTokens(GRAMMAR, tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.fixture(params=list(TOKENS))
def name(request: pytest.FixtureRequest) -> str:
    """Of a tokenizer."""
    return str(request.param)


@pytest.fixture
def tokens(name: str) -> FrameTokens:
    return TOKENS[name]


def spans_of(text: str, slots: Sequence[tuple[str, str]]) -> list[Span]:
    placed = place(clean(text), slots)
    assert [slot for _, slot in placed] == list(slots)
    return [span for span, _ in placed]


# --- the form ------------------------------------------------------------------------------------


def test_a_command_is_written_word_by_word() -> None:
    frame = Frame("alarm", (("time", "7"),))
    assert prompt("wake me at 7") == " wake me at 7\n"
    answer = write("wake me at 7", frame, [(11, 12)])
    assert answer == "<|intent:alarm|> wake<|out|> me<|out|> at<|out|> 7<|slot:time|>"
    assert read(answer) == frame
    assert prompt("  play it\nplease ") == " play it please\n"
    assert prompt("放首歌") == "放首歌\n"
    assert prompt(" ") == "\n"
    assert clean("a\r\n b ") == "a   b"
    more = write("放 Shape of You", Frame("x", (("a", "Shape of You"),)), [(2, 14)])
    assert more == "<|intent:x|>放<|out|> Shape<|slot:a|> of<|in|> You<|in|>"
    assert write("", Frame("x"), []) == "<|intent:x|>"
    assert read("<|intent:x|>") == Frame("x")


def test_the_marks_of_a_grammar_have_one_order() -> None:
    turned = {name: slots[::-1] for name, slots in reversed(GRAMMAR.intents.items())}
    assert mark_names(CommandGrammar(intents=turned)) == mark_names(GRAMMAR)
    slots = ["artist", "place", "song", "via", "城市"]
    assert mark_names(GRAMMAR)[:7] == [OUT, INSIDE, *map(slot_mark, slots)]
    assert mark_names(GRAMMAR)[7:] == [intent_mark(name) for name in sorted(GRAMMAR.intents)]
    same = CommandGrammar(intents={"a": ["b"], "b": ["b", "a"]})
    assert len(set(mark_names(same))) == len(mark_names(same)) == 6


@pytest.mark.parametrize(("text", "intent", "slots"), ROWS)
def test_what_is_written_is_read(text: str, intent: str, slots: list[tuple[str, str]]) -> None:
    frame = Frame(intent, tuple(slots))
    assert read(write(text, frame, spans_of(text, slots))) == frame


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "this is no answer to a command: ''"),
        ("play", "no answer"),
        ("x<|intent:play|>", "no answer"),
        ("<|out|>", "no answer"),
        (" it<|out|>", "no answer"),
        ("<|intent:play|> it", "no answer"),
        ("<|intent:play|> it<|out|> on", "no answer"),
        ("<|intent:play|> it<|in|>", "'in' stands where no slot is open"),
        ("<|intent:play|> a<|slot:x|> b<|out|> c<|in|>", "'in' stands where no slot"),
        ("<|intent:play|> it<|intent:play|>", "'intent:play' stands where"),
    ],
)
def test_what_is_no_answer_is_refused(answer: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(answer)
    assert error.value.hint


def test_values_begin_and_end_between_words() -> None:
    text = "it's 7am at O'Hare, naïve cafe\u0301 北京12号 a_b"
    for a, b in (("7", "am"), ("京", "1"), ("北", "京"), ("O", "'"), ("2", "号"), ("a", "_")):
        assert is_boundary(text, text.index(a + b) + len(a))
    for a, b in (("a", "m"), ("1", "2"), ("H", "are"), ("na", "ïve"), ("e", "\u0301"), ("i", "t")):
        assert not is_boundary(text, text.index(a + b) + len(a))
    assert is_boundary("", 0)
    assert is_boundary("a", 1)
    assert is_boundary("서울에서", 2)
    assert is_boundary("ไทย", 1)
    assert is_boundary("𠮷野家", 1)
    assert not is_boundary("a  b", 2)
    assert is_boundary("a\u3000\u3000b", 2)


def test_the_words_of_a_text() -> None:
    text = "it's 7am,  naïve\t北京12号 🎵<|out|>\u3000x"
    found = [text[start:end] for start, end in words(text)]
    assert found == [
        "it", "'", "s", "7", "am", ",", "naïve", "北", "京", "12", "号", "🎵", "<", "|", "out", "|",
        ">", "x",
    ]  # fmt: skip
    assert words("") == []


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "intent", "slots"), ROWS)
def test_every_row_can_be_written(
    name: str, text: str, intent: str, slots: list[tuple[str, str]]
) -> None:
    """In the tokens that training shows, and they say what the text form says."""
    tokens, tokenizer = TOKENS[name], TOKENIZERS[name]
    frame, spans = Frame(intent, tuple(slots)), spans_of(text, slots)
    answer = tokens.answer(text, frame, spans)
    constraint = FrameConstraint(tokens, text)
    for token in answer:
        assert token in constraint.allowed()
        constraint.advance(token)
    assert len(constraint.allowed()) == 0
    assert constraint.frame == frame
    assert tokens.length(text) == len(tokens.prompt(text)) + len(answer)
    inner = tokenizer.inner
    assert inner.decode(answer, skip_special_tokens=False) == write(text, frame, spans)
    assert inner.decode(tokens.prompt(text)) == prompt(text)


@pytest.mark.parametrize("text", ["play Yesterday, please", "放 Maps", "a"])
def test_a_word_has_the_same_tokens_in_prompt_and_answer(tokens: FrameTokens, text: str) -> None:
    found = tokens.words(text)
    assert len(found) == len(words(text))
    ids = [token for word in found for token in word]
    answer = tokens.answer(text, Frame("play"), [])
    assert [token for token in answer if token not in tokens.marks] == ids
    assert set(tokens.prompt(text)) >= set(ids)


def test_texts_begin_as_the_tokenizer_begins_them() -> None:
    """Its token before a text, not the one behind it; and no blank of its own before each word."""
    inner, tokens = TOKENIZERS["sentencepiece"].inner, TOKENS["sentencepiece"]
    assert inner.encode("play").tokens == ["<s>", "▁play", "</s>"]
    assert inner.encode(" play").tokens == ["<s>", "▁▁", "p", "l", "ay", "</s>"]
    found = [inner.id_to_token(token) for token in tokens.prompt("play .京")]
    assert found == ["<s>", "▁play", "▁", ".", "京", "<0x0A>"]
    assert TOKENS["bytes"].prompt("") == TOKENIZERS["bytes"].inner.encode("\n").ids


def test_a_word_may_have_no_tokens() -> None:
    """As signs that the tokenizer's normalizer removes."""
    inner = byte_tokenizer()
    inner.normalizer = normalizers.Replace("★", "")
    tokens = FrameTokens(GRAMMAR, with_marks(inner))
    frame = Frame("play", (("song", "★ a"),))
    assert [len(word) for word in tokens.words("★ a")] == [1, 2]
    assert [len(word) for word in tokens.words("a★")] == [2, 0]
    constraint = FrameConstraint(tokens, "a★")
    for token in tokens.answer("a★", Frame("play", (("song", "★"),)), [(1, 2)]):
        constraint.advance(token)
    assert constraint.frame == Frame("play", (("song", "★"),))
    assert tokens.answer("★ a", frame, [(0, 3)])[-1] == tokens.id[INSIDE]


@pytest.mark.parametrize(
    "text",
    [
        "<|out|>",
        "play<|intent:play|>x<|in|><|slot:song|>",
        "play <|out|> <|slot:song|> [gMASK]<sop> <s> </s> <|user|> <|endoftext|> <unk>",
    ],
)
def test_a_text_that_holds_a_mark_holds_no_mark(name: str, text: str) -> None:
    tokens, inner = TOKENS[name], TOKENIZERS[name].inner
    special = {token for token, added in inner.get_added_tokens_decoder().items() if added.special}
    assert special & set(inner.encode(text, add_special_tokens=False).ids)  # as it stands, it does
    begin = tokens.prompt("")[: len(tokens.prompt("")) - 1]
    assert not special & set(tokens.prompt(text)[len(begin) :])
    assert not special & {token for word in tokens.words(text) for token in word}
    answer = tokens.answer(text, Frame("play"), [])
    assert sum(token in special for token in answer) == 1 + len(words(text))
    whole = Frame("play", (("song", text),))
    assert read(write(text, whole, [(0, len(text))])) == whole


def test_a_tokenizer_without_the_marks_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no token for 11 marks .*, such as <\|out\|>") as e:
        FrameTokens(GRAMMAR, Tokenizer(byte_tokenizer(), {}))
    assert "tokenizer.json" in e.value.hint
    few = with_marks(byte_tokenizer(), CommandGrammar(intents={"play": ["song"]}))
    with pytest.raises(CheckpointError, match=r"for 7 marks .*, such as <\|slot:artist\|>"):
        FrameTokens(GRAMMAR, few)


def test_a_text_that_is_not_unicode_is_refused(tokens: FrameTokens) -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        tokens.prompt("a \ud800")
    with pytest.raises(DataError, match="not valid Unicode"):
        FrameConstraint(tokens, "\udc00")


# --- the constraint ------------------------------------------------------------------------------


def names_of(tokens: FrameTokens, constraint: FrameConstraint) -> set[str]:
    """The allowed tokens, each of which is a mark."""
    known = {token: name for name, token in tokens.id.items()}
    return {known[token] for token in constraint.allowed().tolist()}


def test_marks_of_the_intent_alone_may_follow(tokens: FrameTokens) -> None:
    constraint = FrameConstraint(tokens, "go to O'Hare")

    def word(count: int) -> None:
        for _ in range(count):
            (only,) = constraint.allowed().tolist()  # forced: no logits are needed
            assert only not in tokens.marks
            constraint.advance(only)

    lengths = list(map(len, tokens.words("go to O'Hare")))
    assert names_of(tokens, constraint) == {intent_mark(name) for name in GRAMMAR.intents}
    constraint.advance(tokens.id["<|intent:navigate|>"])
    assert constraint.frame == Frame("navigate")
    begins = {OUT, "<|slot:place|>", "<|slot:via|>"}
    for mark, after in (
        (OUT, begins),
        ("<|slot:via|>", begins),
        (INSIDE, begins | {INSIDE}),
        ("<|slot:place|>", begins | {INSIDE}),
    ):
        word(lengths.pop(0))
        assert names_of(tokens, constraint) == after
        constraint.advance(tokens.id[mark])
    word(lengths.pop(0))
    assert constraint.frame == Frame("navigate", (("via", "to O"), ("place", "'")))
    constraint.advance(tokens.id[INSIDE])
    assert len(constraint.allowed()) == 0
    assert constraint.frame == Frame("navigate", (("via", "to O"), ("place", "'Hare")))


def test_an_intent_without_slots_leaves_no_choice(tokens: FrameTokens) -> None:
    constraint = FrameConstraint(tokens, "play it again")
    constraint.advance(tokens.id["<|intent:play_next|>"])
    while len(allowed := constraint.allowed()):
        (only,) = allowed.tolist()
        constraint.advance(only)
    assert constraint.frame == Frame("play_next")


def test_a_token_that_is_not_allowed_is_refused(tokens: FrameTokens) -> None:
    constraint = FrameConstraint(tokens, "play You")
    with pytest.raises(DataError, match="the answer has no intent") as error:
        _ = constraint.frame
    assert "--max-length" in error.value.hint
    first = tokens.words("play You")[0][0]
    for wrong in (first, tokens.id[OUT], tokens.id["<|slot:song|>"], -1):
        with pytest.raises(ValueError, match=f"token {wrong} is not allowed"):
            constraint.advance(wrong)
    constraint.advance(tokens.id["<|intent:play|>"])
    for wrong in (tokens.id[OUT], tokens.id["<|intent:play|>"], first + 1):
        with pytest.raises(ValueError, match=f"token {wrong} is not allowed"):
            constraint.advance(wrong)
    for token in tokens.words("play You")[0]:
        constraint.advance(token)
    for mark in (INSIDE, "<|slot:place|>", "<|intent:play|>"):
        with pytest.raises(ValueError, match="is not allowed here"):
            constraint.advance(tokens.id[mark])
    assert constraint.frame == Frame("play")


texts = st.text(
    st.sampled_from("ab playof.'7\t\n北京Ġ=é🎵<|>\u3000\u0301")
    | st.characters(exclude_categories=["Cs"]),
    max_size=24,
) | st.lists(
    st.sampled_from(["play", " ", "<|out|>", "<|slot:song|>", "<|in|>", "京", "7", "<s>"])
).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(TOKENS)), texts, st.integers(0, 2**32 - 1))
def test_whatever_is_chosen_it_ends_in_a_frame_of_the_text(name: str, text: str, seed: int) -> None:
    random, tokens, line = np.random.default_rng(seed), TOKENS[name], clean(text)
    known = {token: mark for mark, token in tokens.id.items()}
    constraint, written = FrameConstraint(tokens, text), list[int]()
    while len(allowed := constraint.allowed()):
        assert len(set(allowed.tolist())) == len(allowed)
        written.append(int(random.choice(allowed)))
        constraint.advance(written[-1])
        assert len(written) <= 1 + 40 * len(line)  # it ends
    frame = constraint.frame
    assert frame.intent in GRAMMAR.intents
    # What the marks say, by another way.
    marks = [known[token] for token in written if token in known][1:]
    spans: list[Span] = []
    for (start, end), mark in zip(words(line), marks, strict=True):
        if mark == INSIDE:
            spans[-1] = (spans[-1][0], end)
        elif mark != OUT:
            spans.append((start, end))
    assert [line[start:end] for start, end in spans] == [value for _, value in frame.slots]
    assert all(slot in GRAMMAR.intents[frame.intent] for slot, _ in frame.slots)
    assert all(value and value == value.strip() for _, value in frame.slots)
    assert all(is_boundary(line, index) for span in spans for index in span)
    assert tokens.answer(text, frame, spans) == written
    assert len(tokens.prompt(text)) + len(written) == tokens.length(text)
    assert read(write(text, frame, spans)) == frame


def test_it_is_fast_for_a_large_vocabulary() -> None:
    inner = byte_tokenizer()
    inner.add_tokens([AddedToken(f" w{i}", special=False) for i in range(32000)])
    tokenizer = with_marks(inner)
    text = " ".join(f"w{i * 37}" for i in range(100))
    start, steps = time.perf_counter(), 0
    tokens = FrameTokens(GRAMMAR, tokenizer)
    for _ in range(5):
        constraint = FrameConstraint(tokens, text)
        for token in tokens.answer(text, Frame("play"), []):
            assert token in constraint.allowed()
            constraint.advance(token)
            steps += 1
    assert steps > 1000
    assert (time.perf_counter() - start) / steps < 1e-3  # 0.02 ms on an idle core
