"""Deals work units to stateless workers, and deals them again when a worker is lost.

The host of a run owns the pool: it starts the workers, tells each which units are its own and which hidden states are
there, and counts what they give back exactly once. A worker that dies takes nothing along: its units go to the others.
A worker that joins is used from the next iteration on. The loop waits for no worker: what one does not take is kept,
up to a bound, and then that worker is lost.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.runtime.channel import Channel, ChannelClosed, ChannelFull
from pipeline.runtime.peak_flops import Capability
from pipeline.runtime.peak_memory import PeakMemory
from pipeline.schedule.ops import B
from pipeline.schedule.work_units import WorkUnit
from pipeline.state.host_optimizer import HostOptimizer
from pipeline.wire import WireError, checked
from recovery.dispatcher import Deal, Dispatcher
from recovery.losses import LIMIT, STOPPING_LIMIT, Losses
from recovery.processes import ProcessEnd, Processes, kill
from recovery.runs import Given, Iteration, PoolMember

_TICK_S = 0.25
LEFT = 4
"""The exit code of a worker that found its connection closed."""


class NoWorkerLeft(RuntimeError):
    """All workers are lost and none may be started again. Says why the last one went."""


class Pool:
    """The workers of one run. `start(id)` forks a worker and returns its pid, or raises OSError; `exits` tells which
    have ended.

    `cost(unit)` is what a microbatch of a unit takes, in any unit; `event(name, ...)` is told what happens. No gradient
    block of a worker is given out again before that worker was seen to end, or has given it back itself.
    """

    def __init__(
        self, address: str, start: Callable[[int], int], exits: Callable[[float], Sequence[ProcessEnd]],
        optimizer: HostOptimizer, blocks: int, cost: Callable[[WorkUnit], float], deal: Deal,
        event: Callable[..., None], *, deadline_s: float, max_failures: int,
        stopping: Callable[[], bool] = bool,
    ) -> None:  # fmt: skip
        self._event, self._stopping = event, stopping
        self._deadline_s, self._max_failures = deadline_s, max_failures
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(address)
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._inbox: deque[tuple[str, Any]] = deque()
        self.members: dict[int, PoolMember] = {}
        self.dispatcher = Dispatcher(self.members, self._tell, optimizer, blocks, cost, deal)
        self._losses = Losses(math.inf)
        self._next_worker = 0
        self._reasons: dict[int, tuple[str, bool]] = {}  # why a worker goes, and whether it has said so itself
        self._processes = Processes(start, exits)
        self._opened = False
        self._heard = time.monotonic()
        self.failures = 0
        self.last_reason, self._last = "nobody was started", -1
        self.heard: dict[str, Any] = {}

    def told(self, what: str, about: Any) -> None:
        """The optimizer's reports, from its thread."""
        self._inbox.append((what, about))
        with contextlib.suppress(OSError):  # where it is full, the loop is about to wake
            self._wake.send(b".")

    # ---- workers ----

    def open(self, workers: int) -> None:
        """Start so many workers and wait for them. Raises NoWorkerLeft where none comes up."""
        for place in range(workers):
            self._add_member(place)
        deadline = time.monotonic() + self._deadline_s
        while self._starting and time.monotonic() < deadline:
            self.turn()
        if not self.dispatcher.ready:
            raise NoWorkerLeft(f"no worker came up: {self.last_reason}")
        self._opened = True

    @property
    def _starting(self) -> bool:
        return bool(self._processes.vacancies) or any(member.channel is None for member in self.members.values())

    def _add_member(self, place: int, tries: int = 0) -> None:
        """Start a worker, or put it off where there is no room: the others go on without."""
        member, self._next_worker = self._next_worker, self._next_worker + 1
        started = self._processes.start(member, place, tries)
        if isinstance(started, int):
            self.members[member] = PoolMember(member, place, started, time.monotonic())
        else:
            self.last_reason, self._last = started, member
            self._event("not_started", worker=member, reason=started)

    # ---- iterations ----

    def finish(self, run: Iteration) -> None:
        """Return once a run is whole: every unit done and every gradient added exactly once, and nobody left who might
        still write. Raises NoWorkerLeft, TooManyFailures, and TimeoutError where nothing comes on any more."""
        self._heard = time.monotonic()
        while run.left or self._processes.unseen:
            self.turn()
            if time.monotonic() > self._heard + 2 * self._deadline_s:
                raise TimeoutError(f"nothing was heard for {2 * self._deadline_s:g} s; {self._what_is_left(run)}")
        self.dispatcher.active.remove(run)
        self._losses.progress()
        wanted = {(unit.span, m) for unit in run.row if B in unit.kinds for m in unit.microbatches}
        if set(run.committed) != wanted or set(run.committed.values()) - {1}:
            raise RuntimeError(f"gradients were counted {dict(run.committed)}; expected once each")

    def _what_is_left(self, run: Iteration) -> str:
        if unseen := self._processes.unseen:
            return f"processes {sorted(unseen)} were ended, and have not been seen to end"
        given = {member.id: len(member.given) for member in self.members.values()}
        left = f"{run.left} units of step {run.step} are left, {len(run.pending)} of them with nobody"
        return f"{left}; units by worker: {given}"

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
                self._serve(key)
        while self._inbox:
            what, about = self._inbox.popleft()
            if what == "failed":
                raise about
            self._heard = time.monotonic()
            if what == "added":
                self.dispatcher.blocks.append(about)
            else:
                self.heard[what] = about
        self._look_after()
        self.dispatcher.dispatch()

    # ---- messages ----

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # whoever it was is gone again
            end, _ = self._listener.accept()
            pid, uid, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != os.getuid() or pid not in {member.pid for member in self.members.values()}:
                end.close()  # no worker of ours
                return
            self._selector.register(channel := Channel(end), selectors.EVENT_READ, (pid, channel))

    def _serve(self, key: selectors.SelectorKey) -> None:
        """Take what a worker has said, and give it what waits for it."""
        pid, channel = key.data
        member = next((m for m in self.members.values() if m.pid == pid), None)
        if member is None:
            self._selector.unregister(channel)
            channel.close()
        elif self._take(member, channel):
            self._selector.unregister(channel)
            self._lost(member)
        elif member.id in self.members:
            self._await_room(member)

    def _take(self, member: PoolMember, channel: Channel) -> bool:
        """Handle all that a worker has said; whether it is lost: gone, or saying what is nothing."""
        try:
            while member.id in self.members and (message := channel.receive(0.0)) is not None:
                member.since = self._heard = time.monotonic()
                self._handle(member, channel, message)
            return False
        except ChannelClosed:
            return True
        except WireError as error:
            self._reasons.setdefault(member.id, (f"has said what is no message: {error}", True))
            return True

    def _handle(self, member: PoolMember, channel: Channel, message: dict[str, Any]) -> None:
        if "hello" in message:
            told = checked(message, "a hello", capability=dict)
            member.capability = Capability.from_json(told["capability"])
            member.channel = channel
            if self._opened:
                self._event("joined", worker=member.id)
        elif "error" in message:
            told = checked(message, "an error", error=str, fatal=bool)
            self._reasons[member.id] = told["error"], True
            if told["fatal"]:
                raise RuntimeError(f"worker {member.id}: {told['error']}")
        elif "event" in message:
            event = checked(message, "an event", event=dict)["event"]
            fault = checked(event, "an event", step=int, fault=str, at=str)
            self._event("fault", worker=member.id, **fault)
        elif "op" in message:
            told = checked(message, "a result", op=int, m=int, sums=dict | None, busy=float)
            sums = told["sums"] and checked(told["sums"], "the sums of a result", **dict.fromkeys(told["sums"], float))
            if given := member.given.get(told["op"]):
                self._losses.progress(member.place)
                self.dispatcher.op_done(member, given, told["m"], sums, told["busy"])
        elif "recalled" in message:
            if given := member.given.pop(checked(message, "an answer", recalled=int)["recalled"], None):
                self.dispatcher.take_back(given)
        else:
            told = checked(message, "a result", unit=int, version=int, events=list, held=int, memory=dict)
            if given := member.given.get(told["unit"]):
                self._unit_done(member, given, told)

    def _unit_done(self, member: PoolMember, given: Given, told: dict[str, Any]) -> None:
        """A unit's gradient counts if its block holds what it should; else its writer is not to be trusted."""
        if lacks := self.dispatcher.lacks(given):
            self._reasons[member.id] = f"gave back a gradient that does not count: {lacks}", True
            self._lost(member)
            return
        del member.given[given.id]
        member.most_held = max(member.most_held, told["held"])
        member.memory = member.memory.up_to(PeakMemory.from_json(told["memory"]))
        self.dispatcher.unit_done(member, given, told["version"], told["events"])

    def _tell(self, member: PoolMember, **message: Any) -> None:
        if member.channel is None:
            return
        try:
            member.channel.post(message)
        except ChannelFull as error:
            self._reasons.setdefault(member.id, (f"does not take its messages: {error}", False))
            member.stuck = True
        self._await_room(member)

    def _await_room(self, member: PoolMember) -> None:
        """Have the loop wake when a worker takes more of what waits for it."""
        channel = member.channel
        if channel is not None and channel.socket.fileno() in self._selector.get_map():
            events = selectors.EVENT_READ | (0 if channel.flush() else selectors.EVENT_WRITE)
            if self._selector.get_key(channel).events != events:
                self._selector.modify(channel, events, (member.pid, channel))

    # ---- losses ----

    def _look_after(self) -> None:
        """Notice who has ended, or has not said anything for too long."""
        self._processes.poll(0.0)
        for member in list(self.members.values()):
            if self._processes.has_ended(member.pid):
                if member.channel is not None:
                    self._take(member, member.channel)  # what it has said before it ended
                self._lost(member)
            elif member.stuck:
                self._lost(member)
            elif not self._could_go_on(member):
                member.since = time.monotonic()
            elif time.monotonic() > member.since + self._deadline_s:
                reason = f"has not answered for {self._deadline_s:g} s and was ended"
                self._reasons.setdefault(member.id, (reason, False))
                self._lost(member)
        if blocks := self._processes.seen():
            self.dispatcher.blocks.extend(blocks)
            self._heard = time.monotonic()
        for each in self._processes.due():
            self._add_member(each.place, each.tries)
        if not self.members and not self._processes.vacancies:
            raise NoWorkerLeft(
                f"no worker is left: the last one, {self._last}, {self.last_reason}; --resume goes on from the newest "
                "valid checkpoint"
            )

    def _could_go_on(self, member: PoolMember) -> bool:
        """Whether a worker has something to do for which it need not wait: then it should be heard of."""
        if member.channel is None:
            return True
        given = next(iter(member.given.values()), None)
        if given is None:
            return False
        left = [m for m in given.unit.microbatches if m not in given.run.done[given.index]]
        return not left or all(fact in given.run.facts for fact in given.run.needs(given.unit, left[0]))

    def _lost(self, member: PoolMember) -> None:
        """A worker is gone: its units go back, and what waits for them is taken back as well."""
        if self.members.pop(member.id, None) is None:
            return
        blocks = [given.block for given in member.given.values() if given.block >= 0]
        seen, by_itself = self._processes.end(member.pid, blocks, by_itself=member.id not in self._reasons)
        if member.channel is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(member.channel)
            member.channel.close()
        self.failures += 1
        ended = str(seen) if by_itself and seen is not None and seen.code != LEFT else "closed its connection"
        reason, told = self._reasons.pop(member.id, (ended, False))
        self.last_reason, self._last = reason, member.id
        self._event("detected", worker=member.id, reason=reason)
        limit = STOPPING_LIMIT if self._stopping() else LIMIT
        if told or member.channel is None or member.given:  # one that had nothing to do proves nothing of the next
            self._losses.note(member.id, member.place, reason, told=told, when=self._next_worker, limit=limit)
        replaced = self.failures <= self._max_failures
        self._event(
            "redealt", worker=member.id, units=len(member.given), remedy="its units are dealt to the others",
            replacement=self._next_worker if replaced else None,
        )  # fmt: skip
        if seen is not None:
            self.dispatcher.blocks.extend(blocks)
        for given in member.given.values():
            self.dispatcher.put_back(given)
        if replaced:
            self._add_member(member.place)

    def close(self) -> None:
        """End all workers and the sockets."""
        for member in self.members.values():
            self._tell(member, end=True)
            if member.channel is None:  # still starting, and not to be talked to
                kill(member.pid)
        self._processes.end_all(member.pid for member in self.members.values())
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket | Channel)
            key.fileobj.close()
        self._wake.close()
        self._selector.close()
        self.members.clear()
