"""A list scheduler: any routes, any placement; whoever is idle takes the most urgent op that is ready.

Backwards come before forwards, lower microbatches before higher ones. Memory is kept by a hard limit on the activations
a worker holds. A limit alone could deadlock where routes differ (two microbatches, each holding what the other needs
next), so a forward is granted only if afterwards all microbatches under way could still finish one after another: the
banker's algorithm (Dijkstra, EWD 108). With the limits p - i of 1F1B on a chain, this reproduces 1F1B.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from pipeline.schedule.ops import B, F, I, Key, Op, Route, Schedule, Span, W, overlaps, route_needs

Place = Callable[[Span, int], int]
"""(span, microbatch) -> the worker that runs it."""


_URGENCY = {B: 0, I: 0, F: 1, W: 2}


def unit_seconds(kind: str, span: Span) -> float:
    """A forward takes 1, a backward 2 and each of its halves 1, whatever the span."""
    return 2.0 if kind == B else 1.0


def greedy(
    routes: Sequence[Route],
    place: Place,
    *,
    seconds: Callable[[str, Span], float] = unit_seconds,
    hop: Callable[[int, int], float] | None = None,
    limits: Mapping[int, int] | None = None,
    workers: Sequence[int] = (),
    split: bool = False,
    name: str = "greedy",
) -> Schedule:
    """Lanes for `routes`, from a run under the given times; the lanes are valid under any other times too.

    `seconds(kind, span)` is what an op takes, `hop(source, target)` what its output then takes to another worker.
    `limits[w]` is the most activations, one per span and microbatch, that worker w may hold; missing: any number.
    `workers` get a lane even if nothing is placed on them. With `split`, backwards are I and W, and W fills gaps.
    Time grows with ops times workers: meant for tens. Raises ValueError where one microbatch alone exceeds a limit.
    """
    needs = [route_needs(route) for route in routes]
    missing: dict[Key, int] = {}
    followers: dict[Key, list[Key]] = defaultdict(list)
    named = {F: F, B: I if split else B}
    for m, needed in enumerate(needs):
        for (kind, span), sources in needed.items():
            missing[key := (named[kind], span, m)] = len(sources)
            for other, other_span in sources:
                followers[named[other], other_span, m].append(key)
            if split and kind == B:
                missing[W, span, m] = 1
                followers[key].append((W, span, m))
    where = {key: place(key[1], key[2]) for key in missing}
    bank = _Bank(routes, where, limits or {}, last=W if split else B)

    lanes: dict[int, list[Op]] = {w: [] for w in sorted({*workers, *where.values()})}
    ready: dict[int, list[tuple[int, int, int, Key]]] = {w: [] for w in lanes}  # sorted by urgency
    depth = {key: i for i, key in enumerate(missing)}  # among equals: further along its route
    busy: set[int] = set()
    # at one moment: workers come free (0), then outputs arrive (1)
    events: list[tuple[float, int, int, Key]] = [(0.0, 1, depth[key], key) for key, n in missing.items() if n == 0]
    arrival: dict[Key, float] = defaultdict(float)
    heapq.heapify(events)
    while events:
        now = events[0][0]
        while events and events[0][0] == now:
            _, arrived, _, key = heapq.heappop(events)
            worker = where[key]
            if arrived:
                _insert(ready[worker], (_URGENCY[key[0]], key[2], -depth[key], key))
                continue
            busy.remove(worker)
            bank.done(key)
            for follower in followers[key]:
                delay = hop(worker, where[follower]) if hop and where[follower] != worker else 0.0
                arrival[follower] = max(arrival[follower], now + delay)
                missing[follower] -= 1
                if missing[follower] == 0:
                    heapq.heappush(events, (arrival[follower], 1, depth[follower], follower))
        for worker, waiting in ready.items():
            if worker in busy:
                continue
            chosen = next((i for i, (*_, key) in enumerate(waiting) if bank.grant(key)), None)
            if chosen is not None:
                key = waiting.pop(chosen)[-1]
                busy.add(worker)
                lanes[worker].append(Op(*key))
                heapq.heappush(events, (now + seconds(key[0], key[1]), 0, depth[key], key))
    return Schedule(tuple(routes), {worker: tuple(lane) for worker, lane in lanes.items()}, name)


def _insert(waiting: list[tuple[int, int, int, Key]], entry: tuple[int, int, int, Key]) -> None:
    waiting.append(entry)
    waiting.sort()


class _Bank:
    """Lends activation slots so that every microbatch under way can always finish."""

    def __init__(
        self, routes: Sequence[Route], where: Mapping[Key, int], limits: Mapping[int, int], last: str
    ) -> None:  # fmt: skip
        self._free = dict(limits)
        self._where = where
        self._held: dict[int, Counter[int]] = {}  # microbatch under way -> worker -> slots it holds
        self._open: dict[int, Counter[int]] = {}  # microbatch under way -> worker -> slots it has yet to take
        self._releases: dict[Key, list[int]] = defaultdict(list)  # the last backward of a forward -> where that was
        self._whole: list[Counter[int]] = []
        for m, route in enumerate(routes):
            whole: Counter[int] = Counter()
            for span in route.forward if route.backward else ():
                worker = where[F, span, m]
                if worker in limits:
                    whole[worker] += 1
                    end = max(i for i, s in enumerate(route.backward) if overlaps(s, span))
                    self._releases[last, route.backward[end], m].append(worker)
            for worker, slots in whole.items():
                if slots > limits[worker]:
                    raise ValueError(
                        f"limits[{worker}]: {limits[worker]}, but microbatch {m} alone holds {slots} activations there"
                    )
            self._whole.append(whole)

    def grant(self, key: Key) -> bool:
        """Take the slot of a forward, if it is there and all could still finish; other ops need none."""
        kind, _, m = key
        worker = self._where[key]
        if kind != F or not self._whole[m][worker]:
            return True
        if self._free[worker] < 1:
            return False
        held = self._held.setdefault(m, Counter())
        still = self._open.setdefault(m, Counter(self._whole[m]))
        held[worker] += 1
        still[worker] -= 1
        self._free[worker] -= 1
        if self._safe(m):
            return True
        held[worker] -= 1
        still[worker] += 1
        self._free[worker] += 1
        if not held.total():
            del self._held[m], self._open[m]
        return False

    def done(self, key: Key) -> None:
        """Give back the slots that this op was the last to need."""
        for worker in self._releases.get(key, ()):
            self._free[worker] += 1
            held = self._held[key[2]]
            held[worker] -= 1
            if not held.total() and not self._open[key[2]].total():
                del self._held[key[2]], self._open[key[2]]

    def _safe(self, asking: int) -> bool:
        """Whether microbatch `asking` can finish after some others have; the state before its grant was safe."""
        free, left = dict(self._free), dict.fromkeys(self._open)
        while True:
            able = [m for m in left if all(slots <= free[w] for w, slots in self._open[m].items())]
            if asking in able:
                return True
            if not able:
                return False
            for m in able:
                del left[m]
                for worker, slots in self._held[m].items():
                    free[worker] += slots
