"""L1: one file per runtime; each opens a folder as a Session. Torch-free, except `torch.py`."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from pocketglm import registry
from pocketglm.artifacts.checkpoint import model_folder
from pocketglm.artifacts.export import is_export, read_export
from pocketglm.contracts import DecoderSession, EncoderSession, RunOptions, Runtime, Session
from pocketglm.errors import UsageError

_DEFAULTS = RunOptions()


def open_session(
    path: Path, options: RunOptions = _DEFAULTS, runtime: str | None = None
) -> Session:
    """Open an export in its own runtime, or a checkpoint in PyTorch.

    runtime: another one that reads the same files, such as `genai` for an ONNX decoder.

    Raises:
        UsageError: no such folder, or no such runtime.
        CheckpointError: neither an export nor a checkpoint that can be used.
        MissingExtraError: the runtime's package is not installed.
    """
    return runtime_of(path, runtime).open(model_folder(path), options)


def runtime_of(path: Path, name: str | None = None) -> Runtime:
    """What opens the folder; name: that one. Raises as `open_session`."""
    folder = model_folder(path)
    name = name or (read_export(folder).runtime if is_export(folder) else "torch")
    spec: Runtime = registry.load("runtimes", name)
    return spec


def open_encoder(path: Path, options: RunOptions = _DEFAULTS) -> EncoderSession:
    """`open_session` for a model that must be an encoder.

    Raises:
        UsageError: it is a decoder; and as `open_session`.
    """
    session = open_session(path, options)
    if session.info.kind != "encoder":
        session.close()
        raise UsageError(
            f"{path} is a decoder: it writes text and has no labels or embedding",
            "try it with: pocketglm run PATH; score it with: eval --task lm, or --task command",
        )
    return cast(EncoderSession, session)


def open_decoder(
    path: Path, options: RunOptions = _DEFAULTS, runtime: str | None = None
) -> DecoderSession:
    """`open_session` for a model that must be a decoder.

    Raises:
        UsageError: it is an encoder; and as `open_session`.
    """
    session = open_session(path, options, runtime)
    if session.info.kind != "decoder":
        session.close()
        raise UsageError(
            f"{path} is an encoder: it labels or embeds texts and cannot write one",
            "use a decoder (GLM, Llama, Qwen)",
        )
    return cast(DecoderSession, session)
