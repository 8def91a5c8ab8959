"""Every scheduler against the formulas its paper gives, and every output, for random sizes, through all readers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain as concat
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.schedule.graph import compiled
from pipeline.schedule.lower import lower
from pipeline.schedule.memory import lane_peaks
from pipeline.schedule.ops import B, F, I, Op, Route, Schedule, Span, W, dumps, loads
from pipeline.schedule.simulate import Costs, simulate
from pipeline.schedule.verify import verify
from schedulers import PLANNERS, SCHEDULERS, balanced, build, evaluation, greedy, head_with_embedding, interleaved, plan
from schedulers.balanced_search.pieces import deal, pieces
from schedulers.balanced_search.search import Search

UNIT = Costs(forward=1.0, backward=2.0)


def spans(count: int, layers: int = 1) -> list[Span]:
    return [(i * layers, (i + 1) * layers) for i in range(count)]


def bubble(schedule: Schedule, costs: Costs = UNIT) -> float:
    verify(schedule)
    return simulate(schedule, costs).bubble


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2), (4, 8), (5, 7), (8, 32)])
@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
def test_bubble_of_gpipe_and_1f1b(name: str, p: int, m: int) -> None:
    assert bubble(build(name, spans(p), m)) == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("v", [1, 2, 3, 4])
@pytest.mark.parametrize(("p", "rounds"), [(1, 1), (2, 1), (2, 3), (4, 1), (4, 2), (8, 4)])
def test_bubble_of_interleaved(p: int, rounds: int, v: int) -> None:
    m = p * rounds
    assert bubble(interleaved(spans(p * v), m, chunks=v)) == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("p", "m"), [(4, 5), (4, 6), (4, 7), (3, 8), (8, 13)])
def test_interleaved_keeps_its_bubble_where_p_does_not_divide_m(p: int, m: int) -> None:
    assert bubble(interleaved(spans(2 * p), m)) == pytest.approx((p - 1) / (2 * m + p - 1))


@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 2), (2, 5), (4, 4), (4, 8), (5, 9), (8, 8), (8, 32)])
def test_bubble_and_memory_of_zb_h1(p: int, m: int) -> None:
    schedule = build("zero_bubble", spans(p), m)
    assert bubble(schedule) == pytest.approx((p - 1) / (3 * m + p - 1))
    assert max(verify(schedule).peak_activations.values()) <= p


@pytest.mark.parametrize(("p", "m"), [(1, 3), (4, 2), (4, 4), (4, 16), (7, 5)])
def test_activations_of_gpipe_and_1f1b(p: int, m: int) -> None:
    assert verify(build("one_f_one_b", spans(p), m)).peak_activations == {i: min(p - i, m) for i in range(p)}
    assert verify(build("gpipe", spans(p), m)).peak_activations == dict.fromkeys(range(p), m)


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("head", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("ratio", [1.5, 2.0, 2.5])
def test_head_with_embedding_is_no_slower_than_1f1b(p: int, head: float, ratio: float) -> None:
    whole, m = spans(p + 1), 3 * p
    forward = dict.fromkeys(whole, 1.0) | {whole[0]: 1 - head, whole[-1]: head}
    schedule = head_with_embedding(whole, m)
    costs = Costs(forward, {span: ratio * seconds for span, seconds in forward.items()})
    assert bubble(schedule, costs) <= (p - 1) / (m + p - 1) + 1e-9
    assert {schedule.home[F, whole[0], 0], schedule.home[B, whole[-1], m - 1]} == {0}
    peaks = verify(schedule).peak_activations
    assert all(peaks[i] <= p + 1 - i for i in range(1, p))
    assert peaks[0] <= 7 * p / 6 + 3


def test_microbatches_are_dealt_to_replicas_in_turn() -> None:
    schedule = build("one_f_one_b", spans(2), 5, 2)
    assert {m: schedule.home[F, (1, 2), m] for m in range(5)} == {0: 1, 1: 3, 2: 1, 3: 3, 4: 1}
    assert schedule.holders == {(0, 1): (0, 2), (1, 2): (1, 3)}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_replica_without_microbatches_has_an_empty_lane(name: str) -> None:
    schedule = build(name, spans(2), 1, 3)
    verify(lower(schedule))
    workers = range(3 if name == "interleaved" else 6)
    assert sorted(schedule.lanes) == list(workers)
    assert [w for w in workers if schedule.lanes[w]] == list(workers[: len(workers) // 3])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_cannot_be_scheduled_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"microbatches: 0; allowed: 1 or more"):
        build(name, spans(2), 0)
    with pytest.raises(ValueError, match=r"replicas: 0; allowed: 1 or more"):
        build(name, spans(2), 1, 0)
    with pytest.raises(ValueError, match=r"spans: 0; allowed: 1 or more"):
        build(name, [], 1)
    with pytest.raises(ValueError, match=r"span \(3, 4\) after \(0, 2\)"):
        build(name, [(0, 2), (3, 4)], 1)


def test_unknown_names_and_chunks_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"unknown scheduler 'x'; allowed: gpipe, one_f_one_b, interleaved, zero_bubble"
    ):
        build("x", spans(2), 1)
    with pytest.raises(ValueError, match=r"chunks: 2 with 3 spans"):
        interleaved(spans(3), 4, chunks=2)
    with pytest.raises(ValueError, match=r"stages: 2 for 3 spans"):
        evaluation(spans(3), 4, stages=2)
    with pytest.raises(ValueError, match=r"spans: 1; allowed: 2 or more"):
        head_with_embedding(spans(1), 4)


# ---- balanced: layers shared between neighbours ----

layer_costs = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=12)


@given(layer_costs, st.integers(1, 6))
def test_pieces_give_every_worker_its_part(costs: list[float], workers: int) -> None:
    workers = min(workers, len(costs))
    cut = pieces(costs, workers)
    assert [layer for piece in cut for layer in range(*piece.span)] == list(range(len(costs)))
    load = [sum(sum(costs[slice(*p.span)]) * p.shares.get(w, 0.0) for p in cut) for w in range(workers)]
    part = sum(costs) / workers
    assert all(sum(p.shares.values()) == pytest.approx(1.0) for p in cut)
    assert max(load) <= part + 2 * min(part, max(costs)) / 16 + 1e-9, "more than the slivers that were not worth a copy"
    held = [w for p in cut for w in p.shares]
    assert held == sorted(held)
    assert set(held) == set(range(workers))


@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4), st.integers(0, 40))
def test_dealing_is_even_at_every_moment(weights: list[float], count: int) -> None:
    shares = {w: x / sum(weights) for w, x in enumerate(weights)}
    dealt = deal(shares, count)
    for n in range(count + 1):
        assert all(abs(dealt[:n].count(w) - n * share) < len(shares) for w, share in shares.items())


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("head", [0.3, 0.9, 2.0])
def test_balanced_beats_every_classic_order_where_layers_do_not_divide(p: int, head: float) -> None:
    layers = [0.01, *[1.0] * (2 * p), head]
    costs = Costs(forward=layers, backward=[2 * c for c in layers])
    spans_of = {
        name: simulate(plan(name, layers, p, 2 * p), costs).makespan_s for name in PLANNERS if name != "interleaved"
    }
    assert min(spans_of, key=spans_of.__getitem__) == "balanced", spans_of
    assert spans_of["balanced"] >= 3 * sum(layers) * 2 * p / p, "faster than all workers at work all the time"
    most = max(bytes_held(plan("one_f_one_b", layers, p, 2 * p), layers).values())
    assert max(bytes_held(plan("balanced", layers, p, 2 * p), layers).values()) <= 2.5 * most + 1e-9


def test_balanced_without_anything_to_share_is_zb_h1() -> None:
    schedule = plan("balanced", [1.0] * 4, 4, 8)
    assert list(schedule.holders.values()) == [(0,), (1,), (2,), (3,)]
    assert bubble(schedule) <= bubble(build("zero_bubble", spans(4), 8)) + 1e-9


def bytes_held(schedule: Schedule, layers: Sequence[float]) -> dict[int, float]:
    return lane_peaks(compiled(schedule), lambda span: sum(layers[slice(*span)]))


@settings(max_examples=40)
@given(layer_costs, st.integers(1, 5), st.integers(1, 12), st.integers(1, 2), st.sampled_from(["line", "v"]))
def test_balanced_keeps_to_the_memory_of_1f1b(
    costs: list[float], p: int, m: int, replicas: int, shape: Literal["line", "v"]
) -> None:
    p = min(p, len(costs))
    theirs = bytes_held(plan("one_f_one_b", costs, p, m, replicas), costs)
    each = plan("balanced", costs, p, m, replicas, balanced_memory="1f1b", balanced_shape=shape)
    check_everything(each, True)
    slack = 1e-9 * sum(costs)
    assert all(held <= theirs[w] + slack for w, held in bytes_held(each, costs).items())
    fullest = plan("balanced", costs, p, m, replicas, balanced_memory="fullest", balanced_shape=shape)
    check_everything(fullest, True)
    assert max(bytes_held(fullest, costs).values()) <= max(theirs.values()) + slack


@settings(max_examples=40)
@given(layer_costs, st.integers(1, 5), st.integers(1, 12), st.sampled_from(["line", "v"]))
def test_lanes_are_timed_as_the_simulator_times_them(
    costs: list[float], p: int, m: int, shape: Literal["line", "v"]
) -> None:
    p, halves = min(p, len(costs)), (1.25, 0.75)
    chosen = Search(costs, p, [m], halves, costs).choose("free", shape)
    schedule = balanced(costs, p, m, halves=halves, shape=shape)
    twice, half = ([h * c for c in costs] for h in halves)
    timed = simulate(schedule, Costs(costs, input_gradient=twice, weight_gradient=half))
    assert timed.makespan_s == pytest.approx(chosen.makespan * sum(costs), rel=1e-5, abs=2e-6 * sum(costs))
    assert timed.makespan_s >= 3 * m * sum(costs) / p * (1 - 1e-9)
    assert balanced(costs, p, m, halves=halves, shape=shape) == schedule


@pytest.mark.parametrize(
    ("workers", "blocks", "microbatches", "most"),
    [(2, 8, 4, 1.0628), (2, 8, 8, 1.0253), (4, 8, 8, 1.1), (4, 8, 16, 1.0459), (3, 7, 12, 1.0592), (8, 20, 16, 1.149)],
)
def test_balanced_is_no_slower_than_when_all_borders_were_dealt_alike(
    workers: int, blocks: int, microbatches: int, most: float
) -> None:
    """`most`: the makespan then, with a head worth 0.9 of a block, over that of workers that never wait."""
    layers = [0.01, *[1.0] * blocks, 0.9]
    costs, least = Costs(layers, [2 * c for c in layers]), 3 * microbatches * sum(layers) / workers
    line, folded = (
        simulate(plan("balanced", layers, workers, microbatches, balanced_shape=shape), costs).makespan_s
        for shape in ("line", "v")
    )
    assert folded <= line <= most * least


def test_balanced_plans_for_many_workers() -> None:
    layers = [0.01, *[1.0] * 80, 0.9]
    search = Search(layers, 32, [128], (1.0, 1.0), layers)
    line, folded = (search.choose("free", shape).makespan / (3 * 128 / 32) for shape in ("line", "v"))
    assert line <= 1.083, "of workers that never wait; to fill a line takes 31 of 32 parts of a forward: 1.081"
    assert folded <= 1.065


def test_balanced_where_a_replica_has_nothing_and_a_microbatch_holds_much() -> None:
    alone = plan("balanced", [1.0, 1.0, 1.0], 2, 1, 3, evaluated=5)
    verify(alone)
    assert sorted(alone.lanes) == list(range(6))
    check_everything(plan("balanced", [1.0, 1.0, 1.0], 2, 1, 3), True)
    wide = balanced([1.0, 1.1, 1.0, 1.1, 1.0], 3, 1, sizes=[0.0, 9.0, 0.0, 9.0, 0.0])
    check_everything(wide, True)


def test_balanced_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"workers: 3 for 2 layers; allowed: 1 to 2"):
        pieces([1.0, 1.0], 3)
    with pytest.raises(ValueError, match=r"layer_costs: \[0.0, 0.0\]; allowed: 0 or more, not all 0"):
        pieces([0.0, 0.0], 1)
    with pytest.raises(ValueError, match=r"unknown scheduler 'x'; allowed: .*balanced"):
        plan("x", [1.0], 1, 1)


# ---- every output, through all readers ----

sizes = st.integers(1, 5)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, bool]:
    """A schedule of random sizes, and whether it trains."""
    p, m, replicas, layers = draw(sizes), draw(st.integers(1, 14)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    name = draw(
        st.sampled_from(
            [*SCHEDULERS, "evaluation", "head_with_embedding", "head evaluation", "balanced", "balanced evaluation"]
        )
    )
    if name == "interleaved":
        chunks = draw(st.integers(1, 4))
        return interleaved(spans(p * chunks, layers), m, replicas, chunks), True
    if name == "evaluation":
        return evaluation(spans(p * layers), m, replicas, stages=p), False
    if name.startswith("head"):
        evaluate = name == "head evaluation"
        return head_with_embedding(spans(p + 1, layers), m, replicas, evaluate=evaluate), not evaluate
    if name.startswith("balanced"):
        evaluate = name == "balanced evaluation"
        costs = draw(st.lists(st.floats(0.1, 4.0), min_size=p, max_size=p + layers))
        return plan("balanced", costs, p, m, replicas, evaluated=m if evaluate else None), not evaluate
    return build(name, spans(p, layers), m, replicas), True


def check_everything(schedule: Schedule, trains: bool) -> None:
    report = verify(schedule)
    lowered = lower(schedule)
    again = verify(lowered)
    assert again.peak_activations == report.peak_activations
    costs = Costs(forward=1.25, backward=2.5, speed={0: 0.5})
    planned, timed = simulate(schedule, costs), simulate(lowered, costs)
    assert timed.peak_activations == planned.peak_activations == report.peak_activations
    assert timed.makespan_s == pytest.approx(planned.makespan_s)
    assert loads(dumps(schedule)) == schedule
    assert loads(str(lowered)) == lowered
    work = Counter(op[:3] for op in concat(*schedule.lanes.values()))
    visits = sum(len(route.forward) for route in schedule.routes)
    assert sum(n for (kind, _, _), n in work.items() if kind == F) == visits
    backs = sum(n for (kind, _, _), n in work.items() if kind in (B, I))
    assert backs == sum(n for (kind, _, _), n in work.items() if kind in (B, W)) == (visits if trains else 0)


@given(schedules())
def test_every_scheduler_for_random_sizes(made: tuple[Schedule, bool]) -> None:
    check_everything(*made)


# ---- greedy ----


@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 5), (4, 3), (4, 12), (7, 9)])
def test_greedy_with_the_limits_of_1f1b_is_1f1b(p: int, m: int) -> None:
    route = Route.through(tuple(spans(p)))
    made = greedy([route] * m, lambda span, _: span[0], limits={i: p - i for i in range(p)})
    assert made.lanes == build("one_f_one_b", spans(p), m).lanes


def test_greedy_keeps_a_limit_where_swapped_routes_would_lock_each_other() -> None:
    """Each of two microbatches, on swapped routes, holds the only slot that the other needs: the second must wait."""
    a, b = (0, 1), (1, 2)
    routes = [Route.through((a, b)), Route.through((b, a))]
    made = greedy(routes, lambda span, _: span[0], limits={0: 1, 1: 1})
    verify(made, max_activations=1)
    assert [str(op) for op in made.lanes[1]] == ["F[1:2]#0", "B[1:2]#0", "F[1:2]#1", "B[1:2]#1"]


def test_greedy_refuses_a_limit_below_one_microbatch() -> None:
    with pytest.raises(ValueError, match=r"limits\[0\]: 1, but microbatch 0 alone holds 2 activations there"):
        greedy([Route.through(((0, 1), (1, 2)))], lambda span, _: 0, limits={0: 1})


def test_greedy_plans_with_hops() -> None:
    """While microbatch 0 is on a slow link, its worker takes up the next; without hops its backward comes first."""
    routes = [Route.through(((0, 1), (1, 2)))] * 2
    near = greedy(routes, lambda span, _: span[0], seconds=lambda kind, span: 1.0 if span[1] == 1 else 0.25)
    far = greedy(
        routes, lambda span, _: span[0], seconds=lambda kind, span: 1.0 if span[1] == 1 else 0.25, hop=lambda a, b: 5.0
    )
    assert near.lanes[1] == (Op(F, (1, 2), 0), Op(B, (1, 2), 0), Op(F, (1, 2), 1), Op(B, (1, 2), 1))
    assert [op.kind for op in far.lanes[0]] == [F, F, B, B]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Route], dict[tuple[Span, int], int], dict[int, int], bool]:
    """Random routes (skips and any order), any placement, limits as tight as they may be."""
    stages, m, trains = draw(st.integers(1, 5)), draw(st.integers(1, 8)), draw(st.booleans())
    visits = st.lists(st.sampled_from(spans(stages, 2)), min_size=1, unique=True)
    routes = [Route.through(tuple(draw(visits))) for _ in range(m)]
    routes = routes if trains else [Route(route.forward, ()) for route in routes]
    places = {(span, i): draw(st.integers(0, 3)) for i, route in enumerate(routes) for span in route.forward}
    alone = Counter((w, i) for (_, i), w in places.items())
    limits = {w: max(n for (v, _), n in alone.items() if v == w) + draw(st.integers(0, 2)) for w, _ in alone}
    return routes, places, limits, trains


@given(problems())
def test_greedy_for_random_routes_placements_and_limits(problem: tuple) -> None:
    routes, places, limits, trains = problem
    made = greedy(routes, lambda span, m: places[span, m], limits=limits)
    verify(made, max_activations=limits)
    check_everything(made, trains)
