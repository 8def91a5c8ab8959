"""Anneals RoundPipe's cut, compiled: tens of thousands of cuts a second, each timed by the clock's own rules.

A cut is one row of marks each way, over the layers before the span of the loss: a mark at l says that a span begins
there. A step sets or clears a mark, shifts one, moves the span of the loss by a layer, or turns the order of units; it
is kept where it is faster, and now and then where it is not (Kirkpatrick et al., "Optimization by Simulated
Annealing", 1983). numba is imported with this file, so only a search imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.schedule.ops import Span
from pipeline.schedule.work_units import Cut
from schedulers.compiled import entry
from schedulers.roundpipe_search.problem import RoundsProblem, sums

Marks = NDArray[np.int8]
"""[2, layers + 1]: where a span begins, forth and back."""
Floats = NDArray[np.float64]

_WARM = 0.03  # of the makespan: what a step may cost in the beginning
_FORTH, _LOSS, _BACK = 0, 1, 2


class Annealer:
    """The problem as arrays. `speeds` as in `Clock`, `ready` is its rule of that name."""

    def __init__(self, problem: RoundsProblem, ready: bool, speeds: Sequence[float] = ()) -> None:
        sizes = sums(problem.sizes) if problem.sizes else [0.0] * (problem.num_layers + 1)
        room = problem.room if problem.sizes else np.inf
        self._num_layers = problem.num_layers
        self._fixed = (
            np.array(sums(problem.forward)), np.array(sums(problem.backward)), np.array(sizes), float(room),
            np.array(speeds or [1.0] * problem.workers, dtype=np.float64), problem.microbatches, problem.round,
            float(problem.hop_s), ready,
        )  # fmt: skip

    def time(self, cut: Cut, by_stage: bool) -> float:
        """The makespan that the clock gives."""
        return float(_timed(self._marks(cut), cut.fused[0], by_stage, *self._fixed))

    def improve(self, cut: Cut, by_stage: bool, steps: int, seed: int) -> tuple[float, Cut, bool]:
        """(makespan, cut, by_stage) of the best of so many steps from `cut`, which is itself one of them."""
        found, marks, lo, stagewise = _annealed(self._marks(cut), cut.fused[0], by_stage, steps, seed, *self._fixed)
        spans = [_spans(row, lo) for row in marks]
        return float(found), Cut(spans[0], (int(lo), self._num_layers), spans[1][::-1]), bool(stagewise)

    def _marks(self, cut: Cut) -> Marks:
        marks = np.zeros((2, self._num_layers + 1), dtype=np.int8)
        for row, spans in zip(marks, (cut.forward, cut.backward), strict=True):
            row[[lo for lo, _ in spans]] = 1
        return marks


def _spans(marks: Marks, end: int) -> tuple[Span, ...]:
    return tuple(pairwise([*(int(i) for i in np.flatnonzero(marks[:end])), int(end)]))


@entry
def _timed(
    marks: Marks, lo: int, by_stage: bool, forth: Floats, back: Floats, sizes: Floats, room: float, speeds: Floats,
    microbatches: int, at_once: int, hop: float, ready: bool,
) -> float:  # fmt: skip
    """`Clock.deal` of all units of a cut, from the beginning; infinite where a span does not fit."""
    layers, workers = forth.shape[0] - 1, speeds.shape[0]
    kinds, los, his = np.empty(2 * layers, np.int64), np.empty(2 * layers, np.int64), np.empty(2 * layers, np.int64)
    stages = 0
    for layer in range(lo):
        if marks[0, layer]:
            kinds[stages], los[stages] = _FORTH, layer
            if stages:
                his[stages - 1] = layer
            stages += 1
    his[stages - 1] = lo
    kinds[stages], los[stages], his[stages] = _LOSS, lo, layers
    stages, end = stages + 1, lo
    for layer in range(lo - 1, -1, -1):
        if marks[1, layer]:
            kinds[stages], los[stages], his[stages] = _BACK, layer, end
            stages, end = stages + 1, layer
    for s in range(stages):
        if sizes[his[s]] - sizes[los[s]] > room:
            return np.inf

    rounds = (microbatches + at_once - 1) // at_once
    free, ended, at = np.zeros(workers), np.zeros(microbatches), np.full(microbatches, -1)
    made, home = np.zeros((stages, microbatches)), np.full((stages, microbatches), -1)
    times, own = np.zeros(microbatches), np.zeros(microbatches)
    last = -1
    for unit in range(stages * rounds):
        s, r = (unit // rounds, unit % rounds) if by_stage else (unit % stages, unit // stages)
        kind, first, stop = kinds[s], r * at_once, min(microbatches, (r + 1) * at_once)
        before, after = forth[his[s]] - forth[los[s]], back[his[s]] - back[los[s]]
        head = before if kind == _BACK else 0.0
        tail = after if kind == _BACK else before + (after if kind == _LOSS else 0.0)
        source = -1
        if kind == _BACK and los[s] > 0:
            source = 0
            while not los[source] < los[s] <= his[source]:
                source += 1
        begin, stop_at = 0, workers
        if not ready:
            begin = (last + 1) % workers
            if kind != _BACK and los[s] == 0:
                begin = int(np.argmin(free))
            stop_at = begin + 1
        best = -1
        for w in range(begin, stop_at):
            now, speed = free[w], speeds[w]
            for m in range(first, stop):
                if source >= 0:
                    now = max(now, made[source, m] + (0.0 if home[source, m] == w else hop))
                there = ended[m] + (hop if at[m] != w and at[m] >= 0 else 0.0)
                now = max(now + head / speed, there) + tail / speed
                own[m] = now
            if best >= 0:
                over = own[stop - 1] - times[stop - 1]
                if over >= 1e-12 or (over >= -1e-12 and free[w] <= free[best]):
                    continue
            best = w
            times[first:stop] = own[first:stop]
        for m in range(first, stop):
            ended[m], at[m] = times[m], best
            if kind != _BACK:
                made[s, m], home[s, m] = times[m], best
        free[best] = times[stop - 1]
        last = best
    return free.max()


@entry
def _annealed(
    marks: Marks, lo: int, by_stage: bool, steps: int, seed: int, forth: Floats, back: Floats, sizes: Floats,
    room: float, speeds: Floats, microbatches: int, at_once: int, hop: float, ready: bool,
) -> tuple[float, Marks, int, bool]:  # fmt: skip
    np.random.seed(seed)
    layers = forth.shape[0] - 1
    here = _timed(marks, lo, by_stage, forth, back, sizes, room, speeds, microbatches, at_once, hop, ready)
    best, kept, kept_lo, kept_order = here, marks.copy(), lo, by_stage
    warm = _WARM * here
    for step in range(steps):
        tried, new_lo, order = marks.copy(), lo, by_stage
        what, side = np.random.random(), int(np.random.random() < 0.6)
        if what < 0.03:
            order = not by_stage
        elif what < 0.12:
            new_lo = max(1, min(layers - 1, lo + (1 if np.random.random() < 0.5 else -1)))
            tried[:, min(lo, new_lo) :] = 0
        elif lo < 2:
            continue
        elif what < 0.45:
            at = np.random.randint(1, lo)
            tried[side, at] = 1 - tried[side, at]
        else:
            at = np.random.randint(1, lo)
            to = at + (1 if np.random.random() < 0.5 else -1)
            if not 1 <= to < lo or tried[side, at] == tried[side, to]:
                continue
            tried[side, at], tried[side, to] = tried[side, to], tried[side, at]
        took = _timed(tried, new_lo, order, forth, back, sizes, room, speeds, microbatches, at_once, hop, ready)
        heat = warm * (1 - step / steps) ** 2
        if took <= here or (heat > 0 and np.random.random() < np.exp((here - took) / heat)):
            marks, lo, by_stage, here = tried, new_lo, order, took
            if here < best - 1e-12:
                best, kept, kept_lo, kept_order = here, marks.copy(), lo, by_stage
    return best, kept, kept_lo, kept_order
