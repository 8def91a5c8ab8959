"""The most a worker can hold at each point of its lane, whatever the times: activations, and messages on their way.

A link receives by itself, so a message lies in its receiver's mailbox as soon as the network likes. What bounds it is
order alone: a message that needs nothing of worker w behind its n-th op, a SEND, can be there while that SEND is still
at it, and no earlier. Vector clocks (Fidge 1988, Mattern 1989) say so: along the lanes each worker keeps the last SEND
of everybody that is known to lie before; a SEND takes a copy along, and its RECV joins it. The same clocks say when a
message must have left its sender. The bound of each kind is reached, by a run in which all others are as far as they
can be or all links as slow as they can be; both at once they cannot be, so all kinds together are an upper bound.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.schedule.graph import Graph
from pipeline.schedule.ops import COMPUTE, RECV, SEND, STEP, F, I, Key, Op, R, Span, W

Levels = NDArray[np.float64]
"""[kinds of `Held`, ops of a lane + 1]: what may be held while each op runs, and in the end, when all have settled."""


@dataclass(frozen=True)
class Held:
    """What a worker holds, by kind: a number of things, or bytes, as the sizes were."""

    activations: float = 0
    """What forwards have left for their backwards, and halves of backwards for the others: inputs and outputs too."""
    received: float = 0
    """Messages that lie in the mailbox, or were taken out and have not been used."""
    outputs: float = 0
    """Outputs that wait for their SEND or for a later op of the lane, and are in no activation."""
    sent: float = 0
    """Packed copies that have not left."""
    posted: float = 0
    """The buffers of links for what comes next."""
    working: float = 0
    """What an op takes beside all this while it runs."""

    @property
    def messages(self) -> float:
        """Received, waiting to be sent, and sent."""
        return self.received + self.outputs + self.sent

    @property
    def total(self) -> float:
        return self.activations + self.messages + self.posted + self.working


HELD = tuple(field.name for field in fields(Held))
_ACTIVATIONS, _RECEIVED, _OUTPUTS, _SENT, _POSTED, _WORKING = range(len(HELD))


class Bound(NamedTuple):
    """`most` of each kind by itself, which need not be at one moment; `fullest`: the moment with the most together,
    at op `at` of the lane (its length: in the end). `messages`: the most of all messages together. `slots`: by peer,
    the most of its messages that were sent and are still needed here, in the mailbox or as what an op works on: over
    shared memory each of them lies in a slot."""

    most: Held
    fullest: Held
    at: int
    messages: float
    slots: Mapping[int, int]


@dataclass(frozen=True)
class Sizes:
    """What things count. Unless told otherwise, an activation and a message count 1 and nothing else counts."""

    activation: Callable[[Span], float] = lambda _: 1
    """What a forward leaves until its backward, or its first half, is over: input and output included."""
    half: Callable[[Span], float] = lambda _: 1
    """What I leaves for W."""
    message: Callable[[Op], float] = lambda _: 1
    """The output of a compute op, and its packed copy."""
    buffer: float = 1
    """A received message: links receive into buffers of one size."""
    posted: float = 0
    """What one link keeps for receiving, whatever has arrived."""
    working: Callable[[str, Span], float] = lambda _kind, _span: 0
    """What a compute op takes while it runs, beside its input, output and what it leaves."""


def bounds(graph: Graph, sizes: Sizes | None = None) -> dict[int, Bound]:
    """Worker -> the most it may hold, whatever the times. See `levels`."""
    found: dict[int, Bound] = {}
    for worker, level, slots in _levels(graph, sizes):
        at = int(level.sum(0).argmax())
        messages = level[[_RECEIVED, _OUTPUTS, _SENT]].sum(0).max()
        found[worker] = Bound(Held(*level.max(1).tolist()), Held(*level[:, at].tolist()), at, float(messages), slots)
    return found


def levels(graph: Graph, sizes: Sizes | None = None) -> Iterator[tuple[int, Levels]]:
    """Each worker with what it may hold at most of each kind, op by op of its lane. For lowered schedules.

    At the end, messages of the next iteration count, taken to be one of the same schedule: who has settled earlier may
    send them. Raises ValueError where outputs cross workers and no SEND says when.
    """
    for worker, level, _ in _levels(graph, sizes):
        yield worker, level


def _levels(graph: Graph, sizes: Sizes | None) -> Iterator[tuple[int, Levels, dict[int, int]]]:
    """Each worker with its levels, and its slots by peer."""
    schedule = graph.schedule
    if graph.feeds and not schedule.lowered:
        raise ValueError(f"schedule {schedule.name!r} has no SEND and RECV; lower it to see what messages take")
    sizes = sizes or Sizes()
    known, leaves = walk(graph)
    for worker, lane in graph.lanes.items():
        yield worker, *_lane_levels(graph, lane, sizes, known, leaves)


class _Link:
    """The SENDs of a worker to another, in order. `proof[i]`: the first RECV that shows the i-th to have arrived, since
    messages of a link arrive in order. `oldest`: the first that may not have."""

    def __init__(self, sends: list[int], received: Mapping[int, int]) -> None:
        self.sends, self.oldest = sends, 0
        self.proof = list(accumulate((received[i] for i in reversed(sends)), min))[::-1]


def walk(graph: Graph) -> tuple[dict[int, int], dict[int, int]]:
    """SEND -> the last SEND of its receiver that lies before it, whatever the times (-1 where none does); and SEND ->
    the RECV of its sender at whose end it has arrived for certain, where there is one."""
    rows = {worker: row for row, worker in enumerate(graph.lanes)}
    clocks = {worker: np.full(len(rows), -1, np.int32) for worker in rows}
    taken: dict[int, NDArray[np.int32]] = {}  # SEND -> the clock it took along: never changed, so not copied
    known: dict[int, int] = {}
    leaves: dict[int, int] = {}
    ops, workers, waits = graph.ops, graph.workers, graph.waits
    links = _links(graph, rows)
    for i in graph.order:
        op = ops[i]
        if op[0] == SEND:
            taken[i] = clock = clocks[workers[i]]
            known[i] = int(clock[rows[op[3]]])
        elif op[0] == RECV:
            worker, (send,) = workers[i], waits[i]
            clocks[worker] = joined = np.maximum(clocks[worker], taken.pop(send))
            if joined[peer := rows[op[3]]] < send:  # lanes may take messages in another order
                joined[peer] = send
            for row, link in links.get(worker, ()):
                last, sends, proof, at = int(joined[row]), link.sends, link.proof, link.oldest
                while at < len(sends) and proof[at] < last and sends[at] < i:
                    leaves[sends[at]] = i
                    at += 1
                link.oldest = at
    return known, leaves


def _links(graph: Graph, rows: Mapping[int, int]) -> dict[int, list[tuple[int, _Link]]]:
    """Worker -> (row of the peer, link) of each of its links."""
    received = {graph.waits[i][0]: i for i, op in enumerate(graph.ops) if op[0] == RECV}
    sends: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, op in enumerate(graph.ops):
        if op[0] == SEND:
            sends[graph.workers[i], op[3]].append(i)
    found: dict[int, list[tuple[int, _Link]]] = defaultdict(list)
    for (worker, peer), each in sends.items():
        found[worker].append((rows[peer], _Link(each, received)))
    return found


def _lane_levels(
    graph: Graph, lane: range, sizes: Sizes, known: Mapping[int, int], leaves: Mapping[int, int]
) -> tuple[Levels, dict[int, int]]:
    """One lane, read from its end to its start, so that what is used later is known where it is made."""
    ops, waits, frees, routes = graph.ops, graph.waits, graph.frees, graph.schedule.routes
    start, end = lane.start, len(lane)  # the end is no op: all have settled
    changes = [array("d", bytes(8 * (end + 2))) for _ in HELD]  # what each op adds; quicker than NumPy's, one by one
    activations, received, outputs, sent, posted, working = changes
    used: dict[tuple[bool, int], int] = {}  # (forward, microbatch) -> the next op that uses an output of it
    sends: dict[Key, int] = {}
    halves: dict[tuple[Span, int], int] = {}
    weights: dict[tuple[Span, int], int] = {}
    peers: set[int] = set()
    slots: dict[int, list[int]] = defaultdict(lambda: [0] * (end + 2))  # by peer: what each op adds
    keeps: dict[int, int] = {}  # op -> the last one that needs what it has been given
    early, settled = 0.0, end
    for i in range(end - 1, -1, -1):
        op = ops[start + i]
        kind, span, m, peer, of = op
        if kind == SEND:
            assert of is not None
            sends.setdefault(of[:3], i)
            sent[i] += (size := sizes.message(of))
            sent[min(leaves.get(start + i, start + end) - start, settled) + 1] -= size  # who has settled has got it
            peers.add(peer)
        elif kind == RECV:
            assert of is not None
            use = used.get((of[0] == F, m)) or used.get((False, m), i)  # by a backward that is cut otherwise
            first = max(0, known[waits[start + i][0]] - start)  # while the last SEND that it needs is still at it
            received[first] += sizes.buffer
            received[use if start + use in frees else use + 1] -= sizes.buffer  # a forward keeps its input itself
            slots[peer][first] += 1
            slots[peer][keeps.get(use, use) + 1] -= 1
            if first == 0:  # it needs nothing of this worker: that of the next iteration may come early
                early += sizes.buffer
                slots[peer][settled] += 1
            peers.add(peer)
        elif kind == STEP:
            settled = i
        elif kind in COMPUTE:
            if size := sizes.working(kind, span):
                working[i] += size
                working[i + 1] -= size
            if kind == W:
                weights[span, m] = i
                continue
            forward = kind in (F, R)
            until = sends.pop(op[:3], 0) or used.get((forward, m), i)
            used[forward, m] = i
            if forward and (freeing := frees.get(start + i)) is not None:
                last = max(freeing, default=start + end) - start
                if last > end or min(freeing, default=start) < start:
                    last = end  # another worker frees it
                activations[i] += (size := sizes.activation(span))
                if (half := halves.get((span, m), last)) < last:
                    activations[half + 1] -= size
                    activations[half + 1] += (size := sizes.half(span))
                activations[last + 1] -= size
                keeps[i] = last
                continue
            if kind == I:
                halves[span, m] = i
                keeps[i] = weights.get((span, m), i)
                until = max(until, keeps[i])  # it lies beside what waits for W
            if span != (routes[m].forward if forward else routes[m].backward)[-1]:
                outputs[i] += (size := sizes.message(op))
                outputs[until + 1] -= size
    received[settled] += early
    posted[0] += len(peers) * sizes.posted
    most = {peer: max(accumulate(each)) for peer, each in slots.items()}
    return np.array(changes).cumsum(1)[:, :-1], most
