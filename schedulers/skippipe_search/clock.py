"""Times paths through the network: every node takes what has come first, or what is furthest along its path.

One event loop over plain numbers, since a search asks it thousands of times. A forward starts only while its node has
a free memory slot, which its backward gives back; paths that swap stages can lock each other out, and are told so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

from schedulers.skippipe_search.problem import Path, RoutingProblem

Rule = Literal["first come", "furthest"]
"""Whom an idle node serves: who has come first, or who is furthest along its path."""

RULES: tuple[Rule, ...] = ("first come", "furthest")
STUCK = float("inf")
TIE_S = 1e-9
"""A node chooses when all that comes in the same moment is there."""
IDLE, FREED, CHOOSE = -1, -2, -3  # events of a node: its op is over, and a memory slot is free too, it takes its next


@dataclass(frozen=True)
class Run:
    """`finish[m]`: when microbatch m is through, STUCK if never. `lanes[n]`: (microbatch, position) in the order in
    which node n takes them: positions 0 to L-1 are forwards, L the loss, L+1 to 2L backwards, L the path's length."""

    finish: tuple[float, ...]
    lanes: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def iteration_s(self) -> float:
        return max(self.finish)


def clock(problem: RoutingProblem, paths: Sequence[Path], rule: Rule = "first come") -> Run:
    """One iteration, with the order of every node."""
    lanes: list[list[tuple[int, int]]] = [[] for _ in problem.hop_s]
    finish = PathClock(problem).finish(paths, rule, lanes)
    return Run(tuple(finish), tuple(map(tuple, lanes)))


class PathClock:
    """The event loop, with everything that does not change between two questions looked up before."""

    def __init__(self, problem: RoutingProblem) -> None:
        self.hop, self.gap, self.slots = problem.hop_s, problem.gap_s, problem.slots
        self.times = [
            tuple(problem.seconds(kind, n) for kind in ("forward", "loss", "backward")) for n in range(len(self.hop))
        ]
        self.contention = problem.contention

    def best(self, paths: Sequence[Path]) -> tuple[float, Rule]:
        """Seconds of the iteration under the better rule, and which that is."""
        ends: list[tuple[float, Rule]] = [(max(self.finish(paths, rule)), rule) for rule in RULES]
        return min(ends, key=lambda each: each[0])

    def finish(
        self, paths: Sequence[Path], rule: Rule = "first come", lanes: list[list[tuple[int, int]]] | None = None
    ) -> list[float]:
        """When each microbatch is through; STUCK for those that never are. `lanes` are added to, if given."""
        hop, gap, times, contention = self.hop, self.gap, self.times, self.contention
        furthest = rule == "furthest"
        size = len(hop)
        slots, busy = list(self.slots), [False] * size
        waiting: list[list[tuple[float, float, int]]] = [[] for _ in range(size)]
        links: dict[tuple[int, int], float] = {}
        finish = [STUCK] * len(paths)
        stops = [(*path, path[0], *path[::-1]) for path in paths]
        lengths = [len(path) for path in paths]
        # (time, number, position at which a microbatch arrives, or what happens to a node; the microbatch, or the node)
        events: list[tuple[float, int, int, int]] = [(0.0, m, 0, m) for m in range(len(paths))]
        number = len(paths)
        while events:
            now, _, at, m = heappop(events)
            if at >= 0:
                node = stops[m][at]
                waiting[node].append((-at, now, m) if furthest else (now, -at, m))
                if busy[node]:
                    continue
                heappush(events, (now + TIE_S, 0, CHOOSE, node))
                continue
            node = m
            if at != CHOOSE:
                busy[node] = False
                if at == FREED:
                    slots[node] += 1
                heappush(events, (now + TIE_S, 0, CHOOSE, node))
                continue
            if busy[node]:
                continue
            now -= TIE_S
            queue = waiting[node]
            if not queue:
                continue
            if slots[node]:
                chosen = min(queue)
            else:  # who holds a slot here already
                held = [e for e in queue if -(e[0] if furthest else e[1]) >= lengths[e[2]]]
                if not held:
                    continue
                chosen = min(held)
            queue.remove(chosen)
            at, m = -int(chosen[0] if furthest else chosen[1]), chosen[2]
            length = lengths[m]
            code = IDLE
            if at < length:
                slots[node] -= 1
                end = now + times[node][0]
            elif at == length:
                end = now + times[node][1]
            else:
                code = FREED
                end = now + times[node][2]
            busy[node] = True
            if lanes is not None:
                lanes[node].append((m, at))
            number += 2
            if at < 2 * length:
                target = stops[m][at + 1]
                arrival = end
                if target != node:
                    if contention:
                        arrival = max(end, links.get((node, target), 0.0))
                        links[node, target] = arrival + hop[node][target]
                    arrival += hop[node][target]
                heappush(events, (arrival, number, at + 1, m))
            else:
                finish[m] = end
            heappush(events, (end + gap, number + 1, code, node))
        return finish
