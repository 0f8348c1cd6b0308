"""Opens an ONNX decoder export with onnxruntime-genai, as the apps that embed it do. Torch-free.

The folder's genai_config.json says what the model is. Its thread count is kept unless the caller
has another; where it has none, all usable cores are taken: genai's own default is half of them.
The cache is one buffer of the whole context, taken when a session opens or forks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.artifacts.checkpoint import read_json
from pocketglm.artifacts.export import ExportManifest, read_export
from pocketglm.contracts import Floats, Ids, RunOptions, Runtime, SessionInfo
from pocketglm.errors import CheckpointError, UsageError, require
from pocketglm.runtimes._cores import usable_cores
from pocketglm.runtimes._text import Text, check_tokens, context_of

CONFIG = "genai_config.json"


class GenaiSession(Text):
    """An open decoder with one text; forks share the weights."""

    def __init__(self, model: Any, info: SessionInfo) -> None:
        self._model, self.info = model, info
        self._ids: list[int] = []
        self._generator = self._new_generator(info.max_length)

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return len(self._ids)

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Append one or more tokens; the logits after the last one, float32 [V].

        Raises:
            UsageError: no token, one outside the vocabulary, or more than the cache can hold.
        """
        tokens = check_tokens(ids, self.length, self.info)
        if self._generator.token_count() != self.length:  # Ctrl-C came within the last call
            self._generator.rewind_to(self.length)
        logits = _append(self._generator, tokens)
        self._ids += tokens.tolist()
        return logits

    def _forget(self, count: int) -> None:
        if count:
            del self._ids[-count:]
            self._generator.rewind_to(self.length)

    def fork(self) -> GenaiSession:
        """A session with a copy of the text so far; it shares the weights.

        genai cannot copy a cache: the copy reads the text again, at the cost of a prefill.
        """
        other = GenaiSession(self._model, self.info)
        if self._ids:
            other.prefill(self._ids)
        return other

    def score(self, ids: Sequence[int]) -> Floats:
        """Logits float32 [S, V] at every position of a text of its own.

        A file that has the last position's only is run token by token.

        Raises:
            UsageError: as `prefill`.
        """
        tokens = check_tokens(ids, 0, self.info)
        generator = self._new_generator(len(tokens))
        if self.info.scores == "last":
            return np.stack([_append(generator, tokens[i : i + 1]) for i in range(len(tokens))])
        _append(generator, tokens)
        logits: Floats = generator.get_output("logits")[0]
        return logits

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._generator, self._model, self._ids

    def _new_generator(self, tokens: int) -> Any:
        og = require("onnxruntime_genai", extra="genai")
        settings = og.GeneratorParams(self._model)
        # Logits as the file computes them: choosing is generate.py's.
        settings.set_search_options(max_length=tokens, min_length=0, repetition_penalty=1.0)
        return og.Generator(self._model, settings)


def _append(generator: Any, tokens: Ids) -> Floats:
    generator.append_tokens(tokens.astype(np.int32))
    logits: Floats = generator.get_logits()
    last: Floats = logits.reshape(-1, logits.shape[-1])[-1]
    return last


def open_export(path: Path, options: RunOptions) -> GenaiSession:
    """Open a decoder's export folder.

    Raises:
        MissingExtraError: onnxruntime-genai is not installed.
        UsageError: no decoder's ONNX export, or a context that is longer than its own.
        CheckpointError: genai_config.json or a model file is missing or broken.
    """
    og = require("onnxruntime_genai", extra="genai")
    manifest = read_export(path)
    if manifest.kind != "decoder" or not (path / CONFIG).is_file():
        raise UsageError(
            f"{path} is no ONNX export of a decoder: onnxruntime-genai needs its {CONFIG}",
            "open it without --runtime, or export a decoder with --target onnx",
        )
    info = _info(path, manifest, options)
    session_options = {
        "intra_op_num_threads": info.threads,
        **({"session.intra_op.allow_spinning": "1"} if options.spinning else {}),
        **({} if options.optimize else {"graph_optimization_level": "ORT_DISABLE_ALL"}),
    }
    overlay = {"model": {"decoder": {"session_options": session_options}}}
    try:
        config = og.Config(str(path))
        config.overlay(json.dumps(overlay))
        return GenaiSession(og.Model(config), info)
    except RuntimeError as error:  # the only one it raises
        raise CheckpointError(
            f"onnxruntime-genai {og.__version__} cannot open {path}: {error}",
            "copy the folder again, or export the checkpoint again",
        ) from error


def _info(path: Path, manifest: ExportManifest, options: RunOptions) -> SessionInfo:
    decoder = read_json(path / CONFIG).get("model", {}).get("decoder", {})
    stated = decoder.get("session_options", {}).get("intra_op_num_threads")
    return SessionInfo(
        runtime="genai",
        output="logits",
        kind="decoder",
        max_length=context_of(manifest.max_length, options.context, path),
        activation=manifest.activation,
        threads=options.threads or stated or usable_cores(),
        vocab_size=manifest.vocab_size,
        bos_id=manifest.bos_id,
        eos_ids=tuple(manifest.eos_ids),
        scores=manifest.logits or "last",
    )


SPEC = Runtime(
    summary="onnxruntime-genai on the CPU, for decoders exported to ONNX",
    open=open_export,
    delegate="graph optimizer",
)
