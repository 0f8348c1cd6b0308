"""Commands: text -> intent, slots and the phone's action, by a decoder that can write nothing else.

* `exact_match`: intent and all slots are right.
* `intent_accuracy`; `action_match`: the action string is the same.
* `slot_precision`, `slot_recall`, `slot_f1`: micro averages over all slots of all rows, as CoNLL
  counts entities (Tjong Kim Sang and De Meulder 2003, aclanthology.org/W03-0419). A slot is right
  if name and value are; a row's value that comes twice has to be found twice. CoNLL compares
  positions: here the same value at another place of the text counts as right.
Decoding is greedy, within the grammar that the model was trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketglm.artifacts.checkpoint import model_folder
from pocketglm.artifacts.export import is_export, read_export
from pocketglm.artifacts.manifest import CommandGrammar, read_manifest
from pocketglm.contracts import DataOptions, DecoderSession, Metric, Reporter, Scores, Task
from pocketglm.data.frames import FrameRow, action, read_frames
from pocketglm.errors import UsageError
from pocketglm.eval._stats import mean_metric, ratio_metric
from pocketglm.eval.intent import check_labels
from pocketglm.generate import Sampling, generate
from pocketglm.text.frame import Frame, FrameConstraint, FrameTokens, clean, words
from pocketglm.text.tokenizer import Tokenizer

Numbers = npt.NDArray[np.float64]


def read_grammar(path: Path) -> CommandGrammar:
    """The intents and slots that the model in folder `path` was trained on.

    Raises:
        UsageError: it was not trained for commands.
        CheckpointError: the folder is no model.
    """
    folder = model_folder(path)
    found = (read_export(folder) if is_export(folder) else read_manifest(folder)).command
    if found is None:
        raise UsageError(
            f"{path} was not trained for commands, so it has no intents and slots",
            "train it first: pocketglm train CKPT --task command --data DATA --out DIR",
        )
    return found


def parse(
    session: DecoderSession, tokens: FrameTokens, text: str, max_length: int | None = None
) -> Frame:
    """What a command means; the session's text before is forgotten.

    max_length: tokens of text and answer together, None = the model's. A text that leaves no room
    for its answer loses its last words.

    Raises:
        UsageError: `max_length` is more than the model's, or too few for any word.
        DataError: the text is not Unicode.
    """
    return _parse(session, tokens, text, max_length)[0]


def _parse(
    session: DecoderSession, tokens: FrameTokens, text: str, max_length: int | None
) -> tuple[Frame, bool]:
    """The frame, and whether the text was cut."""
    limit = session.info.max_length if max_length is None else max_length
    if limit > session.info.max_length:
        raise UsageError(
            f"--max-length {limit} is more than this model's {session.info.max_length} tokens",
            f"use {session.info.max_length} or less",
        )
    kept = _fitting(tokens, text, limit)
    session.rewind(session.length)
    constraint = FrameConstraint(tokens, kept)
    for _ in generate(session, tokens.prompt(kept), Sampling(max_new_tokens=limit), constraint):
        pass
    return constraint.frame, kept != clean(text)


def _fitting(tokens: FrameTokens, text: str, limit: int) -> str:
    """The text, without the last words for which there is no room."""
    line = clean(text)
    costs = np.cumsum([2 * len(ids) + 1 for ids in tokens.words(line)])
    count = int(np.searchsorted(costs, limit - tokens.length(""), side="right"))
    kept = line[: words(line)[count - 1][1]] if count else ""
    if line and not kept:
        raise UsageError(
            f"a length of {limit} tokens has no room for a command",
            "use a larger --max-length, or a model with a longer context",
        )
    return kept


def score(
    folder: Path,
    session: DecoderSession,
    tokenizer: Tokenizer,
    options: DataOptions,
    max_length: int | None,
    reporter: Reporter,
) -> Scores:
    """Score a decoder on the test commands of `options.path`.

    Raises:
        UsageError: the model was not trained for commands; as `parse`.
        DataError: the data cannot be used, or has intents that the model does not know.
    """
    grammar = read_grammar(folder)
    tokens = FrameTokens(grammar, tokenizer)
    rows = read_frames(options, "test")
    check_labels([row.frame.intent for row in rows], list(grammar.intents), options)
    found: list[Frame] = []
    cut = 0
    for row in rows:
        frame, short = _parse(session, tokens, row.text, max_length)
        found.append(frame)
        cut += short
        reporter.progress("eval", len(found), len(rows))
    return command_scores(rows, found, truncated=cut / len(rows))


def command_scores(
    gold: Sequence[FrameRow], predicted: Sequence[Frame], truncated: float = 0.0
) -> Scores:
    """Metrics of predicted frames against true rows; predictions are told as action strings, and
    `rows` also holds the slots of each: right, true, and predicted.

    `action_match` leaves out rows whose data states an action of another form than
    `data.frames.action` writes; metrics that have no row or slot to count are left out.

    Raises:
        ValueError: there are no rows, or as many predictions as rows not.
    """
    pairs = list(zip(gold, predicted, strict=True))
    said = [action(frame.intent, frame.slots) for frame in predicted]
    right_intent = _shares(row.frame.intent == frame.intent for row, frame in pairs)
    counts = np.array([_slot_counts(row.frame, frame) for row, frame in pairs], np.float64)
    hits, wanted, given = counts.T
    rows: dict[str, Numbers] = {
        "exact_match": right_intent * ((hits == wanted) & (hits == given)),
        "intent_accuracy": right_intent,
    }
    comparable = np.array([row.action == action(row.frame.intent, row.frame.slots) for row in gold])
    if comparable.any():
        same = _shares(row.action == text for row, text in zip(gold, said, strict=True))
        rows["action_match"] = np.where(comparable, same, np.nan)
    metrics: dict[str, Metric] = {name: mean_metric(values) for name, values in rows.items()}
    rows |= {"slot_hits": hits, "slots": wanted, "slots_predicted": given}
    ratios = {
        "slot_f1": (2 * hits, wanted + given),
        "slot_precision": (hits, given),
        "slot_recall": (hits, wanted),
    }
    for name, (above, below) in ratios.items():
        if below.any():
            metrics[name] = ratio_metric(above, below)
    return Scores(
        primary="exact_match",
        metrics=metrics,
        rows=rows,
        predictions=said,
        gold=[row.action for row in gold],
        texts=[row.text for row in gold],
        truncated=truncated,
    )


def _shares(values: Iterable[bool]) -> Numbers:
    return np.array(list(values), np.float64)


def _slot_counts(gold: Frame, predicted: Frame) -> tuple[int, int, int]:
    """Slots that are right, that there are, and that were predicted."""
    wanted, given = (
        Counter((n, " ".join(v.split())) for n, v in f.slots) for f in (gold, predicted)
    )
    return (wanted & given).total(), wanted.total(), given.total()


SPEC = Task(
    summary="commands to intent, slots and action: exact match, slot F1",
    score=score,
    kind="decoder",
)
