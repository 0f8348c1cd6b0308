"""An open LiteRT decoder of an export folder. Torch-free.

The file has graphs for prompts of some lengths and one for a single token (see export.json). A
prompt goes through the longest graphs that it fills, its rest through the shortest that holds it,
padded behind. The cache is one set of LiteRT's own buffers, which every graph reads and writes in
place: the interpreter's signatures would copy it in and out at each token (6.0 ms instead of 0.9
for 10 layers and 1151 slots).
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.artifacts.export import ExportManifest
from pocketglm.contracts import Floats, Ids, RunOptions, SessionInfo
from pocketglm.errors import CheckpointError, require
from pocketglm.runtimes._info import decoder_info
from pocketglm.runtimes._quiet import silence
from pocketglm.runtimes._text import CachedText, check_tokens

_DECODE = "decode"


class LitertDecoderSession(CachedText):
    """An open decoder with one text; forks share the weights."""

    def __init__(self, model: Any, info: SessionInfo) -> None:
        self._model, self.info = model, info
        details = model.get_input_tensor_details(_DECODE)
        self._shapes = {n: tuple(d["shape"]) for n, d in details.items() if n[:2] == "kv"}
        self._cache = {n: model.create_input_buffer_by_name(_DECODE, n) for n in self._shapes}
        for name, shape in self._shapes.items():
            self._cache[name].write(np.zeros(shape, np.float32))
        self._graphs = {
            _size(name): _Graph(model, name, self._cache, ports["outputs"])
            for name, ports in model.get_signature_list().items()
        }
        self._sizes = sorted(size for size in self._graphs if size)

    @classmethod
    def open(
        cls, file: Path, manifest: ExportManifest, threads: int, options: RunOptions
    ) -> LitertDecoderSession:
        """Open a model file.

        Raises:
            UsageError: a context that is longer than the file's.
            CheckpointError: the manifest is not a decoder's, or LiteRT cannot open the file.
        """
        info = decoder_info(file.parent, manifest, threads, options)
        with silence():
            return cls(_compiled(file, threads, optimize=options.optimize), info)

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Append one or more tokens; the logits after the last one, float32 [V].

        Raises:
            UsageError: no token, one outside the vocabulary, or more than the cache can hold.
        """
        last: Floats = self._append(check_tokens(ids, self._length, self.info))[-1]
        return last

    def fork(self) -> LitertDecoderSession:
        """A session with a copy of the text so far; it shares the weights."""
        other = LitertDecoderSession(self._model, self.info)
        other._length = self._length
        for name, shape in self._shapes.items():
            values = self._cache[name].read(int(np.prod(shape)), np.float32)
            other._cache[name].write(values.reshape(shape))
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
        del self._graphs, self._cache, self._model

    def _append(self, tokens: Ids) -> Floats:
        """Logits of the last token [1, V], or of all [n, V] where the file has them."""
        found, start = [], 0
        whole = self.info.scores == "all"
        prompt = len(tokens) if whole and len(tokens) > 1 else len(tokens) - 1
        while start < prompt:
            rest = prompt - start
            size = next((n for n in self._sizes if n >= rest), self._sizes[-1])
            count = min(size, rest)
            logits = self._call(size, tokens[start : start + count])
            if whole:
                found.append(logits[:count])
            start += count
        if start < len(tokens):
            found.append(self._call(0, tokens[start:]))
        return np.concatenate(found)

    def _call(self, size: int, tokens: Ids) -> Floats:
        """The logits that one graph has, [n, V]."""
        logits = self._graphs[size].run(self._model, tokens, self._length)
        self._length += len(tokens)
        return logits.reshape(-1, self.info.vocab_size)


class _Graph:
    """One graph and its buffers."""

    def __init__(
        self, model: Any, name: str, cache: dict[str, Any], outputs: Sequence[str]
    ) -> None:
        self.name = name
        self.tokens = int(model.get_input_tensor_details(name)["tokens"]["shape"][1])
        self.inputs = dict(cache)
        for key in ("tokens", "input_pos"):
            self.inputs[key] = model.create_input_buffer_by_name(name, key)
        self.outputs, self.size = dict(cache), 0
        if "logits" in outputs:
            self.outputs["logits"] = model.create_output_buffer_by_name(name, "logits")
            self.size = int(np.prod(model.get_output_tensor_details(name)["logits"]["shape"]))

    def run(self, model: Any, tokens: Ids, start: int) -> Floats:
        """Take `tokens` into the cache from position `start`; all logits, flat."""
        padded = np.zeros((1, self.tokens), np.int32)
        padded[0, : len(tokens)] = tokens
        self.inputs["tokens"].write(padded)
        positions = np.arange(start, start + self.tokens, dtype=np.int32)
        self.inputs["input_pos"].write(positions)
        model.run_by_name(self.name, self.inputs, self.outputs)
        if not self.size:
            return np.empty(0, np.float32)
        logits: Floats = self.outputs["logits"].read(self.size, np.float32)
        return logits


def _size(name: str) -> int:
    """Tokens of a prompt's graph; 0: it is the one for single tokens."""
    return 0 if name == _DECODE else int(name.rpartition("_")[2])


def _compiled(file: Path, threads: int, *, optimize: bool) -> Any:
    """The open file; without XNNPACK if not `optimize`."""
    compiled = require("ai_edge_litert.compiled_model", extra="litert")
    cpu = compiled.CpuOptions(
        num_threads=threads, kernel_mode=None if optimize else compiled.CpuKernelMode.BUILTIN
    )
    try:
        return compiled.CompiledModel.from_file(
            str(file),
            environment=_environment(compiled),
            options=compiled.Options(cpu_options=cpu),
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"LiteRT cannot open {file}: {error}",
            "copy the folder again, or export the checkpoint again",
        ) from error


@functools.cache
def _environment(compiled: Any) -> Any:
    """LiteRT's for the process, of the CPU alone: it looks for no library of an accelerator."""
    nowhere = str(Path(compiled.__file__).parent / "none")
    options = compiled.EnvironmentOptions(
        runtime_path=nowhere, compiler_plugin_path=nowhere, dispatch_library_path=nowhere
    )
    atexit.register(_mute)
    return compiled.Environment.create(options=options)


def _mute() -> None:
    """When the process ends, LiteRT names what it lets go; Python has nothing left to say then."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
