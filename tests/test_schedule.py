"""The representation: its text form, and what the order of a route says about who waits for whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.schedule.ops import (
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
    deps,
    dumps,
    loads,
    parse_op,
    route_needs,
)  # fmt: skip

A, C, D = (0, 2), (2, 4), (4, 5)
TEXT = """unbroken schedule 1 by hand
route 0-1: 0:2 2:4 | 2:4 0:2
route 2-2: 0:2 |
lane 0: F[0:2]#0 SEND(F[0:2]#0)>3 F[0:2]#1 RECV(B[2:4]#0)<3 I[0:2]#0 W[0:2]#0 REDUCE[0:2] STEP[0:2]
lane 3:
"""


def test_text_is_read_and_written() -> None:
    schedule = loads(TEXT)
    assert dumps(schedule) == TEXT
    assert schedule.name == "by hand"
    assert schedule.routes == (Route((A, C), (C, A)), Route((A, C), (C, A)), Route((A,), ()))
    assert schedule.lanes[3] == ()
    assert schedule.lanes[0][1] == Op(SEND, A, 0, 3, Op(F, A, 0))
    assert [op.kind for op in schedule.lanes[0]] == [F, SEND, F, RECV, I, W, REDUCE, STEP]
    assert loads(TEXT.replace("\n", "\r\n\n")) == schedule


spans = st.tuples(st.integers(0, 50), st.integers(1, 9)).map(lambda s: (s[0], s[0] + s[1]))
compute = st.tuples(st.sampled_from([F, B, I, W]), spans, st.integers(0, 2000)).map(lambda op: Op(*op))
links = st.builds(
    lambda kind, of, peer: Op(kind, of.span, of.microbatch, peer, of),
    st.sampled_from([SEND, RECV]), compute, st.integers(0, 300),
)  # fmt: skip
others = st.tuples(st.sampled_from([LOAD, OFFLOAD, REDUCE, STEP]), spans).map(lambda op: Op(*op))
routes = st.builds(Route, st.lists(spans).map(tuple), st.lists(spans).map(tuple))
lanes = st.dictionaries(st.integers(0, 300), st.lists(compute | links | others).map(tuple), max_size=4)


@given(st.lists(routes, max_size=5).map(tuple), lanes)
def test_any_schedule_round_trips(routes: tuple[Route, ...], lanes: dict[int, tuple[Op, ...]]) -> None:
    schedule = Schedule(routes, lanes)
    assert loads(dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lane 1: F[0:2]", "F needs #microbatch"),
        ("lane 1: STEP[0:2]#1", "STEP takes no #microbatch"),
        ("lane 1: F[2:2]#0", "the span is empty"),
        ("lane 1: F[0:2]#-1", "expected e.g."),
        ("lane 1: F[0:2]#0x", "expected e.g."),
        ("lane 1: X[0:2]#0", "expected e.g."),
        ("lane 1: SEND(F[0:2]#0)<3", "expected SEND"),
        ("lane 1: SEND(STEP[0:2])>3", "expected SEND"),
        ("lane 1: RECV(SEND(F[0:2]#0)>1)<3", "expected SEND"),
        ("lane 1: RECV(F[0:2]#0)", "expected e.g."),
        ("lane 3: F[0:2]#2", "worker 3 has a lane already"),
        ("lane -1:", "expected 'route"),
        ("lane one:", "expected 'route"),
        ("route 4-4: 0:2 | 0:2", "from microbatch 3 on"),
        ("route 3-2: 0:2 | 0:2", "from microbatch 3 on"),
        ("route 3-3: 0:2 0:2", "expected 'route"),
        ("route 3-3: 0-2 | 0:2", "span '0-2'"),
        ("route 3-3: 2:1 | 0:2", "span '2:1'"),
        ("\x00garbage", "expected 'route"),
    ],
)
def test_text_that_cannot_be_read_whole_is_refused(line: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        loads(TEXT + line + "\n")


@pytest.mark.parametrize("text", ["", "\n", "unbroken schedule 2 x", "lane 0: F[0:2]#0", TEXT[5:]])
def test_text_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="expected 'unbroken schedule 1'"):
        loads(text)


@given(st.text(max_size=30))
def test_no_text_is_an_op_by_accident(text: str) -> None:
    try:
        op = parse_op(text)
    except ScheduleError:
        return
    assert loads(f"unbroken schedule 1\nlane 0: {op}").lanes[0] == (op,)


def test_an_op_says_what_it_is() -> None:
    assert str(Op(F, A, 7)) == "F[0:2]#7"
    assert str(Op(STEP, A)) == "STEP[0:2]"
    assert str(Op(RECV, A, 7, 2, Op(I, A, 7))) == "RECV(I[0:2]#7)<2"


def test_needs_follow_the_order_of_the_route() -> None:
    assert route_needs(Route.through((C, A))) == {
        (F, C): (), (F, A): ((F, C),), (B, A): ((F, A),), (B, C): ((F, C), (B, A)),
    }  # fmt: skip
    assert route_needs(Route((A, D), ())) == {(F, A): (), (F, D): ((F, A),)}


def test_needs_of_a_backward_that_is_cut_differently() -> None:
    """It recomputes: it needs the input of its first layer, and what was left by the forwards over its layers."""
    needs = route_needs(Route((A, C, D), (D, (1, 4), (0, 1))))
    assert needs[B, D] == ((F, D),)
    assert needs[B, (1, 4)] == ((F, A), (F, C), (B, D))
    assert needs[B, (0, 1)] == ((F, A), (B, (1, 4)))
    assert route_needs(Route((A, C), ((1, 4), (0, 1))))[B, (1, 4)] == ((F, A), (F, C))
    assert route_needs(Route(((0, 1), (1, 4)), ((2, 4), (0, 2))))[B, (2, 4)] == ((F, (1, 4)), (F, (0, 1)))


def test_deps_of_every_kind() -> None:
    route = Route.through((A, C))
    carried = Op(F, A, 0)
    send, receive = Op(SEND, A, 0, 1, carried), Op(RECV, A, 0, 0, carried)
    lanes = {
        0: (carried, send, Op(I, A, 0), Op(W, A, 0), Op(REDUCE, A), Op(STEP, A)),
        1: (receive, Op(F, C, 0), Op(B, C, 0), Op(F, A, 1), Op(F, C, 1), Op(B, C, 1), Op(B, A, 1), Op(REDUCE, A)),
    }
    schedule = Schedule((route, route), lanes)
    assert schedule.holders == {A: (0, 1), C: (1,)}
    assert deps(schedule, 0, carried) == ()
    assert deps(schedule, 0, send) == ((0, carried),)
    assert deps(schedule, 1, receive) == ((0, send),)
    assert deps(schedule, 1, Op(F, C, 0)) == ((1, receive),)
    assert deps(schedule, 0, Op(I, A, 0)) == ((0, carried), (1, Op(B, C, 0)))  # nothing carries it: the op that made it
    assert deps(schedule, 0, Op(W, A, 0)) == ((0, Op(I, A, 0)),)
    assert deps(schedule, 0, Op(STEP, A)) == ((0, Op(REDUCE, A)), (1, Op(REDUCE, A)))
    assert deps(schedule, 0, Op(REDUCE, A)) == deps(schedule, 0, Op(LOAD, A)) == ()


def test_deps_that_stand_nowhere_are_refused() -> None:
    schedule = Schedule((Route.through((A, C)),), {1: (Op(F, C, 0),)})
    with pytest.raises(ScheduleError, match=r"F\[2:4\]#0 of worker 1 needs F\[0:2\]#0, which no lane holds"):
        deps(schedule, 1, Op(F, C, 0))
    with pytest.raises(ScheduleError, match=r"F\[4:5\]#0 of worker 1 is on no route"):
        deps(schedule, 1, Op(F, D, 0))
    with pytest.raises(ScheduleError, match=r"is on no route"):
        deps(schedule, 1, Op(F, A, 5))
