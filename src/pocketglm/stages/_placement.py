"""Where an export will run on the device that it is for, and the gate on it.

An app's delegate is the one that is named, else the runtime's default: XNNPACK in LiteRT and
ExecuTorch, in Core ML what the package's compute units ask for. If it would take less than half of
the multiplications (`checks/placement.LITTLE`), or needs another file, the export is refused; other
delegates of the device that would take little are told as warnings. For a GPU or an NPU every piece
of the graph costs a hand-over, so more pieces than blocks are told too.
"""

from __future__ import annotations

from collections.abc import Sequence

from pocketglm import registry
from pocketglm.artifacts.checkpoint import Checkpoint
from pocketglm.artifacts.graph import Graph
from pocketglm.artifacts.placement import Placement
from pocketglm.contracts import Check, ExportOptions, Target
from pocketglm.devices.profile import find_profile
from pocketglm.errors import PlacementError, UnsupportedError, UsageError

_DEFAULT = "xnnpack"
_UNITS = {"cpuAndNeuralEngine": ("npu",), "cpuAndGPU": ("gpu",), "all": ("npu", "gpu")}


def foresee(ckpt: Checkpoint, name: str, target: Target, options: ExportOptions) -> list[Placement]:
    """The placement of what `target` will write; empty where no device was named, where the
    target's runtime has no delegates, and where the target refuses the checkpoint.

    Raises:
        UsageError: there is no such device, or the delegate is not there.
        UnsupportedError: the target's runtime is not for the device.
        PlacementError: the app's delegate would take little, and that was not allowed.
    """
    if options.device is None:
        if options.delegate is not None:
            raise UsageError("--delegate without --device", "name the device, too")
        return []
    own, profile = find_profile(options.device)
    if target.systems and profile.os not in target.systems:
        raise UnsupportedError(
            f"{name} does not run on {own}",
            [f"its system is {profile.os}, {name} is for {' and '.join(target.systems)}"],
            "name a device that has it (`pocketglm devices`), or another target",
        )
    if target.graphs is None and options.delegate is not None:
        raise UsageError(
            f"{name} has no delegates, so no '{options.delegate}'", "leave --delegate out"
        )
    if target.graphs is None or target.supports(ckpt, options):
        return []
    check: Check = registry.load("checks", "placement")
    graphs = target.graphs(ckpt, options)
    placements = list(check.run(graphs, name, options.device))
    chosen = _chosen(placements, name, options) if options.delegate else _usual(placements, graphs)
    if not options.allow_fallback:
        for entry in chosen:
            if entry.judgement == "little" or not entry.lowered:
                message, hint = words(entry)
                raise PlacementError(
                    message, f"{hint}; or --allow-fallback to export it all the same"
                )
    return placements


def _usual(placements: Sequence[Placement], graphs: Sequence[Graph]) -> list[Placement]:
    """Those of the delegate that an app has unasked."""
    asked = [
        node.attributes["units"] for g in graphs for node in g.nodes if "units" in node.attributes
    ]
    if not asked:
        return [p for p in placements if p.delegate.endswith(f"-{_DEFAULT}")]
    return _best([p for p in placements if p.runs_on in _UNITS.get(str(asked[0]), ())])


def _best(placements: Sequence[Placement]) -> list[Placement]:
    """Of each graph the one that takes most."""
    best: dict[str, Placement] = {}
    for entry in placements:
        if entry.graph not in best or entry.share > best[entry.graph].share:
            best[entry.graph] = entry
    return list(best.values())


def _chosen(placements: Sequence[Placement], name: str, options: ExportOptions) -> list[Placement]:
    """Those of the delegate that is named: by its name, its end (`gpu`), or its unit (of several
    ways to an NPU the best one).
    """
    wanted = options.delegate
    found = [p for p in placements if p.delegate == wanted or p.delegate.endswith(f"-{wanted}")]
    found = found or _best([p for p in placements if p.runs_on == wanted])
    if not found:
        own, _ = find_profile(options.device or "")
        known = ", ".join(sorted({p.delegate for p in placements})) or "none"
        raise UsageError(
            f"{own} has no delegate '{options.delegate}' for {name}", f"known there: {known}"
        )
    return found


def warnings(placements: Sequence[Placement]) -> list[tuple[str, str]]:
    """(message, hint) of each delegate that would take less than nine tenths of the
    multiplications, or of a GPU's or NPU's that would be cut into more pieces than the model has
    blocks; the worst graph of each.
    """
    worst: dict[str, Placement] = {}
    for entry in placements:
        if entry.delegate not in worst or entry.share < worst[entry.delegate].share:
            worst[entry.delegate] = entry
    return [
        words(entry) for entry in worst.values() if entry.judgement != "good" or _in_pieces(entry)
    ]


def _in_pieces(entry: Placement) -> bool:
    blocks = sum(part.part.startswith("block.") for part in entry.parts)
    return entry.runs_on != "cpu" and entry.partitions > max(blocks, 1)


def words(entry: Placement) -> tuple[str, str]:
    """(what the delegate takes and what falls back first, what to change)."""
    message = (
        f"{entry.target} on {entry.device}: {entry.title} ({entry.accelerator}) would take "
        f"{100 * entry.share:.0f} % of the multiplications in {entry.graph}: {entry.taken} of "
        f"{entry.nodes} operators, in {_count(entry.partitions, 'piece')}"
    )
    other = "use another delegate of the device, or another target"
    if not entry.lowered:
        message += (
            f" of a file that is lowered for it, which the {entry.target} target does not write"
        )
    if not entry.left:
        return message, "" if entry.lowered else other
    first = entry.left[0]
    fall = "falls" if first.count == 1 else "fall"
    message += (
        f"; {_count(first.count, first.op)} {fall} back to the CPU, the first one in {first.part} "
        f"({first.first}): {first.because}"
    )
    return message, other if not entry.lowered else first.rewrite or other


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 and what.islower() else ''}"
