"""The proof that a schedule can run and is whole, before any worker starts.

Each check is small and says which op broke it: completeness, pairing of sends and receives, order within lanes and
absence of deadlock, the end of the step, copies, memory. What passes here cannot hang for want of a message.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pipeline.garbage import no_collection
from pipeline.schedule.graph import Graph, compiled
from pipeline.schedule.holdings import Bound, bounds
from pipeline.schedule.memory import lane_peaks
from pipeline.schedule.ops import (
    ALL,
    COMPUTE,
    KINDS,
    LOAD,
    OFFLOAD,
    RECV,
    REDUCE,
    SEND,
    STEP,
    B,
    F,
    I,
    Op,
    R,
    Route,
    Schedule,
    ScheduleError,
    Span,
    W,
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was proved. `peak_activations[w]`: the most that worker w ever holds, one per span and microbatch.

    Where all that crosses workers has a SEND, or nothing crosses, also the messages that a worker may hold at once,
    whatever the times and the network: those that have come and are not used yet, those that are sent and not let go
    of (over gloo all of a step), and all of them together, with outputs that wait to be sent. What links have posted
    for receiving is not counted.
    """

    num_ops: int
    num_workers: int
    num_microbatches: int
    peak_activations: Mapping[int, int]
    lowered: bool
    peak_received: Mapping[int, int] = field(default_factory=dict)
    peak_sent: Mapping[int, int] = field(default_factory=dict)
    peak_messages: Mapping[int, int] = field(default_factory=dict)


@no_collection()
def verify(
    schedule: Schedule, *, max_activations: int | Mapping[int, int] | None = None, always: Collection[Span] = (),
    balanced: bool = False, peaks: bool = True,
) -> Report:  # fmt: skip
    """Prove a schedule, or raise ScheduleError naming the op, what it waits for or what is missing.

    Where routes skip spans: `always` are spans that none may skip, and `balanced` demands that all others are visited
    by as many microbatches as each other, and each of their workers by as many as its replicas, give or take one.

    `max_activations` bounds what each worker may hold, the same for all or by worker (missing: unbounded). Where
    backward spans are cut differently, what another worker's backward frees counts as held to the end. Without `peaks`
    and `max_activations` the report has none: to find them takes a third of the time.
    """
    for route in dict.fromkeys(schedule.routes):
        _check_route(route)
    _check_ops(schedule)
    _check_complete(schedule)
    for m, route in enumerate(schedule.routes):
        if skipped := [span for span in always if span not in route.forward]:
            raise ScheduleError(f"route of microbatch {m} skips span {skipped[0]}, which none may skip")
    if balanced:
        _check_balance(schedule, always)
    graph = compiled(schedule)
    _ = graph.order
    if schedule.lowered:
        _check_pairing(graph)
    for worker, lane in schedule.lanes.items():
        _check_copies(worker, lane)
        _check_end(worker, lane)
    _check_holders(schedule)
    held: dict[int, Bound] = {}
    activations: dict[int, int] = {}
    if not peaks and max_activations is None:
        pass
    elif schedule.lowered or not graph.feeds:
        held = bounds(graph)
        activations = {worker: int(bound.most.activations) for worker, bound in held.items()}
    else:
        activations = {worker: int(peak) for worker, peak in lane_peaks(graph).items()}
    for worker, peak in activations.items():
        limit = max_activations if not isinstance(max_activations, Mapping) else max_activations.get(worker)
        if limit is not None and peak > limit:
            raise ScheduleError(f"worker {worker} holds {peak} activations at its fullest; allowed: {limit}")
    return Report(
        len(graph.ops), len(graph.lanes), schedule.num_microbatches, activations, schedule.lowered,
        peak_received={worker: int(bound.most.received) for worker, bound in held.items()},
        peak_sent={worker: int(bound.most.sent) for worker, bound in held.items()},
        peak_messages={worker: int(bound.messages) for worker, bound in held.items()},
    )  # fmt: skip


def _layers(spans: tuple[Span, ...]) -> list[int]:
    return [layer for lo, hi in spans for layer in range(lo, hi)]


def _check_route(route: Route) -> None:
    """No layer twice, and back through the layers of the forward in reverse, however they are cut."""
    for side, spans in (("forward", route.forward), ("backward", route.backward)):
        for span in spans:
            if not 0 <= span[0] < span[1]:
                raise ScheduleError(f"route: {side} span {span}; expected 0 <= lo < hi")
        twice = [layer for layer, n in Counter(_layers(spans)).items() if n > 1]
        if twice:
            raise ScheduleError(f"route: its {side} visits layer {twice[0]} twice: {spans}")
    if not route.forward:
        raise ScheduleError(f"route: its forward is empty: {route}")
    back = [layer for lo, hi in route.backward for layer in reversed(range(lo, hi))]
    if route.backward and back != _layers(route.forward)[::-1]:
        raise ScheduleError(
            f"route: forward {route.forward}, but backward {route.backward}; expected the same layers back"
        )


def _check_ops(schedule: Schedule) -> None:
    """Every op is well formed and, if it computes, on the route of its microbatch."""
    needs = schedule.needs
    for worker in schedule.lanes:
        if worker < 0:
            raise ScheduleError(f"worker {worker}; expected a number from 0 on")
    for worker, op in schedule.ops():
        kind, span, microbatch, peer, of = op
        if kind in COMPUTE:
            if not 0 <= microbatch < len(needs):
                raise ScheduleError(
                    f"{op} of worker {worker}: there is no microbatch {microbatch}; the schedule has {len(needs)}"
                )
            if (F if kind == F else B, span) not in needs[microbatch]:
                raise ScheduleError(f"{op} of worker {worker}: the route of microbatch {microbatch} has no such span")
            if peer != -1 or of is not None:
                raise ScheduleError(f"{op} of worker {worker} computes; it has no peer and carries nothing")
        elif kind in (SEND, RECV):
            _check_link(schedule, worker, op)
        elif kind not in KINDS or microbatch != ALL or peer != -1 or of is not None or not 0 <= span[0] < span[1]:
            raise ScheduleError(f"{tuple(op)} of worker {worker}; expected one of {', '.join(KINDS)}, for a span alone")


def _check_link(schedule: Schedule, worker: int, op: Op) -> None:
    if op.of is None or op.of.kind not in COMPUTE or op.of[1:3] != op[1:3]:
        raise ScheduleError(
            f"{tuple(op)} of worker {worker}: expected a compute op of the same span and microbatch in it"
        )
    if op.peer not in schedule.lanes or op.peer == worker:
        raise ScheduleError(f"{op} of worker {worker}: worker {op.peer} has no lane, or is the same worker")


def _check_complete(schedule: Schedule) -> None:
    """Every span of every route is computed forward once, and back once: whole, or as both halves."""
    nodes = schedule.nodes
    for m, route in enumerate(schedule.routes):
        for span in route.forward:
            if (F, span, m) not in nodes:
                raise _missing(F, span, m)
        for span in route.backward:
            whole, half, rest = (B, span, m) in nodes, nodes.get((I, span, m)), nodes.get((W, span, m))
            if whole and (half or rest):
                raise ScheduleError(
                    f"{Op(B, span, m)} stands beside {(half or rest or ('', ''))[1]}; expected B, or I and W"
                )
            if not whole and not (half or rest):
                raise _missing(B, span, m)
            if not whole and not (half and rest):
                raise _missing(I if rest else W, span, m)
            if half and rest and half[0] != rest[0]:
                raise ScheduleError(
                    f"{half[1]} is of worker {half[0]}, {rest[1]} of worker {rest[0]}; expected one worker"
                )


def _check_balance(schedule: Schedule, always: Collection[Span]) -> None:
    """Spans that may be skipped are visited equally often, and so are the replicas of each span."""
    visits = Counter(span for route in schedule.routes for span in route.forward if span not in always)
    by_worker = Counter((span, worker) for (kind, span, _), worker in schedule.home.items() if kind == F)
    groups = {"spans": {str(span): n for span, n in visits.items()}} if visits else {}
    for span, workers in schedule.holders.items():
        groups[f"the workers of span {span}"] = {f"worker {w}": by_worker[span, w] for w in workers}
    for what, counts in groups.items():
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        if counts[most] > counts[least] + 1:
            raise ScheduleError(
                f"visits of {what} are not balanced: {most} has {counts[most]}, {least} has {counts[least]}; "
                "they may differ by one"
            )


def _missing(kind: str, span: Span, microbatch: int) -> ScheduleError:
    return ScheduleError(f"{Op(kind, span, microbatch)} is missing: it is on the route of microbatch {microbatch}")


_KINDS_OF = {F: (F, R), R: (R,), B: (B, I)}
"""What an entry of a route's needs stands for."""


def _check_pairing(graph: Graph) -> None:
    """Each SEND is received, each RECV is needed, and once anything is sent, all that crosses workers is.

    That each RECV has its SEND, and each SEND stands where its output is made, is known from building the graph.
    """
    schedule = graph.schedule
    for i in graph.feeds:
        if graph.ops[i].kind != SEND:
            raise ScheduleError(
                f"{graph.ops[i]} of worker {graph.workers[i]} is needed by worker {graph.feeds[i][0]}, "
                "but no SEND and RECV carry it; other transfers have them"
            )
    uses: dict[int, dict[tuple[str, Span], list[tuple[str, Span]]]] = {}
    home = schedule.home
    for i, op in enumerate(graph.ops):
        kind, span, m, peer, of = op
        if kind == SEND and i not in graph.feeds:
            raise ScheduleError(
                f"{op} of worker {graph.workers[i]} is never received: worker {peer} has no RECV for it"
            )
        if kind == RECV and of is not None:
            needs, worker = schedule.needs[m], graph.workers[i]
            used = uses.get(id(needs))
            if used is None:
                used = uses[id(needs)] = defaultdict(list)
                for user, sources in needs.items():
                    for source in sources:
                        used[source] += [(k, user[1]) for k in _KINDS_OF[user[0]]]
            users = used.get((F if of[0] == F else B, span), ()) if of[0] != W else ()
            if not any(home.get((k, s, m)) == worker for k, s in users):
                raise ScheduleError(f"{op} of worker {worker} receives what no op of that lane needs")


def _check_copies(worker: int, lane: tuple[Op, ...]) -> None:
    """Where a lane loads a span, it computes on the span only between a LOAD and the next OFFLOAD."""
    loads = {op.span for op in lane if op.kind == LOAD or op.kind == OFFLOAD}
    if not loads:
        return
    present: set[Span] = set()
    for op in lane:
        if op.span not in loads or op.kind not in (*COMPUTE, LOAD, OFFLOAD):
            continue
        if (op.kind == LOAD) == (op.span in present):
            state = "there already" if op.span in present else "not loaded at that point"
            raise ScheduleError(f"{op} of worker {worker}: span {op.span} is {state}")
        if op.kind == LOAD:
            present.add(op.span)
        elif op.kind == OFFLOAD:
            present.remove(op.span)


def _check_end(worker: int, lane: tuple[Op, ...]) -> None:
    """In a lane, REDUCE comes after the last gradient of its span, and STEP after all work and after REDUCE."""
    ended: dict[str, set[Span]] = {REDUCE: set(), STEP: set()}
    for op in lane:
        kind, span = op.kind, op.span
        if kind in COMPUTE and ended[STEP]:
            raise ScheduleError(f"{op} of worker {worker} comes after a STEP; a step ends the work of all spans")
        if kind in (B, I, W) and span in ended[REDUCE]:
            raise ScheduleError(f"{op} of worker {worker} comes after {Op(REDUCE, span)}, which sums what it adds")
        if kind == REDUCE and span in ended[STEP]:
            raise ScheduleError(f"{op} of worker {worker} comes after {Op(STEP, span)}")
        if kind in ended:
            ended[kind].add(span)


def _check_holders(schedule: Schedule) -> None:
    """REDUCE and STEP of a span: by all workers that compute its gradient, or by none, and by nobody else."""
    gradients: dict[Span, set[int]] = {}
    for (kind, span, _), worker in schedule.home.items():
        if kind in (B, W):
            gradients.setdefault(span, set()).add(worker)
    found: dict[str, dict[Span, set[int]]] = {REDUCE: {}, STEP: {}}
    for worker, op in schedule.others:
        if op[0] in found:
            found[op[0]].setdefault(op[1], set()).add(worker)
    for kind, by_span in found.items():
        for span, workers in sorted(by_span.items()):
            expected = gradients.get(span, set())
            if workers != expected:
                raise ScheduleError(
                    f"{Op(kind, span)} is in the lanes of workers {sorted(workers)}; expected all that compute its "
                    f"gradient, {sorted(expected)}, or none"
                )
