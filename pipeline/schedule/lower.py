"""From a scheduler's lanes to lanes that a worker can run, in small passes: each takes a Schedule and returns one."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.garbage import no_collection
from pipeline.schedule.ops import COMPUTE, RECV, REDUCE, SEND, STEP, B, F, Node, Op, R, Schedule, Span, W, deps


def add_send_recv(schedule: Schedule) -> Schedule:
    """SEND right after the op whose output another worker needs, RECV right before the first op that needs it.

    A link receives by itself, so a RECV only waits for what may have come long before. An output goes to each worker
    once. A schedule that has SENDs is returned as it is. Raises ScheduleError where a needed op stands in no lane.
    """
    if schedule.lowered:
        return schedule
    sends: dict[Node, list[Op]] = {}
    receives: dict[Node, list[Op]] = {}
    for worker, lane in schedule.lanes.items():
        had: set[Op] = set()
        for op in lane:
            if op.kind not in COMPUTE:
                continue
            for source, made in deps(schedule, worker, op):
                if source != worker and made not in had:
                    had.add(made)
                    receives.setdefault((worker, op), []).append(Op(RECV, made.span, made.microbatch, source, made))
                    sends.setdefault((source, made), []).append(Op(SEND, made.span, made.microbatch, worker, made))
    lanes = {
        worker: tuple(
            each for op in lane for each in (*receives.get((worker, op), ()), op, *sends.get((worker, op), ()))
        )
        for worker, lane in schedule.lanes.items()
    }
    return Schedule(schedule.routes, lanes, schedule.name)


def add_reduce_step(schedule: Schedule) -> Schedule:
    """REDUCE of a span right after its last gradient in each lane that computes one, and its STEP at the lane's end.

    Lanes without gradients, as in an evaluation, and lanes that have a STEP already are left as they are.
    """
    lanes: dict[int, tuple[Op, ...]] = {}
    for worker, lane in schedule.lanes.items():
        last = {op.span: i for i, op in enumerate(lane) if op.kind in (B, W)}
        if any(op.kind == STEP for op in lane):
            last = {}
        ends = {i: Op(REDUCE, span) for span, i in last.items()}
        ops = [each for i, op in enumerate(lane) for each in ((op, ends[i]) if i in ends else (op,))]
        lanes[worker] = (*ops, *(Op(STEP, span) for span in sorted(last)))
    return Schedule(schedule.routes, lanes, schedule.name)


def add_redundant(schedule: Schedule, copies: Collection[tuple[Span, int]]) -> Schedule:
    """R of each (span, worker) in `copies`, for every microbatch that visits the span and comes by the worker.

    It stands right after the worker's forward of the span before it, whose output is its input; where that is another
    worker's, after the last forward of the microbatch in the lane. Once lowered, a SEND stands before it.
    """
    after: dict[Node, list[Op]] = {}
    for span, worker in copies:
        last = {op.microbatch: op for op in schedule.lanes.get(worker, ()) if op.kind == F}
        for m, own in last.items():
            forward = schedule.routes[m].forward
            if span in forward and schedule.routes[m].backward:
                before = Op(F, forward[max(0, forward.index(span) - 1)], m)
                here = schedule.home.get(before[:3]) == worker
                after.setdefault((worker, before if here else own), []).append(Op(R, span, m))
    lanes = {
        worker: tuple(each for op in lane for each in (op, *after.get((worker, op), ())))
        for worker, lane in schedule.lanes.items()
    }
    return Schedule(schedule.routes, lanes, schedule.name)


@no_collection()
def lower(schedule: Schedule) -> Schedule:
    """All passes. SENDs come last, so that they stand before a REDUCE."""
    return add_send_recv(add_reduce_step(schedule))
