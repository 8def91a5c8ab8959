"""Simulated annealing in compiled code: a slice of moves at a time, by the estimate alone or by the clock too.

The clock is asked only where the estimate, which hardly ever says more than the clock, does not rule a move out.
"""

from __future__ import annotations

import math

from schedulers.compiled import entry, inlined, inner
from schedulers.skippipe_search.compiled_clock import home_alone, round_trip, run_clock
from schedulers.skippipe_search.compiled_moves import propose, undo, uniform
from schedulers.skippipe_search.flat import Flat, Floats, Ints, Room, State

EVEN = 1e-9
"""By how many seconds a plan must be better to be kept instead."""


@inner
def worth(by_home: Floats, total: float, many: int, home: float, each: float) -> float:
    """The slowest home counts most; the next ones, and the means over homes and over microbatches, a little, so that
    there is a slope where it is not them."""
    first, second, third, mean = 0.0, 0.0, 0.0, 0.0
    for seconds in by_home:
        mean += seconds
        if seconds > first:
            first, second, third = seconds, first, second
        elif seconds > second:
            second, third = seconds, second
        elif seconds > third:
            third = seconds
    return first + 0.1 * second + 0.05 * third + home * mean / by_home.shape[0] + each * total / many


@inlined
def _valued(by_home: Floats, totals: Floats, r: Room, many: int, home: float, each: float) -> float:
    """By `worth`; or, where `shape` says so, by a sum over homes that feels every one of them, slow ones more."""
    total, power, middle = 0.0, r.shape[0], r.shape[1]
    if power == 0.0:
        for h in range(by_home.shape[0]):
            total += totals[h]
        return worth(by_home, total, many, home, each)
    for h in range(by_home.shape[0]):
        total += middle / power * (by_home[h] / middle) ** power + each * totals[h] * by_home.shape[0] / many
    return total


@entry
def estimated(p: Flat, s: State, r: Room, home: float, each: float) -> float:
    """What the paths are worth, each home alone, after those in `changed` have become others."""
    many = s.paths.shape[0]
    s.tally[1] = 0
    s.tally[4] += 1
    for c in range(s.tally[0]):
        m = s.changed[c]
        s.trips[m] = round_trip(p, s.paths[m])
    for c in range(s.tally[0]):
        h = s.changed[c] % p.homes
        if s.mark[h] != s.tally[4]:
            s.mark[h] = s.tally[4]
            k = s.tally[1]
            s.homes[k], s.old_own[k], s.old_total[k] = h, s.own[h], s.total[h]
            s.tally[1] = k + 1
            s.own[h], s.total[h] = home_alone(p, s.paths, s.trips, h, r)
    return _valued(s.own, s.total, r, many, home, each)


@entry
def timed(p: Flat, s: State, r: Room, home: float, each: float) -> float:
    """What the paths are worth by the clock. Where they lock each other out: more than any that do not, less the more
    ops are served before, and the less they take by the estimate, so that there is a slope out of it."""
    many = s.paths.shape[0]
    ops = many * (2 * p.length + 1)
    unserved = ops - run_clock(p, s.paths, r)
    if unserved > 0:
        about = _valued(s.own, s.total, r, many, home, each)
        for h in range(p.homes):
            r.ends[h] = r.totals[h] = p.most_s * (1.0 + unserved / ops)
        return about + _valued(r.ends, r.totals, r, many, home, each)
    for h in range(p.homes):
        r.ends[h] = r.totals[h] = 0.0
    for m in range(many):
        h = m % p.homes
        r.totals[h] += r.finish[m]
        r.ends[h] = max(r.ends[h], r.finish[m])
    return _valued(r.ends, r.totals, r, many, home, each)


@inlined
def _keep(s: State, kept: Ints, names: Ints) -> None:
    for m in range(kept.shape[0]):
        for i in range(kept.shape[1]):
            kept[m, i] = s.paths[m, i]
    for n in range(names.shape[0]):
        names[n] = s.stage_of[n]


@entry
def descend(
    p: Flat, s: State, r: Room, kept: Ints, names: Ints, seconds: Floats, exact: bool, moves: int, heat: float,
    cool: float, home: float, each: float, bound: float,
) -> int:  # fmt: skip
    """Make `moves` at a temperature that falls by the factor `cool` each. Returns how many the clock was asked for.

    `seconds` are what the paths are worth, what the best are worth, their slowest home, and what the paths are worth
    by the estimate; the best are in `kept` [M, L] and `names` (stages by node). Ends where the slowest home is at
    `bound`.
    """
    asked = 0
    for _ in range(moves):
        heat *= cool
        if not propose(p, s):
            continue
        limit = seconds[0] - heat * math.log(max(uniform(s.draw), 1e-300))
        then = about = estimated(p, s, r, home, each)
        if exact:  # the clock is not asked about what is longer by the estimate alone
            then = math.inf
            if about <= limit and about - seconds[3] <= limit - seconds[0] + heat:
                then = timed(p, s, r, home, each)
                asked += 1
        if then > limit:
            undo(p, s)
            continue
        seconds[0], seconds[3] = then, about
        for h in range(p.homes):
            s.slow[h] = r.ends[h] if exact else s.own[h]
        if then < seconds[1] - EVEN:
            seconds[1], seconds[2] = then, 0.0
            for h in range(p.homes):
                seconds[2] = max(seconds[2], s.slow[h])
            _keep(s, kept, names)
            if exact and seconds[2] <= bound:
                break
    return asked
