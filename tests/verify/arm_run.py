"""Runs one export on rows with our own runtime: on this machine, or inside the emulated root.

    python arm_run.py EXPORT ROWS.json OUT.npz

A row is {"text": ..., "ids": [...]}; the ids are a decoder's alone: what to compute the logits of.
OUT has float32 `logits` [rows, C], or [tokens of all rows, V], and for each row as JSON `choices`,
what the model decided (the label; of a decoder intent and slots, mark by mark, greedily), and
`margins`, how far each was ahead of the next best. Rows run one at a time, as an app does.
Torch-free.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.artifacts.export import read_export
from pocketglm.contracts import Floats, RunOptions
from pocketglm.eval.command import read_grammar
from pocketglm.runtimes import open_decoder, open_encoder
from pocketglm.text.frame import FrameConstraint, FrameTokens
from pocketglm.text.tokenizer import Tokenizer

ONE = RunOptions(threads=1)
Rows = Sequence[dict[str, Any]]
Decisions = list[tuple[list[str], list[float]]]  # a row's choices and their margins


def margin(values: Floats) -> float:
    ordered = np.sort(values)
    return float(ordered[-1] - ordered[-2]) if len(ordered) > 1 else np.inf


def encoder(folder: Path, rows: Rows) -> tuple[Decisions, Floats]:
    session, tokenizer = open_encoder(folder, ONE), Tokenizer.load(folder)
    found = []
    for row in rows:
        encoded = tokenizer.encode([row["text"]], session.info.max_length)
        found.append(session.logits(encoded.ids, encoded.mask)[0])
    labels = session.info.labels
    return [([labels[v.argmax()]], [margin(v)]) for v in found], np.stack(found)


def decoder(folder: Path, rows: Rows) -> tuple[Decisions, Floats]:
    session = open_decoder(folder, ONE)
    tokens = FrameTokens(read_grammar(folder), Tokenizer.load(folder))
    names = {token: name for name, token in tokens.id.items()}
    decisions: Decisions = []
    scores = []
    for row in rows:
        session.rewind(session.length)
        constraint = FrameConstraint(tokens, row["text"])
        logits = session.prefill(tokens.prompt(row["text"]))
        choices, margins = [], []
        while len(allowed := constraint.allowed()):
            token = int(allowed[logits[allowed].argmax()])
            if token in names:  # a mark; the words between them are given
                choices.append(names[token])
                margins.append(margin(logits[allowed]))
            constraint.advance(token)
            logits = session.step(token)
        decisions.append((choices, margins))
        scores.append(session.score(row["ids"]))
    return decisions, np.concatenate(scores)


def main(export: str, rows: str, out: str) -> None:
    run = encoder if read_export(Path(export)).kind == "encoder" else decoder
    decisions, logits = run(Path(export), json.loads(Path(rows).read_text(encoding="utf-8")))
    choices, margins = ([json.dumps(row) for row in part] for part in zip(*decisions, strict=True))
    np.savez(out, choices=np.array(choices), margins=np.array(margins), logits=logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
