"""Opens an ONNX export with ONNX Runtime on the CPU. Torch-free.

Threads do not spin by default: two spinning threads are the slowest choice on a busy machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from pocketglm.artifacts.export import ExportManifest, read_export
from pocketglm.contracts import Floats, Ids, RunOptions, Runtime, Session
from pocketglm.errors import CheckpointError
from pocketglm.runtimes._cores import usable_cores
from pocketglm.runtimes._info import encoder_info
from pocketglm.runtimes._onnx_decoder import OnnxDecoderSession
from pocketglm.runtimes._sizes import check_sizes
from pocketglm.runtimes._text import check_rows


class OnnxSession:
    """An open encoder of an export folder."""

    def __init__(self, session: ort.InferenceSession, manifest: ExportManifest) -> None:
        self._session = session
        self._names = [port.name for port in self._session.get_inputs()]
        threads = self._session.get_session_options().intra_op_num_threads
        self.info = encoder_info(manifest, threads)

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """ids [B, S], mask [B, S] of 0/1 -> float32 [B, C].

        Raises:
            UsageError: an id is outside the vocabulary, or a row is longer than the positions.
        """
        check_rows(ids, self.info)
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        wanted = {name: feeds[name].astype(np.int64, copy=False) for name in self._names}
        result: Floats = self._session.run([self.info.output], wanted)[0]
        return result

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._session


def _open(path: Path, manifest: ExportManifest, options: RunOptions) -> ort.InferenceSession:
    file = path / manifest.model_file
    check_sizes(path, manifest)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads or manifest.threads or usable_cores()
    settings.inter_op_num_threads = 1
    settings.add_session_config_entry(
        "session.intra_op.allow_spinning", "1" if options.spinning else "0"
    )
    settings.log_severity_level = 3  # errors only: warnings are about graph clean-up
    level = ort.GraphOptimizationLevel
    settings.graph_optimization_level = (
        level.ORT_ENABLE_ALL if options.optimize else level.ORT_DISABLE_ALL
    )
    try:
        return ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception classes have no common base
        wanted = manifest.minimum.get("onnxruntime", ort.__version__)
        raise CheckpointError(
            f"ONNX Runtime {ort.__version__} cannot open {file}: {error}",
            f"export it again, or pip install 'onnxruntime>={wanted}'",
        ) from error


def open_export(path: Path, options: RunOptions) -> Session:
    """Open an export folder.

    Raises:
        CheckpointError: the model file or its data is missing, changed or corrupt.
        UsageError: a context that is longer than a decoder's file allows.
    """
    manifest = read_export(path)
    session = _open(path, manifest, options)
    if manifest.kind == "decoder":
        return OnnxDecoderSession.open(session, path, manifest, options)
    return OnnxSession(session, manifest)


SPEC = Runtime(summary="ONNX Runtime on the CPU", open=open_export, delegate="graph optimizer")
