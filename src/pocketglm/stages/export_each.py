"""`pocketglm export`: every target in a process of its own, so that a converter which crashes or
takes too much memory ends alone. Importing this loads no torch: the processes do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.output import drop_unfinished
from pocketglm.artifacts.schemas import ExportResult, TargetResult
from pocketglm.contracts import ExportOptions, Reporter, Silent
from pocketglm.errors import InputError, PocketError, UsageError
from pocketglm.stages._isolated import Outcome, run

_DEFAULTS = ExportOptions()
_SILENT = Silent()
_LOG = logging.getLogger(__name__)


def export_each(
    path: Path,
    targets: Sequence[str],
    out: Path,
    *,
    options: ExportOptions = _DEFAULTS,
    force: bool = False,
    reporter: Reporter = _SILENT,
) -> ExportResult:
    """As `stages.export.export`, but for the processes: `options.max_memory` is the limit of each.

    A target that crashed or was stopped (exit code 4) leaves what it printed in OUT/<target>.log.

    Raises:
        UsageError, CheckpointError: as `export`.
    """
    if not targets:
        raise UsageError("no target named", f"known: {', '.join(registry.names('targets'))}")
    names = list(dict.fromkeys(targets))
    for name in names:
        registry.check("targets", name)
    digest = Checkpoint.open(path).digest()
    new = not out.exists()
    results = []
    for index, name in enumerate(names):
        reporter.progress("export", index, len(names), name)
        try:
            results.append(_one(path, digest, name, out, options, force, reporter))
        except InputError:
            raise
        except BaseException:  # Ctrl-C
            drop_unfinished(out / name)
            if new:
                with suppress(OSError):  # of what another target has written
                    out.rmdir()
            raise
    reporter.progress("export", len(names), len(names))
    return ExportResult(out=str(out), targets=results)


def _one(
    path: Path,
    digest: str,
    name: str,
    out: Path,
    options: ExportOptions,
    force: bool,
    reporter: Reporter,
) -> TargetResult:
    outcome = run(
        "pocketglm.stages.export:export_target",
        [str(path), digest, name, str(out), asdict(options), force],
        what=f"target {name} on {path}",
        reporter=reporter,
        max_memory=options.max_memory,
    )
    log = out / f"{name}.log"
    if outcome.error is None:
        result = TargetResult.model_validate(outcome.value)
        if result.ok:
            log.unlink(missing_ok=True)  # of an earlier run
        return result.model_copy(
            update={"peak_memory": None if result.already_done else outcome.peak}
        )
    _LOG.debug("target %s has printed:\n%s", name, outcome.output)
    if isinstance(outcome.error, InputError):  # said before any work, of the whole command
        raise outcome.error
    drop_unfinished(out / name)
    return _crashed(name, outcome.error, outcome, log)


def _crashed(name: str, error: PocketError, outcome: Outcome, log: Path) -> TargetResult:
    """With its log, where that can be written."""
    hint = error.hint or "please report it, it is a defect here or in the converter"
    kept = None
    with suppress(OSError):  # such as a full disk
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(outcome.output, encoding="utf-8")
        kept = str(log)
        hint = f"{hint}; what it printed is in {log}"
    result = TargetResult.failed(name, error)
    return result.model_copy(update={"hint": hint, "peak_memory": outcome.peak, "log": kept})
