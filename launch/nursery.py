"""The warm parent: a process that has imported torch and transformers and forks workers on request.

Importing them takes seconds, a fork takes milliseconds. The nursery is forked before its agent starts any thread
(a store server, a progress bar), runs nothing but this loop, and tells the agent of every exit as the operating system
reports it. If the agent dies the nursery dies, and with the nursery every worker: nothing is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Exit:
    """A worker process that ended. `code` is its exit code, or minus the signal that killed it."""

    pid: int
    code: int

    def __str__(self) -> str:
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"


def die_with_parent(parent: int) -> None:
    """Ask the kernel to SIGKILL this process when `parent` dies; do it now if that has happened."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


_OPEN: weakref.WeakSet[Nursery] = weakref.WeakSet()
"""The handles of this process: their sockets must not live on in a forked child, or closing them ends nothing."""


class Nursery:
    """The agent's handle on its warm parent. Forks it at construction, so construct it before starting threads."""

    def __init__(self, entry: Callable[[dict[str, Any]], int]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        agent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for other in [*_OPEN, self]:
                other._socket.close()
            die_with_parent(agent)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with contextlib.suppress(BaseException):
                _serve(theirs, entry)
            os._exit(0)
        theirs.close()
        _OPEN.add(self)
        self._exits: list[Exit] = []

    def fileno(self) -> int:
        """For selectors: readable when an exit is to be polled."""
        return self._socket.fileno()

    def start(self, payload: dict[str, Any]) -> int:
        """Fork a worker that runs entry(payload) and ends with its result as exit code. Returns its pid."""
        self._socket.send(json.dumps(payload).encode())
        while True:
            message = self._read(10.0)
            if message is None:
                raise RuntimeError("the warm parent did not answer within 10 s")
            if "started" in message:
                return int(message["started"])
            self._exits.append(Exit(**message))

    def poll(self, timeout_s: float) -> list[Exit]:
        """The workers that have ended since the last call, waiting up to `timeout_s` for the first."""
        while (message := self._read(0.0 if self._exits else timeout_s)) is not None:
            self._exits.append(Exit(**message))
        exits, self._exits = self._exits, []
        return exits

    def close(self) -> None:
        """End the warm parent and with it every worker that still runs."""
        self._socket.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                return None
        data = self._socket.recv(65536)
        if not data:
            raise RuntimeError("the warm parent has ended unexpectedly")
        return json.loads(data)


def _serve(channel: socket.socket, entry: Callable[[dict[str, Any]], int]) -> None:
    me, children = os.getpid(), dict[int, int]()  # pidfd -> pid
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is channel:
                    request = channel.recv(65536)
                    if not request:
                        return _end(children)
                    pid = os.fork()
                    if pid == 0:
                        selector.close()
                        _become_worker(channel, entry, json.loads(request), me)
                    pidfd = os.pidfd_open(pid)
                    children[pidfd] = pid
                    selector.register(pidfd, selectors.EVENT_READ)
                    channel.send(json.dumps({"started": pid}).encode())
                else:
                    pid = children.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _, status = os.waitpid(pid, 0)
                    channel.send(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def _become_worker(
    channel: socket.socket, entry: Callable[[dict[str, Any]], int], payload: dict[str, Any], parent: int
) -> None:
    channel.close()
    code = 1
    try:
        die_with_parent(parent)
        code = entry(payload)
    except BaseException:  # the process ends here, whatever it was
        traceback.print_exc()
    finally:
        with contextlib.suppress(ValueError, OSError):  # closed, or nobody reads
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _end(children: dict[int, int]) -> None:
    for pid in children.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in children.values():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
