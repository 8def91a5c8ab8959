"""The proved bounds of what workers hold, against a small model that is run in every way, and at random."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.schedule.graph import compiled
from pipeline.schedule.holdings import HELD, Bound, Held, Sizes, bounds, levels
from pipeline.schedule.lower import add_redundant, lower
from pipeline.schedule.memory import lane_peaks
from pipeline.schedule.ops import Schedule, Span
from schedulers import PLANNERS, build, evaluation, gpipe, head_with_embedding, one_f_one_b, plan, swapped, zero_bubble
from schedulers.skippipe import skippipe
from tests.lane_model import ACTIVATIONS, OUTPUTS, RECEIVED, SENT, Model, Most
from tests.test_skippipe import network

A, C, D = (0, 1), (1, 2), (2, 3)


def chain(count: int) -> list[Span]:
    return [(i, i + 1) for i in range(count)]


def proved(schedule: Schedule) -> Most:
    """In the form of the model: all kinds, and their sum."""
    return {w: np.vstack([level, level.sum(0)]) for w, level in levels(compiled(schedule))}


def check(schedule: Schedule, found: Most, expected: Most, what: slice | list[int] = slice(None)) -> None:
    for worker, lane in schedule.lanes.items():
        ours, theirs = found[worker][what], expected[worker][what]
        if (wrong := np.argwhere(ours != theirs)).size:
            kind, at = wrong[0]
            op = lane[at] if at < len(lane) else "the end"
            names = np.array([*HELD, "all"])[what]
            raise AssertionError(f"{names[kind]} of worker {worker} at {op}: proved {ours[kind, at]}, "
                                 f"seen {theirs[kind, at]}\n{schedule}")  # fmt: skip


SMALL = {
    "gpipe": gpipe([A, C], 2),
    "one_f_one_b": one_f_one_b([A, C], 3),
    "one_f_one_b, three": one_f_one_b([A, C, D], 2),
    "zero_bubble": zero_bubble([A, C], 2),
    "zero_bubble, three": zero_bubble([A, C, D], 2),
    "interleaved": build("interleaved", chain(4), 2),
    "balanced": plan("balanced", [1.0, 1.0, 1.0], 2, 2),
    "evaluation": evaluation([A, C, D], 2),
    "head with embedding": head_with_embedding([A, C, D], 2),
    "replicas": one_f_one_b([A, C], 2, 2),
    "redundant": add_redundant(one_f_one_b([A, C], 2), [(C, 0), (A, 1)]),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_bound_is_what_some_run_reaches(name: str) -> None:
    """Every state of small schedules is looked at: op by op, the bound of each kind is the most that any of them holds.

    That of all kinds together is never exceeded.
    """
    schedule = lower(SMALL[name])
    found, expected = proved(schedule), Model(schedule).in_every_way()
    check(schedule, found, expected, slice(-1))
    for worker in schedule.lanes:
        assert (found[worker][-1] >= expected[worker][-1]).all()


@pytest.mark.parametrize("name", SMALL)
def test_a_link_has_as_many_slots_as_some_run_needs(name: str) -> None:
    """Of every state of small schedules: the most messages of a link that were sent and are still needed."""
    schedule = lower(SMALL[name])
    model, most = Model(schedule), dict[tuple[int, int], int]()
    for state in model.states():
        for k, (a, b) in enumerate(model.links):
            if state.at[b] < model.lap[b]:
                link = model.workers[a], model.workers[b]
                most[link] = max(most.get(link, 0), model.slots(state, k))
    found = {(peer, w): n for w, bound in bounds(compiled(schedule)).items() for peer, n in bound.slots.items()}
    assert found == most


@st.composite
def planned(draw: st.DrawFn) -> Schedule:
    """A lowered schedule of any planner."""
    name = draw(st.sampled_from([*PLANNERS, "swapped", "skippipe", "head", "evaluation", "redundant"]))
    p, m, replicas = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 2))
    if name == "skippipe":
        swaps, length = draw(st.booleans()), draw(st.integers(2, 3))
        problem = network(draw(st.integers(0, 20)), (2, 2, 1), path_length=length, num_microbatches=2 * m, swaps=swaps)
        return lower(skippipe(problem, moves=20).schedule())
    if name == "swapped":
        return lower(swapped(chain(6), m))
    if name == "head":
        return lower(head_with_embedding(chain(p + 1), m, replicas))
    if name == "evaluation":
        return lower(evaluation(chain(p), m, replicas))
    if name == "redundant":
        made = one_f_one_b(chain(p), m)
        return lower(add_redundant(made, [(span, (span[0] - 1) % p) for span in chain(p)] if p > 1 else []))
    layers = draw(st.lists(st.floats(0.1, 4.0), min_size=2 * p, max_size=2 * p + 3))
    return lower(plan(name, layers, p, m, replicas))


@given(planned(), st.integers(0, 2**32))
@settings(max_examples=120)
def test_no_run_exceeds_the_bound_and_the_worst_ones_reach_it(schedule: Schedule, seed: int) -> None:
    model, found = Model(schedule), proved(schedule)
    behind, ahead, seen = model.nothing(), model.nothing(), model.nothing()
    for w in range(len(model.workers)):
        model.alone_behind(w, behind)
        model.alone_ahead(w, ahead)
    for number in range(3):
        model.at_random(Random(seed + number), seen)
    for most in (behind, ahead, seen):
        for worker in schedule.lanes:
            assert (most[worker] <= found[worker]).all()
    check(schedule, found, behind, [ACTIVATIONS, RECEIVED, OUTPUTS])
    check(schedule, found, ahead, [SENT])


def test_sizes_weigh_each_kind_and_half_of_a_backward() -> None:
    """One microbatch through two workers; every amount is a power of two, so that a sum tells what it consists of."""
    sizes = Sizes(
        activation=lambda span: 1 if span == A else 2, half=lambda _: 4, message=lambda op: 8 if op.span == A else 16,
        buffer=32, posted=64, working=lambda kind, _: {"F": 128, "I": 256, "W": 512}[kind],
    )  # fmt: skip
    schedule = lower(zero_bubble([A, C], 1))
    found = {worker: level.sum(0).tolist() for worker, level in levels(compiled(schedule), sizes)}
    assert [str(op) for op in schedule.lanes[0]][2:] == ["RECV(I[1:2]#0)<1", "I[0:1]#0", "W[0:1]#0", "REDUCE[0:1]",
                                                         "STEP[0:1]"]  # fmt: skip
    assert found[0] == [
        64 + 1 + 128, 64 + 1 + 8 + 32, 64 + 1 + 8 + 32, 64 + 1 + 32 + 256, 64 + 4 + 512, 64, 64, 64,
    ]  # fmt: skip
    gradient, kept = 16, 16  # of worker 1's input: it lies there until W, beside the copy that is sent
    assert [str(op) for op in schedule.lanes[1]] == ["RECV(F[0:1]#0)<0", "F[1:2]#0", "I[1:2]#0", "SEND(I[1:2]#0)>0",
                                                     "W[1:2]#0", "REDUCE[1:2]", "STEP[1:2]"]  # fmt: skip
    assert found[1] == [
        64 + 32, 64 + 2 + 128, 64 + 2 + gradient + 256, 64 + 4 + gradient + kept, 64 + 4 + gradient + kept + 512,
        64 + kept, 64 + kept + 32, 64 + 32,
    ]  # fmt: skip
    assert bounds(compiled(schedule), sizes)[0] == Bound(
        Held(4, 32, 0, 8, 64, 512), Held(activations=4, posted=64, working=512), 4, 40, {1: 1}
    )


def test_activations_are_those_of_the_lanes_alone() -> None:
    for name, schedule in SMALL.items():
        graph = compiled(lower(schedule))
        assert {w: bound.most.activations for w, bound in bounds(graph).items()} == lane_peaks(graph), name


def test_what_is_sent_is_bounded_by_the_stages_and_not_by_the_microbatches() -> None:
    for microbatches in (8, 32):
        found = bounds(compiled(lower(one_f_one_b(chain(4), microbatches))))
        assert [found[w].most.sent for w in range(4)] == [4, 4, 3, 2]


def test_messages_of_a_schedule_that_sends_nothing_are_not_known() -> None:
    with pytest.raises(ValueError, match="schedule 'one_f_one_b' has no SEND and RECV; lower it"):
        bounds(compiled(one_f_one_b([A, C], 2)))
    (alone,) = bounds(compiled(one_f_one_b([A], 2))).values()
    assert (alone.most, alone.messages) == (Held(activations=1), 0)
