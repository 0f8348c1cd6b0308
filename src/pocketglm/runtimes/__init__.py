"""L1: one file per runtime; each opens a folder as a Session. Torch-free, except `torch.py`."""

from __future__ import annotations

from pathlib import Path

from pocketglm import registry
from pocketglm.artifacts.checkpoint import model_folder
from pocketglm.artifacts.export import is_export, read_export
from pocketglm.contracts import EncoderSession, RunOptions, Runtime

_DEFAULTS = RunOptions()


def open_session(path: Path, options: RunOptions = _DEFAULTS) -> EncoderSession:
    """Open an export in its own runtime, or a checkpoint in PyTorch.

    Raises:
        UsageError: no such folder.
        CheckpointError: neither an export nor a checkpoint that can be used.
        MissingExtraError: the runtime's package is not installed.
    """
    folder = model_folder(path)
    name = read_export(folder).runtime if is_export(folder) else "torch"
    runtime: Runtime = registry.load("runtimes", name)
    return runtime.open(folder, options)
