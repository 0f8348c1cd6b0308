"""An open ExecuTorch decoder of an export folder.

The cache is in the method's own buffers, one for the file. So the sessions of one file, a session
and its forks, share it: each remembers its text, and a session whose turn it is reads again what
the one before it has overwritten. Tokens that both texts begin with stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pocketglm.artifacts.export import ExportManifest
from pocketglm.contracts import Floats, RunOptions, SessionInfo
from pocketglm.runtimes._executorch_method import Method
from pocketglm.runtimes._info import decoder_info
from pocketglm.runtimes._text import Text, check_tokens


class _Cache:
    """An open file, and the text that its cache holds."""

    def __init__(self, method: Method) -> None:
        self.method, self.text = method, list[int]()

    def run(self, text: Sequence[int], tokens: Sequence[int]) -> Floats:
        """Take `tokens` behind `text`: the logits that the file has of them, [V] or [S, V]."""
        same = next(
            (i for i, (a, b) in enumerate(zip(self.text, text, strict=False)) if a != b),
            min(len(self.text), len(text)),
        )
        self.text = list(text[:same])  # what an interrupted call left is overwritten
        new = [*text[same:], *tokens]
        logits = self.method(np.array([new], np.int64), np.array([same], np.int64))
        self.text += new
        # A file with all logits has those of what was read again, too.
        return logits[0] if logits.ndim == 2 else logits[0, -len(tokens) :]


class ExecutorchDecoderSession(Text):
    """An open decoder with one text; forks share the weights and the cache."""

    def __init__(self, cache: _Cache, info: SessionInfo) -> None:
        self._cache, self.info = cache, info
        self._text: list[int] = []

    @classmethod
    def open(
        cls, file: Path, manifest: ExportManifest, threads: int, options: RunOptions
    ) -> ExecutorchDecoderSession:
        """Open a model file.

        Raises:
            UsageError: a context that is longer than the file's.
            CheckpointError: the manifest is not a decoder's, or ExecuTorch cannot open the file.
        """
        info = decoder_info(file.parent, manifest, threads, options)
        return cls(_Cache(Method(file, threads)), info)

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return len(self._text)

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Append one or more tokens; the logits after the last one, float32 [V].

        Raises:
            UsageError: no token, one outside the vocabulary, or more than the cache can hold.
        """
        tokens = check_tokens(ids, self.length, self.info).tolist()
        logits = self._cache.run(self._text, tokens)
        self._text += tokens
        last: Floats = logits if logits.ndim == 1 else logits[-1]
        return last

    def _forget(self, count: int) -> None:
        del self._text[self.length - count :]

    def fork(self) -> ExecutorchDecoderSession:
        """A session with a copy of the text so far; it shares the weights and the cache."""
        other = ExecutorchDecoderSession(self._cache, self.info)
        other._text = list(self._text)
        return other

    def score(self, ids: Sequence[int]) -> Floats:
        """Logits float32 [S, V] at every position of a text of its own.

        A file that has the last position's only is run token by token.

        Raises:
            UsageError: as `prefill`.
        """
        tokens = check_tokens(ids, 0, self.info).tolist()
        if self.info.scores == "all":
            return self._cache.run([], tokens)
        return np.stack([self._cache.run(tokens[:i], [token]) for i, token in enumerate(tokens)])

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._cache
