"""The forkserver: a process that has imported torch and transformers and forks workers on request.

Importing them takes seconds, a fork takes milliseconds. The forkserver is forked before its agent starts any thread
(a store server, a progress bar), runs nothing but this loop, and tells the agent of every exit as the operating system
reports it; of one by a signal the agent knows earlier (`death_watch.py`). If the agent dies the forkserver dies, and
with the forkserver every worker: nothing is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import selectors
import signal
import socket
import sys
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from launch.death_watch import DeathWatch
from pipeline.garbage import keep_all
from pipeline.runtime.channel import Channel, ChannelClosed
from pipeline.wire import checked

_PR_SET_PDEATHSIG = 1
_ANSWER_S = 10.0
DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a terminal or a scheduler sends to all processes of a run: the agent alone decides what they mean."""


class StartError(OSError):
    """A worker could not be forked; the forkserver and all other workers live on. Says why."""


class ForkServerGone(RuntimeError):
    """The forkserver has ended, and every worker with it."""


@dataclass(frozen=True)
class Exit:
    """A worker process that ended. `code` is its exit code, or minus the signal that killed it."""

    pid: int
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"was killed by {signal_name(-self.code)}"
        return f"ended with exit code {self.code}"


def signal_name(number: int) -> str:
    """SIGKILL and the like; real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def die_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when `parent` dies; end now if that has happened."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os._exit(1)


_OPEN: weakref.WeakSet[ForkServer] = weakref.WeakSet()
"""The handles of this process: their sockets must not live on in a forked child, or closing them ends nothing."""


class ForkServer:
    """The agent's handle on its forkserver. Forks it at construction, so construct it before starting threads."""

    def __init__(
        self, entry: Callable[[dict[str, Any]], int], prepare: Callable[[dict[str, Any]], object] = lambda _: None
    ) -> None:  # fmt: skip
        """`entry(payload)` is a worker; `prepare(payload)` is called in the forkserver, and starts no thread."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel = Channel(mine)
        self._watch = DeathWatch()
        agent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for other in [*_OPEN, self]:
                other._channel.close()
            die_with_parent(agent)
            for signum in DEAF_TO:
                signal.signal(signum, signal.SIG_IGN)
            keep_all()
            with contextlib.suppress(BaseException):
                _Server(Channel(theirs), entry, prepare, self._watch).run()
            os._exit(0)
        theirs.close()
        _OPEN.add(self)
        self._exits: list[Exit] = []
        self._asked = 0
        self._disowned: set[int] = set()
        self._living: set[int] = set()
        """Those of whose end nothing was told yet."""
        self._ending: set[int] = set()
        """Those that were seen to die, and have not been waited for."""
        self._died: deque[Exit] = deque()  # filled by the threads that watch
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._bell)

    def fileno(self) -> int:
        """For selectors: readable when an exit is to be polled."""
        return self._channel.fileno()

    def start(self, payload: dict[str, Any]) -> int:
        """Fork a worker that runs entry(payload) and ends with its result as exit code. Returns its pid.

        Raises StartError where the machine has no room for another process, ForkServerGone where the forkserver has
        ended, and TimeoutError where it does not answer.
        """
        deadline = time.monotonic() + _ANSWER_S
        self._asked += 1
        # what a device still writes for a worker that is dead ends when its files are closed, and not before
        slot = None if str(payload.get("device")).startswith("cuda") else self._watch.slot()
        try:
            self._channel.send({"request": self._asked, "payload": payload, "slot": slot}, _ANSWER_S)
        except ChannelClosed as error:
            raise ForkServerGone("the forkserver has ended unexpectedly") from error
        while (message := self._read(deadline - time.monotonic())) is not None:
            if message.get("request") != self._asked:
                self._note(message)
            elif "failed" in message:
                if slot is not None:
                    self._watch.give_back(slot)
                raise StartError(f"could not be started: {message['failed']}")
            else:
                self._living.add(pid := int(message["started"]))
                if slot is not None:
                    self._watch.watch(slot, pid, partial(self._seen, pid))
                return pid
        raise TimeoutError(f"the forkserver did not answer within {_ANSWER_S:g} s")

    def prepare(self, payload: dict[str, Any]) -> None:
        """Have `prepare(payload)` called before the next fork. Raises ForkServerGone, TimeoutError."""
        try:
            self._channel.send({"prepare": payload}, _ANSWER_S)
        except ChannelClosed as error:
            raise ForkServerGone("the forkserver has ended unexpectedly") from error

    def _seen(self, pid: int, code: int) -> None:
        """In a thread that watches: a worker has died."""
        self._died.append(Exit(pid, code))
        with contextlib.suppress(OSError):  # this end is closed
            os.eventfd_write(self._bell, 1)

    def _note(self, message: dict[str, Any]) -> None:
        """Keep an exit, once. An answer that nobody waits for any more is of a worker that nobody knows: it is
        ended."""
        if "request" not in message:
            if (ended := _exit(message)).pid not in self._disowned | self._ending:
                self._exits.append(ended)
            for those in (self._disowned, self._ending, self._living):
                those.discard(ended.pid)
        elif "started" in message:
            self._disowned.add(pid := int(message["started"]))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def poll(self, timeout_s: float) -> list[Exit]:
        """The workers that have ended since the last call, waiting up to `timeout_s` for the first.

        Raises ForkServerGone once the forkserver has ended and all that it has told was returned.
        """
        self._wait(0.0 if self._exits else timeout_s)
        died = len(self._died)
        try:
            while (message := self._read(0.0)) is not None:
                self._note(message)
            for _ in range(died):  # with the forkserver, which leaves first, all die: then the above has raised
                if (seen := self._died.popleft()).pid in self._living:
                    self._living.discard(seen.pid)
                    self._ending.add(seen.pid)
                    self._exits.append(seen)
        except ForkServerGone:
            if not self._exits:
                raise
        exits, self._exits = self._exits, []
        return exits

    def _wait(self, timeout_s: float) -> None:
        """For an end that was seen, or a message."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        if not self._channel.ready:
            poll.register(self._channel, select.POLLIN)
            poll.poll(max(0.0, 1000 * timeout_s))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def close(self) -> None:
        """End the forkserver and with it every worker that still runs."""
        self._channel.close()
        deadline = time.monotonic() + _ANSWER_S
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:  # stopped, say: its workers end with it
                    os.kill(self.pid, signal.SIGKILL)
                    deadline = float("inf")
                time.sleep(0.002)

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        try:
            return self._channel.receive(max(0.0, timeout_s))
        except ChannelClosed as error:
            raise ForkServerGone("the forkserver has ended unexpectedly") from error


def _exit(message: dict[str, Any]) -> Exit:
    return Exit(**checked(message, "the end of a worker", pid=int, code=int))


class _Server:
    """The forkserver's loop: forks on request, tells of exits, waits in neither."""

    def __init__(
        self, channel: Channel, entry: Callable[[dict[str, Any]], int], prepare: Callable[[dict[str, Any]], object],
        watch: DeathWatch,
    ) -> None:  # fmt: skip
        self._channel, self._entry, self._prepare, self._watch = channel, entry, prepare, watch
        self._children: dict[int, int] = {}  # pidfd -> pid
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)

    def run(self) -> None:
        """Until the agent closes its end."""
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._channel:
                        while (asked := self._channel.receive(0.0)) is not None:
                            self._do(asked)
                    else:
                        self._channel.post(self._ended(key.fd))
                events = selectors.EVENT_READ | (0 if self._channel.flush() else selectors.EVENT_WRITE)
                self._selector.modify(self._channel, events)
        except ChannelClosed:
            self._end()

    def _do(self, asked: dict[str, Any]) -> None:
        """Fork, or prepare for it."""
        if "prepare" in asked:
            with contextlib.suppress(Exception):  # who is forked meets it too, and tells
                self._prepare(asked["prepare"])
        else:
            self._channel.post({"request": asked["request"], **self._fork(asked["payload"], asked["slot"])})

    def _fork(self, payload: dict[str, Any], slot: int | None) -> dict[str, Any]:
        """The answer to a request. What fails here costs this worker alone."""
        parent, pid = os.getpid(), 0
        try:
            pid = os.fork()
            if pid == 0:
                self._selector.close()
                self._channel.close()
                _become_worker(self._entry, payload, parent, self._watch, slot)
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if pid:  # nobody could see it end
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return {"failed": f"{error.strerror or error}"}
        self._children[pidfd] = pid
        self._selector.register(pidfd, selectors.EVENT_READ)
        return {"started": pid}

    def _ended(self, pidfd: int) -> dict[str, Any]:
        pid = self._children.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        return {"pid": pid, "code": os.waitstatus_to_exitcode(status)}

    def _end(self) -> None:
        for pid in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self._children.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _become_worker(
    entry: Callable[[dict[str, Any]], int], payload: dict[str, Any], parent: int, watch: DeathWatch, slot: int | None
) -> None:  # fmt: skip
    code = 1
    try:
        die_with_parent(parent)
        if slot is not None:
            watch.hold(slot)
        code = entry(payload)
    except BaseException:  # the process ends here, whatever it was
        traceback.print_exc()
    finally:
        with contextlib.suppress(ValueError, OSError):  # closed, or nobody reads
            sys.stdout.flush()
            sys.stderr.flush()
        if slot is not None:
            watch.let_go(slot)
        os._exit(code)
