"""The embedded commands: disjoint, unambiguous, derivable, and too hard for a bag of words."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline, make_union
from sklearn.svm import LinearSVC

from pocketglm.data.commands import (
    LANGUAGES,
    SIZES,
    Language,
    action_of,
    generate,
    grammar,
    labels,
    write_folder,
)
from pocketglm.errors import UsageError

both = pytest.mark.parametrize("language", LANGUAGES)


def test_actions() -> None:
    assert action_of("app_open", {"app": "Maps"}) == 'do(action="Launch", app="Maps")'
    assert action_of("wifi_on", {}) == 'do(action="Set", setting="wifi", value="on")'
    assert action_of("oos", {}) == 'finish(message="out of scope")'
    assert action_of("note_add", {"note": 'a "b"'}) == 'do(action="AddNote", note="a \\"b\\"")'


@both
def test_sizes_labels_and_balance(language: Language) -> None:
    known = labels(language)
    assert len(known) - 1 >= 40
    assert "oos" in known
    assert known == labels("both")
    for split, size in SIZES.items():
        rows = generate(split, language)
        counts = Counter(row.intent for row in rows)
        assert len({row.text for row in rows}) == len(rows) == size
        assert sorted(counts) == known
        assert counts.pop("oos") == round(0.08 * size)
        assert max(counts.values()) <= 3 * min(counts.values())


@both
def test_every_phrasing_and_slot_value_belongs_to_one_split(language: Language) -> None:
    tables = grammar(language)
    for table in (tables.intents, tables.slots):
        held: dict[str, set[str]] = defaultdict(set)
        for entry in table.values():
            assert set(entry) == set(SIZES)
            for split, values in entry.items():
                assert len(values) == len(set(values))
                held[split] |= {value.removeprefix("!").lower() for value in values}
        for one, other in itertools.combinations(held, 2):
            assert not held[one] & held[other]
    for mood in tables.wrappers.values():
        shared = [set(mood[one]) & set(mood[two]) for one, two in itertools.combinations(SIZES, 2)]
        assert all(same == {"{}"} for same in shared)


@both
def test_rows_are_unambiguous_and_no_text_is_in_two_splits(language: Language) -> None:
    meanings: dict[str, set[str]] = defaultdict(set)
    places: dict[str, set[str]] = defaultdict(set)
    for split in SIZES:
        for row in generate(split, language):
            meanings[row.text.lower()].add(row.intent)
            places[row.text.lower()].add(split)
    assert sum(len(m) == 1 for m in meanings.values()) / len(meanings) >= 0.97
    assert all(len(p) == 1 for p in places.values())


@both
def test_slots_are_in_the_text_and_the_action_follows(language: Language) -> None:
    rows = generate("test", language)
    for row in rows:
        assert all(value in row.text for value in row.slots.values())
        assert row.action == action_of(row.intent, row.slots)
        assert "{" not in row.text
        assert row.language == language
    assert any(len(row.slots) == 2 for row in rows)
    # Intents with the same slots have different actions.
    known = [label for label in labels(language) if label != "oos"]
    assert len({action_of(label, {}) for label in known}) == len(known)


def test_seeded() -> None:
    assert generate("test", "en", 3, 50) == generate("test", "en", 3, 50)
    assert generate("test", "en", 3, 50) != generate("test", "en", 4, 50)
    rows = generate("test", "both", 0, 30)
    assert Counter(row.language for row in rows) == {"en": 30, "zh": 30}


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="unknown split 'dev'"):
        generate("dev")
    with pytest.raises(UsageError, match="unknown language 'fr'"):
        labels("fr")
    with pytest.raises(UsageError, match="unknown intent 'app_opne'") as caught:
        action_of("app_opne", {})
    assert "app_open" in caught.value.hint
    with pytest.raises(UsageError, match="distinct rows, 10000000 were asked for"):
        generate("validation", "zh", n=10_000_000)


def test_write_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", "zh", seed=1)
    lines = (tmp_path / "set" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == SIZES["test"]
    row = json.loads(lines[0])
    assert list(row) == ["text", "slots", "action", "language", "label"]
    assert row["text"] == generate("test", "zh", 1)[0].text


@both
def test_a_bag_of_words_is_not_enough(language: Language) -> None:
    train, test = generate("train", language), generate("test", language)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    parts = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    best = 0.0
    # Chinese has no blanks between words, so letters are its words.
    for form in (words, make_union(words, parts)) if language == "en" else (letters,):
        model = make_pipeline(form, LinearSVC())
        model.fit([row.text for row in train], [row.intent for row in train])
        best = max(best, model.score([row.text for row in test], [row.intent for row in test]))
    assert 0.3 < best < 0.95  # below: the test rows would be riddles, not commands
