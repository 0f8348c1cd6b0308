"""Which operators of an export will run on an accelerator, before it is made.

The graphs that a target will write, the rules of the delegates that a device has (`rules/*.yaml`,
each with its source), and how a delegate cuts a graph into pieces. Rules of XNNPACK are compared
with the real runtimes node by node in the tests; the others say how they are known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from pocketglm.artifacts.graph import Graph
from pocketglm.artifacts.placement import Judgement, PartShare, Placement, Rest
from pocketglm.checks._devices import delegates, facts
from pocketglm.checks._partitions import merged, pieces
from pocketglm.checks._rules import Refusal, Rules, Scalar, holds, refusal, scene_of, unowned
from pocketglm.contracts import Check
from pocketglm.devices.profile import find_profile

GOOD, LITTLE = 0.9, 0.5  # shares of the multiplications


def assign(
    rules: Rules, graph: Graph, device: Mapping[str, Scalar]
) -> tuple[set[int], dict[int, Refusal]]:
    """Indices of the nodes that the delegate takes, and why it leaves the others.

    An operator that the delegate runs once, at loading, is taken if all that read it are; one that
    belongs to another (`follows`), if that is.
    """
    scene, unpacked = scene_of(graph, device), dict[str, int]()
    values = dict(graph.values)
    for index, node in enumerate(graph.nodes):
        if node.op in rules.unpacks and holds(rules.unpacks[node.op], node, scene):
            for name in node.outputs:
                values[name] = replace(values[name], constant=True)
                unpacked[name] = index
    scene = replace(scene, values=values)
    left: dict[int, Refusal] = {}
    follows: list[int] = []
    for index, node in enumerate(graph.nodes):
        if index in unpacked.values():
            continue
        if node.op in rules.follows:
            follows.append(index)
        elif reason := refusal(rules, node, scene):
            left[index] = reason
            for name in node.inputs:
                if name in unpacked:
                    left[unpacked[name]] = reason
    _follow(rules, graph, follows, left)
    return set(range(len(graph.nodes))) - left.keys(), left


def _follow(rules: Rules, graph: Graph, follows: Sequence[int], left: dict[int, Refusal]) -> None:
    """Leave those of `follows` that belong to nothing that is taken."""
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        for name in node.inputs:
            readers.setdefault(name, []).append(index)
    for index in reversed(follows):
        node = graph.nodes[index]
        reading = [i for name in node.outputs for i in readers.get(name, ())]
        owners = [i for i in reading if graph.nodes[i].op in rules.follows[node.op]]
        if all(i in left for i in owners):
            blamed = [*owners, *(i for i in reading if i in left)]
            left[index] = left[blamed[0]] if blamed else unowned(rules, node)


def place(
    name: str, rules: Rules, graph: Graph, device: Mapping[str, Scalar], where: tuple[str, str]
) -> Placement:
    """One delegate's share of one graph. where: the device's name, and that of the unit in it."""
    taken, left = assign(rules, graph, device)
    parts = _parts(graph, taken)
    macs, macs_taken = sum(p.macs for p in parts), sum(p.macs_taken for p in parts)
    share = macs_taken / macs if macs else len(taken) / max(len(graph.nodes), 1)
    return Placement(
        target=rules.target,
        device=where[0],
        delegate=name,
        title=rules.title,
        lowered=rules.lowered,
        runs_on=rules.runs_on,
        accelerator=where[1],
        graph=graph.name,
        nodes=len(graph.nodes),
        taken=len(taken),
        partitions=len(pieces_of(rules, graph, taken)),
        macs=macs,
        macs_taken=macs_taken,
        parts=parts,
        left=_rest(graph, left),
        evidence=rules.evidence,
        judgement=judge(share),
        note=rules.note,
    )


def pieces_of(rules: Rules, graph: Graph, taken: Collection[int]) -> list[list[int]]:
    """The connected pieces that the delegate gets, as indices of nodes."""
    if rules.partitions == "turns":
        return pieces(graph, taken)
    first: dict[str, int] = {}  # to read a value
    for index, node in enumerate(graph.nodes):
        for name in node.inputs:
            first.setdefault(name, index)
    groups = {}
    for index in taken:
        node = graph.nodes[index]
        reading = [first[name] for name in node.outputs if name in first]
        if node.op in rules.follows and reading:
            groups[index] = min(reading)
    keepers = {index for index in taken if graph.nodes[index].op in rules.keepers}
    return merged(graph, taken, groups, keepers)


def judge(share: float) -> Judgement:
    """What a share of the multiplications is called."""
    return "little" if share < LITTLE else "partial" if share < GOOD else "good"


def _parts(graph: Graph, taken: Collection[int]) -> list[PartShare]:
    """In the order of the model."""
    found: dict[str, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        counts = found.setdefault(node.part, [0, 0, 0, 0])
        for place, value in ((0, 1), (2, node.macs)):
            counts[place] += value
            counts[place + 1] += value if index in taken else 0
    return [
        PartShare(part=part, nodes=n, taken=t, macs=m, macs_taken=mt)
        for part, (n, t, m, mt) in found.items()
    ]


def _rest(graph: Graph, left: Mapping[int, Refusal]) -> list[Rest]:
    groups: dict[tuple[str, Refusal], list[int]] = {}
    for index in sorted(left):
        groups.setdefault((graph.nodes[index].op, left[index]), []).append(index)
    rest = [
        Rest(
            op=op,
            count=len(indices),
            first=_label(graph, indices[0]),
            part=graph.nodes[indices[0]].part,
            macs=sum(graph.nodes[i].macs for i in indices),
            **reason.model_dump(),
        )
        for (op, reason), indices in groups.items()
    ]
    return sorted(rest, key=lambda entry: (-entry.macs, -entry.count))


def _label(graph: Graph, index: int) -> str:
    """A node as a person finds it: by the weight that it reads, or that is unpacked for it; else by
    its own name.
    """
    node = graph.nodes[index]
    makers = [other for other in graph.nodes if set(other.outputs) & set(node.inputs)]
    for name in (*node.inputs, *(name for maker in makers for name in maker.inputs)):
        if name and graph.values[name].constant and len(graph.values[name].shape) > 1:
            return graph.values[name].name
    return node.name


def run(graphs: Sequence[Graph], target: str, device: str) -> list[Placement]:
    """Every delegate that the device has, on every graph.

    Raises:
        UsageError: there is no such device.
    """
    name, profile = find_profile(device)
    known = facts(profile)
    return [
        place(delegate, rules, graph, known, (name, unit))
        for delegate, (rules, unit) in delegates(target, profile).items()
        for graph in graphs
    ]


SPEC = Check(
    summary="which operators run on the accelerator of a device, and which fall back to its CPU",
    run=run,
)
