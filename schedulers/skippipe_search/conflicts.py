"""Conflict-based search: every microbatch takes its cheapest path until too many meet in one place, then some give way.

As SkipPipe does it (arXiv 2502.19913): the low level finds one microbatch the cheapest path that avoids what it must
not use; the high level keeps a tree of such prohibitions. A node of the tree whose stage or node is visited more often
than its share allows has one child per microbatch that could give way. Microbatches of one home with the same
prohibitions are alike, so one child stands for them all; the tree is searched by what is still too much, then by time
(greedy conflict-based search, Barer et al. 2014). Two microbatches that want one node at one time are no conflict
here: one waits, as the clock says, and the best of the first few solutions by the clock is taken.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from schedulers.skippipe_search.clock import PathClock
from schedulers.skippipe_search.problem import NetworkError, Path, RoutingProblem, check_paths, quotas
from schedulers.skippipe_search.router import Router

_SOLUTIONS = 4
TRIES = 40
"""Orders of the homes that `prioritised` tries."""


@dataclass(frozen=True)
class _Node:
    """One set of prohibitions by microbatch, and the paths under it."""

    banned: tuple[frozenset[int], ...]
    paths: tuple[Path, ...]
    trips: tuple[float, ...]


def conflict_based(
    problem: RoutingProblem, expansions: int = 400, over: Callable[[], bool] = lambda: False
) -> list[Path] | None:
    """Paths that are legal and balanced, or None where none were found within so many expansions, or until `over()`."""
    (_, stage_most), node_quotas = quotas(problem)
    router, clock = Router(problem), PathClock(problem)
    known: dict[tuple[int, frozenset[int]], tuple[float, Path] | None] = {}

    def cheapest(home: int, banned: frozenset[int]) -> tuple[float, Path] | None:
        if (home, banned) not in known:
            known[home, banned] = router.cheapest(home, banned)
        return known[home, banned]

    def excess(paths: tuple[Path, ...]) -> tuple[int, list[tuple[int, frozenset[int]]]]:
        """Visits beyond what is allowed, and the places where they are: (how many, nodes), stages before nodes."""
        visits = Counter(node for path in paths for node in path[1:])
        places: list[tuple[int, frozenset[int]]] = []
        for stage in problem.stages[1:]:
            if (much := sum(visits[node] for node in stage) - stage_most) > 0:
                places.append((much, frozenset(stage)))
        for node, (_, most) in node_quotas.items():
            if (much := visits[node] - most) > 0:
                places.append((much, frozenset((node,))))
        return sum(much for much, _ in places), places

    roots: list[tuple[float, Path]] = []
    for m in range(problem.num_microbatches):
        root = cheapest(problem.home(m), frozenset())
        if root is None:
            return None
        roots.append(root)
    start = _Node((frozenset(),) * len(roots), tuple(p for _, p in roots), tuple(t for t, _ in roots))
    open_: list[tuple[int, float, int, _Node]] = [(excess(start.paths)[0], max(start.trips), 0, start)]
    number, best, solutions = 0, (float("inf"), None), 0
    while open_ and expansions > 0 and solutions < _SOLUTIONS and not over():
        expansions -= 1
        much, _, _, node = heapq.heappop(open_)
        if much == 0:
            try:
                check_paths(problem, node.paths)
            except NetworkError:
                continue  # nowhere too much, but somewhere too little
            solutions += 1
            best = min(best, (clock.best(node.paths)[0], list(node.paths)), key=lambda each: each[0])
            continue
        _, place = max(excess(node.paths)[1], key=lambda each: (len(each[1]), each[0], -min(each[1])))
        tried: set[tuple[int, frozenset[int]]] = set()
        for m, path in enumerate(node.paths):
            if not place.intersection(path[1:]) or (problem.home(m), node.banned[m]) in tried:
                continue
            tried.add((problem.home(m), node.banned[m]))
            banned = node.banned[m] | place
            other = cheapest(problem.home(m), banned)
            if other is None:
                continue
            child = _Node(
                (*node.banned[:m], banned, *node.banned[m + 1 :]), (*node.paths[:m], other[1], *node.paths[m + 1 :]),
                (*node.trips[:m], other[0], *node.trips[m + 1 :]),
            )  # fmt: skip
            number += 1
            heapq.heappush(open_, (excess(child.paths)[0], sum(child.trips) + max(child.trips), number, child))
    return best[1]


def prioritised(
    problem: RoutingProblem, seed: int = 0, tries: int = TRIES, over: Callable[[], bool] = lambda: False
) -> list[Path] | None:
    """One home after another takes the cheapest paths that are left, those with the longest round trips first; then
    in other orders, until `over()`. Legal and balanced paths, the best of all orders by the clock; None where all get
    stuck."""
    router, clock, draw = Router(problem), PathClock(problem), random.Random(seed)
    trips = {home: (router.cheapest(home) or (0.0, ()))[0] for home in problem.homes}
    ranking, best = sorted(problem.homes, key=lambda home: -trips[home]), (float("inf"), None)
    for number in range(tries):
        if number and over():
            break
        if (paths := _in_turn(problem, router, ranking)) is not None:
            best = min(best, (max(clock.finish(paths)), paths), key=lambda each: each[0])
        a, b = draw.randrange(len(ranking)), draw.randrange(len(ranking))
        ranking[a], ranking[b] = ranking[b], ranking[a]
    return best[1]


def _in_turn(problem: RoutingProblem, router: Router, ranking: Sequence[int]) -> list[Path] | None:
    """Home by home, the cheapest paths that leave room for the microbatches after them; None where one gets stuck."""
    (_, stage_most), node_quotas = quotas(problem)
    stage_of, visits, by_stage = problem.stage_of, Counter[int](), Counter[int]()
    paths: dict[int, Path] = {}
    for m in (m for home in ranking for m in problem.microbatches_of(home)):
        left = problem.num_microbatches - len(paths)
        banned = {node for node, (_, most) in node_quotas.items() if visits[node] >= most}
        must = [i for i in range(1, len(problem.stages)) if stage_most - by_stage[i] >= left]
        for i, stage in enumerate(problem.stages[1:], 1):
            if by_stage[i] >= stage_most or (len(must) >= problem.path_length - 1 and i not in must):
                banned.update(stage)
        found = router.cheapest(problem.home(m), banned)
        if found is None:
            return None
        paths[m] = found[1]
        visits.update(found[1][1:])
        by_stage.update(stage_of[node] for node in found[1][1:])
    whole = [paths[m] for m in range(len(paths))]
    try:
        check_paths(problem, whole)
    except NetworkError:
        return None
    return whole


def dealt_paths(problem: RoutingProblem) -> list[Path]:
    """Legal and balanced paths without any search: stages and their nodes in turn."""
    others = len(problem.stages) - 1
    visits, at, paths = problem.path_length - 1, [0] * len(problem.stages), list[Path]()
    for m in range(problem.num_microbatches):
        path = [problem.home(m)]
        for i in sorted((m * visits + k) % others + 1 for k in range(visits)) if visits else ():
            path.append(problem.stages[i][at[i] % len(problem.stages[i])])
            at[i] += 1
        paths.append(tuple(path))
    return paths
