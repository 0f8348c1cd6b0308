"""An open Core ML decoder of an export folder. Torch-free.

The package has the function `decode`, which takes one token, and may have others that take more: a
prompt goes through the longest that it fills, its rest through the shortest that holds it, padded
behind. All write the same states; padding is overwritten by the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.artifacts.export import ExportManifest
from pocketglm.contracts import Floats, Ids, SessionInfo
from pocketglm.errors import CheckpointError
from pocketglm.runtimes._coreml_program import OpenFunction
from pocketglm.runtimes._text import CachedText, check_tokens

DECODE = "decode"


@dataclass(frozen=True, slots=True)
class _Graph:
    """A function for `size` tokens. position: the first one's place [1], or all places [size]."""

    function: OpenFunction
    size: int
    ids: str
    position: str

    @classmethod
    def of(cls, function: OpenFunction, name: str) -> _Graph:
        """Which of its inputs is what: the ids have two axes, the position has one."""
        ranks = {len(port.type.shape): key for key, port in function.inputs.items()}
        if sorted(ranks) != [1, 2] or len(function.inputs) != 2:
            ports = ", ".join(f"{key} {port.type}" for key, port in function.inputs.items())
            raise CheckpointError(
                f"function {name} takes {ports}; a decoder takes ids [1, N] and a position",
                "export the checkpoint again",
            )
        size = function.inputs[ranks[2]].type.shape[1]
        if size is None:
            raise CheckpointError(
                f"function {name} takes any number of ids", "export the checkpoint again"
            )
        return cls(function, size, ranks[2], ranks[1])

    def run(self, tokens: Ids, start: int, state: Any, output: str) -> Floats:
        """Logits of at most `size` tokens from `start` on: [1 or size, V]."""
        padded = np.zeros((1, self.size), np.int32)
        padded[0, : len(tokens)] = tokens
        count = self.function.inputs[self.position].type.shape[0] or 1
        places = np.arange(start, start + count, dtype=np.int32)
        logits = self.function.run({self.ids: padded, self.position: places}, state)[output]
        return np.asarray(logits, np.float32).reshape(-1, logits.shape[-1])


class CoreMLDecoderSession(CachedText):
    """An open decoder with one text; forks share the weights."""

    def __init__(self, graphs: Sequence[_Graph], info: SessionInfo, output: str) -> None:
        self._graphs, self.info, self._output = list(graphs), info, output
        self._state = self._graphs[0].function.new_state()

    @classmethod
    def open(
        cls,
        functions: Mapping[str, OpenFunction],
        manifest: ExportManifest,
        info: SessionInfo,
        path: Path,
    ) -> CoreMLDecoderSession:
        """Take open functions into use.

        Raises:
            CheckpointError: they are not a decoder's, or have not all the same states.
        """
        if DECODE not in functions or not functions[DECODE].states:
            lacks = "no states: its cache is lost" if DECODE in functions else "no function decode"
            raise CheckpointError(f"{path} has {lacks}", "export the checkpoint again")
        wanted = {name: str(port.type) for name, port in functions[DECODE].states.items()}
        for name, function in functions.items():
            if {key: str(port.type) for key, port in function.states.items()} != wanted:
                raise CheckpointError(
                    f"{path}: function {name} has other states than decode",
                    "export the checkpoint again",
                )
            if manifest.output not in function.outputs:
                raise CheckpointError(
                    f"{path}: function {name} has no output {manifest.output}",
                    "export the checkpoint again",
                )
        graphs = sorted((_Graph.of(f, n) for n, f in functions.items()), key=lambda g: g.size)
        if graphs[0].size != 1:
            raise CheckpointError(
                f"{path}: decode takes {graphs[0].size} tokens, not one",
                "export the checkpoint again",
            )
        return cls(graphs, info, manifest.output)

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Append one or more tokens; the logits after the last one, float32 [V].

        Raises:
            UsageError: no token, one outside the vocabulary, or more than the cache can hold.
        """
        last: Floats = self._append(check_tokens(ids, self._length, self.info))[-1]
        return last

    def fork(self) -> CoreMLDecoderSession:
        """A session with a copy of the text so far; it shares the weights."""
        other = CoreMLDecoderSession(self._graphs, self.info, self._output)
        other._length = self._length
        other._state = self._graphs[0].function.copy_state(self._state)
        return other

    def score(self, ids: Sequence[int]) -> Floats:
        """Logits float32 [S, V] at every position of a text of its own.

        A file that has the last position's only is run token by token.

        Raises:
            UsageError: as `prefill`.
        """
        tokens = check_tokens(ids, 0, self.info)
        other = CoreMLDecoderSession(self._graphs, self.info, self._output)
        if self.info.scores == "last":
            return np.stack([other.step(int(token)) for token in tokens])
        return other._append(tokens)

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._graphs, self._state

    def _append(self, tokens: Ids) -> Floats:
        """Logits of the last token [1, V], or of all [n, V] where the file has them."""
        found, start = [], 0
        whole = self.info.scores == "all"
        while start < len(tokens):
            rest = len(tokens) - start
            # Where a call has the last position's logits only, the last token is a call of its own.
            wanted = rest if whole or rest == 1 else rest - 1
            graph = next((g for g in self._graphs if g.size >= wanted), self._graphs[-1])
            count = min(graph.size, wanted)
            part = tokens[start : start + count]
            logits = graph.run(part, self._length, self._state, self._output)
            self._length += count
            start += count
            if whole or start == len(tokens):
                found.append(logits[:count])
        return np.concatenate(found)
