"""What a teacher says about texts, computed once and kept on disk.

Every set of texts is a folder in the step cache, named by the sha256 of all that decides its
contents; other students and seeds find it there. Files are numpy's, read as memory maps: `logits`
float32 [N, C], `features-I` float16 [tokens of all rows, width], `starts` int64 [N + 1], the first
token of each row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pocketglm.artifacts.checkpoint import Checkpoint, read_json
from pocketglm.artifacts.manifest import digest_file, digest_value, tool_versions, write_json
from pocketglm.artifacts.output import output_folder
from pocketglm.contracts import Reporter
from pocketglm.errors import CheckpointError, LockedError
from pocketglm.model.encoder import Encoder
from pocketglm.model.hf import labels_of, load_encoder, spec_of, stored_name
from pocketglm.model.layers import bare_modules
from pocketglm.ops.stored import check_finite
from pocketglm.text.tokenizer import Tokenizer
from pocketglm.train._optim import accelerator
from pocketglm.train._rows import Tokens, pad, tokenize
from pocketglm.train._taps import Features, tapped, taps, width_of

_FORMAT = 1  # of the folder
_SEAL = "teacher.json"  # written last: sha256 of each file
_BATCH = 64  # rows
_WAIT = 0.1  # seconds between looks at a folder that another process is writing
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Outputs:
    """The files of one set of texts. `reused`: they were there."""

    logits: npt.NDArray[np.float32]
    features: list[npt.NDArray[np.float16]]
    starts: npt.NDArray[np.int64]
    reused: bool

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, [N]."""
        return np.diff(self.starts)

    def tokens(self, feature: int, row: int) -> npt.NDArray[np.float16]:
        """A feature of one row, [S, width]."""
        return self.features[feature][self.starts[row] : self.starts[row + 1]]


@dataclass(frozen=True)
class Teacher:
    """A classifier that is asked for its logits, and for features of some of its layers.

    root: the cache. length: tokens of a text, at most.
    """

    ckpt: Checkpoint
    root: Path
    length: int
    features: Features
    layers: tuple[int, ...]
    reporter: Reporter

    @cached_property
    def digest(self) -> str:
        return self.ckpt.digest()

    @cached_property
    def labels(self) -> list[str]:
        """In the order of the logits."""
        return labels_of(self.ckpt)

    @cached_property
    def widths(self) -> list[int]:
        """Of each feature."""
        with bare_modules():
            return [
                width_of(p) for p in taps(Encoder(spec_of(self.ckpt)), self.features, self.layers)
            ]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.ckpt.path)

    @cached_property
    def model(self) -> Encoder:
        """Loaded only if something is not in the cache.

        Raises:
            CheckpointError: a weight holds NaN or infinity.
        """
        model = load_encoder(self.ckpt)
        for name, value in model.state_dict().items():
            check_finite(self.ckpt, stored_name(self.ckpt, name), value)
        self.tokenizer.check_vocabulary(model.spec.vocab_size, self.ckpt.path)
        device: torch.device = accelerator().device
        return model.to(device)

    def outputs(self, texts: Sequence[str], what: str) -> Outputs:
        """About each of the texts; `what` they are, for the reporter.

        Raises:
            DiskFullError, UsageError: the cache cannot be written.
        """
        key = digest_value(
            {
                "format": _FORMAT,
                "teacher": self.digest,
                "texts": list(texts),
                "length": self.length,
                "features": self.features,
                "layers": self.layers,
                "versions": tool_versions("torch"),
            }
        )
        folder = self.root / key
        reused = True
        while (found := _read(folder)) is None:
            reused = False
            try:
                with output_folder(folder, key, owned=True) as unfinished:
                    self._write(unfinished, texts, what)
            except LockedError:
                time.sleep(_WAIT)
        state = "as computed before" if reused else "kept for other students"
        self.reporter.say(f"the teacher's outputs for {what}: {state}")
        logits, starts, *features = found
        return Outputs(logits, features, starts, reused)

    def _write(self, folder: Path, texts: Sequence[str], what: str) -> None:
        tokens = tokenize(self.tokenizer, texts, self.length)
        starts = np.concatenate([[0], np.cumsum(tokens.lengths)]).astype(np.int64)
        np.save(folder / "starts.npy", starts)
        names = ["logits", *(f"features-{number}" for number in range(len(self.widths)))]
        shapes = [(len(texts), len(self.labels))]
        shapes += [(int(starts[-1]), width) for width in self.widths]
        files = [
            _new_file(folder / f"{name}.npy", np.float32 if name == "logits" else np.float16, shape)
            for name, shape in zip(names, shapes, strict=True)
        ]
        self._compute(tokens, starts, files, what)
        for file in files:
            file.flush()
        names.insert(1, "starts")
        write_json(
            folder / _SEAL,
            {"files": {name: digest_file(folder / f"{name}.npy") for name in names}},
        )

    @torch.inference_mode()
    def _compute(
        self,
        tokens: Tokens,
        starts: npt.NDArray[np.int64],
        files: Sequence[npt.NDArray[Any]],
        what: str,
    ) -> None:
        model, lengths = self.model, tokens.lengths
        device = next(model.parameters()).device
        places = taps(model, self.features, self.layers)
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            batch = pad(tokens.ids, rows, self.tokenizer.pad_id)
            run = partial(model, batch["ids"].to(device), batch["mask"].to(device))
            logits, features = tapped(places, run)
            files[0][rows] = logits.float().cpu().numpy()
            for file, feature in zip(files[1:], features, strict=True):
                values = feature.float().clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
                for row, value in zip(rows, values, strict=True):
                    file[starts[row] : starts[row + 1]] = value[: lengths[row]]
            self.reporter.progress(f"teacher: {what}", start + len(rows), len(order))


def _new_file(file: Path, dtype: npt.DTypeLike, shape: tuple[int, int]) -> np.memmap[Any, Any]:
    """A memory map of a new .npy file, filled with zeros."""
    made: np.memmap[Any, Any] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        file, mode="w+", dtype=np.dtype(dtype), shape=shape
    )
    return made


def _read(folder: Path) -> list[npt.NDArray[Any]] | None:
    """The arrays, if they are there and as they were written."""
    try:
        sealed = read_json(folder / _SEAL)["files"]
        for name, digest in sealed.items():
            if digest_file(folder / f"{name}.npy") != digest:
                return None
        return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in sealed]
    except (OSError, ValueError, KeyError, CheckpointError):
        return None
