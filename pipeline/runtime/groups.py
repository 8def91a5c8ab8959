"""Process groups built per view from the store, never global, so that a view change rebuilds only what changed.

`torch.distributed`'s global groups cannot be edited when a member dies; a group made by hand over a prefix of the
store costs milliseconds and belongs to nobody else (measured: 1-11 ms for gloo among living processes).
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runtime.door import Door, prove
from pipeline.store.waiting import came

_CONNECT_S = 10.0  # between processes that have just met
_SLICE_S = 0.05  # how often who awaits the others asks whether they are still to come
_COMPLETED_S = 0.0002  # between two looks at a sum on a device
_ACCEPT_S = 0.05  # how often who awaits a connection asks whether it is still to come
_CREDENTIALS = struct.Struct("iII")  # of a peer: process, user, group


class Work(Protocol):
    """A running collective or transfer."""

    def wait(self, timeout: timedelta = ...) -> bool: ...
    def is_completed(self) -> bool: ...


class Group(Protocol):
    """The part of a torch process group that the engine uses."""

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Work: ...
    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Work: ...
    def allreduce(self, tensors: list[Tensor], opts: Any = ...) -> Work: ...


@dataclass(frozen=True)
class Way:
    """To the member of rank `peer` of a group, for tensors on the host; its `tag` tells them from all others."""

    group: Group
    peer: int
    tag: int

    def send(self, tensor: Tensor) -> Work:
        """Start sending."""
        return self.group.send([tensor], self.peer, self.tag)

    def recv(self, tensor: Tensor) -> Work:
        """Start receiving into `tensor`."""
        return self.group.recv([tensor], self.peer, self.tag)


class NcclGroup:
    """NCCL by the contract of gloo: who waits for a sum waits on the host and until a deadline, and any thread may end
    it. For sums over replicas with a device each; nothing is received that may not be on its way."""

    def __init__(self, group: Any) -> None:
        self._group, self.ended = group, False

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        return _NcclWork(self, self._group.allreduce(tensors, opts))

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Work:
        raise NotImplementedError("activations do not go over NCCL")

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Work:
        raise NotImplementedError("activations do not go over NCCL")

    def abort(self) -> None:
        """End what is under way: its kernels return, and who waits for it is told."""
        self.ended = True
        self._group.abort()


@dataclass
class _NcclWork:
    _group: NcclGroup
    _work: Any

    def is_completed(self) -> bool:
        return self._group.ended or self._work.is_completed()

    def wait(self, timeout: timedelta = timedelta(seconds=60)) -> bool:
        deadline = time.monotonic() + timeout.total_seconds()
        while not self.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"a sum over NCCL has not ended after {timeout.total_seconds():g} s")
            time.sleep(_COMPLETED_S)
        if self._group.ended:
            raise RuntimeError("the group of a sum over NCCL was ended")
        return bool(self._work.wait())  # the stream of who waits comes after it


def sum_over(group: Group, tensor: Tensor, timeout_s: float) -> Work:
    """Start summing `tensor` in place over the members of `group`."""
    options: Any = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=timeout_s)
    return group.allreduce([tensor], options)


def poison(group: Group, members: Sequence[int], worker: int, lost: set[int]) -> None:
    """End, from any thread, what waits in a group of `worker`: its waiters raise, and the sockets of gloo close."""
    if isinstance(group, NcclGroup):
        group.abort()
        return
    # A living peer before a lost one: a receive from a dead one fails without closing the others. Where there is
    # none, the lost one may be stopped or out of reach, and then a receive from it ends the wait.
    peer = next((w for w in sorted(members, key=lambda w: w in lost) if w != worker), None)
    if peer is not None:
        with suppress(RuntimeError):
            group.recv([torch.empty(1)], list(members).index(peer), 1).wait(timedelta(milliseconds=1))


def address_towards(host: str, port: int) -> str:
    """The address of the interface through which this machine reaches `host`: where gloo should listen."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port or 1))
        return str(probe.getsockname()[0])


def machine() -> str:
    """What two processes have in common that can share memory through a socket: the machine since it was started, the
    network namespace (in which such sockets have their names), and the user. Empty where that cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            started = file.read().strip()
        return f"{started}/{os.stat('/proc/self/ns/net').st_ino}/{os.getuid()}" if hasattr(os, "memfd_create") else ""
    except OSError:
        return ""


def _listen() -> socket.socket | None:
    """A socket under a name that nobody can guess; None where there are none."""
    if not machine():
        return None
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"\0unbroken-{secrets.token_hex(16)}")
        listener.listen(4)
        return listener
    except OSError:
        return None


def _connect(at: str) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(_CONNECT_S)
    try:
        end.connect(at)
        if _user_of(end) != os.getuid():
            raise PermissionError("another user listens there")
    except OSError as error:
        end.close()
        raise RuntimeError(f"the other member's socket cannot be reached: {error}") from error
    return end


def _user_of(end: socket.socket) -> int:
    """Of the process at the other end."""
    return _CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]


@dataclass
class GroupBuilder:
    """Builds groups for one worker over one store. `address` is the interface gloo binds to."""

    store: dist.Store
    worker: int
    address: str
    device: torch.device
    timeout_s: float = 60.0
    ended: Callable[[], str | None] = lambda: None
    """Why there is no point in waiting for the other members any more, if so."""
    _door: Door | None = field(default=None, repr=False)

    def build(self, name: str, members: Sequence[int], backend: str = "gloo") -> Group:
        """The group of `members` (worker ids, in rank order) called `name`; blocks until all of them ask for it.

        `backend` is gloo or nccl. Members meet at the store first, where waiting can be ended; the connection itself
        then takes milliseconds, and over gloo all prove who they are. Raises ValueError where this worker is no member,
        RuntimeError where the others do not come within `timeout_s`, where `ended` says that they will not, or where
        somebody else has connected.
        """
        if self.worker not in members:
            raise ValueError(f"worker {self.worker} asked for group {name!r} of {list(members)}; it must be a member")
        rank, size, store = list(members).index(self.worker), len(members), dist.PrefixStore(name, self.store)
        if rank == 0:
            store.set("key", secrets.token_hex(32))
        self._meet(store, name, members)
        if backend == "nccl":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=self.timeout_s)
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # else its watchdog ends the process
            return NcclGroup(dist.ProcessGroupNCCL(store, rank, size, nccl))
        self._door = door = self._door or Door(self.address)
        options: Any = cast(Any, dist.ProcessGroupGloo)._Options()
        options._devices = [door.device]
        options._threads = 1
        options._timeout = timedelta(seconds=_CONNECT_S)
        try:
            with door.held_open():
                group = cast(Group, dist.ProcessGroupGloo(store, rank, size, options))
                prove(group, store.get("key"), rank, size, _CONNECT_S)
        except RuntimeError:
            self._door = None  # a stranger may have come in there, and the next one would have to find another
            raise
        return group

    def local_socket(self, name: str, members: Sequence[int], about: str = "") -> tuple[socket.socket, str] | None:
        """A Unix socket of whole messages between two `members` of one machine, in rank order, and what the other has
        said `about` itself; None where they are not on one machine. Raises as `build` does."""
        rank, store = list(members).index(self.worker), dist.PrefixStore(f"{name}/local", self.store)
        listener = _listen() if rank == 0 else None
        store.set(f"machine/{rank}", machine())
        store.set(f"about/{rank}", about)
        if rank == 0:
            store.set("at", "" if listener is None else listener.getsockname().decode())
        try:
            self._meet(store, name, members)
            at = store.get("at").decode()
            if not at or store.get("machine/0") != store.get("machine/1"):
                return None
            said = store.get(f"about/{1 - rank}").decode()
            return (_connect(at) if listener is None else self._accept(listener, name)), said
        finally:
            if listener is not None:
                listener.close()

    def _accept(self, listener: socket.socket, name: str) -> socket.socket:
        """The other member: a process of the same user. Whoever else knocks is sent away."""
        deadline = time.monotonic() + _CONNECT_S
        while (left := deadline - time.monotonic()) > 0:
            if (reason := self.ended()) is not None:  # it may have been lost on its way here
                raise RuntimeError(f"building {name} was ended: {reason}")
            listener.settimeout(min(left, _ACCEPT_S))
            with suppress(TimeoutError):
                end, _ = listener.accept()
                if _user_of(end) == os.getuid():
                    return end
                end.close()
        raise RuntimeError(f"the other member of {name} did not connect in {_CONNECT_S:g} s")

    def _meet(self, store: dist.Store, name: str, members: Sequence[int]) -> None:
        store.set(f"here/{self.worker}", "")
        deadline, others = time.monotonic() + self.timeout_s, [f"here/{member}" for member in members]
        while not came(store, others, _SLICE_S):
            if (reason := self.ended()) is not None:
                raise RuntimeError(f"building group {name} was ended: {reason}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the members {list(members)} of group {name} did not meet in {self.timeout_s:g} s")
