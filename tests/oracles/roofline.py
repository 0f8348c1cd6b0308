"""Times and memory of a model on a device, written anew from docs/cost-model.md in float64.

Nothing here is imported from the package: plain numbers in, plain numbers out.
"""

from __future__ import annotations


def peak_of_cores(clusters: list[tuple[float, int, float]], threads: int, per_pipe: float) -> float:
    """Operations a second of the fastest `threads` cores. clusters: (pipes, cores, GHz)."""
    cores = sorted(
        (pipes * ghz for pipes, count, ghz in clusters for _ in range(count)), reverse=True
    )
    return sum(cores[:threads]) * 1e9 * per_pipe * 2


def one_pass(
    *,
    tokens: int,
    body: float,
    layers: int,
    width: int,
    causal: bool,
    read: float,
    nodes: int,
    bandwidth: float,
    peak: float,
    memory: float,
    share: float,
    node: float,
) -> float:
    """Seconds of a prompt or a text."""
    scores = sum((position + 0.5 if causal else tokens) for position in range(tokens))
    operations = 2 * body * tokens + 4 * layers * width * scores
    return read / (memory * bandwidth) + operations / (share * peak) + nodes * node


def one_token(
    *,
    body: float,
    read: float,
    kv: float,
    cached: list[int],
    nodes: int,
    bandwidth: float,
    peak: float,
    memory: float,
    cache: float,
    share: float,
    node: float,
) -> float:
    """Mean seconds of a token of an answer whose tokens find `cached` positions each."""
    total = 0.0
    for positions in cached:
        moved = read + cache * kv * positions
        total += moved / (memory * bandwidth) + 2 * body / (share * peak) + nodes * node
    return total / len(cached)
