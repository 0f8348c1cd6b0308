"""Runs one export on rows with our own runtime: on this machine, or inside the emulated root.

    python arm_run.py EXPORT ROWS.json OUT.npz

A row is {"text": ..., "ids": [...]}; the ids are a decoder's alone: tokens to compute the logits of.
OUT has `labels`, one string a row (of a decoder: intent and slots, decoded greedily), and float32
`logits` [rows, C], or [tokens of all rows, V]. Torch-free. Rows are run one at a time, as an app does.
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
from pocketglm.eval.command import parse, read_grammar
from pocketglm.runtimes import open_decoder, open_encoder
from pocketglm.text.frame import FrameTokens
from pocketglm.text.tokenizer import Tokenizer

ONE = RunOptions(threads=1)
Rows = Sequence[dict[str, Any]]


def encoder(folder: Path, rows: Rows) -> tuple[list[str], Floats]:
    session, tokenizer = open_encoder(folder, ONE), Tokenizer.load(folder)
    found = []
    for row in rows:
        encoded = tokenizer.encode([row["text"]], session.info.max_length)
        found.append(session.logits(encoded.ids, encoded.mask)[0])
    logits = np.stack(found)
    return [session.info.labels[best] for best in logits.argmax(axis=1)], logits


def decoder(folder: Path, rows: Rows) -> tuple[list[str], Floats]:
    session = open_decoder(folder, ONE)
    tokens = FrameTokens(read_grammar(folder), Tokenizer.load(folder))
    labels, logits = [], []
    for row in rows:
        frame = parse(session, tokens, row["text"])
        labels.append(json.dumps([frame.intent, frame.slots], ensure_ascii=False))
        logits.append(session.score(row["ids"]))
    return labels, np.concatenate(logits)


def main(export: str, rows: str, out: str) -> None:
    run = encoder if read_export(Path(export)).kind == "encoder" else decoder
    labels, logits = run(Path(export), json.loads(Path(rows).read_text(encoding="utf-8")))
    np.savez(out, labels=np.array(labels), logits=logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
