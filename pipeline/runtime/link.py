"""A link across machines, over gloo: each message in pieces, so that a device, the network and a device overlap.

One thread always receives the next message and files it by (view, step, op), and one waits for what was sent, so that
its memory goes as soon as it has left. The first piece has the header and the beginning of the payload, and says how
much follows. From and to a CUDA device each piece goes through pinned host memory, copied on a stream of its own behind
the op that made it, while the piece before is on the network; neither the host nor the device waits. Whatever ends the
receiving thread, a message that is none or a buffer for which there is no memory, is told as the loss of the link.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor

from pipeline.runtime.copy_engine import URGENT, CopyEngine
from pipeline.runtime.groups import Group, Work
from pipeline.runtime.mailbox import LinkError, Mailbox
from pipeline.runtime.message import HEADER_BYTES, Header, Shape, Timing
from pipeline.schedule.ops import Op

FIRST = 64 << 10
"""Bytes of a payload that go with its header: most messages of a small model are one piece."""
PIECE = 4 << 20
"""Bytes of a piece that follows."""
_BYE = -2
_FOREVER = timedelta(days=10)
_COPY_S = 60.0  # until a copy to the device has failed


@dataclass(frozen=True)
class Engines:
    """What copies between a CUDA device and the host for all links of a worker."""

    down: CopyEngine
    up: CopyEngine

    @classmethod
    def of(cls, device: torch.device) -> Engines:
        return cls(CopyEngine(device, "links-down"), CopyEngine(device, "links-up"))

    def close(self) -> None:
        """End their threads."""
        self.down.close()
        self.up.close()


def pack(header: Header, begins: Tensor, pinned: bool = False) -> Tensor:
    """The first piece: the header, and room for the beginning of the payload, which is copied into it from the CPU."""
    buffer = torch.empty(HEADER_BYTES + begins.numel(), dtype=torch.uint8, pin_memory=pinned)
    buffer[:HEADER_BYTES] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
    if begins.device.type == "cpu":
        buffer[HEADER_BYTES:].copy_(begins)
    return buffer


def as_bytes(payload: Tensor) -> Tensor:
    """[bytes], without a copy where it lies in one piece."""
    return payload.detach().contiguous().view(-1).view(torch.uint8)


class Link:
    """One peer: sends without waiting, and one thread that receives into the mailbox. `engines` are for a CUDA
    device."""

    def __init__(
        self, peer: int, group: Group, ranks: tuple[int, int], mailbox: Mailbox, *, max_bytes: int,
        engines: Engines | None = None, shape: Shape | None = None,
    ) -> None:  # fmt: skip
        self.peer = peer
        self._group, (self._rank, self._peer_rank) = group, ranks
        self._mailbox, self._max_bytes, self._timing = mailbox, max_bytes, Timing(shape)
        self._engines = engines
        self._sent: queue.SimpleQueue[tuple[Work, Tensor, bool] | None] = queue.SimpleQueue()
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
        """Start sending `payload`, the output of `op`, which nobody changes any more. Returns at once. Raises LinkError
        for a payload too large, or where the peer is gone."""
        size = payload.numel() * payload.element_size()
        if size > self._max_bytes:
            raise LinkError(f"{op} has {size} bytes for worker {self.peer}; links carry {self._max_bytes} at most")
        header, flat = Header.of(view, step, op, payload, self._timing.deliver_at(size)), as_bytes(payload)
        begins, *others = [flat[:FIRST], *(flat[FIRST:].split(PIECE) if size > FIRST else ())]
        first = pack(header, begins, pinned=self._engines is not None)
        self._begin()
        if self._engines is None:
            for piece in (first, *others):
                self._post(piece, last=piece is (others or [first])[-1])
            return
        down, after = self._engines.down, self._engines.down.mark()
        staged = [(first, [(first[HEADER_BYTES:], begins)] if size else [])]
        for piece in others:
            buffer = torch.empty(piece.numel(), dtype=torch.uint8, pin_memory=True)
            staged.append((buffer, [(buffer, piece)]))
        for buffer, pairs in staged:
            down.move(pairs, URGENT, after, partial(self._staged, buffer, buffer is staged[-1][0]))

    def _staged(self, buffer: Tensor, last: bool, error: BaseException | None) -> None:
        """A piece is on the host."""
        try:
            if error is not None:
                raise LinkError(f"a payload could not be copied: {error}")
            self._post(buffer, last)
        except LinkError as failed:
            self._end(last, str(failed))

    def _begin(self) -> None:
        with self._left:
            if self._failed is not None:
                raise LinkError(f"sending to worker {self.peer} failed: {self._failed}")
            self.in_flight += 1

    def _end(self, last: bool, error: str | None = None) -> None:
        """A piece has left, or will not."""
        with self._left:
            self._failed = self._failed or error
            self.in_flight -= last
            self._left.notify_all()

    def _post(self, buffer: Tensor, last: bool = True) -> None:
        try:
            work = self._group.send([buffer], self._peer_rank, 0)
        except RuntimeError as error:
            raise LinkError(f"sending to worker {self.peer} failed: {_first_line(error)}") from error
        self._sent.put(
            (work, buffer, last)
        )  # a Work that is dropped cancels its transfer: both are kept until it is done

    def _reap(self) -> None:
        """Wait for each transfer in turn; gloo tells of its end only to who waits."""
        while (sent := self._sent.get()) is not None:
            failed: str | None = None
            try:
                sent[0].wait(_FOREVER)
            except RuntimeError as error:
                failed = _first_line(error)
            last = sent[2]
            del sent
            self._end(last, failed)

    def flush(self, deadline: float) -> None:
        """Wait until all that was sent has left. Raises LinkError at `deadline` or when the peer is gone."""
        with self._left:
            self._left.wait_for(lambda: not self.in_flight or self._failed, max(0.0, deadline - time.monotonic()))
            if self._failed:
                raise LinkError(f"sending to worker {self.peer} failed: {self._failed}")
            if self.in_flight:
                raise LinkError(f"{self.in_flight} messages to worker {self.peer} did not leave in time")

    # ---- the end ----

    def close(self) -> None:
        """Say goodbye, so that the peer's receiving thread ends."""
        with contextlib.suppress(LinkError):
            self.flush(time.monotonic() + 1.0)
            self._begin()
            self._post(pack(Header.of(_BYE, 0, Op("F", (0, 0)), torch.empty(0)), torch.empty(0, dtype=torch.uint8)))
            self.flush(time.monotonic() + 1.0)
        self._sent.put(None)

    def abandon(self) -> None:
        """End the link without a word: a receive that gives up at once closes its sockets on both sides.

        It tells of nothing any more, however late its thread ends: there may be a new link to the same peer by then.
        """
        self._abandoned = True
        with contextlib.suppress(RuntimeError):
            self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer_rank, 1).wait(timedelta(milliseconds=1))
        self._sent.put(None)
        self._thread.join(1.0)
        self._reaper.join(1.0)

    def cut(self) -> None:
        """What ends a connection from outside is for others to do: the sockets are gloo's."""

    def join(self, timeout_s: float) -> None:
        """Wait for the receiving thread, which ends at the peer's goodbye or loss."""
        self._thread.join(timeout_s)

    # ---- the thread ----

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
        first = self._receive_into(self._buffer(HEADER_BYTES + min(FIRST, self._max_bytes)))
        header = Header.unpack(first[:HEADER_BYTES].numpy().tobytes(), self._max_bytes)
        if header.view == _BYE:
            return False
        size, begins = header.num_bytes, first[HEADER_BYTES:][: header.num_bytes]
        if self._engines is None and size <= FIRST:
            flat = begins
        else:
            flat = torch.empty(size, dtype=torch.uint8) if self._engines is None else self._engines.up.empty(size)
            self._fill(flat, begins)
        payload = flat.view(header.dtype).view(header.shape)
        self._mailbox.put(header.view, header.step, header.op, self.peer, header.deliver_at, payload)
        return True

    def _fill(self, flat: Tensor, begins: Tensor) -> None:
        """Have a payload whole, of which the beginning is there: on the CPU the rest is received where it belongs."""
        others = flat[begins.numel() :].split(PIECE) if flat.numel() > begins.numel() else ()
        if self._engines is None:
            flat[: begins.numel()].copy_(begins)
            for piece in others:
                self._receive_into(piece)
            return
        tickets = [self._engines.up.move([(flat[: begins.numel()], begins)] if flat.numel() else [], URGENT)]
        for piece in others:
            tickets.append(self._engines.up.move([(piece, self._receive_into(self._buffer(piece.numel())))], URGENT))
        for ticket in tickets:
            ticket.wait(_COPY_S)

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._engines is not None)

    def _receive_into(self, buffer: Tensor) -> Tensor:
        self._group.recv([buffer], self._peer_rank, 0).wait(_FOREVER)
        return buffer


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
