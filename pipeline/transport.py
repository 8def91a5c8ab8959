"""Links between workers: every message goes into a mailbox, and a worker waits on the mailbox, never inside gloo.

A link owns one thread that always receives the next message, header and payload in one buffer, and files it by
(view, step, op). So receives are posted before anyone asks, sends overlap compute, arrival order does not matter, a
message of an older view or step is dropped and never used, and a waiting worker can be woken at any time. A *shaped*
link stamps each message with the moment at which a slow network would have delivered it; the mailbox shows it then.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor

from pipeline.groups import Group, GroupBuilder, Work
from pipeline.schedule import COMPUTE, Op, Span

HEADER_BYTES = 128
_HEADER = struct.Struct("<8qd4q")  # view, step, kind, lo, hi, microbatch, dtype, ndim, deliver_at, shape
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
_BYE = -2
_FOREVER = timedelta(days=10)


class LinkError(RuntimeError):
    """A message that will not come: the peer is gone, or the deadline has passed. Names the peer and the message."""


@dataclass(frozen=True)
class Shape:
    """What a slow link adds, per direction: seconds before the first byte arrives, and bytes per second.

    A message holds an `exclusive` link until it has arrived, any other while its bytes go in.
    """

    latency_s: float = 0.0
    bandwidth: float = float("inf")
    exclusive: bool = False


def pack(view: int, step: int, op: Op, payload: Tensor, deliver_at: float = 0.0, pinned: bool = False) -> Tensor:
    """Header and payload (at most 4 dimensions) as one host buffer of bytes."""
    size = payload.numel() * payload.element_size()
    buffer = torch.empty(HEADER_BYTES + size, dtype=torch.uint8, pin_memory=pinned)
    shape = (*payload.shape, 0, 0, 0, 0)[:4]
    dtype = _DTYPES.index(payload.dtype)
    header = _HEADER.pack(
        view, step, COMPUTE.index(op.kind), *op.span, op.microbatch, dtype, payload.dim(), deliver_at, *shape
    )
    buffer[: _HEADER.size] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    buffer[HEADER_BYTES:].view(payload.dtype).view(payload.shape).copy_(payload)
    return buffer


def unpack(buffer: Tensor) -> tuple[tuple[int, int, Op], float, Tensor]:
    """((view, step, op), deliver_at, payload) of a buffer made by `pack`; the payload shares its memory."""
    fields = _HEADER.unpack(buffer[: _HEADER.size].numpy().tobytes())
    view, step, kind, lo, hi, microbatch, dtype, ndim, deliver_at = fields[:9]
    shape, torch_dtype = fields[9 : 9 + ndim], _DTYPES[dtype]
    size = torch_dtype.itemsize
    for extent in shape:
        size *= extent
    payload = buffer[HEADER_BYTES : HEADER_BYTES + size].view(torch_dtype).view(shape)
    return (view, step, Op(COMPUTE[kind], (lo, hi), microbatch)), deliver_at, payload


class Mailbox:
    """Messages that have arrived at one worker, by (view, step, op, peer). Thread safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._messages: dict[tuple[int, int, Op, int], tuple[float, Tensor]] = {}
        self._lost: dict[int, str] = {}
        self._woken: str | None = None
        self._oldest = (0, 0)
        self.waiting = ""
        """What a worker waits for at the moment, for others to read; empty while it works."""

    def put(self, view: int, step: int, op: Op, peer: int, deliver_at: float, payload: Tensor) -> None:
        """File a message; one that is older than the current (view, step) is dropped."""
        with self._changed:
            if (view, step) >= self._oldest:
                self._messages[view, step, op, peer] = (deliver_at, payload)
                self._changed.notify_all()

    def lose(self, peer: int, reason: str) -> None:
        """Say that nothing more comes from `peer`."""
        with self._changed:
            self._lost.setdefault(peer, reason)
            self._changed.notify_all()

    def forget(self, peer: int) -> None:
        """A new link to `peer` takes the place of one that was lost."""
        with self._changed:
            self._lost.pop(peer, None)

    def woken(self) -> str | None:
        """Why the present view has ended, or None while it has not."""
        return self._woken

    def broken(self) -> set[int]:
        """The peers that were lost."""
        with self._changed:
            return set(self._lost)

    def wake(self, view: int, reason: str) -> None:
        """View `view` has begun: make every wait of an older one fail at once, with `reason`."""
        with self._changed:
            if view > self._oldest[0]:
                self._woken = reason
                self._changed.notify_all()

    def advance(self, view: int, step: int) -> None:
        """Drop all that is older than (view, step) and refuse it from now on."""
        with self._changed:
            if view > self._oldest[0]:
                self._woken = None
            self._oldest = (view, step)
            self._messages = {key: value for key, value in self._messages.items() if key[:2] >= self._oldest}

    def get(self, view: int, step: int, op: Op, peer: int, deadline: float) -> Tensor:
        """The payload of `op` from `peer`, waited for until `deadline` (time.monotonic seconds).

        Raises LinkError when the peer is lost, the wait is woken, or the deadline passes.
        """
        key = (view, step, op, peer)
        with self._changed:
            while True:
                now = time.monotonic()
                held = self._messages.get(key)
                if held is not None and held[0] <= now:
                    del self._messages[key]
                    return held[1]
                what = f"the output of {op} from worker {peer} (view {view}, step {step})"
                if self._woken is not None:
                    raise LinkError(f"waiting for {what} was ended: {self._woken}")
                if held is None and peer in self._lost:
                    raise LinkError(f"{what} will not come: {self._lost[peer]}")
                if now >= deadline:
                    raise LinkError(f"{what} did not come within the step deadline")
                self.waiting = what
                self._changed.wait(min(deadline, held[0] if held else deadline) - now)
                self.waiting = ""


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
        self._shape = shape
        self._free_at = 0.0
        self._in_flight: deque[tuple[Work, Tensor]] = deque()
        self._thread = threading.Thread(target=self._receive, name=f"link-{peer}", daemon=True)
        self._thread.start()

    def send(self, view: int, step: int, op: Op, payload: Tensor) -> None:
        """Start sending `payload`, the output of `op`. Returns at once. Raises LinkError for a payload too large."""
        deliver_at, size = 0.0, payload.numel() * payload.element_size()
        if size + HEADER_BYTES > self._max_bytes:
            raise LinkError(f"{op} has {size} bytes for worker {self.peer}; links carry {self._max_bytes} at most")
        if self._shape is not None:
            self._free_at = max(self._free_at, time.monotonic()) + size / self._shape.bandwidth
            deliver_at = self._free_at + self._shape.latency_s
            if self._shape.exclusive:
                self._free_at = deliver_at
        self._post(pack(view, step, op, payload, deliver_at, pinned=self._device.type == "cuda"))

    def flush(self, deadline: float) -> None:
        """Wait until all that was sent has left. Raises LinkError at `deadline` or when the peer is gone."""
        while self._in_flight:
            work, _ = self._in_flight[0]
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError as error:
                raise LinkError(f"sending to worker {self.peer} failed: {_first_line(error)}") from error
            self._in_flight.popleft()

    def close(self) -> None:
        """Say goodbye, so that the peer's receiving thread ends."""
        with contextlib.suppress(RuntimeError):
            self._post(pack(_BYE, 0, Op("F", (0, 0)), torch.empty(0)))
            self.flush(time.monotonic() + 1.0)

    def abandon(self) -> None:
        """End the link without a word: a receive that gives up at once closes its sockets on both sides."""
        if not self._fixed:
            with contextlib.suppress(RuntimeError):
                self._in.recv([torch.empty(1, dtype=torch.uint8)], self._peer_rank, 1).wait(timedelta(milliseconds=1))
        self._thread.join(1.0)

    def join(self, timeout_s: float) -> None:
        """Wait for the receiving thread, which ends at the peer's goodbye or loss."""
        self._thread.join(timeout_s)

    def _post(self, buffer: Tensor) -> None:
        if self._fixed:
            padded = torch.empty(self._max_bytes, dtype=torch.uint8, device=self._device)
            padded[: buffer.numel()].copy_(buffer)
            buffer = padded
        while self._in_flight and self._in_flight[0][0].is_completed():
            self._in_flight.popleft()
        try:
            # A Work that is dropped cancels its transfer: both are kept until it is done.
            self._in_flight.append((self._out.send([buffer], self._peer_rank, 0), buffer))
        except RuntimeError as error:
            raise LinkError(f"sending to worker {self.peer} failed: {_first_line(error)}") from error

    def _receive(self) -> None:
        on_device = self._fixed
        while True:
            pinned = self._device.type == "cuda" and not on_device
            place = self._device if on_device else torch.device("cpu")
            buffer = torch.empty(self._max_bytes, dtype=torch.uint8, device=place, pin_memory=pinned)
            try:
                self._in.recv([buffer], self._peer_rank, 0).wait(_FOREVER)
            except RuntimeError as error:
                closed = "closed by peer" in str(error) or "reset by peer" in str(error)
                self._mailbox.lose(self.peer, "the connection was closed" if closed else _first_line(error))
                return
            (view, step, op), deliver_at, payload = unpack(buffer.cpu() if on_device else buffer)
            if view == _BYE:
                self._mailbox.lose(self.peer, "it has left")
                return
            self._mailbox.put(view, step, op, self.peer, deliver_at, payload)


@dataclass
class Transport:
    """All links of one worker. A view change edits them: what does not touch a changed worker stays as it is."""

    worker: int
    view: int = 0
    mailbox: Mailbox = field(default_factory=Mailbox)
    links: dict[int, Link] = field(default_factory=dict)

    def connect(
        self, builder: GroupBuilder, pairs: set[tuple[int, int]], *, max_bytes: int, nccl: bool = False,
        shapes: Mapping[tuple[int, int], Shape] | None = None,
    ) -> None:  # fmt: skip
        """Build the missing links among pairs (a, b), a < b, that hold this worker. All must pass the same pairs.

        Pairs are joined in ascending order, which no cycle of waiting can arise from. `shapes[(source, target)]`
        slows that direction down. NCCL gets a group per direction, since its transfers in one group run in turn.
        """
        for low, high in sorted(pairs):
            if self.worker not in (low, high):
                continue
            peer = high if self.worker == low else low
            if peer in self.links:
                continue
            self.mailbox.forget(peer)
            rank = 0 if self.worker == low else 1
            name = f"view{self.view}/link{low}-{high}"
            if nccl:
                up = builder.build(f"{name}/up", (low, high), "nccl")
                down = builder.build(f"{name}/down", (low, high), "nccl")
                outgoing, incoming = (up, down) if rank == 0 else (down, up)
            else:
                outgoing = incoming = builder.build(name, (low, high), "gloo")
            self.links[peer] = Link(
                peer, outgoing, incoming, (rank, 1 - rank), self.mailbox, max_bytes=max_bytes,
                device=builder.device, fixed_size=nccl, shape=(shapes or {}).get((self.worker, peer)),
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


def span_bytes(batch: int, sequence: int, hidden: int, dtype: torch.dtype) -> int:
    """Bytes of one microbatch's activation between two spans."""
    return batch * sequence * hidden * dtype.itemsize


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


__all__ = ["HEADER_BYTES", "Link", "LinkError", "Mailbox", "Shape", "Span", "Transport", "link_pairs", "pack",
           "span_bytes", "unpack"]  # fmt: skip
