"""A schedule compiled to numbers: ops become indices, what they wait for becomes tuples of indices.

Verifier, simulator and lowering ask the same two questions half a million times: what does this op wait for, and in
which order can everything run? Both are answered once, here; the answers come from `schedule.deps` and the lanes.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property

from pipeline.schedule.ops import (
    COMPUTE,
    LOAD,
    OFFLOAD,
    STEP,
    B,
    F,
    Op,
    R,
    Schedule,
    ScheduleError,
    Span,
    W,
    deps,
    overlaps,
)


def compiled(schedule: Schedule) -> Graph:
    """The graph of a schedule, made once for all who read it. Raises ScheduleError as Graph does."""
    kept = vars(schedule)  # beside its cached properties
    if "graph" not in kept:
        kept["graph"] = Graph(schedule)
    return kept["graph"]


_SHOWN = 12  # links of a cycle that a message tells; a cycle through hundreds of workers helps nobody


class Graph:
    """The ops of all lanes, lane after lane, by index.

    `ops[i]` runs on `workers[i]`; `lanes[w]` is the range of indices of worker w, in lane order. `waits[i]` are the
    ops that i waits for, without those that precede it in its own lane. `feeds[i]` are the other workers that receive
    the output of i: over a SEND, or from the compute op itself where transfers are implied.
    Raises ScheduleError for an op that stands in the lanes twice or that waits for one that no lane holds.
    """

    def __init__(self, schedule: Schedule) -> None:
        nodes = list(schedule.ops())
        index = {node: i for i, node in enumerate(nodes)}
        _refuse_twins(schedule)
        self.schedule = schedule
        self.ops: list[Op] = [op for _, op in nodes]
        self.workers: list[int] = [worker for worker, _ in nodes]
        self.lanes: dict[int, range] = {}
        start = 0
        for worker, lane in schedule.lanes.items():
            self.lanes[worker] = range(start, start + len(lane))
            start += len(lane)
        self.waits: list[tuple[int, ...]] = []
        self.feeds: dict[int, tuple[int, ...]] = {}
        feeds = self.feeds
        for i, (worker, op) in enumerate(nodes):
            ahead: list[int] = []
            for node in deps(schedule, worker, op):
                j = index.get(node)
                if j is None:
                    raise ScheduleError(
                        f"{op} of worker {worker} waits for {node[1]} of worker {node[0]}, which is not there"
                    )
                if node[0] == worker and j < i:
                    continue
                ahead.append(j)
                if node[0] != worker and op[0] != STEP and worker not in (known := feeds.get(j, ())):
                    feeds[j] = (*known, worker)
            self.waits.append(tuple(ahead))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The indices in an order in which all ops can run. Raises ScheduleError, telling who waits for whom.

        Lanes are walked until they must wait, and taken up again by the op that they wait for: Kahn's algorithm with
        one ready list per lane, deterministic, linear in ops and waits.
        """
        done = bytearray(len(self.ops))
        order: list[int] = []
        at = {worker: lane.start for worker, lane in self.lanes.items()}
        waiting: dict[int, list[int]] = {}
        ready = deque(self.lanes)
        while ready:
            worker = ready.popleft()
            i, end = at[worker], self.lanes[worker].stop
            while i < end:
                blocker = next((j for j in self.waits[i] if not done[j]), None) if self.waits[i] else None
                if blocker is not None:
                    waiting.setdefault(blocker, []).append(worker)
                    break
                done[i] = 1
                order.append(i)
                if i in waiting:
                    ready.extend(waiting.pop(i))
                i += 1
            at[worker] = i
        if len(order) < len(self.ops):
            raise ScheduleError(
                self._deadlock({self.workers[at[w]]: (at[w], j) for j, ws in waiting.items() for w in ws})
            )
        return tuple(order)

    @cached_property
    def frees(self) -> dict[int, tuple[int, ...]]:
        """F of a route that comes back -> the ops after the last of which its activations are gone.

        That is the B, or W, of the same span; where backward spans are cut differently, of all that overlap it, unless
        they recompute it: then it leaves nothing. What a forward that is run again leaves goes with the backward of its
        span, or, on a copy, with the last backward of its microbatch in its lane: by then it was not needed.
        """
        last = {op[:3]: i for i, op in enumerate(self.ops) if op[0] == B or op[0] == W}
        ends: dict[tuple[int, int], tuple[int, ...]] = {}  # (worker, microbatch) -> the last backward in its lane
        again = {op[1:3] for op in self.ops if op[0] == R}
        if again:
            ends = {(self.workers[j], m): (j,) for (_, _, m), j in last.items()}
        over: dict[tuple[int, Span], tuple[Span, ...]] = {}
        found: dict[int, tuple[int, ...]] = {}
        for i, (kind, span, m, _, _) in enumerate(self.ops):
            if kind == F and (backward := self.schedule.routes[m].backward):
                spans = over.get((id(backward), span))
                if spans is None:
                    spans = over[id(backward), span] = tuple(s for s in backward if overlaps(s, span))
                if again and span not in spans and all((s, m) in again for s in spans):
                    continue
                freeing = (last.get((B, s, m), last.get((W, s, m), -1)) for s in spans)
                found[i] = tuple(j for j in freeing if j >= 0)
            elif kind == R:
                own = last.get((B, span, m), -1)
                here = own >= 0 and self.workers[own] == self.workers[i]
                found[i] = (own,) if here else ends.get((self.workers[i], m), ())
        return found

    def _deadlock(self, stuck: dict[int, tuple[int, int]]) -> str:
        """Who waits for whom, in a circle. `stuck`: worker -> (the op it stands at, the op that one waits for)."""
        worker, path = min(stuck), []
        while worker not in path:
            path.append(worker)
            worker = self.workers[stuck[worker][1]]
        circle = path[path.index(worker) :]
        parts: list[str] = []
        for worker in circle[:_SHOWN]:
            here, there = stuck[worker]
            other = self.workers[there]
            behind = stuck[other][0]
            place = f"lane {other}" if other != worker else "its own lane"
            start = f"worker {worker} waits at {self.ops[here]} for" if not parts else "which waits for"
            parts.append(
                f"{start} {self.ops[there]}"
                + (f", which stands in {place} behind {self.ops[behind]}" if behind != there else f" of worker {other}")
            )
        more = len(circle) - _SHOWN
        tail = f", and so on through {more} more workers" if more > 0 else ": a circle"
        return f"deadlock: {', '.join(parts)}{tail}"


def _refuse_twins(schedule: Schedule) -> None:
    """Every op but LOAD and OFFLOAD stands in the lanes once: a compute op in all, any other in its own lane."""
    compute = len(schedule.nodes) + len(schedule.others)
    if compute == sum(len(lane) for lane in schedule.lanes.values()):
        return
    seen: dict[object, int] = {}
    for worker, op in schedule.ops():
        if op.kind in (LOAD, OFFLOAD):
            continue
        key = op[:3] if op.kind in COMPUTE else (worker, op)
        if key in seen:
            raise ScheduleError(f"{op} of worker {worker} stands in the lane of worker {seen[key]} already")
        seen[key] = worker
