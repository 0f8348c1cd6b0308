"""Opens a GGUF export with llama.cpp on the CPU, by llama-cpp-python. Torch-free.

Texts become tokens by the folder's tokenizer.json, as in every runtime here; what llama.cpp's own
tokenizer makes of them is compared in `tests/verify/check_gguf.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocketglm.artifacts.export import ExportManifest, read_export
from pocketglm.contracts import Floats, Ids, RunOptions, Runtime, Session, SessionInfo
from pocketglm.errors import CheckpointError, UsageError
from pocketglm.runtimes._cores import usable_cores
from pocketglm.runtimes._llama import Context, Model, library
from pocketglm.runtimes._text import Text, check_tokens, context_of


class GgufEncoderSession:
    """An open encoder; rows are run one by one."""

    def __init__(self, model: Model, manifest: ExportManifest, info: SessionInfo) -> None:
        self._model, self.info = model, info
        self._context = Context(model, info.max_length, info.threads, encoder=True)
        self._width = int(manifest.outputs[0]["shape"][-1])

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """ids [B, S], mask [B, S] of 0/1 -> float32 [B, C].

        Raises:
            UsageError: an id is outside the vocabulary, or a row is empty or too long.
        """
        rows = [
            check_tokens(row[keep > 0], 0, self.info) for row, keep in zip(ids, mask, strict=True)
        ]
        values = np.stack([self._context.pooled(row, self._width) for row in rows])
        if self.info.output == "sentence_embedding":
            values /= np.linalg.norm(values, axis=1, keepdims=True)
        return values

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        self._context.close()
        self._model.close()


class GgufDecoderSession(Text):
    """An open decoder with one text; forks share the weights."""

    def __init__(self, model: Model, info: SessionInfo, *, owner: bool = True) -> None:
        self._model, self.info, self._owner = model, info, owner
        self._context = Context(model, info.max_length, info.threads)
        self._ids: list[int] = []

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return len(self._ids)

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Append one or more tokens; the logits after the last one, float32 [V].

        Raises:
            UsageError: no token, one outside the vocabulary, or more than the cache can hold.
            WorkError: llama.cpp gives up.
        """
        tokens = check_tokens(ids, self.length, self.info)
        self._context.forget(self.length)  # what an interrupted call left
        logits = self._context.logits(tokens, self.length, every=False)
        self._ids += tokens.tolist()
        last: Floats = logits[0]
        return last

    def _forget(self, count: int) -> None:
        del self._ids[self.length - count :]
        self._context.forget(self.length)

    def fork(self) -> GgufDecoderSession:
        """A session with a copy of the text so far; it shares the weights and reads it again."""
        other = GgufDecoderSession(self._model, self.info, owner=False)
        if self._ids:
            other.prefill(self._ids)
        return other

    def score(self, ids: Sequence[int]) -> Floats:
        """Logits float32 [S, V] at every position of a text of its own.

        Raises:
            UsageError: as `prefill`.
        """
        tokens = check_tokens(ids, 0, self.info)
        context = Context(self._model, len(tokens), self.info.threads)
        try:
            return context.logits(tokens, 0, every=True)
        finally:
            context.close()

    def close(self) -> None:
        """Free the cache, and the model where this session opened it."""
        self._context.close()
        if self._owner:
            self._model.close()


def open_export(path: Path, options: RunOptions) -> Session:
    """Open a GGUF export folder.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        CheckpointError: the model file is missing, changed, or llama.cpp cannot open it.
        UsageError: no GGUF export, or a context that is longer than the file allows.
    """
    manifest = read_export(path)
    if manifest.runtime != "gguf":
        raise UsageError(f"{path} is no GGUF export", "open it without --runtime")
    library()
    file, entry = path / manifest.model_file, manifest.files.get(manifest.model_file)
    if not file.is_file() or (entry and file.stat().st_size != entry.bytes):
        raise CheckpointError(
            f"{file} is missing, or has another size than it was exported with",
            "copy the folder again, or export the checkpoint again",
        )
    decoder = manifest.kind == "decoder"
    info = SessionInfo(
        runtime="gguf",
        output=manifest.output,
        kind=manifest.kind,
        labels=tuple(manifest.labels),
        max_length=context_of(manifest.max_length, options.context if decoder else None, path),
        pooling=manifest.pooling,
        activation=manifest.activation,
        threads=options.threads or manifest.threads or usable_cores(),
        vocab_size=manifest.vocab_size,
        bos_id=manifest.bos_id,
        eos_ids=tuple(manifest.eos_ids),
        scores="all",
    )
    model = Model(file)
    return GgufDecoderSession(model, info) if decoder else GgufEncoderSession(model, manifest, info)


SPEC = Runtime(summary="llama.cpp on the CPU, for GGUF exports", open=open_export)
