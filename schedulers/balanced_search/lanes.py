"""A list scheduler for one chain in parts, compiled: a hundred thousand ops in about ten milliseconds.

The rules are those of `schedulers.greedy`: whoever is idle takes what is ready, halves of backwards that others wait
for before forwards, those before weight gradients, lower microbatches before higher ones. What differs is how memory
is lent. A microbatch goes through the parts in order, and each part has room of its own; a microbatch that enters a
part takes the room for all that it will hold there, at once. Of the parts at which somebody waits for room, look at the
last one: whoever holds room there needs none further on, or only where nobody waits, so it comes to its end and gives
it back. Hence nothing locks (a hierarchy of resources, Dijkstra, EWD 310), with nothing to look through, while the
banker's algorithm looks through all microbatches under way for each forward. numba is imported with this file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from schedulers.compiled import entry, inner

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
KINDS = ("I", "F", "W")
"""Of an op's code: (kind * pieces + piece) * microbatches + microbatch."""


class Lanes(NamedTuple):
    """`ops[w, :lengths[w]]`: the codes of worker w's ops. `makespan` is infinite where no end below `most` was found,
    or where a worker would have held more than it may."""

    makespan: float
    ops: Ints
    lengths: Ints
    peaks: Floats


def lanes(
    parts: Ints, worker_of: Ints, seconds: Floats, sizes: Floats, rooms: Floats, caps: Floats, most: float = np.inf
) -> Lanes:
    """Lanes for microbatches that go through the pieces in order and back.

    `parts[i, m]` is the part in which microbatch m runs piece i, ascending in i; `worker_of[q]` the worker of a part;
    `seconds[k, i]` what I, F and W of a piece take; `sizes[i]` what its activation counts from F to W; `rooms[q]` what
    all activations of a part may count at once, `caps[w]` the same of all parts of a worker.
    """
    return Lanes(*_lanes(parts, worker_of, seconds, sizes, rooms, caps, most))


@inner
def _push(heap: Ints, size: int, key: int) -> None:
    at = size
    while at and heap[(at - 1) >> 1] > key:
        heap[at] = heap[(at - 1) >> 1]
        at = (at - 1) >> 1
    heap[at] = key


@inner
def _pop(heap: Ints, size: int) -> None:
    last, at, end = heap[size - 1], 0, size - 1
    while True:
        child = 2 * at + 1
        if child + 1 < end and heap[child + 1] < heap[child]:
            child += 1
        if child >= end or heap[child] >= last:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = last


@entry
def _lanes(
    parts: Ints, worker_of: Ints, seconds: Floats, sizes: Floats, rooms: Floats, caps: Floats, most: float
) -> tuple[float, Ints, Ints, Floats]:
    pieces, count = parts.shape
    num_parts, workers, slack = worker_of.shape[0], caps.shape[0], 1e-9 * sizes.sum()
    need = np.zeros((num_parts, count))
    mine = np.zeros(workers, np.int64)
    for i in range(pieces):
        for m in range(count):
            need[parts[i, m], m] += sizes[i]
            mine[worker_of[parts[i, m]]] += 1
    longest = mine.max() + 1
    ready = np.empty((3, workers, longest), np.int64)  # by kind; of forwards those whose part the microbatch is in
    num_ready = np.zeros((3, workers), np.int64)
    entering = np.empty((num_parts, count), np.int64)  # forwards that wait for the room of a part
    num_entering = np.zeros(num_parts, np.int64)
    inside = np.zeros((num_parts, count), np.bool_)
    room = rooms.copy()
    held, peaks = np.zeros(workers), np.zeros(workers)
    ops, lengths = np.empty((workers, 3 * longest), np.int64), np.zeros(workers, np.int64)
    doing, until = np.full(workers, -1), np.full(workers, np.inf)
    awake = np.ones(workers, np.bool_)
    for m in range(count):
        q = int(parts[0, m])
        _push(entering[q], num_entering[q], m * pieces + pieces - 1)
        num_entering[q] += 1
    now, left = 0.0, 3 * pieces * count
    none = np.int64(1) << 62
    while True:
        for w in range(workers):
            if not awake[w] or doing[w] >= 0:
                continue
            awake[w] = False
            kind, key, enters = 0, none, -1
            if num_ready[0, w]:
                key = ready[0, w, 0]
            else:
                kind = 1
                if num_ready[1, w]:
                    key = ready[1, w, 0]
                for q in range(num_parts):
                    if worker_of[q] == w and num_entering[q]:
                        other = entering[q, 0]
                        if other < key and need[q, other // pieces] <= room[q] + slack:
                            key, enters = other, q
                if key == none and num_ready[2, w]:
                    kind, key = 2, ready[2, w, 0]
            if key == none:
                continue
            m, i = key // pieces, key % pieces
            if enters >= 0:
                _pop(entering[enters], num_entering[enters])
                num_entering[enters] -= 1
                room[enters] -= need[enters, m]
                inside[enters, m] = True
            else:
                _pop(ready[kind, w], num_ready[kind, w])
                num_ready[kind, w] -= 1
            if kind == 1:
                i = pieces - 1 - i
                held[w] += sizes[i]
                peaks[w] = max(peaks[w], held[w])
                if held[w] > caps[w] + slack:
                    return np.inf, ops, lengths, peaks
            doing[w] = (kind * pieces + i) * count + m
            until[w] = now + seconds[kind, i]
            ops[w, lengths[w]] = doing[w]
            lengths[w] += 1
        now = until.min()
        if now >= most:  # also where nobody is at work: what a microbatch needs does not fit
            return np.inf, ops, lengths, peaks
        for w in range(workers):
            if until[w] > now:
                continue
            kind, i, m = doing[w] // (pieces * count), doing[w] // count % pieces, doing[w] % count
            doing[w], until[w], awake[w] = -1, np.inf, True
            left -= 1
            if kind == 1 and i + 1 < pieces:
                q = int(parts[i + 1, m])
                v = int(worker_of[q])
                key = m * pieces + pieces - 2 - i  # of one microbatch, what is further along comes first
                if inside[q, m]:
                    _push(ready[1, v], num_ready[1, v], key)
                    num_ready[1, v] += 1
                else:
                    _push(entering[q], num_entering[q], key)
                    num_entering[q] += 1
                awake[v] = True
            elif kind == 2:
                held[w] -= sizes[i]
                room[parts[i, m]] += sizes[i]
            else:  # the loss turns a microbatch round; on its way back it leaves a weight gradient behind
                if kind == 0:
                    _push(ready[2, w], num_ready[2, w], m * pieces + i)
                    num_ready[2, w] += 1
                back = i if kind == 1 else i - 1
                if back >= 0:
                    v = int(worker_of[parts[back, m]])
                    _push(ready[0, v], num_ready[0, v], m * pieces + back)
                    num_ready[0, v] += 1
                    awake[v] = True
        if left == 0:
            return now, ops, lengths, peaks
