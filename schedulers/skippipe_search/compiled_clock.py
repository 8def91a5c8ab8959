"""The clock of clock.py in compiled code, event for event; and a home alone, which is the estimate.

Three things are left out that change nothing. The end of an op is an event only where somebody waits for it. A node
chooses at once, unless something else happens within the moment it gives others to arrive. All microbatches are at
home at first.
"""

from __future__ import annotations

import math

from schedulers.compiled import entry, inlined, inner
from schedulers.skippipe_search.clock import TIE_S
from schedulers.skippipe_search.flat import Flat, Floats, Ints, Room


@inlined
def heap_push(heap: Floats, size: int, value: float) -> None:
    """Add to a heap of `size` numbers."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if heap[parent] <= value:
            break
        heap[i] = heap[parent]
        i = parent
    heap[i] = value


@inlined
def heap_pop(heap: Floats, size: int) -> float:
    """Take the least of a heap of `size` numbers."""
    least, value, i, size = heap[0], heap[size - 1], 0, size - 1
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = value
    return least


@inlined
def _push(time: Floats, key: Ints, size: int, at: float, what: int) -> int:
    """Add an event; events of the same time come by key. Returns how many there are."""
    i = size
    while i > 0:
        p = (i - 1) >> 1
        if time[p] < at or (time[p] == at and key[p] <= what):
            break
        time[i], key[i] = time[p], key[p]
        i = p
    time[i], key[i] = at, what
    return size + 1


@inlined
def _drop(time: Floats, key: Ints, size: int) -> int:
    """Take the first event out. Returns how many are left."""
    size -= 1
    at, what = time[size], key[size]
    i, c = 0, 1
    while c < size:
        if c + 1 < size and (time[c + 1] < time[c] or (time[c + 1] == time[c] and key[c + 1] < key[c])):
            c += 1
        if time[c] > at or (time[c] == at and key[c] >= what):
            break
        time[i], key[i] = time[c], key[c]
        i = c
        c = 2 * i + 1
    time[i], key[i] = at, what
    return size


@inlined
def _choose(r: Room, node: int, furthest: bool, length: int) -> int:
    """Whom a node serves, taken from those who wait; -1 if nobody may start."""
    best, before_best, before, m = -1, -1, -1, r.first[node]
    full = r.left[node] == 0
    while m >= 0:
        if not full or r.at[m] >= length:
            if best < 0:
                better = True
            elif furthest and r.at[m] != r.at[best]:
                better = r.at[m] > r.at[best]
            elif r.arrived[m] != r.arrived[best]:
                better = r.arrived[m] < r.arrived[best]
            elif r.at[m] != r.at[best]:
                better = r.at[m] > r.at[best]
            else:
                better = m < best
            if better:
                best, before_best = m, before
        before, m = m, r.next[m]
    if best >= 0:
        if before_best < 0:
            r.first[node] = r.next[best]
        else:
            r.next[before_best] = r.next[best]
    return best


@entry
def run_clock(p: Flat, paths: Ints, r: Room) -> int:
    """Fill `finish` and `lane`; returns how many ops were served, all unless microbatches lock each other out."""
    many, length, size = paths.shape[0], p.length, p.hop.shape[0]
    time, key = r.time, r.key
    for n in range(size):
        r.first[n], r.free_at[n], r.free_number[n] = -1, -1.0, 0
        r.freed[n], r.left[n], r.waking[n] = 0, p.slots[n], 0
    if p.contention:
        for a in range(size):
            for b in range(size):
                r.links[a, b] = 0.0
    events, number, served = 0, many, 0
    for m in range(many - 1, -1, -1):
        home = paths[m, 0]
        if r.first[home] < 0:
            events = _push(time, key, events, TIE_S, home)
        r.next[m], r.first[home] = r.first[home], m
        r.arrived[m], r.at[m], r.finish[m] = 0.0, 0, math.inf
    while events > 0:
        now, order, code = time[0], key[0] >> 32, key[0] & 0xFFFFFFFF
        events = _drop(time, key, events)
        if code >= size + many:  # an op is over and somebody waits
            node = code - size - many
            r.waking[node] = 0
            now += TIE_S
        elif code >= size:  # somebody comes
            m = code - size
            at = r.at[m]
            if at < length:
                node = paths[m, at]
            elif at == length:
                node = paths[m, 0]
            else:
                node = paths[m, 2 * length - at]
            r.arrived[m] = now
            r.next[m], r.first[node] = r.first[node], m
            over = r.free_at[node]
            if over > now or (over == now and r.free_number[node] > order):
                if not r.waking[node]:
                    r.waking[node] = 1
                    events = _push(time, key, events, over, r.free_number[node] << 32 | size + many + node)
                continue
            now = over + TIE_S if over >= 0.0 and now < over + TIE_S else now + TIE_S
        else:
            node = code
            if r.free_at[node] >= now:
                continue
            code = -1
        if code >= 0 and events > 0 and time[0] <= now:
            events = _push(time, key, events, now, node)
            continue
        now -= TIE_S
        if r.first[node] < 0:
            continue
        r.left[node] += r.freed[node]
        r.freed[node] = 0
        m = _choose(r, node, p.furthest, length)
        if m < 0:
            continue
        at = r.at[m]
        r.lane[served, 0], r.lane[served, 1], r.lane[served, 2] = node, m, at
        served += 1
        if at < length:
            r.left[node] -= 1
            end = now + p.forward[node]
        elif at == length:
            end = now + p.loss[node]
        else:
            r.freed[node] = 1
            end = now + p.backward[node]
        number += 2
        if at < 2 * length:
            at += 1
            target = paths[m, at] if at < length else paths[m, 0] if at == length else paths[m, 2 * length - at]
            arrival = end
            if target != node:
                if p.contention:
                    arrival = max(end, r.links[node, target])
                    r.links[node, target] = arrival + p.hop[node, target]
                arrival += p.hop[node, target]
            r.at[m] = at
            events = _push(time, key, events, arrival, number << 32 | size + m)
        else:
            r.finish[m] = end
        r.free_at[node], r.free_number[node] = end + p.gap, number + 1
        if r.first[node] >= 0:
            r.waking[node] = 1
            events = _push(time, key, events, end + p.gap, number + 1 << 32 | size + many + node)
    return served


@inner
def round_trip(p: Flat, path: Ints) -> float:
    """Seconds of a path with nothing in its way."""
    home = path[0]
    total, before = p.loss[home], home
    for i in range(p.length):
        node = path[i]
        total += p.both[before, node] + p.forward[node] + p.backward[node]
        before = node
    return total + p.both[before, home]


@inner
def home_alone(p: Flat, paths: Ints, trips: Floats, home: int, r: Room) -> tuple[float, float]:
    """When a home's microbatches are back after their round trips, first come, first served: the last, and the sum."""
    many, homes = trips.shape[0], p.homes
    node, count = paths[home, 0], (many - home + homes - 1) // homes
    forward, backward, gap = p.forward[node], p.backward[node], p.gap
    slots = min(p.slots[node], count)
    for k in range(slots):
        r.heap[k] = 0.0
    now, end, total, begun, away = 0.0, 0.0, 0.0, 0, 0
    while begun < count or away > 0:
        start = max(now, r.heap[0]) if begun < count and slots > 0 else math.inf
        if away == 0 or start <= max(now, r.heap2[0]):  # what waits since the beginning has come first
            heap_push(r.heap2, away, start + trips[home + begun * homes] - backward)
            away += 1
            heap_pop(r.heap, slots)
            slots -= 1
            now, begun = start + forward + gap, begun + 1
        else:
            end = max(now, heap_pop(r.heap2, away)) + backward
            away -= 1
            now = end + gap
            total += end
            heap_push(r.heap, slots, end)
            slots += 1
    return end, total
