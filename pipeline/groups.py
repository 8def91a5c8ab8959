"""Process groups built per view from the store, never global, so that a view change rebuilds only what changed.

`torch.distributed`'s global groups cannot be edited when a member dies; a group made by hand over a prefix of the
store costs milliseconds and belongs to nobody else (measured: 1-11 ms for gloo among living processes).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    """A running collective or transfer."""

    def wait(self, timeout: timedelta = ...) -> bool: ...
    def is_completed(self) -> bool: ...


class Group(Protocol):
    """The part of a torch process group that the engine uses."""

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Work: ...
    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Work: ...
    def allreduce(self, tensors: list[Tensor]) -> Work: ...


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
    _gloo_device: Any = field(default=None, repr=False)

    def build(self, name: str, members: Sequence[int], backend: str = "auto") -> Group:
        """The group of `members` (worker ids, in rank order) called `name`; blocks until all of them ask for it.

        `backend` "auto" takes NCCL where the device is CUDA and each worker has one of its own, else gloo. Raises
        ValueError where this worker is no member, RuntimeError where the others do not come within the timeout.
        """
        if self.worker not in members:
            raise ValueError(f"worker {self.worker} asked for group {name!r} of {list(members)}; it must be a member")
        rank, size, store = list(members).index(self.worker), len(members), dist.PrefixStore(name, self.store)
        if backend == "nccl":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timedelta(seconds=self.timeout_s)
            return cast(Group, dist.ProcessGroupNCCL(store, rank, size, nccl))
        if self._gloo_device is None:
            self._gloo_device = dist.ProcessGroupGloo.create_device(hostname=self.address)
        options: Any = cast(Any, dist.ProcessGroupGloo)._Options()
        options._devices = [self._gloo_device]
        options._threads = 1
        options._timeout = timedelta(seconds=self.timeout_s)
        return cast(Group, dist.ProcessGroupGloo(store, rank, size, options))
