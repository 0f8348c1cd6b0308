"""The losses on a command's text, against log-probabilities computed row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pocketglm.model.decoder import Decoder, init_decoder
from pocketglm.model.spec import DecoderSpec, RopeSpec
from pocketglm.train._prompt_loss import CommandLoss, PromptRows
from pocketglm.train._sequences import NextToken, Sequences

SPEC = DecoderSpec(
    family="glm",
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=32,
    rope=RopeSpec(16, interleaved=True),
    max_position_embeddings=32,
    fused_ffn=True,
    tied=True,
    eos_ids=(1,),
    pad_id=0,
)
BREAK, OUT, SLOT = 3, 50, 51
INTENTS = np.array([52, 54, 55])
# Text, line break, intent, then every word with its mark.
ROWS = (
    [10, 11, BREAK, 54, 10, OUT, 11, SLOT],
    [12, BREAK, 55, 12, OUT],
    [13, 14, 15, BREAK, 52, 13, 14, OUT, 15, SLOT],  # a word of two tokens
)
STARTS = (3, 2, 4)


@pytest.fixture
def model() -> Decoder:
    return init_decoder(SPEC, std=0.2)


def rows() -> PromptRows:
    choices = np.sort([OUT, SLOT, *INTENTS])
    ids = [np.array(row, np.int32) for row in ROWS]
    return PromptRows(Sequences(ids, np.array(STARTS), 0, choices), INTENTS)


def logs(model: Decoder, row: list[int], choices: Any = None) -> Any:
    """[S, choices or V], float64."""
    with torch.inference_mode():
        logits = model(torch.tensor([row]))[0].double().numpy()
    logits = logits if choices is None else logits[:, choices]
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def early_of(model: Decoder, smoothing: float) -> float:
    total = 0.0
    for row, start in zip(ROWS, STARTS, strict=True):
        found = logs(model, row, INTENTS)
        for place in range(start - 1):  # the last place before the answer is the answer's own
            right = found[place, INTENTS.tolist().index(row[start])]
            total -= (1 - smoothing) * right + smoothing * found[place].mean()
    return total


def text_of(model: Decoder) -> float:
    pairs = ((row, place) for row, s in zip(ROWS, STARTS, strict=True) for place in range(s - 2))
    return -sum(float(logs(model, row)[place, row[place + 1]]) for row, place in pairs)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_the_loss_is_the_sum_of_its_parts(
    model: Decoder, weights: tuple[float, float], smoothing: float
) -> None:
    early, text = weights
    batch = rows().collate(np.array([2, 0, 1]))
    plain = NextToken(model, smoothing)(batch).item()
    loss = CommandLoss(model, early, text)
    loss.smoothing = smoothing
    expected = plain + early * early_of(model, smoothing) + text * text_of(model)
    assert loss(batch).item() == pytest.approx(expected, rel=1e-5)
    if weights == (0.0, 0.0):
        assert loss(rows().rows.collate(np.array([2, 0, 1]))).item() == plain


def test_the_words_of_the_answer_are_not_among_the_places(model: Decoder) -> None:
    """Telling those, a copy of the text, would be easy and teach nothing."""
    batch = rows().collate(np.arange(3))
    width = batch["ids"].shape[1]
    real = batch["intent_targets"] >= 0
    places = [divmod(int(place), width) for place in batch["text_places"][real]]
    assert places == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert batch["text_targets"][real].tolist() == [11, -100, -100, 14, 15, -100]
    assert batch["intent_targets"][real].tolist() == [1, 1, 2, 0, 0, 0]
    assert len(real) % 64 == 0
    assert (batch["text_targets"][~real] == -100).all()


def test_a_text_without_words_adds_nothing(model: Decoder) -> None:
    empty = Sequences(
        [np.array([BREAK, 54], np.int32)], np.array([1]), 0, np.sort([OUT, SLOT, *INTENTS])
    )
    batch = PromptRows(empty, INTENTS).collate(np.array([0]))
    assert CommandLoss(model, 0.5, 0.5)(batch).item() == NextToken(model)(batch).item()
