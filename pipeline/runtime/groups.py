"""Process groups built per view from the store, never global, so that a view change rebuilds only what changed.

`torch.distributed`'s global groups cannot be edited when a member dies; a group made by hand over a prefix of the
store costs milliseconds and belongs to nobody else (measured: 1-11 ms for gloo among living processes).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

_CONNECT_S = 10.0  # between processes that have just met
_POLL_S = 0.002


class Work(Protocol):
    """A running collective or transfer."""

    def wait(self, timeout: timedelta = ...) -> bool: ...
    def is_completed(self) -> bool: ...


class Group(Protocol):
    """The part of a torch process group that the engine uses."""

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Work: ...
    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Work: ...
    def allreduce(self, tensors: list[Tensor], opts: Any = ...) -> Work: ...


def sum_over(group: Group, tensor: Tensor, timeout_s: float) -> Work:
    """Start summing `tensor` in place over the members of `group`."""
    options: Any = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=timeout_s)
    return group.allreduce([tensor], options)


def poison(group: Group, members: Sequence[int], worker: int, lost: set[int]) -> None:
    """End, from any thread, what waits in a gloo group of `worker`: its sockets close, its waiters raise."""
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
    _gloo_device: Any = field(default=None, repr=False)

    def build(self, name: str, members: Sequence[int], backend: str = "gloo") -> Group:
        """The group of `members` (worker ids, in rank order) called `name`; blocks until all of them ask for it.

        `backend` is gloo or nccl. Members meet at the store first, where waiting can be ended; the connection itself
        then takes milliseconds. Raises ValueError where this worker is no member, RuntimeError where the others do not
        come within `timeout_s`, or where `ended` says that they will not.
        """
        if self.worker not in members:
            raise ValueError(f"worker {self.worker} asked for group {name!r} of {list(members)}; it must be a member")
        rank, size, store = list(members).index(self.worker), len(members), dist.PrefixStore(name, self.store)
        self._meet(store, name, members)
        if backend == "nccl":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=self.timeout_s)
            return cast(Group, dist.ProcessGroupNCCL(store, rank, size, nccl))
        if self._gloo_device is None:
            self._gloo_device = dist.ProcessGroupGloo.create_device(hostname=self.address)
        options: Any = cast(Any, dist.ProcessGroupGloo)._Options()
        options._devices = [self._gloo_device]
        options._threads = 1
        options._timeout = timedelta(seconds=_CONNECT_S)
        return cast(Group, dist.ProcessGroupGloo(store, rank, size, options))

    def _meet(self, store: dist.Store, name: str, members: Sequence[int]) -> None:
        store.set(f"here/{self.worker}", "")
        deadline, others = time.monotonic() + self.timeout_s, [f"here/{member}" for member in members]
        while not store.check(others):
            if (reason := self.ended()) is not None:
                raise RuntimeError(f"building group {name} was ended: {reason}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the members {list(members)} of group {name} did not meet in {self.timeout_s:g} s")
            time.sleep(_POLL_S)
