"""Searches the cut and the order of units with the least makespan: the clock decides, not the slowest stage alone.

First every number of forward stages, of backward stages and of blocks beside the head, each cut as evenly as can be;
then, from the best few, single layers are moved over borders as long as that helps. Deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from pipeline.schedule.ops import Span
from pipeline.schedule.work_units import Cut, units
from schedulers.partition import PartitionError, partition
from schedulers.roundpipe_search.clock import Dealt, dealt
from schedulers.roundpipe_search.problem import RoundsProblem

_FUSED = 4  # blocks beside the head that are tried
_FEW = 2  # workers that wait for little: more blocks beside the head, which are not computed again, may gain more
_STARTS = 6  # of the even cuts, how many are improved
ORDERS = ("by_stage", "by_round")
"""Whether all rounds go through a stage before the next one comes, or each round goes all the way first."""


@dataclass(frozen=True)
class FoundRounds:
    """A plan, and what there was to find."""

    best: Dealt
    order: str
    lower_bound: float
    tried: int

    @property
    def gap(self) -> float:
        return self.best.makespan / self.lower_bound - 1


def search(
    problem: RoundsProblem, *, rule: str = "round_robin", orders: Sequence[str] = ORDERS, speeds: Sequence[float] = (),
    tries: int = 20_000,
) -> FoundRounds:  # fmt: skip
    """The best plan of at most `tries` that are timed. Raises PartitionError where no cut fits."""
    for order in orders:
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; allowed: {', '.join(ORDERS)}")
    tried = 0

    def timed(cut: Cut, order: str) -> Dealt:
        nonlocal tried
        tried += 1
        row = units(cut, problem.microbatches, problem.round, by_stage=order == "by_stage")
        return dealt(problem, cut, row, rule, speeds=speeds)

    even: list[tuple[float, int, str, Dealt]] = []
    for cut in even_cuts(problem):
        if tried >= tries / 2 and even:
            break
        for order in orders:
            found = timed(cut, order)
            even.append((found.makespan, len(even), order, found))
    if not even:
        raise PartitionError("no cut of the layers fits: a span may take no more than half of a worker's room")
    best: tuple[Dealt, str] | None = None
    for _, _, order, start in sorted(even)[:_STARTS]:
        here = start
        while tried < tries:
            step = min((timed(cut, order) for cut in _moved(problem, here.cut)), key=lambda d: d.makespan, default=here)
            if step.makespan >= here.makespan - 1e-12:
                break
            here = step
        if best is None or here.makespan < best[0].makespan:
            best = here, order
    assert best is not None
    return FoundRounds(best[0], best[1], problem.lower_bound, tried)


def even_cuts(problem: RoundsProblem) -> Iterator[Cut]:
    """For each number of blocks beside the head and of stages each way, the cut with the least slowest stage."""
    last = problem.num_layers - 1
    again = [f + b for f, b in zip(problem.forward, problem.backward, strict=True)]

    @cache
    def parts(hi: int, stages: int, back: bool) -> tuple[Span, ...] | None:
        values = (again if back else problem.forward)[:hi]
        sizes = problem.sizes[:hi]
        try:  # from the end, so that among equal cuts later layers come in larger spans: the pipeline fills soon
            found = partition(
                values[::-1], [1.0] * stages, sizes[::-1] or None, [problem.room] * stages if sizes else None
            )
        except PartitionError:
            return None
        return tuple((hi - b, hi - a) for a, b in reversed(found))

    more = (_FUSED * times for times in range(2, last)) if problem.workers <= _FEW else ()
    for beside in (*range(_FUSED), *(n for n in (_FUSED, *more) if n < last - 1), last - 1):
        lo = last - beside
        if beside > _FUSED and problem.workers > _FEW:
            break
        if not problem.fits((lo, last + 1)):
            break
        fewest = _fewest(problem, lo)
        for back in _counts(fewest, 4 * problem.workers + 4, lo):
            for forth in _counts(fewest, 2 * problem.workers + 4, lo):
                forward, backward = parts(lo, forth, False), parts(lo, back, True)
                if forward and backward:
                    yield Cut(forward, (lo, last + 1), backward[::-1])


def _fewest(problem: RoundsProblem, layers: int) -> int:
    """The least number of spans of the first layers that all fit."""
    count, lo = 1, 0
    for layer in range(layers):
        if not problem.fits((lo, layer + 1)):
            count, lo = count + 1, layer
    return count


def _counts(fewest: int, usual: int, layers: int) -> range:
    """Numbers of stages that are tried: as many as help, and where memory asks for more, a few more than that."""
    return range(fewest, min(layers, max(usual, fewest + 4)) + 1)


def _moved(problem: RoundsProblem, cut: Cut) -> Iterator[Cut]:
    """Every cut that is one layer on one border away."""
    for name, spans in (("forward", cut.forward), ("backward", cut.backward[::-1])):
        for i in range(len(spans) - 1):
            for by in (-1, 1):
                mark = spans[i][1] + by
                left, right = (spans[i][0], mark), (mark, spans[i + 1][1])
                if left[0] < mark < right[1] and problem.fits(left) and problem.fits(right):
                    new = (*spans[:i], left, right, *spans[i + 2 :])
                    yield cut._replace(forward=new) if name == "forward" else cut._replace(backward=new[::-1])
