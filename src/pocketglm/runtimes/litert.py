"""Opens a LiteRT export (.tflite) on the CPU, with XNNPACK. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.artifacts.export import read_export
from pocketglm.contracts import Floats, Ids, RunOptions, Runtime, Session, SessionInfo
from pocketglm.errors import CheckpointError, require
from pocketglm.runtimes._cores import usable_cores
from pocketglm.runtimes._info import encoder_info
from pocketglm.runtimes._litert_decoder import LitertDecoderSession
from pocketglm.runtimes._quiet import silence
from pocketglm.runtimes._sizes import check_sizes
from pocketglm.runtimes._text import check_rows, row_length


class LitertSession:
    """An open encoder. Rows run one by one, each as long as its text is."""

    def __init__(self, model: Any, info: SessionInfo) -> None:
        self._model, self.info = model, info
        inputs = {entry["name"]: entry["index"] for entry in model.get_input_details()}
        self._ids, self._mask = (
            next(index for name, index in inputs.items() if name.endswith(end))
            for end in ("input_ids", "attention_mask")
        )
        self._output = model.get_output_details()[0]["index"]
        self._length = 0

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """ids [B, S], mask [B, S] of 0/1 -> float32 [B, C].

        Raises:
            UsageError: an id is outside the vocabulary, or a row is longer than the positions.
        """
        check_rows(ids, self.info)
        return np.concatenate([self._row(row, keep) for row, keep in zip(ids, mask, strict=True)])

    def _row(self, ids: Ids, mask: Ids) -> Floats:
        length = row_length(mask)
        if length != self._length:
            for index in (self._ids, self._mask):
                self._model.resize_tensor_input(index, [1, length])
            self._model.allocate_tensors()
            self._length = length
        self._model.set_tensor(self._ids, ids[None, :length].astype(np.int32))
        self._model.set_tensor(self._mask, mask[None, :length].astype(np.int32))
        self._model.invoke()
        result: Floats = self._model.get_tensor(self._output)
        return result

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._model


def _interpreter(file: Path, threads: int, *, optimize: bool) -> Any:
    """The open file; without XNNPACK if not `optimize`."""
    litert = require("ai_edge_litert.interpreter", extra="litert")
    kinds = litert.OpResolverType
    resolver = kinds.AUTO if optimize else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        with silence():
            model = litert.Interpreter(
                model_path=str(file), num_threads=threads, experimental_op_resolver_type=resolver
            )
            model.allocate_tensors()
        return model
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"LiteRT cannot open {file}: {error}",
            "copy the folder again, or export the checkpoint again",
        ) from error


def open_export(path: Path, options: RunOptions) -> Session:
    """Open an export folder.

    Raises:
        MissingExtraError: ai-edge-litert is not installed.
        CheckpointError: the model file is missing, changed or corrupt.
        UsageError: a context that is longer than a decoder's file allows.
    """
    manifest = read_export(path)
    file = path / manifest.model_file
    check_sizes(path, manifest)
    threads = options.threads or manifest.threads or usable_cores()
    if manifest.kind == "decoder":
        return LitertDecoderSession.open(file, manifest, threads, options)
    model = _interpreter(file, threads, optimize=options.optimize)
    info = encoder_info(manifest, threads)
    return LitertSession(model, info)


SPEC = Runtime(summary="LiteRT on the CPU", open=open_export, delegate="XNNPACK")
