"""How much a worker holds at its fullest: a forward leaves its activations, the last backward over them frees them.

In lane order this can be proved without knowing any time, and is what the verifier does. Where what a worker holds is
freed by another worker, or parameters come and go beside the work, only times tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pipeline.schedule.graph import Graph
from pipeline.schedule.ops import Span

Size = Callable[[Span], float]
"""What the activations of one microbatch on a span count."""

Change = tuple[float, float]
"""(time, what is added): negative where something is freed."""


def lane_peaks(graph: Graph, size: Size | None = None) -> dict[int, float]:
    """Worker -> the most it holds at any point of its lane; each span and microbatch counts 1 unless `size` is given.

    What another worker's op frees counts to the end of the lane, so the result is a bound whatever the times.
    """
    peaks: dict[int, float] = {}
    for worker, lane in graph.lanes.items():
        held = peak = 0.0 if size else 0
        leaving: dict[int, float] = {}
        for i in lane:
            freeing = graph.frees.get(i)
            if freeing is not None:
                amount = size(graph.ops[i].span) if size else 1
                held += amount
                peak = max(peak, held)
                if freeing and all(j in lane for j in freeing):
                    j = max(freeing)
                    leaving[j] = leaving.get(j, 0) + amount
            elif i in leaving:
                held -= leaving[i]
        peaks[worker] = peak
    return peaks


def timed_peaks(
    graph: Graph,
    start: Sequence[float],
    end: Sequence[float],
    size: Size | None = None,
    more: Mapping[int, Sequence[Change]] | None = None,
) -> dict[int, float]:
    """Worker -> the most it holds at any time, with op i running from `start[i]` to `end[i]`; `more` comes on top."""
    peaks: dict[int, float] = {}
    for worker, lane in graph.lanes.items():
        changes = list((more or {}).get(worker, ()))
        for i in lane:
            freeing = graph.frees.get(i)
            if freeing is not None:
                amount = size(graph.ops[i].span) if size else 1
                changes.append((start[i], amount))
                if freeing:
                    changes.append((max(end[j] for j in freeing), -amount))
        held = peak = 0
        for _, amount in sorted(changes):  # at one moment what is freed goes first
            held += amount
            peak = max(peak, held)
        peaks[worker] = peak
    return peaks


def crosses(graph: Graph) -> bool:
    """Whether any worker's activations are freed by another worker's op."""
    workers = graph.workers
    return any(workers[j] != workers[i] for i, freeing in graph.frees.items() for j in freeing)
