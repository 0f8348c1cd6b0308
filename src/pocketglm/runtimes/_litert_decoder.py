"""An open LiteRT decoder of an export folder. Torch-free.

The file has graphs for prompts of some lengths and one for a single token (see export.json); each
takes the cache and gives it back. A prompt goes through the longest graphs that it fills, its rest
through the shortest that holds it, padded behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.artifacts.export import ExportManifest
from pocketglm.contracts import Floats, Ids, SessionInfo
from pocketglm.errors import CheckpointError
from pocketglm.runtimes._text import check_rewind, check_tokens, context_of

_DECODE = "decode"


class LitertDecoderSession:
    """An open decoder with one text; forks share the weights."""

    def __init__(self, model: Any, info: SessionInfo) -> None:
        self._model, self.info = model, info
        self._runners = {name: model.get_signature_runner(name) for name in _signatures(model)}
        self._sizes = sorted(_size(name) for name in self._runners if name != _DECODE)
        details = self._runners[_DECODE].get_input_details()
        self._shapes = {n: tuple(d["shape"]) for n, d in details.items() if n[:2] == "kv"}
        self._length = 0
        self._cache = self._empty()

    @classmethod
    def open(
        cls, model: Any, path: Path, manifest: ExportManifest, threads: int, context: int | None
    ) -> LitertDecoderSession:
        """Take an open model file into use.

        Raises:
            UsageError: a context that is longer than the file's.
            CheckpointError: the manifest is not a decoder's.
        """
        if manifest.logits is None:
            raise CheckpointError(
                f"{path}: its export.json does not say which logits the decoder computes",
                "export the checkpoint again",
            )
        info = SessionInfo(
            runtime="litert",
            output="logits",
            kind="decoder",
            max_length=context_of(manifest.max_length, context, path),
            activation=manifest.activation,
            threads=threads,
            vocab_size=manifest.vocab_size,
            bos_id=manifest.bos_id,
            eos_ids=tuple(manifest.eos_ids),
            scores=manifest.logits,
        )
        return cls(model, info)

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return self._length

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Append one or more tokens; the logits after the last one, float32 [V].

        Raises:
            UsageError: no token, one outside the vocabulary, or more than the cache can hold.
        """
        last: Floats = self._append(check_tokens(ids, self._length, self.info))[-1]
        return last

    def step(self, token: int) -> Floats:
        """`prefill` of one token."""
        return self.prefill([token])

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens.

        Raises:
            UsageError: the text has fewer.
        """
        check_rewind(count, self._length)
        self._length -= count

    def fork(self) -> LitertDecoderSession:
        """A session with a copy of the text so far; it shares the weights."""
        other = LitertDecoderSession(self._model, self.info)
        # Every call gives new arrays and changes none: what is there so far can be shared.
        other._length, other._cache = self._length, self._cache
        return other

    def score(self, ids: Sequence[int]) -> Floats:
        """Logits float32 [S, V] at every position of a text of its own.

        A file that has the last position's only is run token by token.

        Raises:
            UsageError: as `prefill`.
        """
        tokens = check_tokens(ids, 0, self.info)
        other = LitertDecoderSession(self._model, self.info)
        if self.info.scores == "last":
            return np.stack([other.step(int(token)) for token in tokens])
        return other._append(tokens)

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._model, self._runners, self._cache

    def _append(self, tokens: Ids) -> Floats:
        """Logits of the last token [1, V], or of all [n, V] where the file has them."""
        found, start = [], 0
        whole = self.info.scores == "all"
        prompt = len(tokens) if whole and len(tokens) > 1 else len(tokens) - 1
        while start < prompt:
            rest = prompt - start
            size = next((n for n in self._sizes if n >= rest), self._sizes[-1])
            count = min(size, rest)
            piece = np.pad(tokens[start : start + count], (0, size - count))
            out = self._call(f"prefill_{size}", piece, count)
            if whole:
                found.append(out["logits"][0, :count])
            start += count
        if start < len(tokens):
            found.append(self._call(_DECODE, tokens[start:], 1)["logits"][0])
        return np.concatenate(found)

    def _call(self, name: str, tokens: Ids, count: int) -> dict[str, Floats]:
        """One graph, of whose tokens the first `count` are the text's."""
        positions = np.arange(self._length, self._length + len(tokens))
        out: dict[str, Floats] = self._runners[name](
            tokens=tokens[None].astype(np.int32),
            input_pos=positions.astype(np.int32),
            **self._cache,
        )
        self._cache = {key: out.pop(key) for key in self._shapes}
        self._length += count
        return out

    def _empty(self) -> dict[str, Floats]:
        return {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}


def _signatures(model: Any) -> list[str]:
    return list(model.get_signature_list())


def _size(name: str) -> int:
    return int(name.rpartition("_")[2])
