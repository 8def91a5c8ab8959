"""Times a schedule under given costs and links, without running it. The result is a plan, not a measurement.

The ops of a lane run one after another. What crosses workers occupies a link, one transfer at a time per direction, in
the order in which its source made it: from its SEND, or, before lowering, from the end of the op. The lanes thus fix
every order, so one pass over the ops in a valid order yields all times: no event queue, no ties, no randomness.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from pipeline.garbage import no_collection
from pipeline.schedule.costs import CostError, Costs, Network
from pipeline.schedule.graph import Graph, compiled
from pipeline.schedule.memory import Change, crosses, lane_peaks, timed_peaks
from pipeline.schedule.ops import COMPUTE, LOAD, OFFLOAD, RECV, REDUCE, SEND, STEP, F, Op, Schedule, Span
from pipeline.schedule.timeline import Event, Timeline, Transfer

__all__ = ["CostError", "Costs", "Network", "simulate"]


@no_collection()
def simulate(schedule: Schedule, costs: Costs, network: Network | None = None) -> Timeline:
    """The timeline of one iteration; without `network`, transfers take no time.

    LOAD, OFFLOAD and REDUCE run beside the compute of their lane: an op waits for the LOAD of its span, a STEP for the
    sum of its span's gradient over all holders. Ops other than compute are events where they take time.
    `peak_bytes` is given where `costs` say what anything takes. Raises ScheduleError for a schedule that cannot run,
    telling who waits for whom, and CostError for a cost or a link that is missing.
    """
    graph = compiled(schedule)
    run = _Run(graph, costs, network)
    run.walk()
    timed = crosses(graph)
    peaks = timed_peaks(graph, run.start, run.end) if timed else lane_peaks(graph)
    return Timeline(
        schedule.name, run.events(), tuple(run.transfers), {w: int(n) for w, n in peaks.items()},
        _peak_bytes(graph, costs, run, timed), workers=tuple(graph.lanes),
    )  # fmt: skip


@dataclass
class _Run:
    """The state of the one pass: `start[i]` and `end[i]` of every op, and until when each resource is taken."""

    graph: Graph
    costs: Costs
    network: Network | None
    start: list[float] = field(init=False)
    end: list[float] = field(init=False)
    transfers: list[Transfer] = field(default_factory=list)
    arrival: dict[tuple[int, int], float] = field(default_factory=dict)  # (op that made or sent it, worker) -> time
    link_free: dict[tuple[int, int], float] = field(default_factory=dict)
    copy_free: dict[tuple[int, str], float] = field(default_factory=dict)
    loaded: dict[tuple[int, Span], float] = field(default_factory=dict)
    reduced: dict[Span, float] = field(default_factory=dict)  # when the last holder so far had its gradient ready

    def walk(self) -> None:
        graph, arrival, loaded = self.graph, self.arrival, self.loaded
        ops, workers, waits, feeds = graph.ops, graph.workers, graph.waits, graph.feeds
        start = self.start = [0.0] * len(ops)
        end = self.end = [0.0] * len(ops)
        free = dict.fromkeys(graph.lanes, 0.0)
        seconds: dict[tuple[str, Span], float] = {}
        speed = {worker: self.costs.speed.get(worker, 1.0) for worker in graph.lanes}
        gap, last = self.costs.gap_s, dict[int, tuple[int, Span]]()  # worker -> what its last compute op was of
        for i in graph.order:
            op, worker = ops[i], workers[i]
            kind, span = op[0], op[1]
            begin = free[worker]
            if kind in COMPUTE:
                if gap:
                    if worker in last and (waits[i] or last[worker] != (op[2], span)):
                        begin += gap
                    last[worker] = op[2], span
                for j in waits[i]:
                    if (there := arrival[j, worker]) > begin:
                        begin = there
                if loaded and (there := loaded.get((worker, span), 0.0)) > begin:
                    begin = there
                took = seconds.get((kind, span))
                if took is None:
                    took = seconds[kind, span] = self.costs.seconds(kind, span)
                start[i] = begin
                free[worker] = end[i] = begin + took / speed[worker]
                if i in feeds:
                    for target in feeds[i]:
                        self._transfer(i, op, worker, target, end[i])
            elif kind == RECV:
                start[i] = begin
                free[worker] = end[i] = max(begin, arrival[waits[i][0], worker])
            elif kind == SEND:
                start[i] = end[i] = begin
                assert op.of is not None
                self._transfer(i, op.of, worker, op.peer, begin)
            elif kind in (LOAD, OFFLOAD):
                self._copy(i, op, worker, begin)
            elif kind == REDUCE:
                start[i] = end[i] = begin
                self.reduced[span] = max(begin, self.reduced.get(span, 0.0))
            elif kind == STEP:
                if span in self.reduced:
                    begin = max(begin, self.reduced[span] + self._reduce_s(span))
                start[i] = begin
                free[worker] = end[i] = begin + self.costs.of("step_s", span)
        for i, op in enumerate(ops):
            if op[0] == REDUCE:  # a sum starts for all when the last of them is there
                start[i] = self.reduced[op.span]
                end[i] = start[i] + self._reduce_s(op.span)

    def _reduce_s(self, span: Span) -> float:
        return self.costs.of("reduce_s", span) if len(self.graph.schedule.holders.get(span, ())) > 1 else 0.0

    def _transfer(self, i: int, made: Op, source: int, target: int, ready: float) -> None:
        began = arrived = ready
        if self.network is not None:
            costs = self.costs
            size = costs.output_bytes if made[0] == F or costs.gradient_bytes is None else costs.gradient_bytes
            held, hop = self.network.hop(source, target, size)
            began = max(ready, self.link_free.get((source, target), 0.0))
            self.link_free[source, target] = began + held
            arrived = began + hop
        self.arrival[i, target] = arrived
        self.transfers.append(Transfer(source, target, made, began, arrived))

    def _copy(self, i: int, op: Op, worker: int, ready: float) -> None:
        """Between a worker and host memory, beside its compute, one at a time per direction."""
        size = self.costs.of("parameter_bytes", op.span)
        self.start[i] = max(ready, self.copy_free.get((worker, op.kind), 0.0))
        self.end[i] = self.copy_free[worker, op.kind] = self.start[i] + size / self.costs.host_bandwidth
        if op.kind == LOAD:
            self.loaded[worker, op.span] = self.end[i]

    def events(self) -> tuple[Event, ...]:
        rows = zip(self.graph.workers, self.graph.ops, self.start, self.end, strict=True)
        return tuple(
            Event(worker, op, start, end)
            for worker, op, start, end in rows
            if op[0] in COMPUTE or (end > start and op[0] != RECV)
        )


def _peak_bytes(graph: Graph, costs: Costs, run: _Run, timed: bool) -> dict[int, float]:
    """Activations and parameters at the fullest. What a lane loads comes and goes; all else of its spans stays."""
    if costs.activation_bytes == 0 and costs.parameter_bytes == 0:
        return {}
    copied: dict[int, set[Span]] = defaultdict(set)
    changes: dict[int, list[Change]] = defaultdict(list)
    for i, op in enumerate(graph.ops):
        if op[0] == LOAD or op[0] == OFFLOAD:
            worker, moved = graph.workers[i], costs.of("parameter_bytes", op.span)
            copied[worker].add(op.span)
            changes[worker].append((run.start[i], moved) if op[0] == LOAD else (run.end[i], -moved))
    sizes: dict[Span, float] = {}

    def size(span: Span) -> float:
        if span not in sizes:
            sizes[span] = costs.of("activation_bytes", span)
        return sizes[span]

    timed = timed or bool(changes)
    peaks = timed_peaks(graph, run.start, run.end, size, changes) if timed else lane_peaks(graph, size)
    held: dict[int, set[Span]] = defaultdict(set)
    for span, workers in graph.schedule.holders.items():
        for worker in workers:
            held[worker].add(span)
    for worker, spans in held.items():
        stay = [s for s in spans - copied[worker] if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in spans)]
        peaks[worker] += sum(costs.of("parameter_bytes", span) for span in stay)
    return peaks
