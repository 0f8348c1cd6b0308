"""A little text to calibrate and train decoders with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

_TEXT = "the lamp in my room is on and the light of a door was off when it rained at noon"
WORDS = _TEXT.split()


def save_texts(folder: Path, count: int = 60, seed: int = 0) -> Path:
    """Three splits of random sentences; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, size in (("train", count), ("validation", 8), ("test", 8)):
        rows = [{"text": " ".join(rng.choice(WORDS, rng.integers(4, 12)))} for _ in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
