"""An open ONNX decoder of an export folder, in plain ONNX Runtime. Torch-free.

The cache is one buffer per layer and part that a call reads and writes in place (bound as `past`
and as `present`), so a step copies nothing. Buffers begin small and double, up to the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from pocketglm.artifacts.export import ExportManifest
from pocketglm.contracts import Floats, Ids, RunOptions, SessionInfo
from pocketglm.runtimes._info import decoder_info
from pocketglm.runtimes._text import CachedText, check_tokens

_FIRST = 256  # tokens that the buffers begin with

Cache = npt.NDArray[np.float32] | npt.NDArray[np.int8]


class OnnxDecoderSession(CachedText):
    """An open decoder with one text; forks share the weights."""

    def __init__(self, session: ort.InferenceSession, info: SessionInfo) -> None:
        self._session, self.info = session, info
        self._names = [port.name for port in session.get_inputs()[2:]]
        first = session.get_inputs()[2]
        self._heads, self._head_dim = first.shape[1], first.shape[3]
        self._int8 = first.type == "tensor(int8)"
        self._bind([self._empty(min(_FIRST, info.max_length)) for _ in self._names])

    @classmethod
    def open(
        cls,
        session: ort.InferenceSession,
        path: Path,
        manifest: ExportManifest,
        options: RunOptions,
    ) -> OnnxDecoderSession:
        """Take an open model file into use.

        Raises:
            UsageError: a context that is longer than the file's.
            CheckpointError: the manifest is not a decoder's.
        """
        threads = session.get_session_options().intra_op_num_threads
        info = decoder_info(path, manifest, threads, options)
        return cls(session, info)

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Append one or more tokens; the logits after the last one, float32 [V].

        Raises:
            UsageError: no token, one outside the vocabulary, or more than the cache can hold.
        """
        tokens = check_tokens(ids, self._length, self.info)
        end = self._length + len(tokens)
        self._reserve(end)
        mask = np.ones((1, end), np.int64)
        self._binding.bind_cpu_input("input_ids", tokens[None])
        self._binding.bind_cpu_input("attention_mask", mask)
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        self._length = end
        logits: Floats = self._binding.get_outputs()[0].numpy()[0, -1]
        return logits

    def fork(self) -> OnnxDecoderSession:
        """A session with a copy of the text so far; it shares the weights."""
        other = OnnxDecoderSession(self._session, self.info)
        other._length = self._length
        other._bind([buffer.copy() for buffer in self._buffers])
        return other

    def score(self, ids: Sequence[int]) -> Floats:
        """Logits float32 [S, V] at every position of a text of its own.

        A file that has the last position's only is run token by token.

        Raises:
            UsageError: as `prefill`.
        """
        tokens = check_tokens(ids, 0, self.info)
        if self.info.scores == "last":
            other = OnnxDecoderSession(self._session, self.info)
            return np.stack([other.step(int(token)) for token in tokens])
        room = self._empty(len(tokens))  # top-k attention writes into it
        feeds: dict[str, Ids | Cache] = dict.fromkeys(self._names, room)
        feeds |= {"input_ids": tokens[None], "attention_mask": np.ones((1, len(tokens)), np.int64)}
        logits: Floats = self._session.run(["logits"], feeds)[0][0]
        return logits

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._session, self._binding, self._buffers

    # --- the cache -------------------------------------------------------------------------------

    def _empty(self, tokens: int) -> Cache:
        shape = (1, self._heads, tokens, self._head_dim)
        return np.zeros(shape, np.int8) if self._int8 else np.zeros(shape, np.float32)

    def _reserve(self, tokens: int) -> None:
        size = self._buffers[0].shape[2]
        if tokens <= size:
            return
        size = min(max(2 * size, tokens), self.info.max_length)
        buffers = []
        for old in self._buffers:
            new = self._empty(size)
            new[:, :, : self._length] = old[:, :, : self._length]
            buffers.append(new)
        self._bind(buffers)

    def _bind(self, buffers: list[Cache]) -> None:
        """Use `buffers`, in the order of the model's inputs, as past and present."""
        self._buffers = buffers
        self._binding = self._session.io_binding()
        self._binding.bind_output("logits")  # the first of the outputs
        for name, buffer in zip(self._names, buffers, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(buffer)  # over the array's own memory
            self._binding.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values", "present")
            self._binding.bind_ortvalue_output(present, value)
