"""A small model of workers, links and mailboxes that can be run in every way: the oracle of holdings.py.

It knows no clocks. A worker holds tensors by name, as the lane executor does; a SEND puts one on a link; links deliver
in order and whenever they like. Two iterations follow each other, parted by the vote alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import numpy as np

from pipeline.schedule.holdings import HELD
from pipeline.schedule.ops import RECV, SEND, STEP, B, F, I, Key, R, Schedule, W

ACTIVATIONS, RECEIVED, OUTPUTS, SENT, *_ = range(len(HELD))
Most = dict[int, np.ndarray]
"""Worker -> [kinds, and all of them together; ops of the lane, and its end]."""


class State(NamedTuple):
    """By worker: the op that runs, over both iterations. By link: messages that have arrived."""

    at: tuple[int, ...]
    arrived: tuple[int, ...]


Move = tuple[bool, int]
"""(True, worker): it ends its op and begins the next; (False, link): its next message arrives."""


class Model:
    """A link forgets what it has sent as soon as it has arrived."""

    def __init__(self, schedule: Schedule) -> None:
        self.workers = list(schedule.lanes)
        lanes = [schedule.lanes[w] for w in self.workers]
        self.lanes = [(*lane, None, *lane, None) for lane in lanes]  # None: the end, when all have settled
        self.lap = [len(lane) + 1 for lane in lanes]
        self.votes = [next((i for i, op in enumerate(lane) if op.kind == STEP), len(lane)) for lane in lanes]
        sends = [(w, op.peer) for w, lane in schedule.lanes.items() for op in lane if op.kind == SEND]
        self.links = [(self.workers.index(a), self.workers.index(b)) for a, b in dict.fromkeys(sends)]
        self.carried = [
            [op.of for op in self.lanes[a] if op and op.kind == SEND and op.peer == self.workers[b]]
            for a, b in self.links
        ]
        self._passed: dict[tuple[int, str, int], list[int]] = {}
        self.own = [own_levels(schedule, w) for w in self.workers]
        self.kept = [kept_messages(schedule, w) for w in self.workers]
        self.start = State((0,) * len(lanes), (0,) * len(self.links))

    def passed(self, w: int, at: int, kind: str, peer: int) -> int:
        """SENDs to `peer` that have begun, or RECVs from it that are over, while op `at` of w runs."""
        if (w, kind, peer) not in self._passed:
            number = [0]
            for op in self.lanes[w]:
                number.append(number[-1] + (op is not None and op.kind == kind and op.peer == self.workers[peer]))
            self._passed[w, kind, peer] = number
        return self._passed[w, kind, peer][at + (kind == SEND)]

    def moves(self, state: State) -> Iterator[Move]:
        """All that can happen next."""
        for w in range(len(self.workers)):
            if self.can_end(state, w):
                yield True, w
        for k, (a, b) in enumerate(self.links):
            if state.arrived[k] < self.passed(a, state.at[a], SEND, b):
                yield False, k

    def can_end(self, state: State, w: int) -> bool:
        at = state.at[w]
        if at + 1 >= len(self.lanes[w]):
            return False
        op, (lap, place) = self.lanes[w][at], divmod(at, self.lap[w])
        if place >= self.votes[w] and any(
            other < lap * self.lap[v] + self.votes[v] for v, other in enumerate(state.at)
        ):
            return False
        if op is None:
            return all(state.arrived[k] >= self.passed(w, at, SEND, b) for k, (a, b) in enumerate(self.links) if a == w)
        if op.kind == RECV:
            k = self.links.index((self.workers.index(op.peer), w))
            there = self.carried[k][len(self.carried[k]) // 2 * lap : state.arrived[k]]
            return op.of in there
        return True

    def after(self, state: State, move: Move) -> State:
        at, arrived = map(list, state)
        ends, who = move
        (at if ends else arrived)[who] += 1
        return State(tuple(at), tuple(arrived))

    def held(self, state: State, w: int) -> list[int]:
        """Of each kind, by worker w, and all together."""
        at = state.at[w]
        found = [0] * len(HELD)
        found[ACTIVATIONS], found[RECEIVED], found[OUTPUTS] = self.own[w][at % self.lap[w]]
        for k, (a, b) in enumerate(self.links):
            if b == w:
                found[RECEIVED] += state.arrived[k] - self.passed(w, at, RECV, a)
            if a == w:
                found[SENT] += self.passed(w, at, SEND, b) - state.arrived[k]
        return [*found, sum(found)]

    def slots(self, state: State, k: int) -> int:
        """Messages of link k that were sent, arrived or not, and are not let go yet."""
        (a, b), at = self.links[k], state.at
        there = self.passed(a, at[a], SEND, b) - self.passed(b, at[b], RECV, a)
        return there + self.kept[b][at[b] % self.lap[b]].get(self.workers[a], 0)

    def note(self, state: State, most: Most) -> None:
        """Keep what is held in `state`, by who is in the first iteration, where it is more than ever."""
        for w, worker in enumerate(self.workers):
            if state.at[w] < self.lap[w]:
                column = most[worker][:, state.at[w]]
                np.maximum(column, self.held(state, w), out=column)

    def nothing(self) -> Most:
        return {worker: np.zeros((len(HELD) + 1, self.lap[w])) for w, worker in enumerate(self.workers)}

    # ---- ways to run ----

    def in_every_way(self) -> Most:
        """The most in any state that can be reached."""
        most = self.nothing()
        for state in self.states():
            self.note(state, most)
        return most

    def states(self) -> Iterator[State]:
        """All that can be reached while anybody is in the first iteration."""
        seen, todo = {self.start}, [self.start]
        while todo:
            yield (state := todo.pop())
            if any(at < lap for at, lap in zip(state.at, self.lap, strict=True)):
                new = {self.after(state, move) for move in self.moves(state)} - seen
                seen |= new
                todo += new

    def at_random(self, random: Random, most: Most) -> None:
        """One run to the end of both iterations, in which some workers and links are faster than others."""
        haste = {move: random.random() ** 4 for move in self._all_moves()}
        state = self.start
        while moves := list(self.moves(state)):
            state = self.after(state, random.choices(moves, [haste[move] + 1e-6 for move in moves])[0])
            self.note(state, most)

    def _all_moves(self) -> list[Move]:
        return [(True, w) for w in range(len(self.workers))] + [(False, k) for k in range(len(self.links))]

    def alone_behind(self, w: int, most: Most) -> None:
        """Worker w is slow: at each of its ops, all others are as far as they can be without its end."""
        state = self.start
        while state.at[w] < self.lap[w]:
            while moves := [move for move in self.moves(state) if move != (True, w)]:
                for move in moves:
                    state = self.after(state, move)
            self.note(state, most)
            if not self.can_end(state, w):
                return
            state = self.after(state, (True, w))

    def alone_ahead(self, w: int, most: Most) -> None:
        """Nothing happens, and nothing arrives, but what worker w cannot go on without."""
        state = self.start
        for place in range(self.lap[w]):
            state = self._reach(state, w, place)
            self.note(state, most)

    def _reach(self, state: State, w: int, place: int) -> State:
        """Worker w begins the op at `place`, and what has to happen before does."""
        while state.at[w] < place:
            at = state.at[w]
            op = self.lanes[w][at]
            if op is not None and op.kind == RECV:
                a = self.workers.index(op.peer)
                k = self.links.index((a, w))
                number = self.carried[k].index(op.of) + 1
                made = next(i for i in range(len(self.lanes[a])) if self.passed(a, i, SEND, w) == number)
                state = self._reach(state, a, made)
                while state.arrived[k] < number:
                    state = self.after(state, (False, k))
            elif at >= self.votes[w]:
                for v in range(len(self.workers)):
                    state = self._reach(state, v, self.votes[v])
            state = self.after(state, (True, w))
        return state


def kept_messages(schedule: Schedule, worker: int) -> list[dict[int, int]]:
    """Peer -> its messages that were taken out and are still needed while each op of a lane runs, and in the end. What
    a forward was given is needed until its activation goes, what an I was given until its W is over."""
    lane = schedule.lanes[worker]
    there: dict[Key, int] = {}
    needed: dict[Key, set[Key]] = {}  # by the op that it was given to, F, R or I: until that is freed
    split = {op[1:3] for op in lane if op.kind == W}
    last = {op.microbatch: i for i, op in enumerate(lane) if op.kind in (B, I, W)}
    found: list[dict[int, int]] = []
    for i, (kind, span, m, _, of) in enumerate(lane):
        gone: set[Key] = set()
        if kind in (F, R):
            route = schedule.routes[m]
            given = {(F, s, m) for s in route.forward[: route.forward.index(span)][-1:]}
            if route.backward:
                needed[kind, span, m] = given
            else:
                gone |= given
        elif kind in (B, I):
            back = schedule.routes[m].backward
            given = {(k, s, m) for s in back[: back.index(span)][-1:] for k in (B, I)}
            if (span, m) in split:
                needed[I, span, m] = given
            else:
                gone |= given | needed.pop((F, span, m), set())
        elif kind == W:
            gone |= needed.pop((F, span, m), set()) | needed.pop((I, span, m), set())
        if last.get(m) == i:
            for key in [key for key in needed if key[0] == R and key[2] == m]:
                gone |= needed.pop(key)
        found.append(dict(Counter(there.values())))
        still = set().union(*needed.values())
        there = {key: peer for key, peer in there.items() if key not in gone or key in still}
        if kind == RECV and of is not None:
            there[of[:3]] = lane[i].peer
    return [*found, dict(Counter(there.values()))]


def own_levels(schedule: Schedule, worker: int) -> list[tuple[int, int, int]]:
    """(activations, messages taken out, outputs) that a lane itself holds while each op runs and in the end.

    Tensors are named by what made them. An activation holds its input and output, so these do not count apart.
    """
    lane = schedule.lanes[worker]
    split = {op[1:3] for op in lane if op.kind == W}
    last = {op.microbatch: i for i, op in enumerate(lane) if op.kind in (B, I, W)}
    received: set[Key] = set()
    outputs: set[Key] = set()
    beside: set[Key] = set()  # gradients of inputs, which lie beside what I has left for W
    saved: dict[Key, set[Key]] = {}  # by F or R
    found: list[tuple[int, int, int]] = []
    for i, (kind, span, m, _, of) in enumerate(lane):
        used: set[Key] = set()  # what goes when the op is over: tensors, and activations
        freed: set[Key] = set()
        if kind in (F, R):
            route = schedule.routes[m]
            before = {(F, s, m) for s in route.forward[: route.forward.index(span)][-1:]}
            if kind == F and span != route.forward[-1]:
                outputs.add((F, span, m))
            if route.backward:
                saved[kind, span, m] = {(kind, span, m), *before}
                received -= before
                outputs -= before
            else:
                used |= before
        elif kind in (B, I):
            back = schedule.routes[m].backward
            used |= {(k, s, m) for s in back[: back.index(span)][-1:] for k in (B, I)}
            if span != back[-1]:
                outputs.add((kind, span, m))
                beside |= {(kind, span, m)} if kind == I else set()
            freed |= {(F, span, m)} if (span, m) not in split else set()
        elif kind == W:
            freed.add((F, span, m))
        elif kind == SEND and of is not None:
            used.add(of[:3])
        if last.get(m) == i:
            freed |= {key for key in saved if key[0] == R and key[2] == m}
        inside = set().union(*saved.values())
        found.append((len(saved), len(received - inside), len((outputs | beside) - inside)))
        received -= used
        outputs -= used
        beside -= {(I, *key[1:]) for key in freed}
        saved = {key: held for key, held in saved.items() if key not in freed}
        if kind == RECV and of is not None:
            received.add(of[:3])
    return [*found, (len(saved), len(received), len(outputs))]
