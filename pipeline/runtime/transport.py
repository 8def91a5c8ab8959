"""Links between workers: every message goes into a mailbox, and a worker waits on the mailbox, never for a peer.

Workers of one machine share memory (`shared_link.py`): the host's, or that of a device which both can reach
(`device_slots.py`). Links across machines are `link.py`. All receive by themselves before anyone asks, sends overlap
compute, the order of arrival does not matter, a message of an older view or step is dropped and never used, and a
waiting worker can be woken at any time. A *shaped* link stamps each message with the moment at which a slow network
would have delivered it; the mailbox shows it then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.runtime.cuda_driver import CudaDriver
from pipeline.runtime.device_slots import DeviceSlots, Reach
from pipeline.runtime.groups import GroupBuilder, machine
from pipeline.runtime.link import Engines, Link
from pipeline.runtime.mailbox import LinkError, Mailbox
from pipeline.runtime.message import HEADER_BYTES, Shape
from pipeline.runtime.shared_link import SharedLink
from pipeline.runtime.slots import AtOnce, HostSlots, Memory, Queued
from pipeline.schedule.ops import Op, Span
from pipeline.settings import ConfigError


@dataclass
class Transport:
    """All links of one worker. A view change edits them: what does not touch a changed worker stays as it is."""

    worker: int
    view: int = 0
    mailbox: Mailbox = field(default_factory=Mailbox)
    links: dict[int, Link | SharedLink] = field(default_factory=dict)
    _engines: Engines | None = None
    _copies: AtOnce | Queued | None = None

    def connect(
        self, builder: GroupBuilder, pairs: set[tuple[int, int]], *, max_bytes: int, shared: bool = True,
        demanded: bool = False, shapes: Mapping[tuple[int, int], Shape] | None = None,
    ) -> None:  # fmt: skip
        """Build the missing links among pairs (a, b), a < b, that hold this worker. All must pass the same pairs.

        Pairs are joined in ascending order, which no cycle of waiting can arise from. `shapes[(source, target)]`
        slows that direction down. With `shared`, workers of one machine share memory; where that is `demanded` and
        cannot be, ConfigError is raised.
        """
        device, reach = builder.device, Reach.of(builder.device)
        for low, high in sorted(pairs):
            if self.worker not in (low, high):
                continue
            peer = high if self.worker == low else low
            if peer in self.links:
                continue
            self.mailbox.forget(peer)
            name, shape = f"view{self.view}/link{low}-{high}", (shapes or {}).get((self.worker, peer))
            local = builder.local_socket(name, (low, high), json.dumps(reach.as_json())) if shared else None
            if local is not None:
                end, said = local
                memory = self._memory(device, reach, Reach.from_json(json.loads(said)))
                self.links[peer] = SharedLink(
                    peer, end, self.mailbox, max_bytes=max_bytes, shape=shape, memory=memory,
                    copies=self._copying(device),
                )  # fmt: skip
                continue
            if demanded:
                raise ConfigError(_cannot_share(low, high))
            self._engines = self._engines or self._engines_of(device)
            rank = 0 if self.worker == low else 1
            self.links[peer] = Link(
                peer, builder.build(name, (low, high)), (rank, 1 - rank), self.mailbox, max_bytes=max_bytes,
                engines=self._engines, shape=shape,
            )  # fmt: skip

    def _engines_of(self, device: torch.device) -> Engines | None:
        """What copies for links across machines: the CPU needs nothing."""
        return Engines.of(device) if device.type == "cuda" else None

    def _memory(self, device: torch.device, mine: Reach, other: Reach) -> Memory:
        """That of the devices, if each can reach the other's; else the host's."""
        if device.type == "cuda" and mine.meets(other):
            return DeviceSlots(CudaDriver(device))
        return HostSlots(pinned=device.type == "cuda")

    def _copying(self, device: torch.device) -> AtOnce | Queued:
        if self._copies is None:
            self._copies = Queued(device, str(self.worker)) if device.type == "cuda" else AtOnce()
        return self._copies

    def send(self, step: int, op: Op, peer: int, payload: Tensor) -> None:
        """Start sending the output of `op` to `peer`."""
        self.links[peer].send(self.view, step, op, payload)

    def receive(self, step: int, op: Op, peer: int, deadline: float) -> Tensor:
        """The output of `op`, computed by `peer`, on the device or the host. Raises LinkError."""
        return self.mailbox.get(self.view, step, op, peer, deadline)

    def drop(self, peer: int) -> None:
        """End the link to a peer that is gone, or no longer needed."""
        if link := self.links.pop(peer, None):
            link.abandon()

    def flush(self, deadline: float) -> None:
        """Wait until everything sent has left this worker."""
        for link in self.links.values():
            link.flush(deadline)

    def close(self) -> None:
        """End all links in order; peers read the goodbye as a departure, not as a fault."""
        for link in self.links.values():
            link.close()
        for link in self.links.values():
            link.join(1.0)
        for engines in (self._engines, self._copies):
            if engines is not None:
                engines.close()


def link_pairs(sends: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """The undirected pairs (low, high) of directed (source, target) ones."""
    return {(min(pair), max(pair)) for pair in sends}


def _cannot_share(low: int, high: int) -> str:
    """Why two workers have no memory in common."""
    found = "they are not on one machine" if machine() else "this system has no memfd, or no Unix sockets"
    return f"links is 'shm', which workers {low} and {high} cannot have: {found}; allowed here: auto, gloo"


def span_bytes(batch: int, sequence: int, hidden: int, dtype: torch.dtype) -> int:
    """Bytes of one microbatch's activation between two spans."""
    return batch * sequence * hidden * dtype.itemsize


__all__ = ["HEADER_BYTES", "Link", "LinkError", "Mailbox", "Shape", "Span", "Transport", "link_pairs",
           "span_bytes"]  # fmt: skip
