"""What is right is accepted, what is wrong is refused, and the refusal says who waits for whom.

The oracle for order is a few lines of its own: run lanes from the head, an op when what its neighbours made is there.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.schedule.lower import lower
from pipeline.schedule.ops import (
    ALL,
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
    Route,
    Schedule,
    ScheduleError,
    W,
    loads,
)  # fmt: skip
from pipeline.schedule.simulate import Costs, simulate
from pipeline.schedule.verify import verify
from schedulers import SCHEDULERS, build, evaluation, gpipe, one_f_one_b, zero_bubble

A, C, D = (0, 1), (1, 2), (2, 3)
Lanes = dict[int, list[Op]]


def chain(count: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(count)]


def lanes_of(schedule: Schedule) -> Lanes:
    return {worker: list(lane) for worker, lane in schedule.lanes.items()}


def refused(schedule: Schedule, lanes: Lanes, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        verify(Schedule(schedule.routes, {w: tuple(lane) for w, lane in lanes.items()}))


def can_run(schedule: Schedule, count: int) -> bool:
    """Whether the lanes of an unlowered chain of `count` spans run to their ends."""
    lanes, done = lanes_of(schedule), set()
    moved = True
    while moved:
        moved = False
        for lane in lanes.values():
            while lane:
                kind, (i, _), m = lane[0][:3]
                needs = {
                    F: [{(F, i - 1, m)}] if i else [],
                    W: [{(I, i, m)}],
                    B: [{(F, i, m)}] + ([{(B, i + 1, m), (I, i + 1, m)}] if i + 1 < count else []),
                }
                if not all(done & either for either in needs[B if kind == I else kind]):
                    break
                done.add((kind, i, m))
                lane.pop(0)
                moved = True
    return not any(lanes.values())


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, int]:
    """Of a classic scheduler, and the length of its chain."""
    stages, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    name, replicas = draw(st.sampled_from(list(SCHEDULERS))), draw(st.integers(1, 2))
    count = stages * (2 if name == "interleaved" else 1)
    return build(name, chain(count), microbatches, replicas), count


@given(schedules(), st.data())
def test_a_removed_or_doubled_op_is_refused(made: tuple[Schedule, int], data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from([made[0], lower(made[0])]))
    lanes = lanes_of(schedule)
    worker = data.draw(st.sampled_from([w for w, lane in lanes.items() if lane]))
    place = data.draw(st.integers(0, len(lanes[worker]) - 1))
    op = lanes[worker].pop(place)
    if op.kind not in (REDUCE, STEP) or len(schedule.holders[op.span]) > 1:
        refused(schedule, lanes, r"missing|needs|waits for|never received|no SEND and RECV|which no lane|expected all")
    other = data.draw(st.sampled_from(list(lanes)))
    lanes[worker].insert(place, op)
    lanes[other].insert(data.draw(st.integers(0, len(lanes[other]))), op)
    refused(
        schedule, lanes, r"already|peer|same worker|not there|expected all|sums|after a STEP|no lane|receive|one worker"
    )


@given(schedules(), st.data())
def test_two_swapped_ops_are_refused_just_where_it_matters(made: tuple[Schedule, int], data: st.DataObject) -> None:
    schedule, count = made
    lanes = lanes_of(schedule)
    worker = data.draw(st.sampled_from([w for w, lane in lanes.items() if lane]))
    lane = lanes[worker]
    place = st.integers(0, len(lane) - 1)
    a, b = data.draw(place), data.draw(place)
    lane[a], lane[b] = lane[b], lane[a]
    swapped = Schedule(schedule.routes, {w: tuple(lane) for w, lane in lanes.items()})
    if can_run(swapped, count):
        verify(swapped)
        verify(lower(swapped))
    else:
        for wrong in (swapped, lower(swapped)):
            with pytest.raises(ScheduleError, match=r"deadlock: worker \d+ waits at"):
                verify(wrong)
        with pytest.raises(ScheduleError, match="deadlock"):
            simulate(swapped, Costs())


@given(schedules(), st.data())
def test_an_op_of_a_lane_in_any_other_lane_is_judged_by_what_it_needs(made, data: st.DataObject) -> None:
    """Moving a forward to another worker leaves a plan that can still be run or not: the oracle says which."""
    schedule, count = made
    lanes = lanes_of(schedule)
    worker = data.draw(st.sampled_from([w for w, lane in lanes.items() if lane]))
    forwards = [i for i, op in enumerate(lanes[worker]) if op.kind == F]
    other = data.draw(st.sampled_from(list(lanes)))
    op = lanes[worker].pop(data.draw(st.sampled_from(forwards)))
    lanes[other].insert(data.draw(st.integers(0, len(lanes[other]))), op)
    moved = Schedule(schedule.routes, {w: tuple(lane) for w, lane in lanes.items()})
    if can_run(moved, count):
        verify(moved)
        verify(lower(moved))
    else:
        with pytest.raises(ScheduleError, match="deadlock"):
            verify(moved)


def test_a_deadlock_is_told_as_a_circle() -> None:
    schedule = one_f_one_b([A, C], 1)
    lanes = {0: [Op(B, A, 0), Op(F, A, 0)], 1: [Op(F, C, 0), Op(B, C, 0)]}
    refused(
        schedule, lanes, r"worker 0 waits at B\[0:1\]#0 for F\[0:1\]#0, which stands in its own lane behind B\[0:1\]#0"
    )
    schedule = gpipe([A, C], 2)
    lanes = {
        0: [Op(F, A, 0), Op(B, A, 0), Op(F, A, 1), Op(B, A, 1)],
        1: [Op(F, C, 0), Op(F, C, 1), Op(B, C, 0), Op(B, C, 1)],
    }
    refused(
        schedule, lanes,
        r"deadlock: worker 0 waits at B\[0:1\]#0 for B\[1:2\]#0, which stands in lane 1 behind F\[1:2\]#1, "
        r"which waits for F\[0:1\]#1, which stands in lane 0 behind B\[0:1\]#0: a circle",
    )  # fmt: skip


def test_a_long_circle_is_cut_short() -> None:
    """Each of 30 workers runs first what comes back last."""
    routes = tuple(Route((a, b), ()) for a, b in zip(chain(30), [*chain(30)[1:], A], strict=True))
    lanes = {w: (Op(F, span, (w - 1) % 30), Op(F, span, w)) for w, span in enumerate(chain(30))}
    with pytest.raises(ScheduleError, match=r"and so on through 18 more workers"):
        verify(Schedule(routes, lanes))


def test_the_report() -> None:
    report = verify(lower(one_f_one_b([A, C], 3)))
    assert (report.num_ops, report.num_workers, report.num_microbatches, report.lowered) == (28, 2, 3, True)
    assert report.peak_activations == {0: 2, 1: 1}
    assert verify(evaluation([A, C], 3)).peak_activations == {0: 0, 1: 0}
    # while worker 0 is at its second SEND both gradients may come; what it has sent is there when an answer is
    assert (report.peak_received, report.peak_sent) == ({0: 2, 1: 2}, {0: 2, 1: 2})
    assert report.peak_messages == {0: 4, 1: 4}
    assert verify(one_f_one_b([A, C], 3)).peak_messages == {}, "nothing is sent before it is lowered"


def test_the_report_may_leave_out_what_workers_hold() -> None:
    schedule = lower(one_f_one_b([(0, 1), (1, 2)], 2))
    assert not verify(schedule, peaks=False).peak_activations
    with pytest.raises(ScheduleError, match="holds 2 activations at its fullest; allowed: 1"):
        verify(schedule, peaks=False, max_activations=1)


def test_memory_is_bounded() -> None:
    schedule = one_f_one_b(chain(3), 4)
    verify(schedule, max_activations=3)
    verify(schedule, max_activations={0: 3, 2: 1})
    with pytest.raises(ScheduleError, match="worker 0 holds 3 activations at its fullest; allowed: 2"):
        verify(schedule, max_activations=2)
    with pytest.raises(ScheduleError, match="worker 1 holds 2 activations at its fullest; allowed: 1"):
        verify(schedule, max_activations={1: 1})


def test_activations_of_backwards_that_are_cut_differently() -> None:
    """They go with the last backward that overlaps them; freed elsewhere, they count to the end of the lane."""
    route = Route(((0, 2), (2, 4)), ((3, 4), (1, 3), (0, 1)))
    backwards = [(3, 4), (1, 3), (0, 1)]
    both = [Op(F, s, m) for m in (0, 1) for s in route.forward]
    alone = Schedule((route,) * 2, {0: (*both, *(Op(B, s, m) for m in (0, 1) for s in backwards))})
    assert verify(alone).peak_activations == {0: 4}
    in_turn = tuple(Op(k, s, m) for m in (0, 1) for k, spans in ((F, route.forward), (B, backwards)) for s in spans)
    assert verify(Schedule((route,) * 2, {0: in_turn})).peak_activations == {0: 2}
    apart = {0: tuple(op for op in in_turn if op.kind == F), 1: tuple(op for op in in_turn if op.kind == B)}
    assert verify(Schedule((route,) * 2, apart)).peak_activations == {0: 4, 1: 0}


TRAIN = one_f_one_b([A, C], 2)
SPLIT = zero_bubble([A, C], 2)
LOW = lower(TRAIN)
TWINS = lower(one_f_one_b([A, C], 4, 2))


def without(lanes: Lanes, worker: int, op: Op) -> None:
    lanes[worker].remove(op)


@pytest.mark.parametrize(
    ("schedule", "change", "said"),
    [
        (TRAIN, lambda l: without(l, 1, Op(F, C, 1)), r"F\[1:2\]#1 is missing: it is on the route of microbatch 1"),
        (TRAIN, lambda l: without(l, 0, Op(B, A, 1)), r"B\[0:1\]#1 is missing"),
        (SPLIT, lambda l: without(l, 0, Op(W, A, 1)), r"W\[0:1\]#1 is missing"),
        (SPLIT, lambda l: without(l, 0, Op(I, A, 1)), r"I\[0:1\]#1 is missing"),
        (SPLIT, lambda l: l[0].append(Op(B, A, 1)), r"B\[0:1\]#1 stands beside I\[0:1\]#1; expected B, or I and W"),
        (SPLIT, lambda l: (without(l, 0, Op(W, A, 1)), l[1].append(Op(W, A, 1))), r"expected one worker"),
        (TRAIN, lambda l: l[1].append(Op(F, A, 0)), r"F\[0:1\]#0 of worker 1 stands in the lane of worker 0 already"),
        (TRAIN, lambda l: l[1].append(Op(F, A, 2)), r"there is no microbatch 2; the schedule has 2"),
        (TRAIN, lambda l: l[1].append(Op(F, A)), r"there is no microbatch -1"),
        (TRAIN, lambda l: l[1].append(Op(F, D, 0)), r"the route of microbatch 0 has no such span"),
        (TRAIN, lambda l: l.__setitem__(-2, []), r"worker -2; expected a number from 0 on"),
        (TRAIN, lambda l: l[0].append(Op("X", A)), r"expected one of F, B"),
        (TRAIN, lambda l: l[0].append(Op(STEP, A, 1)), r"for a span alone"),
        (TRAIN, lambda l: l[0].append(Op(F, A, 0, 1)), r"computes; it has no peer"),
        (TRAIN, lambda l: l[0].append(Op(SEND, A, 0, 1)), r"expected a compute op"),
        (TRAIN, lambda l: l[0].append(Op(SEND, A, 0, 1, Op(F, A, 1))), r"of the same span and microbatch"),
        (TRAIN, lambda l: l[0].append(Op(SEND, A, 0, 7, Op(F, A, 0))), r"worker 7 has no lane"),
        (TRAIN, lambda l: l[0].append(Op(SEND, A, 0, 0, Op(F, A, 0))), r"or is the same worker"),
        (LOW, lambda l: without(l, 0, Op(SEND, A, 0, 1, Op(F, A, 0))), r"RECV.*of worker 1 waits for SEND.*not there"),
        (LOW, lambda l: without(l, 1, Op(RECV, A, 0, 0, Op(F, A, 0))), r"F\[0:1\]#0 of worker 0 is needed by worker 1"),
        (LOW, lambda l: l[0].insert(1, Op(SEND, A, 0, 1, Op(F, A, 0))), r"stands in the lane of worker 0 already"),
        (LOW, lambda l: l[0].append(Op(SEND, C, 0, 1, Op(F, C, 0))), r"waits for F\[1:2\]#0 of worker 0"),
        (TWINS, lambda l: l[0].insert(1, Op(SEND, A, 0, 2, Op(F, A, 0))), r"is never received: worker 2 has no RECV"),
        (
            TWINS,
            lambda l: (
                l[0].insert(1, Op(SEND, A, 0, 2, Op(F, A, 0))),
                l[2].insert(0, Op(RECV, A, 0, 0, Op(F, A, 0))),
            ),
            r"RECV\(F\[0:1\]#0\)<0 of worker 2 receives what no op of that lane needs",
        ),
        (LOW, lambda l: l[1].append(l[1].pop(0)), r"deadlock: .*in its own lane|deadlock"),
        (
            LOW,
            lambda l: l[0].insert(0, l[0].pop(1)),
            r"worker 0 waits at SEND.*for F\[0:1\]#0, which stands in its own",
        ),
        (LOW, lambda l: l[0].insert(0, Op(REDUCE, A)), r"stands in the lane of worker 0 already"),
        (LOW, lambda l: (without(l, 0, Op(REDUCE, A)), l[0].insert(0, Op(REDUCE, A))), r"which sums what it adds"),
        (LOW, lambda l: (without(l, 0, Op(REDUCE, A)), l[0].append(Op(REDUCE, A))), r"comes after STEP|deadlock"),
        (LOW, lambda l: (without(l, 0, Op(STEP, A)), l[0].insert(0, Op(STEP, A))), r"after a STEP|deadlock"),
        (TWINS, lambda l: without(l, 2, Op(STEP, A)), r"lanes of workers \[0\]; expected .*\[0, 2\], or none"),
        (TWINS, lambda l: without(l, 2, Op(REDUCE, A)), r"lanes of workers \[0\]; expected .*\[0, 2\], or none"),
        (LOW, lambda l: l[0].append(Op(STEP, C)), r"lanes of workers \[0, 1\]; expected .*\[1\], or none"),
    ],
)
def test_corrupted_schedules_are_refused_by_name(schedule: Schedule, change, said: str) -> None:
    verify(schedule)
    lanes = lanes_of(schedule)
    change(lanes)
    refused(schedule, lanes, said)


@pytest.mark.parametrize(
    ("route", "said"),
    [
        (Route((), ()), r"its forward is empty"),
        (Route((A, A), ()), r"its forward visits layer 0 twice"),
        (Route(((0, 2), C), ()), r"its forward visits layer 1 twice"),
        (Route(((2, 1),), ()), r"expected 0 <= lo < hi"),
        (Route((A, C), (A, C)), r"expected the same layers back"),
        (Route((A, C), (C,)), r"expected the same layers back"),
        (Route((A,), (C, A)), r"expected the same layers back"),
    ],
)
def test_routes_that_cannot_be_meant_are_refused(route: Route, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        verify(Schedule((route,), {0: ()}))


def test_a_span_is_loaded_before_its_use_and_until_its_offload() -> None:
    def with_copies(text: str) -> Schedule:
        return loads(f"unbroken schedule 1\nroute 0-0: 0:1 1:2 | 1:2 0:1\nlane 0: {text}\n")

    work = "F[0:1]#0 F[1:2]#0 B[1:2]#0"
    verify(with_copies(f"{work} LOAD[5:6] B[0:1]#0"))
    verify(with_copies(f"LOAD[0:1] {work} OFFLOAD[0:1] LOAD[0:1] B[0:1]#0 OFFLOAD[0:1]"))
    for text, said in (
        (f"{work} LOAD[0:1] B[0:1]#0", r"F\[0:1\]#0 of worker 0: span \(0, 1\) is not loaded at that point"),
        (f"LOAD[0:1] {work} OFFLOAD[0:1] B[0:1]#0", r"B\[0:1\]#0 of worker 0: span \(0, 1\) is not loaded"),
        (f"LOAD[0:1] LOAD[0:1] {work} B[0:1]#0", r"LOAD\[0:1\] of worker 0: span \(0, 1\) is there already"),
        (f"OFFLOAD[0:1] {work} B[0:1]#0", r"OFFLOAD\[0:1\] of worker 0: span \(0, 1\) is not loaded"),
    ):
        with pytest.raises(ScheduleError, match=said):
            verify(with_copies(text))


def test_ops_of_no_single_microbatch_have_none() -> None:
    assert {Op(kind, A).microbatch for kind in (LOAD, OFFLOAD, REDUCE, STEP)} == {ALL}
