"""The routing problem and a search's state as plain arrays, which compiled code reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schedulers.skippipe_search.problem import Path, RoutingProblem, quotas

Floats = Any
Ints = Any
"""Arrays of float64 and of int64; numpy's own types would have it that an item of one may be an array again."""


class Flat(NamedTuple):
    """What does not change during a search; seconds, by node where not said otherwise."""

    hop: Floats  # [from, to]
    both: Floats  # [a, b]: there and back
    forward: Floats
    loss: Floats
    backward: Floats
    gap: float
    slots: Ints
    nodes: Ints  # those in stages
    near: Ints  # [node, rank]: the nearest ones first
    length: int
    homes: int
    swaps: bool
    contention: bool
    joint: bool
    replica_hop: float
    stage_least: int
    stage_most: int
    furthest: bool  # the rule: whom an idle node serves
    uneven: bool  # whether a visit may move from one node to another with the balance kept
    most_s: float  # no iteration takes longer: what the longest round trips take one after another, gaps and all


class State(NamedTuple):
    """What moves change, with what is derived from it. M microbatches, L stops, H homes, V the most visits."""

    paths: Ints  # [M, L]
    stage_of: Ints  # by node, -1: in none
    least: Ints  # by node: the fewest and the most visits
    most: Ints
    visits: Ints  # by node
    by: Ints  # [node, V]: the microbatches that visit it
    stage_visits: Ints
    trips: Floats  # [M]: round trips
    own: Floats  # [H]: each home alone
    total: Floats  # [H]: the sum over its microbatches of when they are through, alone
    slow: Floats  # [H]: each home as moves are to see it
    changed: Ints  # [M]: microbatches that the last move changed, their paths and round trips before
    old: Ints  # [M, L]
    old_trips: Floats
    homes: Ints  # [H]: their homes, with what was derived for those before
    old_own: Floats
    old_total: Floats
    mark: Ints  # [H]: the last move that changed each
    tally: Ints  # [changed microbatches, changed homes, two nodes that exchanged names or -1, moves made]
    row: Ints  # [2, L]: room for paths in the making
    draw: NDArray[np.uint64]  # [1]: the random state


class Room(NamedTuple):
    """Where the clock writes; nothing in it outlives a call but what it says it returns."""

    time: Floats  # a heap of events: when, and in which order at the same time
    key: Ints  # a number << 32, and what happens: a node chooses, a microbatch comes, or a node's op is over
    arrived: Floats  # by microbatch: when it came where it waits, at which position, and who waits there too
    at: Ints
    next: Ints
    first: Ints  # by node: who waits there
    free_at: Floats  # by node: when its op is over, and the number of that event
    free_number: Ints
    freed: Ints  # by node: memory slots that its last op gives back, and those it has left
    left: Ints
    waking: Ints  # by node: whether an event is due when its op is over
    links: Floats  # [from, to] under contention: until when it is taken
    heap: Floats  # two heaps for a home alone
    heap2: Floats
    finish: Floats  # [M]: returned: when each is through
    ends: Floats  # [H]: the same by home, and the sum over its microbatches
    totals: Floats
    shape: Floats  # [2]: a power, or 0, and the seconds of a home that it is taken relative to
    lane: Ints  # [M (2 L + 1), 3]: returned: node, microbatch and position in the order in which they were served


def flatten(problem: RoutingProblem, joint: bool = False) -> Flat:
    """The arrays of a problem."""
    hop = problem.hops
    speed = np.array(problem.speed)
    nodes = np.array(sorted(n for stage in problem.stages for n in stage))
    stop = (problem.forward_s + problem.backward_s) / speed[nodes].min() + 2 * problem.gap_s
    stop += float(problem.both_ways.max())
    trip = (problem.path_length + 1) * stop + problem.loss_s / speed[nodes].min() + problem.gap_s
    (low, high), shares = quotas(problem)
    return Flat(
        hop, problem.both_ways, problem.forward_s / speed, problem.loss_s / speed, problem.backward_s / speed,
        float(problem.gap_s), np.array(problem.slots), nodes, problem.nearest, problem.path_length,
        len(problem.homes), bool(problem.swaps), bool(problem.contention), bool(joint), float(problem.replica_hop_s),
        low, high, False, low != high or any(a != b for a, b in shares.values()), problem.num_microbatches * trip,
    )  # fmt: skip


def state_of(problem: RoutingProblem, paths: Sequence[Path], seed: int) -> State:
    """A search's state at `paths`, with nothing derived yet."""
    size, many, length = len(problem.hop_s), problem.num_microbatches, problem.path_length
    stage_of = problem.stage_by_node
    shares = quotas(problem)[1]
    least, most = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for node, (low, high) in shares.items():
        least[node], most[node] = low, high
    rows = np.array(paths, np.int64).reshape(many, length)
    visits = np.bincount(rows[:, 1:].ravel(), minlength=size)
    by = np.full((size, max(1, int(visits.max()), int(most.max())) + 2), -1)
    stage_visits, at = np.zeros(len(problem.stages), np.int64), np.zeros(size, np.int64)
    np.add.at(stage_visits, stage_of[rows[:, 1:].ravel()], 1)
    for m, row in enumerate(rows[:, 1:].tolist()):
        for node in row:
            by[node, at[node]] = m
            at[node] += 1
    homes = len(problem.homes)
    return State(
        rows, stage_of, least, most, visits, by, stage_visits, np.zeros(many), np.zeros(homes), np.zeros(homes),
        np.zeros(homes), np.zeros(many, np.int64), np.zeros((many, length), np.int64), np.zeros(many),
        np.zeros(homes, np.int64), np.zeros(homes), np.zeros(homes), np.full(homes, -1), np.array([0, 0, -1, -1, 0]),
        np.zeros((2, length), np.int64), np.array([seed % 2**64], np.uint64),
    )  # fmt: skip


def room_of(problem: RoutingProblem) -> Room:
    """Room for the clock."""
    size, many, length = len(problem.hop_s), problem.num_microbatches, problem.path_length
    events = 2 * many + 2 * size + 8
    return Room(
        np.zeros(events), np.zeros(events, np.int64), np.zeros(many),
        np.zeros(many, np.int64), np.zeros(many, np.int64), np.zeros(size, np.int64), np.zeros(size),
        np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int64),
        np.zeros((size, size) if problem.contention else (1, 1)), np.zeros(many + 1), np.zeros(many + 1),
        np.zeros(many), np.zeros(len(problem.homes)),
        np.zeros(len(problem.homes)), np.zeros(2), np.zeros((many * (2 * length + 1), 3), np.int64),
    )  # fmt: skip
