"""train/_augment: changed copies of texts."""

from __future__ import annotations

import pytest

from pocketglm.train._augment import changed_copies, join_words, words_of

TEXTS = ["turn on the kitchen light", "stop", "", "打开客厅的灯", "播放 jazz 音乐 now"]


@pytest.mark.parametrize("text", TEXTS)
def test_words_and_back(text: str) -> None:
    spaced = {"播放 jazz 音乐 now": "播放 jazz 音乐 now"}
    assert join_words(words_of(text)) == spaced.get(text, text)


def test_copies_are_a_function_of_their_number() -> None:
    first, again = changed_copies(TEXTS, 0, 0.3), changed_copies(TEXTS, 0, 0.3)
    assert first == again
    assert first != changed_copies(TEXTS, 1, 0.3)
    assert len(first) == len(TEXTS)
    assert [bool(text) for text in first] == [bool(text) for text in TEXTS]


def test_words_are_dropped_swapped_and_replaced() -> None:
    text = "a b c d e f g h"
    words = text.split()
    copies = [changed_copies([text, "x y z"], number, 0.2)[0].split() for number in range(200)]
    assert any(len(copy) < len(words) for copy in copies)
    assert any(copy != words and sorted(copy) == words for copy in copies)
    assert any(set(copy) & {"x", "y", "z"} for copy in copies)
    gone = sum(len(set(words) - set(copy)) for copy in copies) / (len(words) * len(copies))
    assert 0.15 < gone < 0.25, "two thirds of the chosen words go"
