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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipeline.host_optimizer import HostOptimizer
from pipeline.schedule import B
from pipeline.slots import Slot
from pipeline.stateless import MESSAGE
from recovery.dealing import Deal, Dealing
from recovery.runs import Member, Run

_TICK_S = 0.25
_GONE_S = 5.0


class NoWorkerLeft(RuntimeError):
    """All workers are lost and none may be started again. Says why the last one went."""


class Exit(Protocol):
    """How a worker process ended."""

    @property
    def pid(self) -> int: ...


class Pool:
    """The workers of one run. `start(id)` forks a worker and returns its pid; `exits` tells which have ended.

    `cost(slot)` is what a microbatch of a slot takes, in any unit; `event(name, ...)` is told what happens.
    """

    def __init__(
        self, address: str, start: Callable[[int], int], exits: Callable[[float], Sequence[Exit]],
        optimizer: HostOptimizer, blocks: int, cost: Callable[[Slot], float], deal: Deal,
        event: Callable[..., None], *, deadline_s: float, max_failures: int, fatal: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._start, self._exits, self._event = start, exits, event
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
        self.dealing = Dealing(self.members, self._tell, optimizer, blocks, cost, deal)
        self._next_worker = 0
        self._reasons: dict[int, str] = {}  # what a worker said before it went
        self._ended: dict[int, str] = {}  # pid -> how it ended
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
        if not self.dealing.ready:
            raise NoWorkerLeft(f"no worker came up: {self.last_reason}")
        self._opened = True

    def _add_member(self) -> None:
        member, self._next_worker = self._next_worker, self._next_worker + 1
        self.members[member] = Member(member, self._start(member), time.monotonic())

    # ---- iterations ----

    def finish(self, run: Run) -> None:
        """Return once a run is whole: every slot done and every gradient added exactly once. Raises NoWorkerLeft."""
        while run.left:
            self.turn()
        self.dealing.active.remove(run)
        wanted = {(slot.span, m) for slot in run.row if B in slot.kinds for m in slot.microbatches}
        if set(run.committed) != wanted or set(run.committed.values()) - {1}:
            raise RuntimeError(f"gradients were counted {dict(run.committed)}; expected once each")

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
                self.dealing.blocks.append(about)
            else:
                self.heard[what] = about
        self._look_after()
        self.dealing.dispatch()

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
                self.dealing.op_done(member, given, message)
        elif "recalled" in message:
            if given := member.given.pop(message["recalled"], None):
                self.dealing.take_back(given)
        elif given := member.given.pop(message["slot"], None):
            member.most_held = max(member.most_held, message["held"])
            self.dealing.slot_done(member, given, message)

    def _tell(self, member: Member, **message: Any) -> None:
        if member.channel is not None:
            with contextlib.suppress(OSError):  # its end is read from the socket
                member.channel.send(json.dumps(message).encode())

    # ---- losses ----

    def _look_after(self) -> None:
        """Notice who has ended, or has not said anything for too long."""
        self._poll(0.0)
        for member in list(self.members.values()):
            if member.pid in self._ended:
                self._hear_out(member)
                self._lost(member, ended=True)
            elif not self._could_go_on(member):
                member.since = time.monotonic()
            elif time.monotonic() > member.since + self._deadline_s:
                self._reasons.setdefault(member.id, f"has not answered for {self._deadline_s:g} s and was ended")
                self._lost(member)

    def _hear_out(self, member: Member) -> None:
        """Handle what a worker has said before it ended."""
        with contextlib.suppress(OSError):
            while member.channel and (data := member.channel.recv(MESSAGE, socket.MSG_DONTWAIT)):
                self._handle(member, member.channel, json.loads(data))

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
        ended_by = self._ended.pop(member.pid, "closed its connection")
        self.last_reason = self._reasons.pop(member.id, ended_by)
        self._event("detected", worker=member.id, reason=self.last_reason)
        replaced = self.failures <= self._max_failures
        self._event(
            "redealt", worker=member.id, slots=len(member.given), remedy="its slots are dealt to the others",
            replacement=self._next_worker if replaced else None,
        )  # fmt: skip
        for given in member.given.values():
            self.dealing.take_back(given)
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
        while member.pid not in self._ended and time.monotonic() < deadline:
            self._poll(0.05)

    def _poll(self, timeout_s: float) -> None:
        """Keep how processes have ended, until it is asked for."""
        self._ended.update((each.pid, str(each)) for each in self._exits(timeout_s))

    def close(self) -> None:
        """End all workers and the sockets."""
        for member in self.members.values():
            self._tell(member, end=True)
            if member.channel is None:  # still starting, and not to be talked to
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGKILL)
        deadline = time.monotonic() + _GONE_S
        left = {member.pid for member in self.members.values()}
        while left - set(self._ended) and time.monotonic() < deadline:
            self._poll(0.05)
        left -= set(self._ended)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._wake.close()
        self._selector.close()
        self.members.clear()
