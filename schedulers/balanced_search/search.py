"""Searches how microbatches are dealt to the two sides of each border, and how much each part may hold.

First a few ways of lending memory, then of dealing all borders alike, then one border after another is dealt anew as
long as that helps: hill climbing, each step timed by the compiled lanes. Deterministic.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import fsum, inf
from typing import NamedTuple

import numpy as np

from schedulers.balanced_search.lanes import KINDS, Floats, Ints, lanes
from schedulers.balanced_search.pieces import Held, Piece, Shape, deal, pieces
from schedulers.partition import partition

_TURNS = 8  # how many turns of all borders are tried
_WORK = 6_000_000  # ops that are timed in all, and
_FEWEST, _MOST = 60, 600  # dealings that are timed in any case, and at most
_MUCH = 2.5  # times what the fullest worker of 1F1B holds: more helps little
_FREE = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)  # the same that is lent, of which not all is taken at once
_TAILS = (1, 2, 4, 8)  # workers at the end that share nothing, to try under the tightest memory
_LEVEL = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class Borders(NamedTuple):
    """Per piece, what `deal` is told."""

    shifts: tuple[int, ...]
    turns: tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """A cut into parts, and how they are dealt: `worker_of[q]` is the worker of part q, `rooms` what each may hold."""

    cut: tuple[Piece, ...]
    worker_of: tuple[int, ...]
    borders: Borders
    rooms: tuple[float, ...]
    makespan: float
    """The longest of all replicas."""

    def dealt(self, count: int) -> list[list[int]]:
        """The part of each of `count` microbatches, piece by piece."""
        return [_deal(piece, count, *how) for piece, *how in zip(self.cut, *self.borders, strict=True)]


@dataclass
class Search:
    """`layer_costs` are the seconds of a layer's forward, `counts` the microbatches of the replicas, each number once;
    `halves` what both halves of a backward take, in forwards; `sizes` what a layer's activation counts."""

    layer_costs: Sequence[float]
    workers: int
    counts: Sequence[int]
    halves: tuple[float, float]
    sizes: Sequence[float]

    def choose(self, held: Held, shape: Shape) -> Chosen:
        """The least makespan under `held`; among equals, what holds least at its fullest."""
        cuts = [_in_line(self.layer_costs, self.workers)]
        whole = partition(self.layer_costs, [1.0] * self.workers)
        own = [fsum(self.sizes[lo:hi]) for lo, hi in whole]
        if shape == "v" and len(self.layer_costs) >= 2 * self.workers > 2:
            cuts.append(_folded(self.layer_costs, self.workers))
        if held != "free":
            cuts.append((tuple(Piece(span, {k: 1.0}) for k, span in enumerate(whole)), tuple(range(self.workers))))
        if held == "1f1b":
            cuts += [cut for few in _TAILS if few < self.workers for cut in self._with_tail(own, few)]
        caps = [[size * min(self.workers - k, n) for k, size in enumerate(own)] for n in self.counts]
        found: list[tuple[float, float, int, Chosen]] = []
        for much in (_MUCH, inf):  # where layers are few, a single microbatch may hold more than 1F1B's fullest worker
            for cut, worker_of in cuts:
                one = _OfCut(self, cut, worker_of)
                chosen = one.climb(list(_lent(one, caps, held, much)), max(1, len(cuts) // 2))
                if chosen is not None:
                    found.append((*chosen[:2], len(found), chosen[2]))
            if found:
                break
        return min(found)[-1]

    def _with_tail(self, own: Sequence[float], few: int) -> Iterator[tuple[tuple[Piece, ...], tuple[int, ...]]]:
        """The last `few` workers share nothing: under 1F1B they have room for so few microbatches that one which holds
        a layer more would stop the others. They get no more than their part, the others share the rest."""
        part = fsum(self.layer_costs) / self.workers
        end, tail = len(self.layer_costs), list[Piece]()
        for k in range(self.workers - 1, self.workers - 1 - few, -1):
            lo = end - 1
            while lo > k and fsum(self.layer_costs[lo - 1 : end]) <= part and fsum(self.sizes[lo - 1 : end]) <= own[k]:
                lo -= 1
            tail.insert(0, Piece((lo, end), {k: 1.0}))
            end = lo
        if fsum(self.layer_costs[:end]) > 0:
            yield (*pieces(self.layer_costs[:end], self.workers - few), *tail), tuple(range(self.workers))


Caps = list[list[float]]
"""What each worker may hold, for each of the counts."""


def _lent(one: _OfCut, own: Caps, held: Held, much: float) -> Iterator[tuple[Caps, list[float]]]:
    """(caps, rooms) to try: a worker's cap is shared out to its parts by how long a microbatch stays in them, which is
    less the further along they are, or evenly, or by something in between."""
    parts = len(one.worker_of)
    folded = parts > one.problem.workers
    for times in _FREE if held == "free" else (1.0,):
        caps = own if held == "1f1b" else [[times * max(row)] * len(row) for row in own]
        for level in _LEVEL if folded else (0.0,):
            weight = [(1 - level) * (parts - q) + level * parts / 2 for q in range(parts)]
            total = [fsum(weight[q] for q in range(parts) if one.worker_of[q] == w) for w in range(len(caps[0]))]
            rooms = [caps[0][w] * weight[q] / total[w] for q, w in enumerate(one.worker_of)]
            yield ([[much * max(row)] * len(row) for row in own] if held == "free" else caps), rooms


class _OfCut:
    """One cut, as arrays."""

    def __init__(self, problem: Search, cut: tuple[Piece, ...], worker_of: tuple[int, ...]) -> None:
        self.problem, self.cut, self.worker_of = problem, cut, worker_of
        self.shared = [i for i, piece in enumerate(cut) if len(piece.shares) > 1]
        self.arrays = arrays(cut, problem.layer_costs, problem.halves, problem.sizes)
        self._kept: dict[tuple[int, int, int, int], Ints] = {}
        self._total = fsum(problem.layer_costs)

    def climb(self, lent: Sequence[tuple[Caps, list[float]]], sparing: int) -> tuple[float, float, Chosen] | None:
        """(makespan, fullest, what was chosen) of the best that was found, or None where nothing fits. Takes a
        `sparing`-th of the dealings."""
        size = len(self.cut)
        least = min(self.problem.counts)
        plain = Borders((0,) * size, (0,) * size)
        best: tuple[float, float] = (inf, inf)
        kept: tuple[Borders, tuple[Caps, list[float]]] | None = None

        def look(borders: Borders, caps_rooms: tuple[Caps, list[float]]) -> float:
            nonlocal best, kept, left
            left -= 1
            found = self._time(borders, *caps_rooms, best[0])
            if found < best:
                best, kept = found, (borders, caps_rooms)
            return found[0]

        ops = 3 * size * sum(self.problem.counts)
        left = max(_FEWEST, min(_MOST, _WORK // ops)) // sparing if self.shared else len(lent)
        for each in lent:
            look(plain, each)
        if self.shared:
            alike = [
                Borders((shift,) * size, (turn,) * size) for shift in (0, 1, -1) for turn in range(min(least, _TURNS))
            ]
            few = len(alike) * len(lent) > left / 2 and kept is not None
            for borders, each in product(alike, [kept[1]] if few and kept is not None else lent):
                look(borders, each)
        draw, here = random.Random(0), kept
        while self.shared and here is not None and left > 0:
            i, by = draw.choice(self.shared), draw.choice((-1, 1))
            shifts, turns = map(list, here[0])
            if draw.random() < 0.4:
                shifts[i] += by
            else:
                turns[i] = (turns[i] + by * draw.choice((1, 1, 2))) % least
            lend = draw.choice(lent) if draw.random() < 0.1 else here[1]
            step = Borders(tuple(shifts), tuple(turns)), lend
            if look(*step) <= best[0]:  # one of equals, too: a plateau has many ways out
                here = step
        if kept is None:
            return None
        return *best, Chosen(self.cut, self.worker_of, kept[0], tuple(kept[1][1]), best[0])

    def _time(self, borders: Borders, caps: Caps, rooms: Sequence[float], most: float) -> tuple[float, float]:
        """(makespan, fullest), the greatest of all replicas, the first in sums of all layers' forwards; infinite where
        it does not fit, or takes more than `most`."""
        makespan = fullest = 0.0
        for count, cap in zip(self.problem.counts, caps, strict=True):
            parts = np.array([
                self._dealt(i, count, *how) for i, how in enumerate(zip(*borders, strict=True))
            ])  # fmt: skip
            lent = enough(parts, self.arrays[1], rooms)
            late = (most + 1e-6) * self._total
            run = lanes(parts, np.array(self.worker_of), *self.arrays, lent, np.array(cap, dtype=np.float64), late)
            makespan, fullest = max(makespan, run.makespan), max(fullest, float(run.peaks.max()))
        return (round(makespan / self._total, 6) if makespan < inf else inf), fullest

    def _dealt(self, i: int, count: int, shift: int, turn: int) -> Ints:
        key = i, count, shift, turn
        if key not in self._kept:
            self._kept[key] = np.array(_deal(self.cut[i], count, shift, turn), dtype=np.int64)
        return self._kept[key]


def _deal(piece: Piece, count: int, shift: int, turn: int) -> list[int]:
    return deal(piece.shares, count, shift, turn % max(1, count))


def arrays(
    cut: Sequence[Piece], layer_costs: Sequence[float], halves: tuple[float, float], sizes: Sequence[float]
) -> tuple[Floats, Floats]:
    """`seconds` and `sizes` as in `lanes`."""
    seconds = np.array([fsum(layer_costs[lo:hi]) for (lo, hi), _ in cut])
    times = {"I": halves[0], "F": 1.0, "W": halves[1]}
    return (
        np.array([times[kind] * seconds for kind in KINDS]),
        np.array([fsum(sizes[lo:hi]) for (lo, hi), _ in cut]),
    )


def enough(parts: Ints, sizes: Floats, rooms: Sequence[float]) -> Floats:
    """The rooms, where they are too small for a single microbatch as large as that one."""
    need = np.zeros((len(rooms), parts.shape[1]))
    for i, row in enumerate(parts):
        np.add.at(need, (row, np.arange(len(row))), sizes[i])
    return np.maximum(np.array(rooms), need.max(axis=1))


def _in_line(layer_costs: Sequence[float], workers: int) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
    return pieces(layer_costs, workers), tuple(range(workers))


def _folded(layer_costs: Sequence[float], workers: int) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
    """Twice as many parts as workers, there and back again: the first worker has the first and the last part. A layer
    on the border at the fold is not shared: both of its sides are on one worker."""
    found: list[Piece] = []
    for span, shares in pieces(layer_costs, 2 * workers):
        alone = {workers - 1: 1.0} if len(shares) > 1 and {workers - 1, workers} == shares.keys() else shares
        if found and len(alone) == 1 and found[-1].shares.keys() == alone.keys():
            found[-1] = Piece((found[-1].span[0], span[1]), alone)
        else:
            found.append(Piece(span, alone))
    return tuple(found), (*range(workers), *reversed(range(workers)))


def ordered(
    chosen: Chosen, layer_costs: Sequence[float], workers: int, count: int, halves: tuple[float, float],
    sizes: Sequence[float],
) -> list[list[tuple[str, int, int]]]:  # fmt: skip
    """Worker by worker, (kind, piece, microbatch) of each op of a replica of `count` microbatches, in order."""
    if not count:
        return [[] for _ in range(workers)]
    parts = np.array(chosen.dealt(count), dtype=np.int64)
    seconds, counted = arrays(chosen.cut, layer_costs, halves, sizes)
    rooms = enough(parts, counted, chosen.rooms)
    run = lanes(parts, np.array(chosen.worker_of), seconds, counted, rooms, np.full(workers, np.inf))
    pieces_count = len(chosen.cut) * count
    return [
        [(KINDS[op // pieces_count], op // count % len(chosen.cut), op % count) for op in row[:length].tolist()]
        for row, length in zip(run.ops, run.lengths, strict=True)
    ]
