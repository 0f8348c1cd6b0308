"""Sentence embeddings: nearest-neighbour accuracy on labelled texts, and cosine parity.

`nn_accuracy`: each test text takes the label of the training text whose embedding is nearest
(cosine); the share that is right. Rows with the out-of-scope label are left out on both sides,
since such texts have nothing in common. A limit on the rows applies to the queries, not to the
index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import (
    DataOptions,
    EncoderSession,
    Floats,
    Reporter,
    Scores,
    Silent,
    Task,
)
from pocketglm.data.readers import Example, Split, read_split
from pocketglm.errors import DataError, UsageError
from pocketglm.eval._run import Outputs, logits_of, outputs_of
from pocketglm.eval._stats import mean_metric
from pocketglm.text.tokenizer import Tokenizer

_QUERIES = 512  # queries compared at a time, to bound the memory


def score(
    folder: Path,
    session: EncoderSession,
    tokenizer: Tokenizer,
    options: DataOptions,
    max_length: int | None,
    reporter: Reporter,
) -> Scores:
    """Nearest-neighbour accuracy of the test rows, with the training rows as the index.

    Raises:
        UsageError: the model is a classifier, or the data is a single file.
        DataError: a split has no rows that are in scope.
    """
    if session.info.output != "sentence_embedding":
        raise UsageError(
            "this model is a classifier, it gives no sentence embeddings",
            "score it with --task intent, or take an embedding model",
        )
    if options.path.is_file():  # each text would be its own neighbour
        raise UsageError(
            f"the task embed looks for test rows among training rows; {options.path} is one file",
            "give --data a folder that holds train.jsonl (the index) and test.jsonl (the queries)",
        )
    queries = _in_scope(options, "test")
    index = _in_scope(replace(options, limit=None), "train")
    asked = _vectors(session, tokenizer, queries, max_length, reporter, "embed test")
    known = _vectors(session, tokenizer, index, max_length, reporter, "embed train")
    predictions = [index[row].label for row in nearest_rows(asked.values, known.values)]
    gold = [row.label for row in queries]
    right = np.array([g == p for g, p in zip(gold, predictions, strict=True)], np.float64)
    return Scores(
        primary="nn_accuracy",
        metrics={"nn_accuracy": mean_metric(right)},
        rows={"nn_accuracy": right},
        predictions=predictions,
        gold=gold,
        texts=[row.text for row in queries],
        truncated=(asked.truncated + known.truncated) / (len(queries) + len(index)),
    )


def _in_scope(options: DataOptions, split: Split) -> list[Example]:
    rows = [row for row in read_split(options, split) if row.label != options.oos_label]
    if not rows:
        raise DataError(f"the {split} split has no in-scope row", path=options.path)
    return rows


def _vectors(
    session: EncoderSession,
    tokenizer: Tokenizer,
    rows: Sequence[Example],
    max_length: int | None,
    reporter: Reporter,
    label: str,
) -> Outputs:
    texts = [row.text for row in rows]
    return outputs_of(session, tokenizer, texts, max_length, reporter=reporter, label=label)


def nearest_rows(queries: Floats, index: Floats) -> npt.NDArray[np.int64]:
    """For each unit-length query [Q, C] the row of the nearest unit-length vector of [N, C]."""
    found = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), _QUERIES):
        likeness = queries[start : start + _QUERIES] @ index.T
        found[start : start + len(likeness)] = likeness.argmax(axis=1)
    return found


def cosine_parity(
    a: EncoderSession,
    b: EncoderSession,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_length: int | None = None,
    reporter: Reporter | None = None,
) -> npt.NDArray[np.float64]:
    """Cosine [N] between the two models' outputs for each text; 1 where they agree."""
    reporter = reporter or Silent()
    x, y = (
        logits_of(s, tokenizer, texts, max_length, reporter=reporter, label=f"embed {name}").astype(
            np.float64
        )
        for s, name in ((a, "first"), (b, "second"))
    )
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    result: npt.NDArray[np.float64] = (x * y).sum(axis=1) / np.maximum(lengths, 1e-12)
    return result


SPEC = Task(
    summary="sentence embeddings: nearest-neighbour accuracy (index: train, queries: test)",
    score=score,
)
