"""A bound from all paths at once: a linear program says within which iteration the slots could hold them.

A slot of a node is held from a microbatch's forward to its backward, at least for what is left of the round trip, so
within T seconds it holds visits one after another that together take no longer: slots are bins, visits are items. For
a given T, take every legal path of every home, in fractions. Each home must send its microbatches, each node be visited
as often as balance demands, and each node's items must satisfy what every packing into its bins does:

  sizes      they fit by their sum, less what keeps slots empty: the way there, the way home, and that a node starts
             and ends one op after another
  large      of items above a share 1/R of a bin, at most R - 1 go into each
  pairs      with u from 1/3 to 1/2 of a bin: an item above 1 - u counts one, one above u a half, and a bin holds one
             (dual feasible functions, Fekete and Schepers 2001); where there are at most two items a bin, for any u
  turn       the shortest trips of a home must leave time for its own ops in between (bounds.home_turn)

The program asks which share of the load can be served so. Where that is less than all, no plan takes T seconds or less.
Where the cut is open, whether a node is a home is a variable, and every closed walk over different nodes is a path.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from schedulers.skippipe_search.bounds import home_turn
from schedulers.skippipe_search.flat import Floats, Ints
from schedulers.skippipe_search.problem import RoutingProblem, quotas

MOST_COLUMNS = 150_000
_SHARES = (0.08, 0.16, 0.24, 0.3, 0.34, 0.38, 0.42, 0.46, 0.5)  # u above
_TOLERANCE = 1e-6  # of the load, above that of the solver
_CLOSE = 0.002  # of the bound: how far the search for it goes
_FIRST, _MORE = 4000, 2000  # columns that a program starts with, and those that it gets at a time


@dataclass(frozen=True)
class Columns:
    """Every path [P, L], the seconds of its round trip, and for how long each of its nodes holds a slot at least."""

    paths: Ints
    trips: Floats
    holds: Floats
    reach: Floats  # by node: from the start to its first forward and from its last backward to the end, at least


def all_paths(problem: RoutingProblem, any_stages: bool) -> Columns | None:
    """None where there are too many."""
    length, stages = problem.path_length, problem.stages
    nodes = sorted(n for stage in stages for n in stage)
    if length < 2:
        return None
    if any_stages:
        if math.perm(len(nodes), length) > MOST_COLUMNS:
            return None
        paths = np.array([*itertools.permutations(nodes, length)])
    else:
        visited: list[tuple[int, ...]] = []
        for chosen in itertools.combinations(range(1, len(stages)), length - 1):
            orders = [chosen]
            if problem.swaps:
                orders += [(*chosen[:i], chosen[i + 1], chosen[i], *chosen[i + 2 :]) for i in range(length - 2)]
            many = math.prod(len(stages[i]) for i in chosen) * len(orders)
            if (len(visited) + many) * len(problem.homes) > MOST_COLUMNS:
                return None
            for order in orders:
                visited += itertools.product(*(stages[i] for i in order))
        rest, homes = np.array(visited), np.array(problem.homes)
        paths = np.column_stack([np.repeat(homes, len(rest)), np.tile(rest, (len(homes), 1))])
    hop, both, speed = problem.hops, problem.both_ways, np.array(problem.speed)
    forward, backward = problem.forward_s / speed, problem.backward_s / speed
    own = forward + backward
    after = both[paths[:, -1], paths[:, 0]] + (problem.loss_s / speed)[paths[:, 0]]
    holds = np.empty(paths.shape)
    for i in range(length - 1, -1, -1):
        holds[:, i] = after + own[paths[:, i]]
        after = holds[:, i] + both[paths[:, i - 1], paths[:, i]]
    there, back = np.full(len(hop), np.inf), np.full(len(hop), np.inf)
    to, fro = np.zeros(len(paths)), np.zeros(len(paths))
    for a, b in itertools.pairwise(paths.T):
        to, fro = to + forward[a] + hop[a, b], fro + backward[a] + hop[b, a]
        np.minimum.at(there, b, to)
        np.minimum.at(back, b, fro)
    return Columns(paths, holds[:, 0].copy(), holds, there + back)


class Packing:
    """The program for one problem, for any T."""

    def __init__(self, problem: RoutingProblem, columns: Columns, any_stages: bool) -> None:
        import highspy  # takes a tenth of a second, which who needs no bound need not

        self.solver: Any = highspy
        self.problem, self.columns, self.open = problem, columns, any_stages
        size, count = len(problem.hop_s), len(problem.homes)
        speed = np.array(problem.speed)
        self.op = (problem.forward_s + problem.backward_s) / speed + 2 * problem.gap_s
        (low, high), shares = quotas(problem)
        self.stage_share = (low, high)
        self.least, self.most, self.sent, self.sent_most = (np.zeros(size) for _ in range(4))
        nodes = [n for stage in problem.stages for n in stage]
        if any_stages:
            self.least[nodes] = min(share[0] for share in shares.values())
            self.most[nodes] = max(share[1] for share in shares.values())
            self.sent[nodes] = problem.num_microbatches // count
            self.sent_most[nodes] = -(-problem.num_microbatches // count)
        else:
            for node, share in shares.items():
                self.least[node], self.most[node] = share
            for home in problem.homes:
                self.sent[home] = self.sent_most[home] = len(problem.microbatches_of(home))
        self.stage_of = problem.stage_by_node

    def served(self, seconds: float) -> float:
        """The share of the load that can be served within so many seconds, 1 if all."""
        table = _Table(self, seconds)
        keep = table.legal
        if not len(keep):
            return 0.0
        first = np.zeros(len(keep), bool)
        first[np.argsort(self.columns.trips[keep], kind="stable")[: _FIRST // 2]] = True
        first[:: max(1, len(keep) // (_FIRST // 2))] = True
        model = table.model()
        inside = np.zeros(len(keep), bool)
        while True:
            new = np.flatnonzero(first & ~inside)
            width = table.rows.shape[1]
            model.addCols(
                len(new), np.zeros(len(new)), np.zeros(len(new)), np.full(len(new), self.solver.kHighsInf),
                len(new) * width, np.arange(0, len(new) * width, width, dtype=np.int32),
                table.rows[new].ravel(), table.values[new].ravel(),
            )  # fmt: skip
            inside[new] = True
            model.run()
            unserved = model.getInfo().objective_function_value
            if unserved <= _TOLERANCE:
                return 1.0
            cost = -(np.array(model.getSolution().row_dual)[table.rows] * table.values).sum(axis=1)
            worth = np.flatnonzero((cost < -1e-9) & ~inside)
            if not len(worth):
                return 1.0 - unserved
            first[:] = False
            first[worth[np.argsort(cost[worth], kind="stable")[:_MORE]]] = True


class _Table:
    """The program for one T: `rows` and `values` [legal paths, entries], and the rows' limits and other variables.

    The others are z, the share of the load that is not served, and y by node, whether it is a home.
    """

    def __init__(self, packing: Packing, seconds: float) -> None:
        self.packing, problem, columns = packing, packing.problem, packing.columns
        gap, size = problem.gap_s, len(problem.hop_s)
        self.slots = np.array(problem.slots, float)
        self.limits: list[tuple[Floats, Floats, Floats, Floats]] = []  # by row: low, high, of z, of y
        self.legal = np.flatnonzero(columns.trips <= seconds)
        paths = columns.paths[self.legal]
        trips, homes = columns.trips[self.legal], paths[:, 0]
        rows: list[Ints] = []
        values: list[Floats] = []

        def fill(block: int, at: Ints, value: Any) -> None:
            rows.append(block * size + at)
            values.append(np.broadcast_to(np.asarray(value, float), at.shape))

        none, inf, sent = np.zeros(size), np.full(size, np.inf), packing.sent
        fill(self._block(none, inf, sent, -sent), homes, 1)
        fill(self._block(-inf, none, none, -packing.sent_most), homes, 1)
        turn, after = home_turn(problem, sent)
        most = (seconds - turn) / np.maximum(after, 1) + 1e-9
        fill(self._block(none, inf, 1.0 * (after > 0), -1.0 * (after > 0)), homes, trips <= most[homes])
        bins = np.full(size, seconds + gap)
        for block, weight in self._packed(bins, sent, packing.sent_most, -1.0):
            fill(block, homes, weight(homes, trips + gap))
        reach, least = np.where(np.isfinite(columns.reach), columns.reach, 0.0), packing.least
        visits = self._block(least, inf, least, least), self._block(-inf, packing.most, none, packing.most)
        tests = self._packed(seconds + gap - reach, least, packing.most, 1.0)
        stages = -1
        if not packing.open:  # the first nodes' rows stand for the stages
            low, high = (np.where(np.arange(size) < len(problem.stages) - 1, n, 0.0) for n in packing.stage_share)
            stages = self._block(low, high, low, none)
        for i in range(1, paths.shape[1]):
            at, items = paths[:, i], columns.holds[self.legal, i] + gap
            for block in visits:
                fill(block, at, 1)
            for block, weight in tests:
                fill(block, at, weight(at, items))
            if stages >= 0:
                fill(stages, packing.stage_of[at] - 1, 1)
        self.rows, self.values = np.column_stack(rows).astype(np.int32), np.column_stack(values)

    def _block(self, low: Any, high: Any, z: Any, y: Any) -> int:
        """A row per node. Returns the number of the block."""
        self.limits.append(tuple(np.asarray(each, float) for each in (low, high, z, y)))  # type: ignore[arg-type]
        return len(self.limits) - 1

    def _packed(
        self, bins: Floats, least: Floats, most: Floats, sign: float
    ) -> list[tuple[int, Callable[[Ints, Floats], Any]]]:
        """What items must satisfy to fit into each node's bins: blocks, and the weights of items there.

        They are those of homes, so their limit is in force where y is 1, or where it is 0 (`sign`).
        """
        slots, found = self.slots, []

        def limit(most_: Floats) -> int:
            inf = np.full(len(most_), np.inf)
            return self._block(-inf, most_ if sign > 0 else np.zeros(len(most_)), np.zeros(len(most_)), sign * most_)

        together = np.minimum(slots, least)
        idle = together * (together - 1) / 2 * self.packing.op
        found.append((limit(np.maximum(slots * bins - idle, 0.0)), lambda at, items: items))
        rounds = np.ceil(least / slots)
        for more in (-1, 0, 1):
            parts = np.maximum(rounds + more, 2)
            found.append(
                (limit((parts - 1) * slots), lambda at, items, parts=parts: items > bins[at] / parts[at] + 1e-9)
            )
        few = most <= 2 * slots  # then a bin need hold two at most
        for share in _SHARES:
            valid = few | (share > 1 / 3)
            found.append(
                (
                    limit(slots),
                    lambda at, items, share=share, valid=valid: (
                        valid[at]
                        * 0.5
                        * (1.0 * (items > share * bins[at] + 1e-9) + (items > (1 - share) * bins[at] + 1e-9))
                    ),
                )
            )
        ahead = self.packing.op / 2  # what each of several at once is late by, on average, at one of both ends
        for number in range(2, int(most.max()) + 1 if (most <= slots).all() else 0):
            late = (number - 1) * ahead
            found.append(
                (
                    limit(np.full(len(slots), number - 1.0)),
                    lambda at, items, late=late: items > (bins - late)[at] + 1e-9,
                )
            )
        return found

    def model(self) -> Any:
        """The program without paths."""
        packing, solver = self.packing, self.packing.solver
        model, size = solver.Highs(), len(self.slots)
        model.setOptionValue("output_flag", False)
        model.addVar(0.0, 1.0)
        model.changeColCost(0, 1.0)
        for node in range(size):
            is_home = packing.sent[node] > 0
            known = float(is_home), float(is_home)
            model.addVar(*((0.0, 1.0) if packing.open and is_home else known))
        low, high, z, y = (np.concatenate([each[i] for each in self.limits]) for i in range(4))
        index = np.column_stack([np.zeros(len(z)), 1 + np.tile(np.arange(size), len(self.limits))]).astype(np.int32)
        model.addRows(
            len(z), low, high, 2 * len(z), np.arange(0, 2 * len(z), 2, dtype=np.int32), index.ravel(),
            np.column_stack([z, y]).ravel(),
        )  # fmt: skip
        homes = np.arange(1, size + 1, dtype=np.int32)
        count = float(len(packing.problem.homes))
        model.addRow(count, count, size, homes, np.ones(size))
        return model


def packing_bound(
    problem: RoutingProblem, low: float, high: float = math.inf, any_stages: bool = False,
    over: Callable[[], bool] = lambda: False,
) -> float:  # fmt: skip
    """What no plan can beat, from `low`, which none beats either, up, until `over()`; `high` is what some plan takes.
    `low` again where the paths are too many."""
    columns = all_paths(problem, any_stages)
    if columns is None:
        return low
    packing, step = Packing(problem, columns, any_stages), 0.02
    while high - low > _CLOSE * low and not over():
        at = low * (1 + step) if math.isinf(high) else min((low + high) / 2, low * (1 + 8 * step))
        if packing.served(at) < 1.0:
            low, step = at, 2 * step
        else:
            high = at
    return low
