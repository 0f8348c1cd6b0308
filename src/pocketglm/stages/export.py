"""Lower a checkpoint to the files of one or more runtimes; nothing is kept that fails parity."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.export import (
    EXPORT,
    CacheLayout,
    ExportManifest,
    Parity,
    list_files,
    read_export,
)
from pocketglm.artifacts.manifest import digest_file, digest_value, tool_versions, write_json
from pocketglm.artifacts.origin import origin_of
from pocketglm.artifacts.output import REQUEST, is_done, output_folder
from pocketglm.artifacts.placement import Placement
from pocketglm.artifacts.schemas import ExportResult, TargetResult
from pocketglm.contracts import ExportOptions, Lowered, Reporter, Silent, Target
from pocketglm.errors import (
    CrashError,
    FinishedElsewhereError,
    PocketError,
    UnsupportedError,
    UsageError,
)
from pocketglm.model.hf import (
    check_tensors,
    eos_ids_of,
    is_decoder,
    labels_of,
    max_length_of,
    model_spec_of,
)
from pocketglm.model.spec import DecoderSpec, EncoderSpec
from pocketglm.ops.stored import parameter_counts, precision_of
from pocketglm.runtimes._cores import usable_cores
from pocketglm.stages._isolated import Trail
from pocketglm.stages._memory import Ceiling, keep_freed_memory
from pocketglm.stages._parity import check_parity, encoder_buffers
from pocketglm.stages._parity_decoder import check_decoder_parity, decoder_buffers
from pocketglm.stages._placement import foresee
from pocketglm.text.tokenizer import Tokenizer

_DEFAULTS = ExportOptions()
_SILENT = Silent()


def export(
    path: Path,
    targets: Sequence[str],
    out: Path,
    *,
    options: ExportOptions = _DEFAULTS,
    force: bool = False,
    reporter: Reporter = _SILENT,
) -> ExportResult:
    """Write OUT/<target>/ for every target; each that works is kept.

    A target that fails is reported in its TargetResult, with its error and exit code: refused (2),
    parity (1), extra missing (3), crashed or disk full (4).

    Raises:
        UsageError: unknown target, or a max_length that the model does not have.
        CheckpointError: the checkpoint cannot be used, or its tokenizer has ids beyond the
            vocabulary.
    """
    if not targets:
        raise UsageError("no target named", f"known: {', '.join(registry.names('targets'))}")
    loaded: dict[str, Target] = {name: registry.load("targets", name) for name in targets}
    ckpt = _open(path, options)
    digest = ckpt.digest()
    results = []
    for index, (name, target) in enumerate(loaded.items()):
        reporter.progress("export", index, len(loaded), name)
        try:
            results.append(
                _export(ckpt, digest, name, target, out / name, options, force, reporter)
            )
        except PocketError as error:
            results.append(TargetResult.failed(name, error))
    reporter.progress("export", len(loaded), len(loaded))
    return ExportResult(out=str(out), targets=results)


def export_target(
    path: str,
    digest: str,
    name: str,
    out: str,
    options: dict[str, Any],
    force: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    """One target of `export` from and to JSON values, for the process that `export_each` starts.

    digest: the checkpoint's. options: of ExportOptions.

    Raises:
        UsageError, CheckpointError: as `export`.
        CrashError: the converter or a runtime crashed.
    """
    chosen = ExportOptions(**options)
    ckpt = _open(Path(path), chosen)
    target: Target = registry.load("targets", name)
    try:
        result = _export(ckpt, digest, name, target, Path(out) / name, chosen, force, reporter)
    except CrashError:
        raise
    except PocketError as error:
        result = TargetResult.failed(name, error)
    return result.model_dump(mode="json")


def _open(path: Path, options: ExportOptions) -> Checkpoint:
    """The checkpoint, checked as far as every target needs it."""
    ckpt = Checkpoint.open(path)
    check_tensors(ckpt)
    spec = model_spec_of(ckpt)
    Tokenizer.load(ckpt.path).check_vocabulary(spec.vocab_size, ckpt.path)
    limit = spec.max_position_embeddings
    if options.max_length is not None and not 1 < options.max_length <= limit:
        raise UsageError(
            f"--max-length {options.max_length}: the model has {limit} positions",
            f"choose 2 to {limit}",
        )
    return ckpt


def _export(
    ckpt: Checkpoint,
    digest: str,
    name: str,
    target: Target,
    out: Path,
    options: ExportOptions,
    force: bool,
    reporter: Reporter,
) -> TargetResult:
    request = digest_value(
        {
            "verb": "export",
            "target": name,
            # no byte depends on these
            "options": asdict(
                replace(options, max_memory=None, delegate=None, allow_fallback=False)
            ),
            "checkpoint": digest,
            "pocketglm": tool_versions()["pocketglm"],
        }
    )
    placement = foresee(ckpt, name, target, options)
    done = is_done(out, request, force, [ckpt.path])
    if not done:
        if reasons := target.supports(ckpt, options):
            raise UnsupportedError(f"{name} cannot carry {ckpt.path}", reasons)
        buffers = decoder_buffers(ckpt) if is_decoder(ckpt) else encoder_buffers(ckpt)
        Ceiling(options.max_memory, "export").require(buffers, "the largest part of the model")
        try:
            with output_folder(out, request, force, [ckpt.path]) as partial:
                try:
                    _write(
                        ckpt,
                        digest,
                        request,
                        name,
                        target,
                        partial,
                        options,
                        placement,
                        reporter,
                    )
                except BaseException:
                    _discard(partial)  # an export is quick to make again: nothing to resume
                    raise
        except FinishedElsewhereError:
            done = True
    manifest = read_export(out)
    return TargetResult(
        target=name,
        ok=True,
        out=str(out),
        already_done=done,
        precision=manifest.precision,
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        parity=manifest.parity,
        placement=placement,
    )


def _write(
    ckpt: Checkpoint,
    digest: str,
    request: str,
    name: str,
    target: Target,
    folder: Path,
    options: ExportOptions,
    placement: Sequence[Placement],
    reporter: Reporter,
) -> None:
    _discard(folder)  # what a killed run left
    keep_freed_memory()
    reporter = trail = Trail(reporter)
    reporter.say(f"exporting to {name}")
    try:
        lowered = target.lower(ckpt, folder, options, reporter)
        manifest = _manifest(ckpt, digest, request, name, target, folder, options, lowered)
        manifest = manifest.model_copy(update={"placement": list(placement)})
        write_json(folder / EXPORT, manifest)  # the runtime that parity opens reads it
        if manifest.kind == "decoder":
            parity = check_decoder_parity(ckpt, folder, manifest, target, options, reporter)
        else:
            parity = check_parity(ckpt, folder, manifest, target, reporter)
    except (PocketError, OSError, MemoryError):
        raise
    except Exception as error:  # a converter or runtime that crashed
        raise CrashError(
            f"target {name} failed on {ckpt.path}: {type(error).__name__}: {error}{trail.at}",
            "this is a defect, or a limit of the converter: please report it",
        ) from error
    write_json(folder / EXPORT, manifest.model_copy(update={"parity": parity}))


def _manifest(
    ckpt: Checkpoint,
    digest: str,
    request: str,
    name: str,
    target: Target,
    folder: Path,
    options: ExportOptions,
    lowered: Lowered,
) -> ExportManifest:
    spec = model_spec_of(ckpt)
    unknown = Parity(scope="whole", n=0, output_max_abs=0, output_std=0, tolerance=0, agreement=0)
    return ExportManifest(
        request=request,
        target=name,
        runtime=target.runtime,
        **_kind_fields(ckpt, spec, options, lowered),
        output=lowered.outputs[0]["name"],
        precision=precision_of(ckpt) if ckpt.manifest.schemes else lowered.floats,
        model_file=lowered.model_file,
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        max_length=options.max_length or max_length_of(ckpt),
        vocab_size=spec.vocab_size,
        activation=lowered.activation,
        floats=lowered.floats,
        task=ckpt.manifest.task,
        schemes=ckpt.manifest.schemes,
        tokenizer_sha256=digest_file(folder / "tokenizer.json"),
        operators=lowered.operators,
        minimum=lowered.minimum,
        links=lowered.links,
        checkpoint=digest,
        origin=ckpt.manifest.origin or origin_of(ckpt.path),
        lineage=ckpt.manifest.lineage,
        parameters=lowered.parts,
        parameter_count=sum(parameter_counts(ckpt).values()),
        parity=unknown,
        files=list_files(folder, lowered.digests),
    )


def _kind_fields(
    ckpt: Checkpoint, spec: EncoderSpec | DecoderSpec, options: ExportOptions, lowered: Lowered
) -> dict[str, Any]:
    """What only an encoder's or only a decoder's manifest has."""
    if isinstance(spec, EncoderSpec):
        return {
            "kind": "encoder",
            "labels": labels_of(ckpt),
            "pooling": spec.pooling,
            "threads": options.threads,
        }
    return {
        "kind": "decoder",
        "threads": options.threads or usable_cores(),  # onnxruntime-genai needs a number
        "logits": options.logits,
        "bos_id": spec.bos_id,
        "eos_ids": list(eos_ids_of(ckpt)),
        "cache": CacheLayout(
            layers=spec.num_layers,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype="int8" if ckpt.manifest.cache else lowered.cache,
            scheme=ckpt.manifest.cache,
        ),
        "command": ckpt.manifest.command,
    }


def _discard(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name == REQUEST:
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
