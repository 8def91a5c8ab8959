"""The partition against brute force, and what it says where nothing fits."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedulers.partition import PartitionError, partition


def slowest(spans: tuple, costs: list[float], speeds: list[float]) -> float:
    return max(sum(costs[lo:hi]) / speed for (lo, hi), speed in zip(spans, speeds, strict=True))


def brute_force(costs: list[float], speeds: list[float], memory: list[float], limits: list[float]) -> float:
    """The least time of the slowest worker over all cuts that fit; infinite where none does."""
    best = math.inf
    for cuts in combinations(range(1, len(costs)), len(speeds) - 1):
        spans = tuple(pairwise((0, *cuts, len(costs))))
        if all(sum(memory[lo:hi]) <= room for (lo, hi), room in zip(spans, limits, strict=True)):
            best = min(best, slowest(spans, costs, speeds))
    return best


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[float], list[int], list[int]]:
    workers = draw(st.integers(1, 4))
    layers = draw(st.integers(workers, 12))
    costs = draw(st.lists(st.integers(0, 20), min_size=layers, max_size=layers))
    speeds = draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=workers, max_size=workers))
    memory = draw(st.lists(st.integers(0, 9), min_size=layers, max_size=layers))
    limits = draw(st.lists(st.integers(5, 40), min_size=workers, max_size=workers))
    return costs, speeds, memory, limits


@given(problems())
def test_equals_brute_force(problem: tuple) -> None:
    costs, speeds, memory, limits = problem
    best = brute_force(costs, speeds, memory, limits)
    if math.isinf(best):
        with pytest.raises(PartitionError):
            partition(costs, speeds, memory, limits)
        return
    spans = partition(costs, speeds, memory, limits)
    assert slowest(spans, costs, speeds) == pytest.approx(best)
    assert [lo for lo, _ in spans] == [0, *(hi for _, hi in spans[:-1])]
    assert spans[-1][1] == len(costs)
    assert all(lo < hi for lo, hi in spans)
    assert all(sum(memory[lo:hi]) <= room for (lo, hi), room in zip(spans, limits, strict=True))
    free = slowest(partition(costs, speeds), costs, speeds)
    assert free == pytest.approx(brute_force(costs, speeds, memory, [math.inf] * len(speeds)))


def test_a_faster_worker_gets_more() -> None:
    assert partition([1.0] * 9, [1.0, 2.0]) == ((0, 3), (3, 9))
    assert partition([1.0] * 9, [2.0, 1.0]) == ((0, 6), (6, 9))


@pytest.mark.parametrize(
    ("costs", "speeds", "memory", "limits", "said"),
    [
        ([1], [1, 1], None, None, r"2 stages for 1 layers; allowed: at most 1"),
        ([1], [], None, None, r"speeds is empty"),
        ([1, 1], [1], [5, 6], [10], r"2 layers need 11 bytes; the 1 workers together have 10"),
        ([1, 1], [1, 1], [9, 1], [5, 9], r"layer 0 needs 9 bytes; worker 0, whose turn it is, has 5"),
        ([1, 1, 1], [1, 1], [4, 4, 4], [7, 5], r"hold layers 0 to 1; layers 2 to 2, 4 bytes, fit nowhere"),
        ([1, 1], [1], [1, 1], None, r"memory and limits go together"),
        ([1, 1], [1], [1], [9], r"memory has 1 values; expected 2"),
        ([1, -1], [1], None, None, r"layer_costs\[1\] is -1; allowed: 0 or more"),
        ([1, math.nan], [1], None, None, r"layer_costs\[1\] is nan"),
        ([1, 1], [0], None, None, r"speeds\[0\] is 0; allowed: above 0"),
    ],
)
def test_refusals_name_what_does_not_fit(costs, speeds, memory, limits, said) -> None:
    with pytest.raises(PartitionError, match=said):
        partition(costs, speeds, memory, limits)
