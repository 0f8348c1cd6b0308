"""Generation over a real session: sampling against a float64 oracle, ends, constraints, text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from oracles.sampling import draw, nucleus
from tiny_decoder import save_tiny_decoder, tiny
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models

from pocketglm.contracts import DecoderSession, Floats, Ids, RunOptions
from pocketglm.data.tokenizer_training import byte_tokenizer, train_bpe
from pocketglm.errors import UsageError, WorkError
from pocketglm.generate import Generation, Sampling, TextStream, choose, distribution, generate
from pocketglm.runtimes import open_decoder
from pocketglm.text.tokenizer import Tokenizer

PROMPT = [7, 3, 90, 41]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> DecoderSession:
    folder = save_tiny_decoder(tmp_path_factory.mktemp("gen") / "m", "qwen3", eos_token_id=[])
    return open_decoder(folder, RunOptions(threads=1))


@pytest.fixture
def session(opened: DecoderSession) -> DecoderSession:
    return opened.fork()


class Counted:
    """A real session whose calls are counted."""

    def __init__(self, inner: DecoderSession, eos_ids: tuple[int, ...] = ()) -> None:
        self.inner, self.calls = inner, list[list[int]]()
        self.info = dataclasses.replace(inner.info, eos_ids=eos_ids)

    @property
    def length(self) -> int:
        return self.inner.length

    def prefill(self, ids: Sequence[int]) -> Floats:
        self.calls.append(list(ids))
        return self.inner.prefill(ids)

    def step(self, token: int) -> Floats:
        return self.prefill([token])

    def rewind(self, count: int) -> None:
        self.inner.rewind(count)

    def fork(self) -> DecoderSession:
        return self.inner.fork()

    def score(self, ids: Sequence[int]) -> Floats:
        return self.inner.score(ids)

    def close(self) -> None:
        self.inner.close()


# --- greedy and its ends -------------------------------------------------------------------------


def greedy(count: int) -> list[int]:
    ids = list(PROMPT)
    model = tiny("qwen3")
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_greedy_is_the_argmax_of_transformers(session: DecoderSession) -> None:
    expected = greedy(24)
    assert len(set(expected)) > 10
    answer = generate(session, PROMPT, Sampling(max_new_tokens=24))
    assert list(answer) == expected
    assert answer.finish == "length"
    assert (answer.prompt_tokens, answer.new_tokens) == (4, 24)
    assert session.length == 4 + 23  # nobody needed the logits after the last one


def test_an_end_token_stops_and_is_not_given_out(session: DecoderSession) -> None:
    expected = greedy(24)
    place = max(expected.index(token) for token in expected)
    assert place > 4
    answer = generate(Counted(session, eos_ids=(94, expected[place])), PROMPT)
    assert list(answer) == expected[:place]
    assert answer.finish == "stop"
    assert list(answer) == []  # and stays at its end


def test_the_context_ends_the_text(session: DecoderSession) -> None:
    limit = session.info.max_length
    answer = generate(session, PROMPT, Sampling(max_new_tokens=1000))
    assert len(list(answer)) == limit - len(PROMPT)
    assert answer.finish == "context"
    assert session.length < limit


def test_a_prompt_that_fills_the_context_gets_no_answer(session: DecoderSession) -> None:
    limit = session.info.max_length
    answer = generate(session.fork(), [1] * limit)
    assert (list(answer), answer.finish) == ([], "context")
    with pytest.raises(UsageError, match=f"{limit + 1} tokens long, the context holds {limit}"):
        generate(session.fork(), [1] * (limit + 1))
    session.prefill([1] * 10)
    with pytest.raises(UsageError, match=f"{limit + 9} tokens long"):
        generate(session, [1] * (limit - 1))


def test_an_empty_prompt(session: DecoderSession) -> None:
    with pytest.raises(UsageError, match="no token"):
        generate(session, [])


def test_a_text_goes_on(session: DecoderSession) -> None:
    expected = greedy(12)
    first = list(generate(session, PROMPT, Sampling(max_new_tokens=6)))
    rest = generate(session, first[-1:], Sampling(max_new_tokens=6))  # the one not yet in it
    assert first + list(rest) == expected


def test_speeds_are_told(session: DecoderSession) -> None:
    answer = generate(session, PROMPT, Sampling(max_new_tokens=5))
    assert answer.prefill_per_second is None
    assert answer.decode_per_second is None
    next(answer)
    first = answer.first_token_seconds
    assert 0 < first == answer.seconds
    assert answer.decode_per_second is None
    list(answer)
    assert answer.first_token_seconds == first < answer.seconds
    assert answer.prefill_per_second == pytest.approx(4 / first, rel=0.5)
    assert answer.decode_per_second == pytest.approx(4 / (answer.seconds - first), rel=0.5)


# --- sampling ------------------------------------------------------------------------------------

LOGITS = np.random.default_rng(3).normal(0, 2, 40).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
def test_the_distribution_is_the_oracles(temperature: float, top_p: float) -> None:
    expected = nucleus(LOGITS.tolist(), temperature, top_p)
    got = distribution(LOGITS, temperature, top_p)
    assert got.dtype == np.float64
    assert np.abs(got - expected).max() < 1e-12
    assert np.array_equal(got > 0, np.asarray(expected) > 0)


def test_equal_tokens_and_a_flat_distribution() -> None:
    assert distribution(np.zeros(4, np.float32), 1.0, 0.5).tolist() == [0.5, 0.5, 0, 0]
    peak = np.array([0, 1000, 0], np.float32)
    assert distribution(peak, 1.0, 0.9).tolist() == [0, 1, 0]
    assert distribution(-peak, 0.01, 1.0).tolist() == [0.5, 0, 0.5]
    assert distribution(peak, 1e-320, 1.0).tolist() == [0, 1, 0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.7, 0.8)])
def test_tokens_are_drawn_as_the_oracle_draws_them(temperature: float, top_p: float) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p)
    random, theirs = np.random.default_rng(5), np.random.default_rng(5)
    chances = nucleus(LOGITS.tolist(), temperature, top_p)
    drawn = [choose(LOGITS, sampling, random) for _ in range(2000)]
    assert drawn == [draw(chances, theirs.random()) for _ in range(2000)]
    shares = np.bincount(drawn, minlength=40) / 2000
    assert np.abs(shares - chances).max() < 5 * math.sqrt(0.25 / 2000)


def test_the_seed_decides(session: DecoderSession) -> None:
    def text(seed: int, top_p: float = 1.0) -> list[int]:
        sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=seed, top_p=top_p)
        return list(generate(session.fork(), PROMPT, sampling))

    assert text(1) == text(1)
    assert len({tuple(text(seed)) for seed in range(4)}) == 4
    assert text(1) != greedy(20)
    assert text(1, top_p=1e-6) == greedy(20)  # only the likeliest token is left


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("top_p", 0.0),
     ("top_p", 1.5), ("top_p", math.nan), ("seed", -1)],
)  # fmt: skip
def test_values_outside_of_their_range(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} {value} should be") as error:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert error.value.hint


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_no_numbers(wrong: float) -> None:
    broken = LOGITS.copy()
    broken[7] = wrong
    with pytest.raises(WorkError, match="not finite"):
        choose(broken, Sampling(), np.random.default_rng(0))


def test_banned_tokens_may_have_minus_infinity() -> None:
    logits = np.array([-math.inf, 1.0, 2.0], np.float32)
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.99)):
        drawn = {choose(logits, sampling, np.random.default_rng(s)) for s in range(20)}
        assert 0 not in drawn


# --- constraints ---------------------------------------------------------------------------------


class Steps:
    """Allows the ids of each step in turn."""

    def __init__(self, *steps: list[int] | None) -> None:
        self.steps, self.written = list(steps), list[int]()

    def allowed(self) -> Ids | None:
        if len(self.written) == len(self.steps):
            return np.array([], np.int64)
        step = self.steps[len(self.written)]
        return None if step is None else np.array(step, np.int64)

    def advance(self, token: int) -> None:
        self.written.append(token)


def test_a_constraint_is_kept_and_the_best_allowed_token_taken(session: DecoderSession) -> None:
    constraint = Steps([30, 31, 60], None, [5, 6], [8])
    answer = generate(session, PROMPT, Sampling(), constraint)
    got = list(answer)
    assert constraint.written == got
    assert answer.finish == "stop"
    ids = list(PROMPT)
    for step, token in zip(constraint.steps, got, strict=True):
        logits = tiny("qwen3")(torch.tensor([ids])).logits[0, -1]
        among = list(range(96)) if step is None else step
        assert token == among[int(logits[among].argmax())]
        ids.append(token)


def test_tokens_without_a_choice_are_appended_in_one_call(session: DecoderSession) -> None:
    counted = Counted(session)
    got = list(generate(counted, PROMPT, Sampling(), Steps([9], [10], [1, 2], [11], [12], [3, 4])))
    assert counted.calls == [[*PROMPT, 9, 10], [got[2], 11, 12]]
    free = session.fork()
    free.rewind(free.length)
    logits = free.prefill([*PROMPT, 9, 10])
    assert got[2] == (1 if logits[1] > logits[2] else 2)


def test_a_forced_end_token_ends(session: DecoderSession) -> None:
    counted = Counted(session, eos_ids=(94,))
    answer = generate(counted, PROMPT, Sampling(), Steps([9], [94], [1]))
    assert (list(answer), answer.finish, counted.calls) == ([9], "stop", [])
    assert answer.prefill_per_second is None


def test_sampling_under_a_constraint(session: DecoderSession) -> None:
    drawn = [
        list(generate(session.fork(), PROMPT, Sampling(temperature=5.0, seed=s), Steps([30, 31])))
        for s in range(12)
    ]
    assert {tuple(d) for d in drawn} == {(30,), (31,)}


# --- text ----------------------------------------------------------------------------------------

TEXT = "Wähle 打开地图 🗺️👍🏽, it's 3 o'clock.\n\tdone ﷽ " * 3


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    out = TextStream(tokenizer)
    return [*(out.add(token) for token in ids), out.flush()]


@pytest.mark.parametrize("kind", ["bytes", "merges"])
def test_pieces_are_the_text_and_never_half_a_character(kind: str) -> None:
    inner = byte_tokenizer() if kind == "bytes" else train_bpe([TEXT, "map open 地图"], 300)
    tokenizer = Tokenizer(inner, {})
    ids = tokenizer.encode_prompt(TEXT)
    assert len(ids) > 64  # more than a window
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces[:-1])
    assert pieces.count("") > 3  # within characters
    assert pieces[-1] == ""


def test_broken_bytes_do_not_stop_the_stream() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), {})
    whole = tokenizer.encode_prompt("打a")
    ids = [whole[1], whole[1], *whole, whole[0], whole[1]]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "\ufffd\ufffd打a\ufffd"
    assert pieces[-1] == "\ufffd"
    many = [*[whole[1]] * 60, *whole]
    assert "".join(stream(tokenizer, many)) == tokenizer.decode(many)


def test_a_sentencepiece_like_tokenizer() -> None:
    """Spaces as a sign in front of words, and characters as bytes where there is no token."""
    names = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁the", "▁map", "s", "▁"]
    inner = Inner(models.BPE({n: i for i, n in enumerate(names)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer = Tokenizer(inner, {})
    pin = [1 + byte for byte in "📍".encode()]
    ids = [257, 258, 259, 260, *pin, *[258] * 50, *pin, 257]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == "the maps 📍" + " map" * 50 + "📍 the"
    assert pieces[:4] == ["the", " map", "s", " "]


def test_special_tokens_are_not_shown_and_unknown_ids_are_nothing() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), {})
    assert "".join(stream(tokenizer, [79, 5, 5000, 80])) == tokenizer.decode([79, 80])


def test_a_generation_is_an_iterator(session: DecoderSession) -> None:
    answer = generate(session, PROMPT)
    assert isinstance(answer, Generation)
    assert iter(answer) is answer
