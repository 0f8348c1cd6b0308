"""Opens a Core ML export (.mlpackage): in Core ML on a Mac, elsewhere in the reference evaluator.

The evaluator computes what the saved program says; how fast it is says nothing about Core ML.
`RunOptions.optimize` is fp16 there: on, each result is rounded to the type that the program
declares, as on a phone; off, all is float32. Torch-free.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pocketglm.artifacts.export import ExportManifest, read_export
from pocketglm.contracts import Floats, Ids, RunOptions, Runtime, Session, SessionInfo
from pocketglm.errors import CheckpointError
from pocketglm.runtimes._coreml_check import check_program
from pocketglm.runtimes._coreml_decoder import CoreMLDecoderSession
from pocketglm.runtimes._coreml_file import Package, read_package
from pocketglm.runtimes._coreml_program import OpenFunction, open_function, runs_here
from pocketglm.runtimes._info import decoder_info, encoder_info
from pocketglm.runtimes._sizes import check_sizes
from pocketglm.runtimes._text import check_rows, row_length


class CoreMLSession:
    """An open encoder. Rows run one by one, padded to a length that the program takes."""

    def __init__(self, function: OpenFunction, info: SessionInfo) -> None:
        self._function, self.info = function, info
        self._ids, self._mask = (
            next(name for name in function.inputs if name.endswith(end))
            for end in ("input_ids", "attention_mask")
        )

    def logits(self, ids: Ids, mask: Ids) -> Floats:
        """ids [B, S], mask [B, S] of 0/1 -> float32 [B, C].

        Raises:
            UsageError: an id is outside the vocabulary, or a row is longer than the positions.
        """
        check_rows(ids, self.info)
        return np.concatenate([self._row(row, keep) for row, keep in zip(ids, mask, strict=True)])

    def _row(self, ids: Ids, mask: Ids) -> Floats:
        length = row_length(mask)
        width = self._width(length)
        inputs = {name: np.zeros((1, width), np.int32) for name in (self._ids, self._mask)}
        inputs[self._ids][0, :length] = ids[:length]
        inputs[self._mask][0, :length] = mask[:length]
        result = self._function.run(inputs)[self.info.output]
        return np.asarray(result, np.float32).reshape(1, -1)

    def _width(self, length: int) -> int:
        """Tokens that a row of `length` is padded to: as few as the program takes."""
        port = self._function.inputs[self._ids]
        fixed = port.type.shape[1]
        listed = sorted(shape[1] for shape in port.shapes if shape[1] >= length)
        if fixed is not None or listed:
            return fixed if fixed is not None else listed[0]
        return max(length, port.ranges[1][0]) if port.ranges else length

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        del self._function


def open_export(path: Path, options: RunOptions) -> Session:
    """Open an export folder.

    Raises:
        MissingExtraError: on a Mac, coremltools is not installed.
        CheckpointError: the package is missing, changed or damaged, or its program is wrong.
        UnsupportedError: the evaluator does not know an operation of it.
        UsageError: a context that is longer than a decoder's file allows.
    """
    manifest = read_export(path)
    check_sizes(path, manifest)
    package = read_package(path / manifest.model_file)
    if problems := check_program(package):
        raise CheckpointError(
            f"{package.path}: {problems[0]}",
            "the converter wrote a wrong program: export the checkpoint again",
        )
    if manifest.kind == "decoder":
        return _open_decoder(path, package, manifest, options)
    info = encoder_info(manifest, options.threads or 0)
    function = open_function(package, package.default, half=options.optimize)
    _check_encoder(path, function, manifest)
    return CoreMLSession(function, info)


def _check_encoder(path: Path, function: OpenFunction, manifest: ExportManifest) -> None:
    for end in ("input_ids", "attention_mask"):
        if not any(name.endswith(end) for name in function.inputs):
            raise CheckpointError(f"{path} has no input {end}", "export the checkpoint again")
    if manifest.output not in function.outputs:
        raise CheckpointError(
            f"{path} has no output {manifest.output}", "export the checkpoint again"
        )


def _open_decoder(
    path: Path, package: Package, manifest: ExportManifest, options: RunOptions
) -> CoreMLDecoderSession:
    info = decoder_info(path, manifest, options.threads or 0, options)
    functions = {
        name: open_function(package, name, half=options.optimize) for name in package.functions
    }
    return CoreMLDecoderSession.open(functions, manifest, info, path)


SPEC = Runtime(
    summary="Core ML on a Mac; elsewhere a reference evaluator of the same package",
    open=open_export,
    delegate="" if runs_here() else "fp16",
    emulated=not runs_here(),
)
