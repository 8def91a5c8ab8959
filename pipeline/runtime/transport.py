"""Links between workers: every message goes into a mailbox, and a worker waits on the mailbox, never inside gloo.

Workers of one machine share memory (`shared_link.py`). A link across machines owns one thread that always receives the
next message, header and payload in one buffer, and files it by (view, step, op), and one that waits for what was sent,
so that its buffer goes as soon as it has left. So receives are posted before anyone asks, sends overlap compute, the
order of arrival does not matter, a message of an older view or step is dropped and never used, and a waiting worker can
be woken at any time. Whatever ends the receiving thread, a message that is none or a buffer for which there is no
memory, is told as the loss of the link. A *shaped* link stamps each message with the moment at which a slow network
would have delivered it; the mailbox shows it then.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor

from pipeline.runtime.groups import Group, GroupBuilder, Work, machine
from pipeline.runtime.mailbox import LinkError, Mailbox
from pipeline.runtime.message import HEADER_BYTES, Header, Shape, Timing
from pipeline.runtime.shared_link import SharedLink
from pipeline.schedule.ops import Op, Span
from pipeline.settings import ConfigError

_BYE = -2
_FOREVER = timedelta(days=10)


def pack(view: int, step: int, op: Op, payload: Tensor, deliver_at: float = 0.0, pinned: bool = False) -> Tensor:
    """Header and payload as one host buffer of bytes. Raises LinkError for what has no form."""
    header = Header.of(view, step, op, payload, deliver_at)
    buffer = torch.empty(HEADER_BYTES + header.num_bytes, dtype=torch.uint8, pin_memory=pinned)
    buffer[:HEADER_BYTES] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
    buffer[HEADER_BYTES:].view(payload.dtype).view(payload.shape).copy_(payload)
    return buffer


def unpack(buffer: Tensor) -> tuple[Header, Tensor]:
    """Header and payload of a buffer made by `pack`; the payload shares its memory. Raises LinkError for a buffer that
    is none."""
    header = Header.unpack(buffer[:HEADER_BYTES].numpy().tobytes(), buffer.numel() - HEADER_BYTES)
    payload = buffer[HEADER_BYTES : HEADER_BYTES + header.num_bytes].view(header.dtype).view(header.shape)
    return header, payload


class Link:
    """One peer: sends without waiting, and one thread that receives into the mailbox."""

    def __init__(
        self, peer: int, outgoing: Group, incoming: Group, ranks: tuple[int, int], mailbox: Mailbox, *,
        max_bytes: int, device: torch.device, fixed_size: bool = False, shape: Shape | None = None,
    ) -> None:  # fmt: skip
        self.peer = peer
        self._out, self._in, (self._rank, self._peer_rank) = outgoing, incoming, ranks
        self._mailbox, self._max_bytes, self._device = mailbox, HEADER_BYTES + max_bytes, device
        self._fixed = fixed_size
        self._timing = Timing(shape)
        self._sent: queue.SimpleQueue[tuple[Work, Tensor] | None] = queue.SimpleQueue()
        self._left = threading.Condition()
        self.in_flight = 0
        """Messages that were sent and have not left."""
        self._failed: str | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._receive, name=f"link-{peer}", daemon=True)
        self._reaper = threading.Thread(target=self._reap, name=f"sent-{peer}", daemon=True)
        self._thread.start()
        self._reaper.start()

    def send(self, view: int, step: int, op: Op, payload: Tensor) -> None:
        """Start sending `payload`, the output of `op`. Returns at once. Raises LinkError for a payload too large."""
        size = payload.numel() * payload.element_size()
        if size + HEADER_BYTES > self._max_bytes:
            raise LinkError(f"{op} has {size} bytes for worker {self.peer}; links carry {self._max_bytes} at most")
        deliver_at = self._timing.deliver_at(size)
        self._post(pack(view, step, op, payload, deliver_at, pinned=self._device.type == "cuda"))

    def flush(self, deadline: float) -> None:
        """Wait until all that was sent has left. Raises LinkError at `deadline` or when the peer is gone."""
        with self._left:
            self._left.wait_for(lambda: not self.in_flight or self._failed, max(0.0, deadline - time.monotonic()))
            if self._failed:
                raise LinkError(f"sending to worker {self.peer} failed: {self._failed}")
            if self.in_flight:
                raise LinkError(f"{self.in_flight} messages to worker {self.peer} did not leave in time")

    def close(self) -> None:
        """Say goodbye, so that the peer's receiving thread ends."""
        with contextlib.suppress(RuntimeError):
            self._post(pack(_BYE, 0, Op("F", (0, 0)), torch.empty(0)))
            self.flush(time.monotonic() + 1.0)
        self._sent.put(None)

    def abandon(self) -> None:
        """End the link without a word: a receive that gives up at once closes its sockets on both sides.

        It tells of nothing any more, however late its thread ends: there may be a new link to the same peer by then.
        """
        self._abandoned = True
        if not self._fixed:
            with contextlib.suppress(RuntimeError):
                self._in.recv([torch.empty(1, dtype=torch.uint8)], self._peer_rank, 1).wait(timedelta(milliseconds=1))
        self._sent.put(None)
        self._thread.join(1.0)
        self._reaper.join(1.0)

    def cut(self) -> None:
        """What ends a connection from outside is for others to do: the sockets are gloo's."""

    def join(self, timeout_s: float) -> None:
        """Wait for the receiving thread, which ends at the peer's goodbye or loss."""
        self._thread.join(timeout_s)

    def _post(self, buffer: Tensor) -> None:
        if self._fixed:
            padded = torch.empty(self._max_bytes, dtype=torch.uint8, device=self._device)
            padded[: buffer.numel()].copy_(buffer)
            buffer = padded
        try:
            work = self._out.send([buffer], self._peer_rank, 0)
        except RuntimeError as error:
            raise LinkError(f"sending to worker {self.peer} failed: {_first_line(error)}") from error
        with self._left:
            self.in_flight += 1
        self._sent.put((work, buffer))  # a Work that is dropped cancels its transfer: both are kept until it is done

    def _reap(self) -> None:
        """Wait for each transfer in turn; gloo tells of its end only to who waits."""
        while (sent := self._sent.get()) is not None:
            try:
                sent[0].wait(_FOREVER)
            except RuntimeError as error:
                with self._left:
                    self._failed = self._failed or _first_line(error)
            del sent
            with self._left:
                self.in_flight -= 1
                self._left.notify_all()

    def _receive(self) -> None:
        try:
            while self._receive_one():
                pass
            reason = "it has left"
        except Exception as error:  # whatever it was: nothing more comes, and who waits must know
            closed = "closed by peer" in str(error) or "reset by peer" in str(error)
            reason = "the connection was closed" if closed else _first_line(error)
        if not self._abandoned:
            self._mailbox.lose(self.peer, reason)

    def _receive_one(self) -> bool:
        """Whether there was a message, and not a goodbye."""
        pinned = self._device.type == "cuda" and not self._fixed
        place = self._device if self._fixed else torch.device("cpu")
        buffer = torch.empty(self._max_bytes, dtype=torch.uint8, device=place, pin_memory=pinned)
        self._in.recv([buffer], self._peer_rank, 0).wait(_FOREVER)
        header, payload = unpack(buffer.cpu() if self._fixed else buffer)
        if header.view == _BYE:
            return False
        self._mailbox.put(header.view, header.step, header.op, self.peer, header.deliver_at, payload)
        return True


@dataclass
class Transport:
    """All links of one worker. A view change edits them: what does not touch a changed worker stays as it is."""

    worker: int
    view: int = 0
    mailbox: Mailbox = field(default_factory=Mailbox)
    links: dict[int, Link | SharedLink] = field(default_factory=dict)

    def connect(
        self, builder: GroupBuilder, pairs: set[tuple[int, int]], *, max_bytes: int, nccl: bool = False,
        shared: bool = True, demanded: bool = False, shapes: Mapping[tuple[int, int], Shape] | None = None,
    ) -> None:  # fmt: skip
        """Build the missing links among pairs (a, b), a < b, that hold this worker. All must pass the same pairs.

        Pairs are joined in ascending order, which no cycle of waiting can arise from. `shapes[(source, target)]`
        slows that direction down. With `shared`, workers of one machine share memory; where that is `demanded` and
        cannot be, ConfigError is raised. NCCL gets a group per direction, since its transfers in one group run in turn.
        """
        for low, high in sorted(pairs):
            if self.worker not in (low, high):
                continue
            peer = high if self.worker == low else low
            if peer in self.links:
                continue
            self.mailbox.forget(peer)
            rank = 0 if self.worker == low else 1
            name, shape = f"view{self.view}/link{low}-{high}", (shapes or {}).get((self.worker, peer))
            end = builder.local_socket(name, (low, high)) if shared and builder.device.type == "cpu" else None
            if end is not None:
                self.links[peer] = SharedLink(peer, end, self.mailbox, max_bytes=max_bytes, shape=shape)
                continue
            if demanded:
                raise ConfigError(_cannot_share(low, high, builder.device))
            if nccl:
                up = builder.build(f"{name}/up", (low, high), "nccl")
                down = builder.build(f"{name}/down", (low, high), "nccl")
                outgoing, incoming = (up, down) if rank == 0 else (down, up)
            else:
                outgoing = incoming = builder.build(name, (low, high), "gloo")
            self.links[peer] = Link(
                peer, outgoing, incoming, (rank, 1 - rank), self.mailbox, max_bytes=max_bytes,
                device=builder.device, fixed_size=nccl, shape=shape,
            )  # fmt: skip

    def send(self, step: int, op: Op, peer: int, payload: Tensor) -> None:
        """Start sending the output of `op` to `peer`."""
        self.links[peer].send(self.view, step, op, payload)

    def receive(self, step: int, op: Op, peer: int, deadline: float) -> Tensor:
        """The output of `op`, computed by `peer`, on the host (or the device, over NCCL). Raises LinkError."""
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


def link_pairs(sends: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """The undirected pairs (low, high) of directed (source, target) ones."""
    return {(min(pair), max(pair)) for pair in sends}


def _cannot_share(low: int, high: int, device: torch.device) -> str:
    """Why two workers have no memory in common."""
    found = "they are not on one machine" if machine() else "this system has no memfd, or no Unix sockets"
    if device.type != "cpu":
        found = f"they compute on {device.type}"
    return f"links is 'shm', which workers {low} and {high} cannot have: {found}; allowed here: auto, gloo"


def span_bytes(batch: int, sequence: int, hidden: int, dtype: torch.dtype) -> int:
    """Bytes of one microbatch's activation between two spans."""
    return batch * sequence * hidden * dtype.itemsize


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


__all__ = ["HEADER_BYTES", "Link", "LinkError", "Mailbox", "Shape", "Span", "Transport", "link_pairs", "pack",
           "span_bytes", "unpack"]  # fmt: skip
