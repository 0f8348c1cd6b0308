"""Intent recognition: one label per text, one of which may mean 'out of scope'.

Metrics as defined by Larson et al. 2019, "An Evaluation Dataset for Intent Classification and
Out-of-Scope Prediction" (https://aclanthology.org/D19-1131):
* `accuracy`: in-scope accuracy, over the rows whose true label is in scope. Where no row is out of
  scope this is the plain accuracy. Predicting 'out of scope' for an in-scope row is a mistake.
* `oos_recall`: share of the out-of-scope rows that were recognized as such.
Besides: `accuracy_all` over all rows, `macro_f1` over all labels, `oos_precision`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import DataOptions, EncoderSession, Metric, Reporter, Scores, Task
from pocketglm.data.readers import read_split
from pocketglm.errors import DataError, UsageError
from pocketglm.eval._run import outputs_of
from pocketglm.eval._stats import macro_f1_metric, mean_metric
from pocketglm.text.tokenizer import Tokenizer


def score(
    folder: Path,
    session: EncoderSession,
    tokenizer: Tokenizer,
    options: DataOptions,
    max_length: int | None,
    reporter: Reporter,
) -> Scores:
    """Score a classifier on the test rows of `options.path`.

    Raises:
        UsageError: the model has no labels.
        DataError: a label of the data is not one of the model's.
    """
    labels = session.info.labels
    if not labels:
        raise UsageError(
            "this model has no labels, so it cannot recognize intents",
            "fine-tune it first: pocketglm train CKPT --task intent --data DATA --out DIR",
        )
    rows = read_split(options, "test")
    check_labels([row.label for row in rows], labels, options)
    texts = [row.text for row in rows]
    found = outputs_of(session, tokenizer, texts, max_length, reporter=reporter)
    predicted = found.values.argmax(axis=1).astype(np.int64)
    gold = [row.label for row in rows]
    scores = intent_scores(gold, predicted, labels, options.oos_label, texts)
    return replace(scores, truncated=found.truncated / len(rows))


def check_labels(gold: Sequence[str], labels: Sequence[str], options: DataOptions) -> None:
    """Raises DataError if `gold` holds labels that the model does not know; names up to five."""
    unknown = sorted(set(gold) - set(labels))
    if not unknown:
        return
    shown = ", ".join(repr(label) for label in unknown[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    raise DataError(
        f"{len(unknown)} label(s) that the model was not trained on: {shown}{more}",
        f"train with rows of every label, or drop these rows; the model knows {len(labels)} "
        "labels (pocketglm inspect shows them). Does --label-column name the right column?",
        path=options.path,
    )


def intent_scores(
    gold: Sequence[str],
    predicted: npt.NDArray[np.int64],
    labels: Sequence[str],
    oos_label: str,
    texts: Sequence[str] = (),
) -> Scores:
    """Metrics of predicted label numbers [N] against true labels; all of them in `labels`.

    Raises:
        ValueError: there are no rows.
    """
    number = {label: index for index, label in enumerate(labels)}
    truth = np.array([number[label] for label in gold], np.int64)
    right = (truth == predicted).astype(np.float64)
    outside = number.get(oos_label, -1)
    is_oos, said_oos = truth == outside, predicted == outside
    rows: dict[str, npt.NDArray[np.float64]] = {}
    if not is_oos.all():
        rows["accuracy"] = np.where(is_oos, np.nan, right)
    rows["accuracy_all"] = right
    if is_oos.any():
        rows["oos_recall"] = np.where(is_oos, right, np.nan)
        if said_oos.any():
            rows["oos_precision"] = np.where(said_oos, right, np.nan)
    metrics: dict[str, Metric] = {name: mean_metric(values) for name, values in rows.items()}
    metrics["macro_f1"] = macro_f1_metric(truth, predicted, len(labels))
    return Scores(
        primary="accuracy" if "accuracy" in metrics else "accuracy_all",
        metrics=metrics,
        rows=rows,
        predictions=[labels[index] for index in predicted],
        gold=list(gold),
        texts=list(texts),
    )


SPEC = Task(
    summary="intent recognition: in-scope accuracy, macro-F1, out-of-scope recall and precision",
    score=score,
)
