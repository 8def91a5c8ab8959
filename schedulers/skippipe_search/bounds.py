"""What no plan can beat: bounds on the seconds of an iteration, each from one thing that takes time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from schedulers.skippipe_search.problem import RoutingProblem, quotas
from schedulers.skippipe_search.router import Router


def lower_bounds(problem: RoutingProblem) -> dict[str, float]:
    """By what it counts, for the given stages; the largest is the bound.

    "round trips": a home with M microbatches and K slots makes ceil(M / K) round trips one after another.
    "homes": beside, the home does its own work, which the turn from one round to the next must wait for (see `_home`).
    "held": the same for the slots of the other nodes (see `_held`).
    "first stage", "middle": a node's own ops alone.
    """
    router = Router(problem)
    trips, homes = [0.0], [0.0]
    for home in problem.homes:
        many = len(problem.microbatches_of(home))
        found = router.cheapest(home)
        if found is not None:
            trips.append(-(-many // problem.slots[home]) * found[0])
            homes.append(_home(problem, home, found[0], many))
    return {"round trips": max(trips), "homes": max(homes), "held": _held(problem), **own_work(problem)}


def own_work(problem: RoutingProblem) -> dict[str, float]:
    """Those of `lower_bounds` that are found in no time: a node's own ops."""
    first = [0.0]
    for home in problem.homes:
        many = len(problem.microbatches_of(home))
        own = math.fsum(problem.seconds(kind, home) for kind in ("forward", "loss", "backward"))
        first.append(many * own + (3 * many - 1) * problem.gap_s)
    middle = [
        least * (problem.seconds("forward", node) + problem.seconds("backward", node) + 2 * problem.gap_s)
        - (problem.gap_s if least else 0.0)
        for node, (least, _) in quotas(problem)[1].items()
    ]
    return {"first stage": max(first), "middle": max(middle, default=0.0)}


def _home(problem: RoutingProblem, home: int, trip: float, many: int) -> float:
    """Of one home with M microbatches and K slots whose round trips take `trip` seconds at least.

    Number the microbatches by the start of their forward, S(1) <= S(2) <= ...; S(j + K) waits for j of the backwards,
    so S(j + K) >= S(j) + trip. From S(j) + trip - b on, with j = max(1, M - 2K + 1) and b a backward, at least
    M - K - j + 1 backwards and M - K - j forwards are done before S(M), one after another, and then comes a whole trip.
    """
    slots = problem.slots[home]
    forward = problem.seconds("forward", home) + problem.gap_s
    backward = problem.seconds("backward", home)
    if many <= slots:
        return (many - 1) * forward + trip
    j = max(1, many - 2 * slots + 1)
    start = (j - 1) // slots * trip
    turn = (many - slots - j + 1) * (backward + problem.gap_s) + (many - slots - j) * forward
    return start + trip - backward + turn + trip


def home_turn(problem: RoutingProblem, many: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By node, if it were a home with so many microbatches: seconds of an iteration, and how many of its shortest
    round trips fit into the rest of it at most; no trips where all microbatches are under way at once.

    As in `_home`: S(M) waits for a chain of q + 1 trips, of different microbatches, the last one less its backward,
    and for the turn after them; then comes the last trip.
    """
    slots, speed = np.array(problem.slots, float), np.array(problem.speed)
    forward, backward = problem.forward_s / speed + problem.gap_s, problem.backward_s / speed
    j = np.maximum(1, many - 2 * slots + 1)
    backwards, chain = many - slots - j + 1, np.floor((j - 1) / slots)
    turn = backwards * (backward + problem.gap_s) + (backwards - 1) * forward - backward
    waits = many > slots
    return np.where(waits, turn, 0.0), np.where(waits, chain + 2, 0.0)


def _held(problem: RoutingProblem) -> float:
    """Of the nodes beside the first stage: one with V visits and K slots holds ceil(V / K) microbatches one after
    another, each from its forward until it has been home for its loss and is back; the first must get there before, and
    the last one's backward must get home after.

    What is left of a path after a node is found from the homes on, stop by stop, as the cheapest for that many stops:
    in stages above the node's, or, where stages may change places, in any.
    """
    length, homes, stage = problem.path_length, np.array(problem.homes), problem.stage_by_node
    if length < 2:
        return 0.0
    hop, both = problem.hops, problem.both_ways
    speed = np.array(problem.speed)
    forward, backward = problem.forward_s / speed, problem.backward_s / speed
    after = (stage[:, None] < stage[None, :]) & (stage[:, None] > 0)  # whether the second may follow the first
    if problem.swaps:
        after = (stage[:, None] != stage[None, :]) & (stage[:, None] > 0) & (stage[None, :] > 0)
    follow = np.where(after, both + (forward + backward)[None, :], np.inf)
    home = (both[:, homes] + (problem.loss_s / speed)[homes][None, :]).min(axis=1)
    there = (forward[homes][:, None] + hop[homes]).min(axis=0)
    back = (hop[:, homes] + backward[homes][None, :]).min(axis=1)
    onwards = np.where(after, hop + forward[:, None], np.inf)  # [a, b]: the forward of a and the hop to b
    homewards = np.where(after.T, hop + backward[None, :], np.inf)  # [a, b]: the hop to b and its backward
    left, to, fro = [home], [there], [back]  # by the number of stops in between
    for _ in range(length - 2):
        left.append((follow + left[-1][None, :]).min(axis=1))
        to.append((onwards + to[-1][:, None]).min(axis=0))
        fro.append((homewards + fro[-1][None, :]).min(axis=1))
    found = [0.0]
    for node, (visits, _) in quotas(problem)[1].items():
        reach = float(min(each[node] for each in to) + min(each[node] for each in fro))
        fewest = max(0, length - 1 - int(stage[node]) - int(problem.swaps))
        rest = min((left[r][node] for r in range(fewest, length - 1)), default=np.inf)
        if visits and np.isfinite(rest):
            hold = forward[node] + backward[node] + rest
            found.append(float(reach + -(-visits // problem.slots[node]) * hold))
    return max(found)


def any_cut(problem: RoutingProblem) -> float:
    """A bound for every cut of the nodes into stages of the given sizes.

    Two things, the larger counts. Homes: each has a cheapest round trip through any other nodes, and as many homes are
    needed as the first stage has nodes. Slots: all round trips together must fit into the slots of all homes, less what
    staggers them at both ends; their hops are at least a fractional matching in which each node meets as many hop ends
    as it has visits (a minimum cost flow), since a path enters and leaves each node that it visits.
    """
    size, length = len(problem.hop_s), problem.path_length
    nodes = [n for stage in problem.stages for n in stage]
    fast = max(problem.speed)
    forward, backward = problem.forward_s / fast, problem.backward_s / fast
    own = length * (forward + backward) + problem.loss_s / fast
    hop = problem.both_ways.tolist()
    trips = sorted(own + _tour(hop, nodes, home, length) for home in nodes)
    count, slots = len(problem.homes), max(problem.slots)
    uniform = replace(
        problem, forward_s=forward, backward_s=backward, loss_s=problem.loss_s / fast, speed=(1.0,) * size,
        slots=(slots,) * size,
    )  # fmt: skip
    fewest = problem.num_microbatches // count
    homes = _home(uniform, problem.homes[0], trips[count - 1], fewest)
    shares = [(fewest, -(-problem.num_microbatches // count)), *quotas(problem)[1].values()]
    least, most = min(low for low, _ in shares), max(high for _, high in shares)
    total = problem.num_microbatches * own + _matching(hop, nodes, least, most, length)
    rounds = min(slots, fewest)
    stagger = (forward + backward + 2 * problem.gap_s) * rounds * (rounds - 1) / 2
    return max(homes, (total / count + stagger) / slots)


def _tour(hop: Sequence[Sequence[float]], nodes: Sequence[int], home: int, length: int) -> float:
    """The least sum of hops of a closed walk of `length` stops through `home`; stops next to each other differ."""
    if length == 1:
        return 0.0
    at = {n: hop[home][n] for n in nodes if n != home}
    for _ in range(length - 2):
        at = {n: min(cost + hop[m][n] for m, cost in at.items() if m != n) for n in at} if len(at) > 1 else at
    return min(cost + hop[n][home] for n, cost in at.items())


def _matching(hop: Sequence[Sequence[float]], nodes: Sequence[int], least: int, most: int, length: int) -> float:
    """The least total of hops when every node is visited `least` to `most` times: each visit has two hop ends there,
    and a link is used at most once in each of its nodes' visits.

    A path of two stops uses its one link twice, there and back home.
    """
    if length < 2 or least == 0:
        return 0.0
    graph = nx.DiGraph()
    unit = 1e6  # network simplex wants whole numbers: rounded down, which keeps it a bound
    for a in nodes:
        graph.add_node(("from", a), demand=-2 * least)
        graph.add_node(("to", a), demand=2 * least)
        for b in nodes:
            if a != b:
                capacity = most if length > 2 else 2 * most
                graph.add_edge(("from", a), ("to", b), capacity=capacity, weight=math.floor(hop[a][b] * unit))
        if most > least:  # visits beyond the fewest are made where they are cheapest, if at all
            graph.add_edge("more", ("from", a), weight=0)
            graph.add_edge(("to", a), "more", weight=0)
    cost, _ = nx.network_simplex(graph)
    return cost / unit / 2
