"""Opens an ExecuTorch export (.pte) on the CPU, with XNNPACK.

ExecuTorch's Python interface takes and gives PyTorch tensors, so PyTorch is loaded with it; nothing
here computes with it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pocketglm.artifacts.export import read_export
from pocketglm.contracts import Floats, Ids, RunOptions, Runtime, Session, SessionInfo
from pocketglm.runtimes._cores import usable_cores
from pocketglm.runtimes._executorch_decoder import ExecutorchDecoderSession
from pocketglm.runtimes._executorch_method import Method, packages
from pocketglm.runtimes._info import encoder_info
from pocketglm.runtimes._sizes import check_sizes
from pocketglm.runtimes._text import check_rows, row_length


class ExecutorchSession:
    """An open encoder. Rows run one by one, each as long as its text is."""

    def __init__(self, method: Method, info: SessionInfo) -> None:
        self._method, self.info = method, info

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """ids [B, S], mask [B, S] of 0/1 -> float32 [B, C].

        Raises:
            UsageError: an id is outside the vocabulary, or a row is longer than the positions.
        """
        check_rows(ids, self.info)
        return np.concatenate([self._row(row, keep) for row, keep in zip(ids, mask, strict=True)])

    def _row(self, ids: Ids, mask: Ids) -> Floats:
        length = row_length(mask)
        return self._method(ids[None, :length], mask[None, :length])

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._method


def open_export(path: Path, options: RunOptions) -> Session:
    """Open an export folder. `optimize` changes nothing: what ExecuTorch does to a graph, it has
    done when the file was written.

    Raises:
        MissingExtraError: executorch is not installed.
        CheckpointError: the model file is missing, changed or corrupt.
        UsageError: a context that is longer than a decoder's file allows.
    """
    manifest = read_export(path)
    check_sizes(path, manifest)
    threads = options.threads or manifest.threads or usable_cores()
    file = path / manifest.model_file
    if manifest.kind == "decoder":
        return ExecutorchDecoderSession.open(file, manifest, threads, options)
    info = encoder_info(manifest, threads)
    return ExecutorchSession(Method(file, threads), info)


SPEC = Runtime(
    summary="ExecuTorch on the CPU",
    open=open_export,
    prepare=packages,
    extra_memory="PyTorch, which ExecuTorch's Python interface needs and an app does not",
)
