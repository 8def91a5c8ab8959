"""The planner that leaves shapes out answers as the one that tries them all, and its bounds are bounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

import schedulers.resize
from pipeline.schedule.costs import Costs
from pipeline.schedule.layout import EVALUATE, TRAIN
from pipeline.schedule.lower import lower
from pipeline.schedule.ops import Schedule, ScheduleError
from pipeline.schedule.simulate import simulate
from pipeline.schedule.verify import verify
from schedulers import PartitionError
from schedulers.least_time import least_of_any_cut, least_of_cut
from schedulers.plan import PLANNERS, SCHEDULERS, in_line, num_spans, plan
from schedulers.resize import ResizeProblem, grouped, resize, shapes

Answer = tuple[float, int, int, dict[str, Schedule]]


def exhaustive(
    asked: ResizeProblem, places: Collection[int], speeds: Mapping[int, float], limits: Mapping[int, float],
    held: Mapping[int, Set[int]],
) -> Answer | None:  # fmt: skip
    """Every shape cut, lowered, proved and simulated whole, and the best of all."""
    found: list[Answer] = []
    for stages, replicas in shapes(asked, len(places)):
        groups = grouped(stages, replicas, places, speeds, held)
        paces = [min(speeds[place] for place in group) for group in groups]
        rooms = [min(limits[place] for place in group) for group in groups]
        at = [groups[stage][replica] for replica in range(replicas) for stage in range(stages)]
        made: dict[str, Schedule] = {}
        try:
            for purpose, evaluated in ((TRAIN, None), (EVALUATE, asked.evaluated)):
                schedule = plan(
                    asked.scheduler, asked.layer_costs, stages, asked.microbatches, replicas, chunks=asked.chunks,
                    evaluated=evaluated, ends="home" if stages == 1 and asked.ends_apart else "in-line", speeds=paces,
                    memory=asked.layer_bytes, limits=rooms,
                )  # fmt: skip
                lanes = {at[worker]: lane for worker, lane in schedule.lanes.items()}
                made[purpose] = Schedule(schedule.routes, dict(sorted(lanes.items())))
        except PartitionError:
            continue
        costs = Costs(list(asked.layer_costs), speed={place: speeds[place] for place in at})
        lowered = {purpose: lower(schedule) for purpose, schedule in made.items()}
        for schedule in lowered.values():
            verify(schedule)
        found.append((simulate(made[TRAIN], costs).makespan_s, stages, replicas, lowered))
    return min(found, key=lambda each: (each[0], each[1] * each[2], each[2]), default=None)


@given(st.data())
@example_settings(max_examples=80, deadline=None)
def test_the_answer_is_that_of_trying_them_all(data: st.DataObject) -> None:
    scheduler = data.draw(st.sampled_from(PLANNERS))
    layers, workers = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 7))
    values = st.sampled_from([0.3, 0.7, 1.0]) | st.just(1.0)
    speeds = dict(enumerate(data.draw(st.lists(values, min_size=workers, max_size=workers))))
    rooms = data.draw(st.lists(st.sampled_from([1.0, 3.0, 9.0]), min_size=workers, max_size=workers))
    asked = ResizeProblem(
        scheduler, data.draw(st.lists(st.sampled_from([0.1, 1.0, 1.7]), min_size=layers, max_size=layers)),
        data.draw(st.sampled_from([1, 2, 4, 6])), 2, data.draw(st.integers(1, 4)), layer_bytes=[1.0] * layers,
        ends_apart=data.draw(st.booleans()),
    )  # fmt: skip
    held = {place: {place % layers} for place in range(workers) if data.draw(st.booleans())}
    expected = exhaustive(asked, range(workers), speeds, dict(enumerate(rooms)), held)
    if expected is None:
        with pytest.raises(PartitionError):
            resize(asked, range(workers), speeds=speeds, limits=dict(enumerate(rooms)), held=held)
        return
    found = resize(asked, range(workers), speeds=speeds, limits=dict(enumerate(rooms)), held=held)
    assert (found.seconds, found.stages, found.replicas, found.layout.schedules) == expected, "to the bit"


@given(
    st.sampled_from(list(SCHEDULERS)), st.integers(1, 5), st.integers(1, 9),
    st.lists(st.floats(0.01, 10), min_size=10, max_size=14), st.lists(st.floats(0.1, 3), min_size=5, max_size=5),
)  # fmt: skip
@example_settings(max_examples=150, deadline=None)
def test_no_step_is_shorter_than_its_bounds(
    scheduler: str, stages: int, microbatches: int, costs: list[float], speeds: list[float]
) -> None:
    paces = speeds[:stages]
    made = plan(scheduler, costs, stages, microbatches, speeds=paces)
    took = simulate(made, Costs(costs, speed=dict(enumerate(paces)))).makespan_s
    spans = in_line(scheduler, costs, stages, speeds=paces)
    assert len(spans) == num_spans(scheduler, stages, 2)
    assert least_of_any_cut(scheduler, costs, paces, microbatches) <= took
    assert least_of_cut(scheduler, costs, spans, paces, microbatches) <= took


@pytest.mark.parametrize("scheduler", ["one_f_one_b", "gpipe", "zero_bubble"])
def test_with_stages_that_are_alike_the_bound_is_met(scheduler: str) -> None:
    for stages, microbatches in ((1, 3), (4, 4), (4, 9)):
        spans = [(k, k + 1) for k in range(stages)]
        took = simulate(plan(scheduler, [1.0] * stages, stages, microbatches), Costs([1.0] * stages)).makespan_s
        assert least_of_cut(scheduler, [1.0] * stages, spans, [1.0] * stages, microbatches) == pytest.approx(took)


def test_a_pace_that_is_none_bounds_nothing() -> None:
    assert least_of_any_cut("gpipe", [1.0], [0.0], 1) == 0
    assert resize(ResizeProblem("gpipe", [1.0, 1.0], 2, 1), range(2), speeds={1: 0.0}).stages == 1


def test_what_the_verifier_refuses_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, seen = ResizeProblem("gpipe", [1.0] * 4, 4, 2), list[int]()

    def refuse(most: int) -> None:
        def judge(schedule: Schedule, **_: bool) -> None:
            seen.append(len(schedule.lanes))
            if len(schedule.lanes) > most:
                raise ScheduleError(f"too wide: {len(schedule.lanes)}")

        monkeypatch.setattr(schedulers.resize, "verify", judge)

    refuse(2)
    assert resize(asked, range(4)).stages == 2
    assert seen == [4, 2, 2], "three are no faster than two, both of whose schedules pass"
    refuse(0)
    with pytest.raises(ScheduleError, match="too wide: 4"):
        resize(asked, range(4))
