"""What no plan of RoundPipe's can be faster than: no cut, no order of units, no deal of them to workers.

For each layer lo at which the span of the loss may begin, the greatest of three bounds; then the least over all lo.
Let f and b be the layers' seconds forth and back, v the workers' speeds, N their number, K that of the rounds, and r
the microbatches of the largest round. Where speeds differ, what must run in sequence runs at the greatest.

1. A chain. The loss' unit begins when its first microbatch has come through f[:lo], runs its r microbatches one after
   another, and its last one goes back through b[:lo] (its forward may have been run again before). On either side of
   that unit the next worker is another one, a hop away, or the same one, which has a whole unit to run instead.
2. Parcels. A layer's forward, and its backward, run for a whole round on one worker, the loss' unit too. Of the j N + 1
   largest of these parcels one of N workers has j + 1 at least, and no less than the j + 1 smallest of those.
3. Work, filling and draining. All workers together do `work` seconds, each forward outside the loss' span twice.
   Filling: let the workers be in the order in which they begin, from 0, and n = floor(j / K). Of the first units of
   workers 0 to j, n + 1 at least are of one round, so of as many stages, on as many workers. The last of these begins
   when a microbatch has come through n stages or more, of a layer or more each, and n hops: worker j waits at least
   fill[j] = f[:n] + n hops. A worker that begins with a backward may run the forward of its first microbatch early;
   but by when that one's gradient comes, it has waited for the loss of a microbatch and for a hop: fill is cut there.
   Draining: let them be in the order in which they end, the last one first. Of the last units of workers 0 to j, n + 1
   at least are of one round; after the earliest of those its last microbatch goes through n more stages. Worker j is
   through drain[j] = b[:n] + n hops or more before the end, T. Both grow with j, so in whatever two orders, all workers
   do at most sum_j v[j] max(0, T - fill[j] - drain[j]), fastest first; T is at least where that reaches the work. A
   worker without a unit does not change this: the others come in front of it in both orders, and it does nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import fsum, inf

from schedulers.roundpipe_search.problem import RoundsProblem, sums

_PARCELS = 8  # per worker that are looked at: where there are more of them, they are no coarse measure
_SAFE = 1 - 1e-12  # sums in another order round in another way


def lower_bound(problem: RoundsProblem, speeds: Sequence[float] = ()) -> float:
    """Seconds, at least, of an iteration under any `Cut` that fits; `speeds` as in `Clock`."""
    paces = sorted(speeds or [1.0] * problem.workers, reverse=True)
    ends = range(1, problem.num_layers)
    starts = [lo for lo in ends if problem.fits((lo, problem.num_layers))]
    return _SAFE * min((_bound(problem, lo, paces) for lo in starts), default=inf)


def _bound(problem: RoundsProblem, lo: int, paces: Sequence[float]) -> float:
    """The same, if the span of the loss begins at layer `lo`."""
    forth, back, hop, pace = sums(problem.forward), sums(problem.backward), problem.hop_s, paces[0]
    loss = forth[-1] - forth[lo] + back[-1] - back[lo]
    longest = min(problem.round, problem.microbatches)
    turn = min(hop, (longest - 1) * problem.forward[lo - 1] / pace)
    chain = (forth[lo] + longest * loss + back[lo]) / pace + 2 * turn

    parcels, load = heapq.nlargest(_PARCELS * problem.workers + 1, _parcels(problem, lo, loss)), 0.0
    for j in range(1, (len(parcels) - 1) // problem.workers + 1):
        load = max(load, fsum(parcels[j * problem.workers - j : j * problem.workers + 1]) / pace)

    rounds = -(-problem.microbatches // problem.round)
    early = max(0.0, (forth[lo] + loss) / pace + hop - forth[lo] / paces[-1])
    away: list[float] = []
    for j in range(problem.workers):
        n = j // rounds
        layers = min(n, lo)
        away.append(min(forth[layers] / pace + n * hop, early) + back[layers] / pace + n * hop)
    work = problem.microbatches * (forth[-1] + back[-1] + forth[lo])
    lost = accumulate(v * a for v, a in zip(paces, away, strict=True))
    full = min((work + gone) / total for gone, total in zip(lost, accumulate(paces), strict=True))
    return max(chain, load, full)


def _parcels(problem: RoundsProblem, lo: int, loss: float) -> Iterator[float]:
    """Seconds of what runs on one worker, of as many rounds as can matter."""
    whole, rest = divmod(problem.microbatches, problem.round)
    for size, count in ((problem.round, min(whole, _PARCELS * problem.workers + 1)), (rest, int(rest > 0))):
        for _ in range(count):
            yield size * loss
            for layer in range(lo):
                yield size * problem.forward[layer]
                yield size * (problem.forward[layer] + problem.backward[layer])
