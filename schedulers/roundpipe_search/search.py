"""Searches the cut and the order of units with the least makespan: the clock decides, not the slowest stage alone.

First every number of forward stages, of backward stages and of blocks beside the head, each cut as evenly as can be;
then the best few are annealed, each a few times. Deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

from pipeline.schedule.ops import Span
from pipeline.schedule.work_units import Cut, units
from schedulers.partition import PartitionError, partition
from schedulers.roundpipe_search.bound import lower_bound
from schedulers.roundpipe_search.clock import Dealt, dealt
from schedulers.roundpipe_search.problem import RoundsProblem

_FUSED = 4  # blocks beside the head that are tried
_FEW = 2  # workers that wait for little: more blocks beside the head, which are not computed again, may gain more
_STARTS = 6  # of the even cuts, how many are annealed
_CHAIN = 40_000  # steps of one annealing: more and shorter ones find less, fewer and longer ones by chance more
_EVEN = 10_000  # even cuts that are timed at most
_INTERPRETED = 2000  # tries where nothing is compiled
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
    problem: RoundsProblem, *, rule: str = "round_robin", speeds: Sequence[float] = (), tries: int = 1_200_000
) -> FoundRounds:  # fmt: skip
    """The best plan of about `tries` that are timed. Raises PartitionError where no cut fits."""
    # numba takes half a second to import: only those who search for a cut need it
    from schedulers.compiled import COMPILED
    from schedulers.roundpipe_search.anneal import Annealer

    tries = tries if COMPILED else min(tries, _INTERPRETED)
    annealer = Annealer(problem, rule == "ready", speeds)
    even = [
        (annealer.time(cut, by_stage), i, cut, by_stage)
        for i, cut in enumerate(islice(even_cuts(problem), min(_EVEN, tries // 2)))
        for by_stage in (True, False)
    ]
    if not even:
        raise PartitionError("no cut of the layers fits: a span may take no more than half of a worker's room")
    even.sort(key=lambda each: each[:2])
    (makespan, _, cut, by_stage), tried = even[0], len(even)
    steps = max(1, min(_CHAIN, (tries - tried) // _STARTS))
    for seed in range(max(_STARTS, (tries - tried) // steps)):
        _, _, start, order = even[seed % min(_STARTS, len(even))]
        found = annealer.improve(start, order, steps, seed)
        tried += steps
        if found[0] < makespan - 1e-12:
            makespan, cut, by_stage = found
    row = units(cut, problem.microbatches, problem.round, by_stage=by_stage)
    best = dealt(problem, cut, row, rule, speeds=speeds)
    return FoundRounds(best, ORDERS[not by_stage], lower_bound(problem, speeds), tried)


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
