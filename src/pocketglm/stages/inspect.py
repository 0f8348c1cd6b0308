"""Describes a checkpoint, an export or a proof from its headers and manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import ExportManifest, check_files, is_export, read_export
from pocketglm.artifacts.manifest import CommandGrammar, digest_file, digest_value
from pocketglm.artifacts.proof import PROOF, read_proof
from pocketglm.artifacts.schemas import InspectResult
from pocketglm.artifacts.scheme import CacheScheme, TensorScheme
from pocketglm.model.families import remote_code_note
from pocketglm.model.hf import (
    check_tensors,
    eos_ids_of,
    labels_of,
    max_length_of,
    model_spec_of,
    role_of,
)
from pocketglm.model.spec import EncoderSpec
from pocketglm.ops.stored import parameter_counts, precision_of
from pocketglm.stages._upstream import opens_in_transformers


def inspect_path(folder: Path, *, verify: bool = False) -> InspectResult:
    """What `folder` is. `verify` compares an export's files with their sha256.

    Raises:
        CheckpointError: it is no artifact, or it contradicts itself.
    """
    if is_export(folder):
        return _export(folder, verify)
    if (folder / PROOF).is_file():
        return _proof(folder)
    return _checkpoint(folder)


def describe(scheme: TensorScheme) -> str:
    """A scheme in one line, e.g. 'int8 per channel, symmetric, dynamic_tensor'."""
    group = "per channel" if scheme.group_size is None else f"group {scheme.group_size}"
    sign = "symmetric" if scheme.symmetric else "asymmetric"
    return f"int{scheme.bits} {group}, {sign}, activations {scheme.activation}"


def _cache_form(scheme: CacheScheme | None) -> str:
    return f"int{scheme.bits} per {scheme.per}" if scheme else ""


def _count(schemes: dict[str, TensorScheme]) -> dict[str, int]:
    found = [describe(scheme) for scheme in schemes.values()]
    return {name: found.count(name) for name in sorted(set(found))}


def _checkpoint(folder: Path) -> InspectResult:
    ckpt = Checkpoint.open(folder)
    check_tensors(ckpt)
    spec = model_spec_of(ckpt)
    parts: dict[str, int] = {}
    for name, info in ckpt.tensors.items():
        role = role_of(name)
        parts[role] = parts.get(role, 0) + info.nbytes
    return InspectResult(
        path=str(folder),
        kind="checkpoint",
        architecture=(ckpt.config.get("architectures") or [str(ckpt.config["model_type"])])[0],
        parameters=sum(parameter_counts(ckpt).values()),
        bytes=ckpt.nbytes,
        precision=precision_of(ckpt),
        hidden_size=spec.hidden_size,
        layers=spec.num_layers,
        heads=spec.num_heads,
        vocab_size=spec.vocab_size,
        max_length=max_length_of(ckpt),
        labels=labels_of(ckpt),
        parts=parts,
        schemes=_count(ckpt.manifest.schemes),
        opens_in=_opens_in(ckpt),
        notes=_notes(ckpt),
        digest=ckpt.digest(),
        lineage=ckpt.manifest.lineage,
        command=_intents(ckpt.manifest.command),
        **_own_fields(ckpt),
    )


def _notes(ckpt: Checkpoint) -> list[str]:
    notes = [note] if (note := remote_code_note(ckpt)) else []
    if not (ckpt.path / "tokenizer.json").is_file():
        notes.append("there is no tokenizer.json, which train, eval, run and export need")
    return notes


def _own_fields(ckpt: Checkpoint) -> dict[str, Any]:
    """What only encoders have, or only decoders."""
    spec = model_spec_of(ckpt)
    ranks = [dict(ranks) for ranks in spec.layer_ranks]
    layers = {"layer_ffn": list(spec.layer_ffn), "layer_ranks": ranks}
    if isinstance(spec, EncoderSpec):
        own: dict[str, Any] = {"layer_heads": list(spec.layer_heads), **layers}
        own |= {} if spec.regular else {"head_dim": spec.head_dim}
        return {"pooling": spec.pooling, "head": spec.head, **own}
    return {
        "head": "tied lm" if spec.tied else "lm",
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "kv_bytes_per_token": spec.kv_bytes_per_token // (2 if ckpt.manifest.cache else 1),
        "kv_cache": _cache_form(ckpt.manifest.cache) or "fp16",
        "eos_ids": list(eos_ids_of(ckpt)),
        "layer_blocks": list(spec.layer_blocks),
        "unified": spec.unified,
        "top_k": spec.top_k,
        **layers,
    }


def _opens_in(ckpt: Checkpoint) -> dict[str, str]:
    upstream = opens_in_transformers(ckpt)
    vllm = "no, its model_type is unknown there"
    if upstream.startswith("yes"):
        vllm = "by format; not run here"
    return {"transformers": upstream, "vLLM": vllm}


def _export(folder: Path, verify: bool) -> InspectResult:
    manifest = read_export(folder)
    if verify:
        check_files(folder, manifest)
    cache = manifest.cache
    shown = {
        "target",
        "runtime",
        "model_file",
        "inputs",
        "outputs",
        "operators",
        "minimum",
        "links",
    }
    return InspectResult(
        path=str(folder),
        kind="export",
        parameters=manifest.parameter_count,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        precision=manifest.precision,
        layers=cache.layers if cache else None,
        kv_heads=cache.kv_heads if cache else None,
        head_dim=cache.head_dim if cache else None,
        kv_bytes_per_token=cache.bytes_per_token if cache else None,
        kv_cache=(_cache_form(cache.scheme) or cache.dtype) if cache else "",
        eos_ids=manifest.eos_ids,
        logits=manifest.logits,
        command=_intents(manifest.command),
        vocab_size=manifest.vocab_size or None,
        max_length=manifest.max_length,
        pooling=manifest.pooling,
        labels=manifest.labels,
        parts=manifest.parameters,
        schemes=_count(manifest.schemes),
        opens_in=_export_opens_in(folder, manifest),
        digest=digest_value({name: entry.sha256 for name, entry in manifest.files.items()}),
        lineage=manifest.lineage,
        export=manifest.model_dump(mode="json", include=shown | {"parity"}),
    )


def _export_opens_in(folder: Path, manifest: ExportManifest) -> dict[str, str]:
    genai = {"genai": "yes"} if (folder / "genai_config.json").is_file() else {}
    return {manifest.runtime: "yes", **genai}


def _intents(command: CommandGrammar | None) -> dict[str, list[str]] | None:
    return command.intents if command else None


def _proof(folder: Path) -> InspectResult:
    proof = read_proof(folder)
    return InspectResult(
        path=str(folder),
        kind="proof",
        bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        digest=digest_file(folder / PROOF),
        proof=proof.model_dump(mode="json", include={"verdict", "claims", "task", "device"}),
    )
