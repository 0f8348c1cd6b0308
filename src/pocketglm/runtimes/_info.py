"""What a session says of an export's model: the same in every runtime. Torch-free."""

from __future__ import annotations

from pathlib import Path

from pocketglm.artifacts.export import ExportManifest
from pocketglm.contracts import RunOptions, SessionInfo
from pocketglm.errors import CheckpointError
from pocketglm.runtimes._text import context_of


def encoder_info(manifest: ExportManifest, threads: int) -> SessionInfo:
    """Of an encoder's export."""
    return SessionInfo(
        runtime=manifest.runtime,
        output=manifest.output,
        labels=tuple(manifest.labels),
        max_length=manifest.max_length,
        pooling=manifest.pooling,
        activation=manifest.activation,
        threads=threads,
        vocab_size=manifest.vocab_size,
    )


def decoder_info(
    path: Path,
    manifest: ExportManifest,
    threads: int,
    options: RunOptions,
) -> SessionInfo:
    """Of the decoder's export at `path`.

    Raises:
        CheckpointError: the manifest does not say which logits it computes.
        UsageError: a context that is longer than the file's.
    """
    if manifest.logits is None:
        raise CheckpointError(
            f"{path}: its export.json does not say which logits the decoder computes",
            "export the checkpoint again",
        )
    return SessionInfo(
        runtime=manifest.runtime,
        output="logits",
        kind="decoder",
        max_length=context_of(manifest.max_length, options.context, path),
        activation=manifest.activation,
        threads=threads,
        vocab_size=manifest.vocab_size,
        bos_id=manifest.bos_id,
        eos_ids=tuple(manifest.eos_ids),
        scores=manifest.logits,
    )
