"""llama.cpp's C interface as llama-cpp-python gives it, with numpy around it. Torch-free.

Keys and values stay float32 and flash attention is off: with llama.cpp's defaults (half precision)
the logits of small float32 models differed from PyTorch's by 4e-3, so by 4e-6.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketglm.contracts import Floats
from pocketglm.errors import CheckpointError, WorkError, require

_F32 = 0  # ggml's number of the type
_OFF = 0  # of flash attention
_KEPT: list[Any] = []


@cache
def library() -> Any:
    """llama-cpp-python, silenced.

    Raises:
        MissingExtraError: it is not installed.
    """
    api = require("llama_cpp", extra="llama")
    quiet = api.llama_log_callback(lambda level, text, data: None)
    _KEPT.append(quiet)  # C calls it as long as the process lives
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


class Model:
    """An open file; contexts share its weights.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        CheckpointError: llama.cpp cannot open the file.
    """

    def __init__(self, file: Path) -> None:
        self.api = library()
        self.file = file
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0
        self.handle = self.api.llama_model_load_from_file(str(file).encode(), params)
        if not self.handle:
            raise CheckpointError(
                f"llama.cpp cannot open {file}",
                "copy the folder again, or export the checkpoint again; a new architecture needs a "
                "new llama-cpp-python",
            )
        self.vocab = self.api.llama_model_get_vocab(self.handle)

    def tokenize(self, text: str) -> list[int]:
        """The text's tokens as llama.cpp finds them, with the special ones before and behind."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self.api.llama_tokenize(self.vocab, data, len(data), room, len(room), True, True)
        if count < 0:
            raise WorkError(f"llama.cpp makes {-count} tokens of {len(data)} bytes", "shorten it")
        return list(room[:count])

    def close(self) -> None:
        """Free the weights; nothing that uses them may be used afterwards."""
        if self.handle:
            self.api.llama_model_free(self.handle)
            self.handle = None


class Context:
    """One text in a cache of `size` tokens, or of an encoder one text at a time."""

    def __init__(self, model: Model, size: int, threads: int, *, encoder: bool = False) -> None:
        self.model, self.api = model, model.api
        params = self.api.llama_context_default_params()
        params.n_ctx = size
        self.batch_size = size if encoder else min(size, 512)
        params.n_batch = params.n_ubatch = self.batch_size
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = _F32
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = _OFF
        else:  # before October 2025
            params.flash_attn = False
        params.embeddings = encoder
        self.handle = self.api.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise WorkError(
                f"llama.cpp cannot take {size} tokens of context for {model.file}",
                "ask for less with --context",
            )
        self._batch = self.api.llama_batch_init(self.batch_size, 0, 1)

    def logits(self, tokens: npt.NDArray[np.int64], start: int, *, every: bool) -> Floats:
        """Take tokens into the text after its first `start`; logits [S, V], or the last one's."""
        width = int(self.api.llama_vocab_n_tokens(self.model.vocab))
        found = []
        for first in range(0, len(tokens), self.batch_size):
            part = tokens[first : first + self.batch_size]
            self._run(part, start + first, every=every)
            last = len(part) - 1
            for index in range(0 if every else last, last + 1):
                pointer = self.api.llama_get_logits_ith(self.handle, index)
                found.append(np.ctypeslib.as_array(pointer, shape=(width,)).copy())
        return np.stack(found) if every else found[-1][None]

    def pooled(self, tokens: npt.NDArray[np.int64], width: int) -> Floats:
        """An encoder's output [width] for one text."""
        self._run(tokens, 0, every=True)
        pointer = self.api.llama_get_embeddings_seq(self.handle, 0)
        values: Floats = np.ctypeslib.as_array(pointer, shape=(width,)).copy()
        return values

    def forget(self, start: int) -> None:
        """Drop everything from token `start` on."""
        memory = self.api.llama_get_memory(self.handle)
        self.api.llama_memory_seq_rm(memory, 0, start, -1)

    def close(self) -> None:
        """Free the cache."""
        if self.handle:
            self.api.llama_batch_free(self._batch)
            self.api.llama_free(self.handle)
            self.handle = None

    def _run(self, tokens: npt.NDArray[np.int64], start: int, *, every: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens.tolist()):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every or index == len(tokens) - 1
        code = self.api.llama_decode(self.handle, batch)
        if code:
            raise WorkError(
                f"llama.cpp ends with code {code} at {len(tokens)} tokens of {self.model.file}",
                "open it with a larger --context, or with fewer threads",
            )
