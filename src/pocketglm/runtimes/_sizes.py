"""What every runtime looks at before it opens an export: are its files whole?"""

from __future__ import annotations

from pathlib import Path

from pocketglm.artifacts.export import ExportManifest
from pocketglm.errors import CheckpointError


def check_sizes(path: Path, manifest: ExportManifest) -> None:
    """The model file and its external data, by size: hashing them would take longer than opening.

    Raises:
        CheckpointError: a file is missing or has another size than it was exported with.
    """
    names = {name for name in manifest.files if name.startswith(manifest.model_file)}
    if not any(name.startswith(f"{manifest.model_file}/") for name in names):  # it is no folder
        names.add(manifest.model_file)
    for name in sorted(names):
        file, entry = path / name, manifest.files.get(name)
        if not file.is_file():
            raise CheckpointError(f"{file} is missing", "export the checkpoint again")
        if entry and file.stat().st_size != entry.bytes:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes, it was exported with {entry.bytes}",
                "copy the folder again, or export the checkpoint again",
            )
