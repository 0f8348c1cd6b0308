"""Made-up words: which words they replace, how often, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pocketglm.contracts import DataOptions
from pocketglm.data.frames import FrameRow, grammar_of, read_frames
from pocketglm.data.tokenizer_training import train_bpe
from pocketglm.text.frame import FrameTokens, mark_names, words
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._command_job import encode_frames
from pocketglm.train._made_up import MadeUp


@pytest.fixture(scope="module")
def rows() -> list[FrameRow]:
    return read_frames(DataOptions(Path("commands"), limit=400), "train", training=True)


@pytest.fixture(scope="module")
def tokens(rows: list[FrameRow]) -> FrameTokens:
    """Of a vocabulary that is too small for all words of the rows."""
    inner = train_bpe([f" {row.text}" for row in rows], 600)
    grammar = grammar_of(rows)
    inner.add_special_tokens(mark_names(grammar))
    return FrameTokens(grammar, Tokenizer(inner, {}))


def of_slots(row: FrameRow) -> list[int]:
    """The number of the slot that each word belongs to, -1 for none."""
    return [
        next((n for n, (a, b) in enumerate(row.spans) if a <= start < b), -1)
        for start, _ in words(row.text)
    ]


def changed(rows: list[FrameRow], made: MadeUp, tokens: FrameTokens) -> tuple[float, float]:
    """Shares of the values and of the other words that are others now."""
    rng = np.random.default_rng(0)
    values: dict[tuple[int, int], bool] = {}
    others = []
    for number, row in enumerate(rows):
        pairs = zip(of_slots(row), tokens.words(row.text), made.words(row, rng), strict=True)
        for slot, before, after in pairs:
            if slot < 0:
                others.append(before != after)
            else:
                values[number, slot] = values.get((number, slot), False) or before != after
    return float(np.mean(list(values.values()))), float(np.mean(others))


def test_the_share_of_the_values_and_a_tenth_of_it_elsewhere(
    rows: list[FrameRow], tokens: FrameTokens
) -> None:
    value, other = changed(rows, MadeUp(tokens, rows, 0.4), tokens)
    assert value == pytest.approx(0.4, abs=0.08)
    assert other == pytest.approx(0.04, abs=0.015)
    assert changed(rows, MadeUp(tokens, rows, 0.0), tokens) == (0, 0)


def test_a_value_is_made_up_as_a_whole_and_signs_stay(
    rows: list[FrameRow], tokens: FrameTokens
) -> None:
    made, rng, same = MadeUp(tokens, rows, 1.0), np.random.default_rng(0), 0
    inside = 0
    for row in rows:
        before, after = tokens.words(row.text), made.words(row, rng)
        for slot, (start, _), a, b in zip(
            of_slots(row), words(row.text), before, after, strict=True
        ):
            if not row.text[start].isalnum():
                assert a == b
            elif slot >= 0:
                inside += 1
                same += a == b  # another word of the rows may be the same one by chance
    assert inside > 300
    assert same < 0.05 * inside


def test_words_that_no_row_has_out_of_tokens_that_rows_have(
    rows: list[FrameRow], tokens: FrameTokens
) -> None:
    shown = {tuple(word) for row in rows for word in tokens.words(row.text)}
    pieces = {token for word in shown for token in word}
    made, rng = MadeUp(tokens, rows, 1.0), np.random.default_rng(0)
    found = [tuple(w) for row in rows for w in made.words(row, rng)]
    new = [word for word in found if word not in shown]
    assert len(set(new)) > 100
    assert all(len(word) > 1 and {*word} <= pieces for word in new)


def test_a_made_up_word_is_written_as_the_one_it_replaces(
    rows: list[FrameRow], tokens: FrameTokens
) -> None:
    made, rng = MadeUp(tokens, rows, 1.0), np.random.default_rng(0)
    ascii_tokens = {
        token
        for row in rows
        for (start, end), word in zip(words(row.text), tokens.words(row.text), strict=True)
        if row.text[start:end].isascii()
        for token in word
    }
    for row in rows:
        for (start, end), word in zip(words(row.text), made.words(row, rng), strict=True):
            if row.text[start:end].isascii():
                assert {*word} <= ascii_tokens


def test_prompt_and_answer_repeat_the_same_words(rows: list[FrameRow], tokens: FrameTokens) -> None:
    plain = encode_frames(tokens, rows)
    made, rng = MadeUp(tokens, rows, 1.0), np.random.default_rng(0)
    noisy = encode_frames(tokens, rows, lambda row: made.words(row, rng))
    end = tokens.prompt("")
    marks = {*tokens.marks.tolist()}
    different = 0
    for a, b, first, start in zip(plain.ids, noisy.ids, plain.starts, noisy.starts, strict=True):
        said, answer = b[: start - len(end)].tolist(), b[start:].tolist()
        assert [token for token in answer if token not in marks] == said
        assert [t for t in answer if t in marks] == [t for t in a[first:].tolist() if t in marks]
        different += said != a[: first - len(end)].tolist()
    assert different > 200


def test_the_same_seed_makes_up_the_same_words(rows: list[FrameRow], tokens: FrameTokens) -> None:
    made = MadeUp(tokens, rows, 0.5)
    first, second, third = (
        [made.words(row, rng) for row in rows]
        for rng in (np.random.default_rng(seed) for seed in (1, 1, 2))
    )
    assert first == second != third
