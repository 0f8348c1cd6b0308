"""One of the two exports that a proof compares: what it is, and where its bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketglm.artifacts.checkpoint import model_folder
from pocketglm.artifacts.export import ExportManifest, check_files, read_export
from pocketglm.artifacts.manifest import digest_value
from pocketglm.contracts import Metric
from pocketglm.runtimes import runtime_of
from pocketglm.stages._timing import Timings


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two exports."""

    path: Path
    name: str
    manifest: ExportManifest

    @property
    def digest(self) -> str:
        files = {name: entry.sha256 for name, entry in self.manifest.files.items()}
        return digest_value(files)

    @property
    def identity(self) -> list[Any]:
        """What a proof depends on: the files, and the settings that they do not hold."""
        m = self.manifest
        own = [m.logits, m.eos_ids, m.command and m.command.intents] if m.kind == "decoder" else []
        return [self.digest, m.threads, m.activation, m.labels, m.max_length, *own]

    @property
    def folder_bytes(self) -> int:
        return sum(entry.bytes for entry in self.manifest.files.values())


def open_side(path: Path) -> Side:
    folder = model_folder(path)
    manifest = read_export(folder)
    check_files(folder, manifest)
    where = folder.resolve()
    name = where.parent.name if where.name == manifest.target else where.name
    return Side(folder, name, manifest)


def describe(side: Side, timings: Timings | None, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """What `proof.json` says of one side. timings: None: they could not be taken here."""
    manifest = side.manifest
    made = {"method": "export", "settings": {"target": manifest.target, **manifest.minimum}}
    return {
        "name": side.name,
        "path": str(side.path),
        "target": manifest.target,
        "runtime": manifest.runtime,
        "precision": manifest.precision,
        "model_file": manifest.model_file,
        "model_bytes": model_bytes(manifest),
        "folder_bytes": side.folder_bytes,
        "parts": parts_of(manifest),
        "digest": side.digest,
        "checkpoint": manifest.checkpoint,
        "lineage": [*(step.model_dump(mode="json") for step in manifest.lineage), made],
        "labels": manifest.labels,
        "pooling": manifest.pooling,
        "max_length": manifest.max_length,
        "activation": manifest.activation,
        "parity": manifest.parity.model_dump(mode="json", exclude={"blocks"}),
        "delegate": runtime_of(side.path).delegate,
        "placement": [entry.model_dump(mode="json") for entry in manifest.placement],
        **(_measured(timings) if timings else {}),
        "metrics": {
            name: {"value": m.value, "n": m.n, "low": m.low, "high": m.high}
            for name, m in metrics.items()
        },
        **(_decoder(manifest) if manifest.kind == "decoder" else {}),
        **manifest.origin,
    }


def _measured(timings: Timings) -> dict[str, Any]:
    prompts = timings.prompts
    return {
        "p50_ms": float(np.percentile(timings.samples, 50)),
        "p99_ms": float(np.percentile(timings.samples, 99)),
        "load_ms": float(np.median(timings.loads)),
        "peak_rss_bytes": int(np.median(timings.peaks)),
        **({"first_token_ms": float(np.median(timings.prompt_medians))} if prompts else {}),
    }


def _decoder(manifest: ExportManifest) -> dict[str, Any]:
    return {
        "kind": "decoder",
        "logits": manifest.logits,
        "cache_bytes_per_token": manifest.cache.bytes_per_token if manifest.cache else None,
        "intents": list(manifest.command.intents) if manifest.command else [],
    }


def model_bytes(manifest: ExportManifest) -> int:
    """Bytes of the model file, of what is in it if it is a folder, and of data files beside it that
    carry its name."""
    name = manifest.model_file
    return sum(e.bytes for file, e in manifest.files.items() if file == name or _data(file, name))


def _data(file: str, name: str) -> bool:
    return file.startswith((f"{name}.", f"{name}_", f"{name}/"))


def parts_of(manifest: ExportManifest) -> dict[str, int]:
    """Bytes by embedding / attention / ffn / head / other; they add up to `model_bytes`.

    The graph itself is "other". Empty where the target does not tell.
    """
    if not manifest.parameters:
        return {}
    rest = model_bytes(manifest) - sum(manifest.parameters.values())
    return {**manifest.parameters, "other": manifest.parameters.get("other", 0) + rest}
