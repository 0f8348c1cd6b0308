"""`prove`: what did an export lose and gain against a baseline, measured on one machine in one run.

Accuracy on the same rows (paired), speed in interleaved pairs of two processes that stay open,
memory in fresh processes, sizes counted. Writes proof.json, report.html, report.md and the model
card; they are written whatever the verdict is, since they are the evidence.
"""

from __future__ import annotations

import datetime
import shlex
import shutil
from dataclasses import dataclass, fields
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
    Scores,
    Silent,
)
from pocketglm.data.readers import read_split
from pocketglm.errors import InputError, UsageError, WorkError
from pocketglm.eval._evaluate import evaluate, held_out
from pocketglm.eval.embed import cosine_parity
from pocketglm.model.hf import labels_of
from pocketglm.report import card, html, markdown
from pocketglm.runtimes import open_encoder
from pocketglm.runtimes._cores import usable_cores
from pocketglm.stages import _claims, _device
from pocketglm.stages._claims import Builder, Gates
from pocketglm.stages._sides import Side, describe, model_bytes, open_side
from pocketglm.stages._timing import Timings, interleave
from pocketglm.stages.export import export as export_checkpoint
from pocketglm.text.tokenizer import Tokenizer

__all__ = ["Gates", "exit_code", "prove"]

REPORT = "report.html"
TOKENS = 32
_PAIRS = 7  # the fewest that give an interval and survive an outlier
_COSINE_TEXTS = 500
_PACKAGES = {"onnx": ("onnxruntime", "numpy")}


@dataclass(frozen=True, slots=True)
class _Job:
    """What `prove` measures; `rows` is the digest of the rows that are scored, `threads` what both
    models run with."""

    task: str
    data: DataOptions
    gates: Gates
    threads: int
    pairs: int
    max_length: int | None
    rows: str

    @property
    def run(self) -> RunOptions:
        return RunOptions(threads=self.threads)

    def key(self) -> list[Any]:
        """What decides the result, for the request's digest."""
        asked = [self.task, self.rows, self.gates.model_dump(), self.threads, self.pairs]
        return [*asked, self.max_length, self.data.oos_label]


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

    A checkpoint is first exported, in fp32, to the candidate's target. Both run with `threads`, by
    default the candidate's own, else all usable cores. The result's verdict is the worst of the
    gates'; `exit_code` turns it into the process's.

    Raises:
        UsageError: unknown task, no such folder, too few pairs, models that cannot be compared, a
            gate for what the data does not let measure, or `out` holds an input.
        CheckpointError: a folder is not what it should be, or was changed since.
        DataError: the data cannot be used.
        OutputExistsError: `out` holds something else.
        WorkError: a measuring process died.
    """
    reporter = reporter or Silent()
    if pairs < _PAIRS:
        raise UsageError(
            f"--pairs {pairs} is too few for a 95 % interval", f"use {_PAIRS} or more (default 9)"
        )
    registry.load("eval", task)
    gates = gates or Gates()
    candidate = open_side(export)
    other = _baseline(baseline)
    _check_pair(other, candidate)
    data = held_out(other.path, held_out(candidate.path, data, reporter), reporter)
    rows = _read_rows(data, task, gates)
    threads = threads or candidate.manifest.threads or usable_cores()
    job = _Job(task, data, gates, threads, pairs, max_length, rows)
    base = other.identity if isinstance(other, Side) else other.digest()
    version = tool_versions()["pocketglm"]
    request = digest_value(["prove", version, candidate.identity, base, *job.key()])
    inputs = [path for path in (candidate.path, other.path, data.path) if path.exists()]
    if is_done(out, request, force, inputs):
        return _result(out, read_proof(out), already_done=True)
    command = _command(export, baseline, out, job)
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
    if checkpoint.manifest.schemes:
        raise UsageError(
            f"the baseline {path} is itself quantized",
            "name the checkpoint it was made from; or export it, and name that export",
        )
    return checkpoint


def _export(checkpoint: Checkpoint, candidate: Side, folder: Path, reporter: Reporter) -> Side:
    target = candidate.manifest.target
    reporter.say(f"exporting the baseline {checkpoint.path} to {target}, fp32")
    result = export_checkpoint(
        checkpoint.path,
        [target],
        folder,
        options=ExportOptions(max_length=candidate.manifest.max_length),
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


def _check_pair(baseline: Side | Checkpoint, candidate: Side) -> None:
    labels, runtime = candidate.manifest.labels, candidate.manifest.runtime
    if isinstance(baseline, Side):
        others = baseline.manifest.labels
        if baseline.manifest.runtime != runtime:
            raise UsageError(
                f"the baseline runs in {baseline.manifest.runtime}, the candidate in {runtime}",
                "name a checkpoint as the baseline, it is exported to the candidate's runtime",
            )
    else:
        others = labels_of(baseline)
    if different := sorted({*labels} ^ {*others}):
        raise UsageError(
            f"the two models have different labels ({len(others)} and {len(labels)}), among them "
            + ", ".join(different[:3]),
            "compare an export with the checkpoint that it was made from",
        )


# --- measuring ---------------------------------------------------------------------------------


def _measure(
    baseline: Side, candidate: Side, job: _Job, request: str, command: str, reporter: Reporter
) -> Proof:
    sides = (baseline, candidate)
    before, after = (_score(side, job, reporter) for side in sides)
    tokens = min(TOKENS, baseline.manifest.max_length, candidate.manifest.max_length)
    timings = interleave(baseline.path, candidate.path, tokens, job.threads, job.pairs, reporter)
    device = _device.describe(*_PACKAGES.get(candidate.manifest.runtime, ()))
    build = Builder(_device.short(device, job.threads))
    claims = _claims.task_claims(build, before, after, job.gates)
    if job.task == "embed":
        claims += _cosines(build, sides, before, job, reporter)
    claims += _machine_claims(build, sides, timings, job.gates)
    _claims.check_gates(claims, job.gates)
    details: dict[str, Any] = {
        "command": command,
        "latency": {
            "baseline": [round(float(ms), 4) for ms in timings[0].samples],
            "candidate": [round(float(ms), 4) for ms in timings[1].samples],
            "batch": 1,
            "tokens": tokens,
            "threads": job.threads,
            "pairs": job.pairs,
        },
        "flips": _claims.flips(before, after),
    }
    if job.task == "intent":
        details["confusions"] = _claims.confusions(before, after)
        details["classes"] = _claims.classes(before, after)
    return Proof(
        request=request,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        device=device,
        task=job.task,
        data={
            "path": str(job.data.path),
            "split": "test",
            "n": len(before.gold),
            "digest": job.rows,
        },
        candidate=describe(candidate, timings[1], after),
        baseline=describe(baseline, timings[0], before),
        claims=claims,
        verdict=overall(claims),
        details=details,
    )


def _score(side: Side, job: _Job, reporter: Reporter) -> Scores:
    reporter.say(f"scoring {side.name} ({side.manifest.precision})")
    return evaluate(side.path, job.task, job.data, job.max_length, job.run, reporter)[0]


def _machine_claims(
    build: Builder, sides: tuple[Side, Side], timings: tuple[Timings, Timings], gates: Gates
) -> list[Claim]:
    a, b = sides
    files = (model_bytes(a.manifest), model_bytes(b.manifest))
    return [
        *_claims.speed_claims(build, *timings, gates),
        *_claims.size_claims(build, files, (a.folder_bytes, b.folder_bytes), gates),
        *_claims.memory_claims(build, *timings, gates),
    ]


def _cosines(
    build: Builder, sides: tuple[Side, Side], scores: Scores, job: _Job, reporter: Reporter
) -> list[Claim]:
    texts = list(scores.texts)[:_COSINE_TEXTS]
    a, b = (open_encoder(side.path, job.run) for side in sides)
    try:
        tokenizer = Tokenizer.load(sides[0].path)
        values = cosine_parity(a, b, tokenizer, texts, job.max_length, reporter)
    finally:
        a.close()
        b.close()
    return _claims.cosine_claims(build, values)


# --- what was asked ----------------------------------------------------------------------------


def _read_rows(data: DataOptions, task: str, gates: Gates) -> str:
    """sha256 over the rows that are scored (for `embed` also those they are compared with)."""
    train = read_split(data, "train") if task == "embed" else []
    test = read_split(data, "test")
    if gates.max_oos_recall_drop is not None:
        oos = [row.label == data.oos_label for row in test]
        why = (
            f"the task '{task}' has no out-of-scope recall to limit"
            if task != "intent"
            else f"no test row has the label '{data.oos_label}'"
            if not any(oos)
            else f"every test row has the label '{data.oos_label}', so their recall is the accuracy"
            if all(oos)
            else ""
        )
        if why:
            raise UsageError(
                f"--max-oos-recall-drop: {why}",
                "leave it out (--max-accuracy-drop limits the accuracy), or name the label with "
                "--oos-label",
            )
    return digest_value([len(train), *([row.text, row.label] for row in [*train, *test])])


def _command(export: Path, baseline: Path, out: Path, job: _Job) -> str:
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
