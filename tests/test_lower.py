"""Each pass alone: where it puts its ops, and that running it again changes nothing."""

from __future__ import annotations

import pytest

from pipeline.schedule.lower import add_reduce_step, add_redundant, add_send_recv, lower
from pipeline.schedule.merge import bare, merge
from pipeline.schedule.ops import RECV, SEND, B, F, Op, Route, Schedule, ScheduleError, loads
from pipeline.schedule.verify import verify
from schedulers import SCHEDULERS, build, evaluation, interleaved, one_f_one_b

A, C = (0, 1), (1, 2)


def test_lowered_by_hand() -> None:
    expected = """unbroken schedule 1
route 0-1: 0:1 1:2 | 1:2 0:1
lane 0: F[0:1]#0 SEND(F[0:1]#0)>1 F[0:1]#1 SEND(F[0:1]#1)>1 RECV(B[1:2]#0)<1 B[0:1]#0 RECV(B[1:2]#1)<1 B[0:1]#1 \
REDUCE[0:1] STEP[0:1]
lane 1: RECV(F[0:1]#0)<0 F[1:2]#0 B[1:2]#0 SEND(B[1:2]#0)>0 RECV(F[0:1]#1)<0 F[1:2]#1 B[1:2]#1 SEND(B[1:2]#1)>0 \
REDUCE[1:2] STEP[1:2]
"""
    lowered = lower(one_f_one_b([A, C], 2))
    assert lowered == loads(expected)
    assert lowered.name == "one_f_one_b"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_passes_change_nothing_the_second_time(name: str) -> None:
    once = lower(build(name, [(i, i + 1) for i in range(4)], 5, 2))
    assert lower(once) == once
    assert add_send_recv(once) is once


@pytest.mark.parametrize("name", SCHEDULERS)
def test_lowering_keeps_the_work_and_its_order(name: str) -> None:
    schedule = build(name, [(i, i + 1) for i in range(4)], 5, 2)
    for worker, lane in lower(schedule).lanes.items():
        assert tuple(op for op in lane if op.kind in "FBIW") == schedule.lanes[worker]


def test_an_output_goes_to_each_worker_once_and_is_received_before_its_first_use() -> None:
    """Backward spans cut differently: both need the forward of worker 0, and so do two workers."""
    route = Route((A, C), ((1, 2), (0, 1)))
    lanes = {
        0: (Op(F, A, 0), Op(F, A, 1)),
        1: (Op(F, C, 0), Op(F, C, 1), Op(B, C, 0), Op(B, C, 1), Op(B, A, 1)),
        2: (Op(B, A, 0),),
    }
    lowered = add_send_recv(Schedule((route, route), lanes))
    assert [str(op) for op in lowered.lanes[0]] == [
        "F[0:1]#0", "SEND(F[0:1]#0)>1", "SEND(F[0:1]#0)>2", "F[0:1]#1", "SEND(F[0:1]#1)>1",
    ]  # fmt: skip
    assert sum(op.kind == RECV for op in lowered.lanes[1]) == 2
    assert [str(op) for op in lowered.lanes[2]] == ["RECV(F[0:1]#0)<0", "RECV(B[1:2]#0)<1", "B[0:1]#0"]
    verify(lowered)


def test_one_worker_sends_nothing() -> None:
    schedule = interleaved([A, C], 3)
    assert add_send_recv(schedule) == schedule


def test_an_evaluation_has_no_step() -> None:
    lowered = lower(evaluation([A, C], 3))
    assert {op.kind for _, op in lowered.ops()} == {F, SEND, RECV}
    assert add_reduce_step(evaluation([A, C], 3)) == evaluation([A, C], 3)


def test_every_held_span_steps_after_its_last_gradient() -> None:
    lowered = add_reduce_step(interleaved([(i, i + 1) for i in range(4)], 2))
    assert [str(op) for op in lowered.lanes[0]][-4:] == ["B[0:1]#1", "REDUCE[0:1]", "STEP[0:1]", "STEP[2:3]"]
    assert str(lowered.lanes[0][lowered.lanes[0].index(Op(B, (2, 3), 1)) + 1]) == "REDUCE[2:3]"


def test_a_missing_op_is_named() -> None:
    with pytest.raises(ScheduleError, match=r"needs F\[0:1\]#0, which no lane holds"):
        lower(Schedule((Route.through((A, C)),), {0: (Op(F, C, 0),)}))


def test_a_redundant_forward_follows_what_it_works_on_once_that_is_sent() -> None:
    lowered = lower(add_redundant(one_f_one_b([A, C], 2), [(C, 0), (A, 1)]))
    verify(lowered)
    assert [str(op) for op in lowered.lanes[0]][:3] == ["F[0:1]#0", "SEND(F[0:1]#0)>1", "R[1:2]#0"]
    assert [str(op) for op in lowered.lanes[1]][:3] == ["RECV(F[0:1]#0)<0", "F[1:2]#0", "R[0:1]#0"]
    assert lowered.holders == {A: (0,), C: (1,)}, "a copy does not make a replica"
    assert loads(str(lowered)) == lowered
    assert bare(lowered) == bare(one_f_one_b([A, C], 2))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("into", [{1: 0}, {0: 3}, {0: 3, 2: 1}, {1: 0, 2: 0, 3: 0}])
def test_merged_lanes_can_run_and_do_the_work_of_both(name: str, into: dict[int, int]) -> None:
    schedule = build(name, [(i, i + 1) for i in range(4 if name != "interleaved" else 8)], 6)
    merged = merge(schedule, into)
    verify(lower(merged))
    assert set(merged.lanes) == set(schedule.lanes) - set(into)
    assert sorted(op for _, op in merged.ops()) == sorted(op for _, op in schedule.ops())
    for worker, lane in schedule.lanes.items():
        order = [op for op in merged.lanes[into.get(worker, worker)] if op in set(lane)]
        assert tuple(order) == lane, "the order of a lane has changed"
