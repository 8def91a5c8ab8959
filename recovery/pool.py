"""Deals slots to stateless workers, and deals them again when a worker is lost.

The host of a run owns the pool: it starts the workers, tells each which slots are its own and which hidden states are
there, and counts what they give back exactly once. A worker that dies takes nothing along: its slots go to the others.
A worker that joins is used from the next iteration on.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.host_optimizer import HostOptimizer
from pipeline.schedule import B, Span
from pipeline.slots import BACKWARD, FORWARD, Slot
from pipeline.stateless import MESSAGE

Fact = tuple[str, int, int]
"""(x or dx, microbatch, layer): a hidden state, or the gradient of one, that is there."""
ROOM = 2
"""Slots that a worker has at once: one under way, one whose weights are being loaded."""
_TICK_S = 0.25
_GONE_S = 2.0


class NoWorkerLeft(RuntimeError):
    """All workers are lost and none may be started again. Says why the last one went."""


class Exit(Protocol):
    """How a worker process ended."""

    @property
    def pid(self) -> int: ...


class Deal(Protocol):
    """Gives a slot to a worker. `free`: seconds until each is through with what it has; `speeds`: as measured."""

    def __call__(self, slot: Slot, free: Mapping[int, float], speeds: Mapping[int, float], /) -> int: ...


@dataclass
class Run:
    """One pass over a row of slots: an iteration of training, or a part of an evaluation."""

    number: int
    step: int
    job: str
    row: Sequence[Slot]
    boundaries: Sequence[int]
    source: str
    version: int
    side: int = 0
    counted: bool = True
    """Whether its gradients are added as they come, or wait until the update before it has been asked for."""
    members: frozenset[int] = frozenset()
    pending: deque[int] = field(default_factory=deque)
    done: dict[int, set[int]] = field(default_factory=dict)
    facts: set[Fact] = field(default_factory=set)
    losses: dict[int, float] = field(default_factory=dict)
    committed: Counter[tuple[Span, int]] = field(default_factory=Counter)
    """(backward span, microbatch) -> how often its gradient was counted: once each in the end."""
    waiting: dict[Span, dict[tuple[int, ...], int]] = field(default_factory=dict)
    added: dict[Span, int] = field(default_factory=dict)
    left: int = 0
    homes: dict[int, int] = field(default_factory=dict)
    versions: dict[Span, set[int]] = field(default_factory=dict)
    events: dict[int, list[tuple[str, float, float]]] = field(default_factory=dict)
    began: float = 0.0

    def needs(self, slot: Slot, m: int) -> list[Fact]:
        """What must be there before a microbatch of a slot can run to its end."""
        lo, hi = slot.span
        needed: list[Fact] = [("x", m, lo)] if lo else []
        return [*needed, ("dx", m, hi)] if slot.kinds == BACKWARD else needed

    def makes(self, slot: Slot, m: int) -> list[Fact]:
        """What is there once a microbatch of a slot is through."""
        lo, hi = slot.span
        if slot.kinds == FORWARD:
            return [("x", m, layer) for layer in self.boundaries if lo < layer <= hi]
        return [("dx", m, lo)] if lo else []


@dataclass
class Given:
    """A slot that a worker has."""

    id: int
    run: Run
    index: int
    block: int
    recalled: bool = False

    @property
    def slot(self) -> Slot:
        return self.run.row[self.index]


@dataclass
class Member:
    """A worker, from its start to its end."""

    id: int
    pid: int
    since: float
    channel: socket.socket | None = None
    given: dict[int, Given] = field(default_factory=dict)
    work: float = 0.0
    busy: float = 0.0
    most_held: int = 0

    @property
    def rate(self) -> float | None:
        """Cost units per second, as measured lately; None as long as nothing was."""
        return self.work / self.busy if self.busy > 0 else None


class Pool:
    """The workers of one run. `start(id)` forks a worker and returns its pid; `exits` tells which have ended.

    `cost(slot)` is what a microbatch of a slot takes, in any unit; `event(name, ...)` is told what happens.
    """

    def __init__(
        self, address: str, start: Callable[[int], int], exits: Callable[[float], Sequence[Exit]],
        optimizer: HostOptimizer, blocks: int, cost: Callable[[Slot], float], deal: Deal,
        event: Callable[..., None], *, deadline_s: float, max_failures: int, fatal: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._start, self._exits, self._optimizer = start, exits, optimizer
        self._cost, self._deal, self._event = cost, deal, event
        self._deadline_s, self._max_failures, self._fatal = deadline_s, max_failures, fatal
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._inbox: deque[tuple[str, Any]] = deque()
        self.members: dict[int, Member] = {}
        self.active: list[Run] = []
        self._blocks = list(range(blocks))
        self._next_worker = self._next_order = self._next_run = 0
        self._reasons: dict[int, str] = {}
        self._opened = False
        self.failures = 0
        self.last_reason = "nobody was started"
        self.heard: dict[str, Any] = {}

    def told(self, what: str, about: Any) -> None:
        """The optimizer's reports, from its thread."""
        self._inbox.append((what, about))
        with contextlib.suppress(OSError):
            self._wake.send(b".")

    # ---- workers ----

    def open(self, workers: int) -> None:
        """Start so many workers and wait for them. Raises NoWorkerLeft where none comes up."""
        for _ in range(workers):
            self._add_member()
        deadline = time.monotonic() + self._deadline_s
        while any(m.channel is None for m in self.members.values()) and time.monotonic() < deadline:
            self.turn()
        if not self.ready:
            raise NoWorkerLeft(f"no worker came up: {self.last_reason}")
        self._opened = True

    def _add_member(self) -> None:
        member, self._next_worker = self._next_worker, self._next_worker + 1
        self.members[member] = Member(member, self._start(member), time.monotonic())

    @property
    def ready(self) -> list[int]:
        """The workers that can be used."""
        return [member.id for member in self.members.values() if member.channel is not None]

    @property
    def speeds(self) -> dict[int, float]:
        """Worker -> cost units per second; who was not measured yet is taken for an average one."""
        known = [member.rate for member in self.members.values() if member.rate is not None]
        mean = sum(known) / len(known) if known else 1.0
        return {member.id: member.rate or mean for member in self.members.values()}

    # ---- iterations ----

    def submit(
        self, row: Sequence[Slot], boundaries: Sequence[int], *, step: int, job: str, source: str, version: int,
        side: int = 0,
    ) -> Run:  # fmt: skip
        """Begin with a row of slots as soon as those before it are all given out.

        While another is under way, call `count` once the update of that one has been asked for: gradients of both
        must not meet.
        """
        run = Run(self._next_run, step, job, row, boundaries, source, version, side, counted=not self.active)
        self._next_run += 1
        run.pending, run.left, run.began = deque(range(len(row))), len(row), time.monotonic()
        run.done = {i: set() for i in range(len(row))}
        run.members = frozenset(self.ready)
        self.active.append(run)
        self._dispatch()
        return run

    def finish(self, run: Run) -> None:
        """Return once a run is whole: every slot done and every gradient added exactly once. Raises NoWorkerLeft."""
        while run.left:
            self.turn()
        self.active.remove(run)
        wanted = {(slot.span, m) for slot in run.row if B in slot.kinds for m in slot.microbatches}
        if set(run.committed) != wanted or set(run.committed.values()) - {1}:
            raise RuntimeError(f"gradients were counted {dict(run.committed)}; expected once each")

    def count(self, run: Run) -> None:
        """Add the gradients of a run from now on, and those that have waited."""
        run.counted = True
        for span in list(run.waiting):
            self._add_in_order(run, span)

    def wait_for(self, what: str) -> Any:
        """The optimizer's next report of a kind. Raises TimeoutError."""
        deadline = time.monotonic() + self._deadline_s
        while what not in self.heard:
            self.turn()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the optimizer has not told its {what} after {self._deadline_s:g} s")
        return self.heard.pop(what)

    def turn(self) -> None:
        """Wait for what happens next, and handle all that did. Raises NoWorkerLeft and what the optimizer met."""
        for key, _ in self._selector.select(_TICK_S):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._woken:
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
            else:
                self._read(key)
        while self._inbox:
            what, about = self._inbox.popleft()
            if what == "failed":
                raise about
            if what == "added":
                self._blocks.append(about)
            else:
                self.heard[what] = about
        self._look_after()
        self._dispatch()

    # ---- messages ----

    def _accept(self) -> None:
        channel, _ = self._listener.accept()
        pid, uid, _ = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid() or pid not in {member.pid for member in self.members.values()}:
            channel.close()  # no worker of ours
            return
        self._selector.register(channel, selectors.EVENT_READ, pid)

    def _read(self, key: selectors.SelectorKey) -> None:
        channel = key.fileobj
        assert isinstance(channel, socket.socket)
        try:
            data = channel.recv(MESSAGE)
        except OSError:
            data = b""
        member = next((m for m in self.members.values() if m.pid == key.data), None)
        if not data or member is None:
            self._selector.unregister(channel)
            channel.close()
            if member is not None:
                self._lost(member)
            return
        member.since = time.monotonic()
        self._handle(member, channel, json.loads(data))

    def _handle(self, member: Member, channel: socket.socket, message: Mapping[str, Any]) -> None:
        if "hello" in message:
            member.channel = channel
            if self._opened:
                self._event("joined", worker=member.id)
        elif "error" in message:
            self._reasons[member.id] = message["error"]
            if message["type"] in self._fatal:
                raise RuntimeError(f"worker {member.id}: {message['error']}")
        elif "event" in message:
            self._event("fault", worker=member.id, **message["event"])
        elif "op" in message:
            if given := member.given.get(message["op"]):
                self._op_done(member, given, message)
        elif "recalled" in message:
            if given := member.given.pop(message["recalled"], None):
                self._return(given)
        elif given := member.given.pop(message["slot"], None):
            member.most_held = max(member.most_held, message["held"])
            self._slot_done(member, given, message)

    def _op_done(self, member: Member, given: Given, message: Mapping[str, Any]) -> None:
        run, slot, m = given.run, given.slot, message["m"]
        member.work, member.busy = 0.9 * member.work + self._cost(slot), 0.9 * member.busy + message["busy"]
        if m in run.done[given.index]:
            return
        run.done[given.index].add(m)
        if message["loss"] is not None:
            run.losses[m] = message["loss"]
        made = run.makes(slot, m)
        run.facts.update(made)
        for other in self.members.values():
            told: list[Fact] = []
            for theirs in other.given.values():
                if theirs.run is run:
                    wanted = {fact for each in theirs.slot.microbatches for fact in run.needs(theirs.slot, each)}
                    told += [fact for fact in made if fact in wanted]
            if told:
                self._tell(other, facts=[[run.number, *fact] for fact in told])

    def _slot_done(self, member: Member, given: Given, message: Mapping[str, Any]) -> None:
        run, slot = given.run, given.slot
        run.left -= 1
        run.homes[given.index] = member.id
        run.versions.setdefault(slot.span, set()).add(message["version"])
        if message["version"] != run.version:
            raise RuntimeError(f"span {slot.span} was read at version {message['version']}; expected {run.version}")
        run.events.setdefault(member.id, []).extend(message["events"])
        if given.block >= 0:
            run.committed.update((slot.span, m) for m in slot.microbatches)
            run.waiting.setdefault(slot.span, {})[slot.microbatches] = given.block
            if run.counted:
                self._add_in_order(run, slot.span)

    def _add_in_order(self, run: Run, span: Span) -> None:
        """Rounds are added in their own order, so that the sum is the same whoever was first."""
        rounds = [slot.microbatches for slot in run.row if slot.span == span and B in slot.kinds]
        waiting, at = run.waiting[span], run.added.get(span, 0)
        while at < len(rounds) and rounds[at] in waiting:
            self._optimizer.add(waiting.pop(rounds[at]), span)
            at += 1
        run.added[span] = at

    def _tell(self, member: Member, **message: Any) -> None:
        if member.channel is not None:
            with contextlib.suppress(OSError):  # its end is read from the socket
                member.channel.send(json.dumps(message).encode())

    # ---- dealing ----

    def _dispatch(self) -> None:
        """Give out what can be given: the slots of the oldest run first, in their order."""
        for run in self.active:
            while run.pending and self._give(run):
                pass
            if run.pending:
                return

    def _give(self, run: Run) -> bool:
        usable = [w for w in self.ready if w in run.members]
        if not usable and (usable := self.ready):
            run.members = frozenset(usable)  # all whom it began with are lost
        index = run.pending[0]
        slot = run.row[index]
        if not usable or self._optimizer.version(slot.span, run.source) < run.version:
            return False
        # what a run keeps back must leave enough for the one before it to be done, and done again
        kept = 0 if run.counted else ROOM * len(self.members)
        if B in slot.kinds and len(self._blocks) <= kept:
            return False
        speeds = self.speeds
        free = {w: self._left(self.members[w], speeds[w]) for w in usable}
        member = self.members[self._deal(slot, free, {w: speeds[w] for w in usable})]
        if len(member.given) >= ROOM:
            return False
        run.pending.popleft()
        self._next_order += 1
        given = Given(self._next_order, run, index, self._blocks.pop() if B in slot.kinds else -1)
        member.given[given.id] = given
        member.since = time.monotonic()
        needed = [fact for m in slot.microbatches for fact in run.needs(slot, m)]
        skip = [m for m in slot.microbatches if m in run.done[index]]
        mine = [m for m in slot.microbatches if given.block >= 0 or m not in skip]
        order = {
            "id": given.id, "run": run.number, "step": run.step, "job": run.job, "kinds": slot.kinds,
            "span": slot.span, "microbatches": mine, "source": run.source, "side": run.side, "block": given.block,
            "skip": skip,
        }  # fmt: skip
        self._tell(member, do=order, facts=[[run.number, *fact] for fact in needed if fact in run.facts])
        return True

    def _left(self, member: Member, speed: float) -> float:
        """Seconds until a worker is through with what it has."""
        left = 0.0
        for given in member.given.values():
            done = given.run.done[given.index]
            left += self._cost(given.slot) * sum(m not in done for m in given.slot.microbatches)
        return left / speed

    # ---- losses ----

    def _look_after(self) -> None:
        """Notice who has ended, or has not said anything for too long."""
        ended = {each.pid: str(each) for each in self._exits(0.0)}
        for member in list(self.members.values()):
            if member.pid in ended:
                self._reasons.setdefault(member.id, ended[member.pid])
                self._lost(member, ended=True)
            elif not self._could_go_on(member):
                member.since = time.monotonic()
            elif time.monotonic() > member.since + self._deadline_s:
                self._reasons.setdefault(member.id, f"has not answered for {self._deadline_s:g} s and was ended")
                self._lost(member)

    def _could_go_on(self, member: Member) -> bool:
        """Whether a worker has something to do for which it need not wait: then it should be heard of."""
        if member.channel is None:
            return True
        given = next(iter(member.given.values()), None)
        if given is None:
            return False
        left = [m for m in given.slot.microbatches if m not in given.run.done[given.index]]
        return not left or all(fact in given.run.facts for fact in given.run.needs(given.slot, left[0]))

    def _lost(self, member: Member, *, ended: bool = False) -> None:
        """A worker is gone: its slots go back, and what waits for them is taken back as well."""
        if self.members.pop(member.id, None) is None:
            return
        if not ended:
            self._await_end(member)
        if member.channel is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(member.channel)
            member.channel.close()
        self.failures += 1
        self.last_reason = self._reasons.pop(member.id, "closed its connection")
        self._event("detected", worker=member.id, reason=self.last_reason)
        replaced = self.failures <= self._max_failures
        self._event(
            "redealt", worker=member.id, slots=len(member.given), remedy="its slots are dealt to the others",
            replacement=self._next_worker if replaced else None,
        )  # fmt: skip
        for given in member.given.values():
            self._return(given)
        if replaced:
            self._add_member()
        if not self.members:
            raise NoWorkerLeft(
                f"no worker is left: the last one, {member.id}, {self.last_reason}; --resume goes on from the newest "
                "valid checkpoint"
            )

    def _await_end(self, member: Member) -> None:
        """Nothing of it may write any more when its blocks are given to others."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)
        deadline = time.monotonic() + _GONE_S
        while time.monotonic() < deadline:
            for each in self._exits(0.05):
                if each.pid == member.pid:
                    self._reasons.setdefault(member.id, str(each))
                    return
                other = next((m for m in self.members.values() if m.pid == each.pid), None)
                if other is not None:
                    self._reasons.setdefault(other.id, str(each))
                    other.since = -self._deadline_s  # seen by the next look

    def _return(self, given: Given) -> None:
        """A slot is to be given out again, and before it whatever others wait for in vain meanwhile."""
        run = given.run
        if given.block >= 0:
            self._blocks.append(given.block)
        if given.block < 0 and run.done[given.index] >= set(given.slot.microbatches):
            run.left -= 1  # all its results had been told, only its last word was not
        else:
            run.pending = deque(sorted([*run.pending, given.index]))
        for member in self.members.values():
            for other in member.given.values():
                if other.recalled or (other.run.number, other.index) < (run.number, given.index):
                    continue
                if any(fact not in other.run.facts for m in other.slot.microbatches
                       for fact in other.run.needs(other.slot, m)):  # fmt: skip
                    other.recalled = True
                    self._tell(member, recall=other.id)

    def close(self) -> None:
        """End all workers and the sockets."""
        for member in self.members.values():
            self._tell(member, end=True)
            if member.channel is None:  # still starting, and not to be talked to
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGKILL)
        deadline = time.monotonic() + _GONE_S
        left = {member.pid for member in self.members.values()}
        while left and time.monotonic() < deadline:
            left -= {each.pid for each in self._exits(0.05)}
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._wake.close()
        self._selector.close()
        self.members.clear()
