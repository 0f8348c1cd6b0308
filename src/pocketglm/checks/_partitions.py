"""The pieces of a graph that a delegate takes: as few as the order of the operators allows."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pocketglm.artifacts.graph import Graph


def pieces(graph: Graph, taken: Collection[int]) -> list[list[int]]:
    """Indices of the nodes of each piece that the delegate takes.

    In turns the nodes that it takes and the others run, each time all that can: whose inputs were
    made in an earlier turn or in this one. So TensorFlow Lite's PartitionGraphIntoIndependentNode
    Subsets works (`graph_info.cc`), and, beginning with what is taken, ONNX Runtime's
    CreateSupportedPartitions.
    """
    made_by = {name: index for index, node in enumerate(graph.nodes) for name in node.outputs}
    needs = [{made_by[name] for name in node.inputs if name in made_by} for node in graph.nodes]
    turn: dict[int, int] = {}
    found: list[list[int]] = []
    while len(turn) < len(graph.nodes):
        kind: bool | None = None
        piece: list[int] = []
        for index in range(len(graph.nodes)):  # in order, so that one pass is enough
            if index in turn or not needs[index] <= turn.keys():
                continue
            if kind is None:
                kind = index in taken
            if (index in taken) == kind:
                turn[index] = len(found)
                piece.append(index)
        if not piece:
            raise ValueError(f"the nodes of {graph.name} are in no order in which they can run")
        found.append(piece)
    return [piece for piece in found if piece[0] in taken]


def merged(
    graph: Graph, taken: Collection[int], groups: Mapping[int, int], keepers: Collection[int]
) -> list[list[int]]:
    """Indices of the nodes of each piece, as ExecuTorch's GroupBasedPartitioner forms them.

    From the last node back, each takes up every earlier one with which no path leads out of the
    piece and back into it. groups: nodes that stay with another one. keepers: nodes that keep the
    constants that they are the first to read; whoever else reads these counts as a reader of the
    node. Sets of nodes are the bits of whole numbers.
    """
    after, direct = _reach(graph)
    for index, others in _sharers(graph, keepers).items():
        direct[index] |= others
    units: dict[int, int] = {}
    for index in sorted(taken, reverse=True):
        owner = _owner(index, groups)
        units[owner] = units.get(owner, 0) | 1 << index
    waiting = list(units.values())
    found = []
    while waiting:
        piece, rest = waiting[0], []
        users = _join(direct, piece)
        for other in waiting[1:]:
            both = piece | other
            reached = users | _join(direct, other)
            if _join(after, reached & ~both) & both:
                rest.append(other)
            else:
                piece, users = both, reached
        found.append([i for i in range(len(graph.nodes)) if piece >> i & 1])
        waiting = rest
    return sorted(found)


def _sharers(graph: Graph, keepers: Collection[int]) -> dict[int, int]:
    """Of each keeper the other nodes that read its constants."""
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        for name in node.inputs:
            if name and graph.values[name].constant:
                readers.setdefault(name, []).append(index)
    found: dict[int, int] = {}
    for indices in readers.values():
        first = next((index for index in indices if index in keepers), None)
        if first is not None:
            others = sum(1 << index for index in set(indices) - {first})
            found[first] = found.get(first, 0) | others
    return found


def _owner(index: int, groups: Mapping[int, int]) -> int:
    while index in groups:
        index = groups[index]
    return index


def _reach(graph: Graph) -> tuple[list[int], list[int]]:
    """Of each node those that follow from it, and those that read it."""
    count = len(graph.nodes)
    made_by = {name: index for index, node in enumerate(graph.nodes) for name in node.outputs}
    direct = [0] * count
    for index, node in enumerate(graph.nodes):
        for name in node.inputs:
            if name in made_by:
                direct[made_by[name]] |= 1 << index
    after = list(direct)
    for index in reversed(range(count)):
        after[index] |= _join(after, direct[index])
    return after, direct


def _join(sets: list[int], members: int) -> int:
    """The union of the sets of all members."""
    union = 0
    while members:
        lowest = members & -members
        union |= sets[lowest.bit_length() - 1]
        members ^= lowest
    return union
