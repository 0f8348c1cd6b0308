"""`prove`: what did an export lose and gain against a baseline, measured on one machine in one run.

Accuracy on the same rows (paired), speed in interleaved pairs of two processes that stay open,
memory in fresh processes, sizes counted. Writes proof.json, report.html, report.md and the model
card; they are written whatever the verdict is, since they are the evidence.
"""

from __future__ import annotations

import datetime
import shlex
import shutil
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint, model_folder
from pocketglm.artifacts.export import is_export, read_export
from pocketglm.artifacts.manifest import digest_value, tool_versions, write_json
from pocketglm.artifacts.output import REQUEST, is_done, output_folder
from pocketglm.artifacts.proof import PROOF, Claim, Proof, overall, read_proof
from pocketglm.artifacts.schemas import ProveResult
from pocketglm.contracts import (
    DataOptions,
    ExportOptions,
    Reporter,
    RunOptions,
    Runtime,
    Silent,
    Task,
)
from pocketglm.errors import InputError, UsageError, WorkError
from pocketglm.eval._evaluate import check_kind, check_vocabularies, held_out
from pocketglm.eval.command import read_grammar
from pocketglm.model.hf import is_decoder, labels_of
from pocketglm.report import card, html, markdown
from pocketglm.runtimes import open_session, runtime_of
from pocketglm.runtimes._cores import usable_cores
from pocketglm.stages import _claims, _claims_decoder, _device
from pocketglm.stages._claims import Builder, Gates
from pocketglm.stages._sides import Side, describe, model_bytes, open_side
from pocketglm.stages._task import Job, compare, read_rows
from pocketglm.stages._timing import Timings, interleave
from pocketglm.stages.export_each import export_each
from pocketglm.text.tokenizer import Tokenizer

__all__ = ["Gates", "exit_code", "prove"]

REPORT = "report.html"
TOKENS = 32
PROMPT, NEW_TOKENS = 128, 64  # of a decoder; less where its context is short
_PAIRS = 7  # the fewest that give an interval and survive an outlier
_PACKAGES = {
    "executorch": ("executorch", "torch"),
    "onnx": ("onnxruntime", "numpy"),
    "gguf": ("llama-cpp-python", "numpy"),
    "litert": ("ai-edge-litert", "numpy"),
    "coreml": ("coremltools", "numpy"),
}


def exit_code(result: ProveResult, allow_inconclusive: bool = False) -> int:
    """0 for a proof whose limits are kept (or that has none), else 1."""
    if result.verdict == "inconclusive":
        return 0 if allow_inconclusive else 1
    return 1 if result.verdict == "fail" else 0


def prove(
    export: Path,
    baseline: Path,
    task: str,
    data: DataOptions,
    out: Path,
    *,
    gates: Gates | None = None,
    threads: int | None = None,
    pairs: int = 9,
    max_length: int | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> ProveResult:
    """Compare the export folder `export` with `baseline`, an export or a checkpoint.

    A checkpoint is first exported, in fp32, to the candidate's target, with its length and form of
    logits. Both run with `threads`, by default the candidate's own, else all usable cores. The
    result's verdict is the worst of the gates'; `exit_code` turns it into the process's.

    Raises:
        UsageError: unknown task, or one for the other kind of model; no such folder, too few pairs,
            models that cannot be compared, a gate for what the data does not let measure, or `out`
            holds an input.
        CheckpointError: a folder is not what it should be, or was changed since.
        DataError: the data cannot be used.
        OutputExistsError: `out` holds something else.
        MissingExtraError: the candidate's runtime is not installed.
        WorkError: a measuring process died.
    """
    reporter = reporter or Silent()
    if pairs < _PAIRS:
        raise UsageError(
            f"--pairs {pairs} is too few for a 95 % interval", f"use {_PAIRS} or more (default 9)"
        )
    spec: Task = registry.load("eval", task)
    gates = gates or Gates()
    candidate = open_side(export)
    other = _baseline(baseline)
    check_kind(export, task, spec, candidate.manifest.kind)
    check_kind(baseline, task, spec, _kind_of(other))
    if spec.kind == "decoder":
        _check_decoders(other, candidate, task)
    else:
        _check_labels(other, candidate)
    data = held_out(other.path, held_out(candidate.path, data, reporter), reporter)
    if runtime_of(candidate.path).emulated:
        _check_untimed(candidate, gates)
    rows = read_rows(data, task, gates)
    threads = threads or candidate.manifest.threads or usable_cores()
    job = Job(task, data, gates, threads, pairs, max_length, rows)
    base = other.identity if isinstance(other, Side) else other.digest()
    version = tool_versions()["pocketglm"]
    request = digest_value(["prove", version, candidate.identity, base, *job.key()])
    inputs = [path for path in (candidate.path, other.path, data.path) if path.exists()]
    if is_done(out, request, force, inputs):
        return _result(out, read_proof(out), already_done=True)
    command = _command(export, baseline, out, job)
    # What cannot be opened, for want of a package perhaps, is told before its baseline is made.
    open_session(candidate.path, RunOptions(threads=threads)).close()
    with output_folder(out, request, force, inputs) as partial:
        _discard(partial)  # what a killed run left
        try:
            if not isinstance(other, Side):
                other = _export(other, candidate, partial / "baseline", reporter)
            proof = _measure(other, candidate, job, request, command, reporter)
            _discard(partial)
            _write(proof, partial)
        except BaseException:
            _discard(partial)  # nothing to resume: what was measured belongs to one run
            raise
    return _result(out, proof)


def _write(proof: Proof, folder: Path) -> None:
    (folder / REPORT).write_text(html.render(proof), encoding="utf-8")
    (folder / "report.md").write_text(markdown.render(proof), encoding="utf-8")
    (folder / "README.md").write_text(card.render(proof), encoding="utf-8")
    write_json(folder / PROOF, proof)


def _discard(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != REQUEST:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _result(out: Path, proof: Proof, already_done: bool = False) -> ProveResult:
    return ProveResult(
        out=str(out),
        report=str(out / REPORT),
        verdict=proof.verdict,
        claims=proof.claims,
        already_done=already_done,
    )


# --- the two sides -----------------------------------------------------------------------------


def _baseline(path: Path) -> Side | Checkpoint:
    if is_export(model_folder(path)):
        return open_side(path)
    checkpoint = Checkpoint.open(path)
    if checkpoint.manifest.schemes or checkpoint.manifest.cache:
        raise UsageError(
            f"the baseline {path} is itself quantized",
            "name the checkpoint it was made from; or export it, and name that export",
        )
    return checkpoint


def _export(checkpoint: Checkpoint, candidate: Side, folder: Path, reporter: Reporter) -> Side:
    target = candidate.manifest.target
    reporter.say(f"exporting the baseline {checkpoint.path} to {target}, in float")
    result = export_each(
        checkpoint.path,
        [target],
        folder,
        options=ExportOptions(
            max_length=candidate.manifest.max_length, logits=candidate.manifest.logits or "last"
        ),
        force=False,
        reporter=reporter,
    )
    (entry,) = result.targets
    if not entry.ok or entry.out is None:
        kind = InputError if entry.exit_code == 2 else WorkError
        raise kind(
            f"the baseline {checkpoint.path} could not be exported to {target}: {entry.error}",
            "export it by hand, and name that export as the baseline",
        )
    where = Path(entry.out)
    return Side(where, checkpoint.path.resolve().name, read_export(where))


def _kind_of(side: Side | Checkpoint) -> str:
    if isinstance(side, Side):
        return side.manifest.kind
    return "decoder" if is_decoder(side) else "encoder"


def _check_runtime(baseline: Side, candidate: Side) -> None:
    if baseline.manifest.runtime != candidate.manifest.runtime:
        raise UsageError(
            f"the baseline runs in {baseline.manifest.runtime}, the candidate in "
            f"{candidate.manifest.runtime}",
            "name a checkpoint as the baseline, it is exported to the candidate's runtime",
        )


def _check_labels(baseline: Side | Checkpoint, candidate: Side) -> None:
    labels = candidate.manifest.labels
    if isinstance(baseline, Side):
        _check_runtime(baseline, candidate)
        others = baseline.manifest.labels
    else:
        others = labels_of(baseline)
    _check_same("labels", others, labels)


def _check_same(what: str, others: Collection[str], ours: Collection[str]) -> None:
    if different := sorted({*ours} ^ {*others}):
        raise UsageError(
            f"the two models have different {what} ({len(others)} and {len(ours)}), among them "
            + ", ".join(different[:3]),
            "compare an export with the checkpoint that it was made from",
        )


def _check_decoders(baseline: Side | Checkpoint, candidate: Side, task: str) -> None:
    if isinstance(baseline, Side):
        _check_runtime(baseline, candidate)
        forms = (baseline.manifest.logits, candidate.manifest.logits)
        if forms[0] != forms[1]:
            raise UsageError(
                f"the baseline computes the logits of positions: {forms[0]}, the candidate: "
                f"{forms[1]}; their prompts cannot be timed against each other",
                "name a checkpoint as the baseline, or export both with the same --logits",
            )
    if task == "command":
        others, ours = (read_grammar(side.path).intents for side in (baseline, candidate))
        _check_same("intents", others, ours)
    else:
        check_vocabularies(candidate.path, Tokenizer.load(candidate.path), baseline.path)


def _check_untimed(candidate: Side, gates: Gates) -> None:
    for gate in ("min_speedup", "max_latency_ms", "max_memory_mb"):
        if getattr(gates, gate) is not None:
            option = "--" + gate.replace("_", "-")
            raise UsageError(
                f"{option}: {candidate.manifest.runtime} does not run on this machine, its "
                "reference evaluator says nothing about speed or memory",
                f"leave {option} out, or prove it where the runtime runs",
            )


# --- measuring ---------------------------------------------------------------------------------


def _measure(
    baseline: Side, candidate: Side, job: Job, request: str, command: str, reporter: Reporter
) -> Proof:
    sides = (baseline, candidate)
    device = _device.describe(*_PACKAGES.get(candidate.manifest.runtime, ()))
    build = Builder(_device.short(device, job.threads))
    found = compare(build, sides, job, reporter)
    tokens, new = _lengths(sides)
    runtime = runtime_of(candidate.path)
    timings = (
        None
        if runtime.emulated
        else interleave(
            baseline.path, candidate.path, tokens, job.threads, job.pairs, reporter, new
        )
    )
    claims = [*found.claims, *_machine_claims(build, sides, timings, tokens, job.gates)]
    _claims.check_gates(claims, job.gates)
    before, after = timings or (None, None)
    return Proof(
        request=request,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        device=device,
        task=job.task,
        data={
            "path": str(job.data.path),
            "split": "test",
            "n": found.n,
            **found.counts,
            "digest": job.rows,
        },
        candidate=describe(candidate, after, found.metrics[1]),
        baseline=describe(baseline, before, found.metrics[0]),
        claims=claims,
        verdict=overall(claims),
        details={
            "command": command,
            **({"latency": _latency(timings, tokens, new, job)} if timings else {}),
            **found.details,
            **({"notes": notes} if (notes := _notes(found.notes, tokens, new, runtime)) else {}),
        },
    )


def _latency(timings: tuple[Timings, Timings], tokens: int, new: int, job: Job) -> dict[str, Any]:
    return {
        **{
            name: [round(float(ms), 4) for ms in side.samples]
            for name, side in zip(("baseline", "candidate"), timings, strict=True)
        },
        "batch": 1,
        "tokens": tokens,
        **({"new_tokens": new} if new else {}),
        "threads": job.threads,
        "pairs": job.pairs,
    }


def _notes(found: Sequence[str], tokens: int, new: int, runtime: Runtime) -> list[str]:
    notes = [*found]
    if runtime.emulated:
        return [*notes, "computed by the runtime's reference evaluator: no speed, no memory"]
    if new:
        notes.append(_speed_note(tokens, new))
    if runtime.extra_memory:
        notes.append(f"memory includes {runtime.extra_memory}")
    return notes


def _speed_note(tokens: int, new: int) -> str:
    return f"speed and memory: prompts of {tokens} tokens, {new} new tokens after each, batch 1"


def _lengths(sides: tuple[Side, Side]) -> tuple[int, int]:
    """Tokens of the timed texts: of an encoder's, or of a decoder's prompt and after it."""
    limit = min(side.manifest.max_length for side in sides)
    if sides[1].manifest.kind == "encoder":
        return min(TOKENS, limit), 0
    return max(min(PROMPT, limit // 2), 1), max(min(NEW_TOKENS, limit // 4), 1)


def _machine_claims(
    build: Builder,
    sides: tuple[Side, Side],
    timings: tuple[Timings, Timings] | None,
    tokens: int,
    gates: Gates,
) -> list[Claim]:
    a, b = sides
    files = (model_bytes(a.manifest), model_bytes(b.manifest))
    sizes = _claims.size_claims(build, files, (a.folder_bytes, b.folder_bytes), gates)
    if timings is None:
        return sizes
    speed = (
        _claims_decoder.speed_claims(build, *timings, tokens, gates)
        if b.manifest.kind == "decoder"
        else _claims.speed_claims(build, *timings, gates)
    )
    return [*speed, *sizes, *_claims.memory_claims(build, *timings, gates)]


# --- what was asked ----------------------------------------------------------------------------


def _command(export: Path, baseline: Path, out: Path, job: Job) -> str:
    """The command line that repeats this proof."""
    usual = DataOptions(job.data.path)
    options: dict[str, Any] = {
        f.name: getattr(job.data, f.name)
        for f in fields(DataOptions)
        if getattr(job.data, f.name) != getattr(usual, f.name) and f.name != "divided_by"
    }
    options |= {"max_length": job.max_length, "threads": job.threads, "pairs": job.pairs}
    options |= job.gates.model_dump()
    parts = ["pocketglm", "prove", str(export), "--baseline", str(baseline), "--task", job.task]
    parts += ["--data", str(job.data.path)]
    for name, value in options.items():
        if value is not None:
            parts += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join([*parts, "--out", str(out)])
