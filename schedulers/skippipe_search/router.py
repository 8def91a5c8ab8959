"""The cheapest legal path of one home, exactly: dynamic programming over visits, highest and last stage, and node."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schedulers.skippipe_search.problem import Path, RoutingProblem

_Key = tuple[int, int, int, bool]
"""(stages visited beside the home's, the highest of them, the last of them, whether two have changed places)."""


@dataclass
class _Front:
    """By node of the last stage: the least seconds so far, and where they come from: a key, a node there, and the
    node between if two stages were visited in one go, in reverse (else -1)."""

    cost: NDArray[np.float64]
    key: list[_Key]
    node: NDArray[np.intp]
    between: NDArray[np.intp]


class Router:
    """Answers for one problem. A hop counts both ways, a node its forward and its backward."""

    def __init__(self, problem: RoutingProblem) -> None:
        self.problem = problem
        hops = np.array(problem.hop_s, dtype=float)
        self._both = hops + hops.T
        np.fill_diagonal(self._both, 0.0)
        self._own = np.array([problem.seconds("forward", n) + problem.seconds("backward", n) for n in range(len(hops))])
        self._nodes = [np.array(stage) for stage in problem.stages]

    def cheapest(self, home: int, banned: Collection[int] = ()) -> tuple[float, Path] | None:
        """Seconds of the shortest round trip of `home` that visits none of `banned`, and its path; None where there
        is none."""
        problem, nodes, both = self.problem, self._nodes, self._both
        own = float(self._own[home]) + problem.seconds("loss", home)
        visits, stages = problem.path_length - 1, len(nodes)
        if visits == 0:
            return own, (home,)
        extra = self._own.copy()
        extra[list(banned)] = np.inf
        none = np.full(1, -1)
        fronts: dict[_Key, _Front] = {(0, 0, 0, False): _Front(np.zeros(1), [(0, 0, 0, False)], none, none)}

        def offer(key: _Key, source: _Key, cost: NDArray[np.float64], came: NDArray[np.intp],
                  between: NDArray[np.intp] | None) -> None:  # fmt: skip
            front = fronts.get(key)
            if front is None:
                none = np.full(len(cost), -1)
                fronts[key] = _Front(cost, [source] * len(cost), came, none if between is None else between)
                return
            better = cost < front.cost
            if better.any():
                front.cost = np.where(better, cost, front.cost)
                front.node = np.where(better, came, front.node)
                front.between = np.where(better, -1 if between is None else between, front.between)
                front.key = [source if b else old for b, old in zip(better, front.key, strict=True)]

        for count in range(visits):
            for key in [key for key in fronts if key[0] == count]:
                _, top, last, swapped = key
                cost = fronts[key].cost
                here = np.array([home]) if count == 0 else nodes[last]
                for j in range(top + 1, stages):
                    spare = stages - 1 - j - (visits - count - 1)  # stages beyond those still needed after this one
                    if spare < -1:
                        break
                    step = cost[:, None] + both[np.ix_(here, nodes[j])]
                    came = step.argmin(axis=0)
                    first = step[came, np.arange(len(nodes[j]))] + extra[nodes[j]]
                    if spare >= 0:
                        offer((count + 1, j, j, swapped), key, first, came, None)
                    if swapped or not problem.swaps or count + 2 > visits:
                        continue
                    for i in range(top + 1, j):
                        back = first[:, None] + both[np.ix_(nodes[j], nodes[i])]
                        via = back.argmin(axis=0)
                        second = back[via, np.arange(len(nodes[i]))] + extra[nodes[i]]
                        offer((count + 2, j, i, True), key, second, came[via], nodes[j][via])
        best: tuple[float, _Key, int] | None = None
        for key, front in fronts.items():
            if key[0] == visits:
                total = front.cost + both[nodes[key[2]], home]
                k = int(total.argmin())
                if np.isfinite(total[k]) and (best is None or total[k] < best[0]):
                    best = (float(total[k]), key, k)
        if best is None:
            return None
        seconds, key, k = best
        path: list[int] = []
        while key[0] > 0:
            front = fronts[key]
            path.append(int(nodes[key[2]][k]))
            if front.between[k] >= 0:
                path.append(int(front.between[k]))
            key, k = front.key[k], int(front.node[k])
        return own + seconds, (home, *reversed(path))
