"""Moves on paths in compiled code; each keeps every path legal and the visits balanced, and can be taken back.

Two microbatches exchange a node, the rest of their paths, or all that they visit; a path turns a pair of stages round;
a node takes the place of another that has visits to spare; and two nodes exchange names, which moves them between
stages where the cut is searched too. Slow homes are changed more often, and nodes are looked for nearby.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from schedulers.compiled import inlined, inner
from schedulers.skippipe_search.flat import Flat, Ints, State


@inlined
def uniform(state: NDArray[np.uint64]) -> float:
    """From 0 to 1 (SplitMix64, Steele et al. 2014)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.float64((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@inlined
def below(state: NDArray[np.uint64], most: int) -> int:
    return min(int(uniform(state) * most), most - 1)


@inner
def put(p: Flat, s: State, m: int, row: Ints) -> None:
    """A microbatch takes another path."""
    for i in range(1, p.length):
        node = s.paths[m, i]
        k = 0
        while s.by[node, k] != m:
            k += 1
        s.visits[node] -= 1
        s.by[node, k] = s.by[node, s.visits[node]]
        s.stage_visits[s.stage_of[node]] -= 1
    s.paths[m, 0] = row[0]
    for i in range(1, p.length):
        node = row[i]
        s.paths[m, i] = node
        s.by[node, s.visits[node]] = m
        s.visits[node] += 1
        s.stage_visits[s.stage_of[node]] += 1


@inner
def change(p: Flat, s: State, m: int, row: Ints) -> None:
    """The same, remembered; nothing where the path is the old one."""
    same = True
    for i in range(p.length):
        same = same and row[i] == s.paths[m, i]
    if not same:
        _remember(p, s, m)
        put(p, s, m, row)


@inlined
def _remember(p: Flat, s: State, m: int) -> None:
    c = s.tally[0]
    s.changed[c], s.old_trips[c] = m, s.trips[m]
    for i in range(p.length):
        s.old[c, i] = s.paths[m, i]
    s.tally[0] = c + 1


@inner
def exchange_names(s: State, a: int, b: int) -> None:
    """Two nodes exchange their stages and shares, with those who visit them; paths are still to be told."""
    s.stage_of[a], s.stage_of[b] = s.stage_of[b], s.stage_of[a]
    s.least[a], s.least[b] = s.least[b], s.least[a]
    s.most[a], s.most[b] = s.most[b], s.most[a]
    s.visits[a], s.visits[b] = s.visits[b], s.visits[a]
    for k in range(s.by.shape[1]):
        s.by[a, k], s.by[b, k] = s.by[b, k], s.by[a, k]


@inlined
def _copy(row: Ints, path: Ints) -> None:
    for i in range(row.shape[0]):  # an assignment of slices takes seconds to compile
        row[i] = path[i]


@inner
def order(p: Flat, s: State, row: Ints) -> None:
    """Sort a path by stage; with swaps, turn a pair round, mostly where that is cheapest."""
    stage_of = s.stage_of
    for i in range(2, p.length):
        node, j = row[i], i
        while j > 1 and stage_of[row[j - 1]] > stage_of[node]:
            row[j] = row[j - 1]
            j -= 1
        row[j] = node
    if not p.swaps or p.length < 3:
        return
    turn = 0
    if uniform(s.draw) < 0.2:
        turn = below(s.draw, p.length - 1)
    else:
        least = 0.0
        for i in range(1, p.length - 1):
            x, y, before = row[i], row[i + 1], row[i - 1]
            after = row[i + 2] if i + 2 < p.length else row[0]
            more = p.both[before, y] + p.both[x, after] - p.both[before, x] - p.both[y, after]
            if more < least:
                least, turn = more, i
    if turn:
        row[turn], row[turn + 1] = row[turn + 1], row[turn]


@inlined
def _fits(p: Flat, s: State, m: int, at: int, node: int) -> bool:
    """Whether a node may stand there: its stage is not visited elsewhere on the path."""
    stage = s.stage_of[node]
    fits = True
    for i in range(p.length):
        fits = fits and (i == at or s.stage_of[s.paths[m, i]] != stage)
    return fits


@inlined
def _slow(p: Flat, s: State) -> int:
    """A microbatch, of a home that is the slowest of some."""
    home, among = below(s.draw, p.homes), 1
    while among < 2 * p.homes and uniform(s.draw) < 0.6:
        among *= 2
    for _ in range(among - 1):
        other = below(s.draw, p.homes)
        if s.slow[other] > s.slow[home]:
            home = other
    count = (s.paths.shape[0] - home + p.homes - 1) // p.homes
    return home + p.homes * below(s.draw, count)


@inlined
def _beside(p: Flat, s: State, node: int) -> int:
    """A node that is visited, near another one by preference; -1 if none is found at once."""
    near = p.near.shape[1]
    u = uniform(s.draw)
    found = p.near[node, int(u * u * near)] if uniform(s.draw) < 0.7 else p.nodes[below(s.draw, p.nodes.shape[0])]
    return found if s.stage_of[found] > 0 and s.visits[found] > 0 else -1


@inner
def propose(p: Flat, s: State) -> bool:
    """Make a move, and say whether anything changed."""
    s.tally[0], s.tally[2], s.tally[3] = 0, -1, -1
    kind = uniform(s.draw)
    if kind < (0.15 if p.joint else 0.05):
        return _rename(p, s)
    a = _slow(p, s)
    one, two = s.row[0], s.row[1]
    _copy(one, s.paths[a])
    if kind < 0.25 and p.swaps:
        order(p, s, one)
        change(p, s, a, one)
        return s.tally[0] > 0
    if kind < 0.35:  # all that they visit
        if uniform(s.draw) < 0.5:
            b = below(s.draw, s.paths.shape[0])
        else:
            node = _beside(p, s, one[0])
            if node < 0:
                return False
            b = s.by[node, below(s.draw, s.visits[node])]
        if a == b:
            return False
        _copy(two, s.paths[b])
        one[0], two[0] = two[0], one[0]
        order(p, s, one)
        order(p, s, two)
        change(p, s, a, two)
        change(p, s, b, one)
        return s.tally[0] > 0
    i = 1 + below(s.draw, p.length - 1)
    x = one[i]
    y = _beside(p, s, one[i - 1] if uniform(s.draw) < 0.5 else one[i + 1] if i + 1 < p.length else one[0])
    if y < 0 or x == y:
        return False
    if kind < 0.45 and p.uneven:
        return _replace(p, s, a, i, y)
    b = s.by[y, below(s.draw, s.visits[y])]
    if a == b:
        return False
    _copy(two, s.paths[b])
    j = 1
    while two[j] != y:
        j += 1
    if kind < 0.6:  # the rest of their paths, from the same stop on
        j = i
        for k in range(i, p.length):
            one[k], two[k] = two[k], one[k]
        if not (_distinct(p, s, one) and _distinct(p, s, two)):
            return False
    else:
        if not (_fits(p, s, a, i, y) and _fits(p, s, b, j, x)):
            return False
        one[i], two[j] = y, x
    order(p, s, one)
    order(p, s, two)
    change(p, s, a, one)
    change(p, s, b, two)
    return s.tally[0] > 0


@inlined
def _distinct(p: Flat, s: State, row: Ints) -> bool:
    for i in range(1, p.length):
        for j in range(i):
            if s.stage_of[row[i]] == s.stage_of[row[j]]:
                return False
    return True


@inner
def _replace(p: Flat, s: State, a: int, i: int, y: int) -> bool:
    """Another node for one of a path's, where both counts allow it."""
    x = s.paths[a, i]
    if s.visits[x] - 1 < s.least[x] or s.visits[y] + 1 > s.most[y] or not _fits(p, s, a, i, y):
        return False
    one, other = s.stage_of[x], s.stage_of[y]
    if one != other and (s.stage_visits[one] - 1 < p.stage_least or s.stage_visits[other] + 1 > p.stage_most):
        return False
    row = s.row[0]
    row[i] = y
    order(p, s, row)
    change(p, s, a, row)
    return True


@inner
def _rename(p: Flat, s: State) -> bool:
    """Two nodes exchange all that they do. Between stages only where the cut is searched, and where neither comes to
    sit behind too slow a link to its new replicas."""
    a, b = p.nodes[below(s.draw, p.nodes.shape[0])], p.nodes[below(s.draw, p.nodes.shape[0])]
    one, other = s.stage_of[a], s.stage_of[b]
    if a == b:
        return False
    if one == other:
        if one == 0 or s.least[a] != s.least[b] or s.most[a] != s.most[b]:
            return False  # homes are dealt in a fixed order; what they do is exchanged by other moves
    else:
        if not p.joint or p.slots[a] != p.slots[b]:
            return False
        for n in p.nodes:
            if (s.stage_of[n] == one and n != a and p.hop[b, n] > p.replica_hop) or (
                s.stage_of[n] == other and n != b and p.hop[a, n] > p.replica_hop
            ):
                return False
    s.tally[2], s.tally[3] = a, b
    for m in range(s.paths.shape[0]):
        here = False
        for i in range(p.length):
            here = here or s.paths[m, i] == a or s.paths[m, i] == b
        if here:
            _remember(p, s, m)
    _tell(p, s)
    return s.tally[0] > 0


@inlined
def _tell(p: Flat, s: State) -> None:
    """Exchange the two names on the changed paths."""
    a, b = s.tally[2], s.tally[3]
    exchange_names(s, a, b)
    for c in range(s.tally[0]):
        m = s.changed[c]
        for i in range(p.length):
            if s.paths[m, i] == a:
                s.paths[m, i] = b
            elif s.paths[m, i] == b:
                s.paths[m, i] = a


@inner
def undo(p: Flat, s: State) -> None:
    """Take the last move back."""
    if s.tally[2] >= 0:
        _tell(p, s)
    else:
        for c in range(s.tally[0] - 1, -1, -1):
            put(p, s, s.changed[c], s.old[c])
    for c in range(s.tally[0]):
        s.trips[s.changed[c]] = s.old_trips[c]
    for c in range(s.tally[1]):
        home = s.homes[c]
        s.own[home], s.total[home] = s.old_own[c], s.old_total[c]
