"""A link between two workers of one machine: payloads in shared memory, a few words about them over a Unix socket.

The receiver owns slots, in host memory or on its device. The sender copies a payload into a free one and, when it is
there, says so; the receiver files it in the mailbox where it lies, and says that the slot is free when the last who
used the payload has let go, and what the device had to do with it is done. So a payload is copied once, by the sender,
and no device ever waits for another process: who dies in the middle of a copy has said nothing of it. Where no slot is
free the sender keeps the payload, asks for one more, and goes on; how many there come to be follows from the schedule,
which bounds how many messages are under way or in use, and of those that are free two keep their pages: what a link
holds beyond what is used is the same as if it were posted. Nothing waits inside a kernel call but the link's own
thread, in poll; the end of the peer, however it comes, is the end of its socket.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from pipeline.runtime.mailbox import LinkError, Mailbox
from pipeline.runtime.message import HEADER_BYTES, Header, Shape, Timing
from pipeline.runtime.slots import AtOnce, Bell, HostSlots, Memory, OwnSlot, Queued
from pipeline.schedule.ops import Op

_WORDS = struct.Struct("<qqq")  # what, then by that: FULL, FREE: a slot, and whether it has pages; WANT: two counts
_SLOT, _FREE, _WANT, _FULL, _BYE = range(5)
KEPT = 2
"""Slots that there are from the start, and of the free ones those that keep their pages."""
_JOIN_S = 1.0


class SharedLink:
    """One peer: sends without waiting, and one thread that receives into the mailbox. The socket, of whole messages
    (SOCK_SEQPACKET), is the link's own from now on."""

    def __init__(
        self, peer: int, end: socket.socket, mailbox: Mailbox, *, max_bytes: int, shape: Shape | None = None,
        memory: Memory | None = None, copies: AtOnce | Queued | None = None,
    ) -> None:  # fmt: skip
        """`memory` is where slots lie, at both ends (the host's), and `copies` what fills them (the CPU)."""
        self.peer, self._end, self._mailbox = peer, end, mailbox
        self._memory, self._copies = memory or HostSlots(), copies or AtOnce()
        self._size, self._timing = max(1, max_bytes), Timing(shape)
        self._bell = Bell()
        self._lock = threading.Lock()
        """Of all that follows, and of who writes into the socket. What a finalizer does needs none."""
        self._left = threading.Condition(self._lock)
        self._theirs: list[Tensor] = []
        self._free: deque[int] = deque()
        self._waiting: deque[tuple[bytes, Tensor]] = deque()
        self._filling = 0
        """Slots into which a copy is under way."""
        self._unsent: deque[tuple[int, bytes, OwnSlot | None]] = deque()
        self._failed: str | None = None
        self._copy_failed: str | None = None
        """What a device had to do, and could not: the thread ends the link."""
        self._mine: list[OwnSlot] = []
        self._ready: set[int] = set()
        """Own slots that are free and have pages."""
        self._returning = 0
        """Own slots that nobody has any more, while the device may still read them."""
        self._given = self._got = 0
        """Slots that the peer was told of by this end, and this end by the peer, again and again."""
        self._abandoned = self._closing = False
        end.setblocking(False)
        with self._lock:
            for _ in range(KEPT):
                self._grant()
        self._thread = threading.Thread(target=self._run, name=f"link-{peer}", daemon=True)
        self._thread.start()

    @property
    def in_flight(self) -> int:
        """Messages that were sent and have not left."""
        return len(self._waiting) + self._filling + sum(what == _FULL for what, _, _ in [*self._unsent])

    @property
    def slots(self) -> int:
        """How many slots this end owns."""
        return len(self._mine)

    # ---- sending ----

    def send(self, view: int, step: int, op: Op, payload: Tensor) -> None:
        """Start sending `payload`, the output of `op`, which nobody changes any more. Returns at once. Raises LinkError
        for a payload too large, or where the peer is gone."""
        size = payload.numel() * payload.element_size()
        if size > self._size:
            raise LinkError(f"{op} has {size} bytes for worker {self.peer}; links carry {self._size} at most")
        header = Header.of(view, step, op, payload, self._timing.deliver_at(size)).pack()
        with self._lock:
            if self._failed is not None:
                raise LinkError(f"sending to worker {self.peer} failed: {self._failed}")
            number = self._free.popleft() if self._free and not self._waiting else None
            if number is None:
                self._waiting.append((header, payload.detach()))
                self._post(_WANT, len(self._waiting), self._got)
            else:
                self._filling += 1
        if number is not None:
            self._fill(number, header, payload.detach())

    def _fill(self, number: int, header: bytes, payload: Tensor) -> None:
        """Copy a payload into a slot that is counted as being filled, and say so when it is there."""
        size = payload.numel() * payload.element_size()
        slot = self._theirs[number][:size].view(payload.dtype).view(payload.shape)
        self._copies.copy(slot, payload, partial(self._filled, number, header))

    def _filled(self, number: int, header: bytes, error: BaseException | None) -> None:
        with self._lock:
            self._filling -= 1
            if error is not None:
                self._copy_failed = f"a payload could not be copied: {error}"
                self._bell.ring()
            elif self._failed is None:
                self._post(_FULL, number, header=header)

    def _post(
        self, what: int, number: int = 0, count: int = 0, header: bytes = b"", slot: OwnSlot | None = None
    ) -> None:
        """Write a message into the socket, or keep it until there is room. The lock is held."""
        self._unsent.append((what, _WORDS.pack(what, number, count) + header, slot))
        if not self._push():
            self._bell.ring()  # the thread waits for room

    def _push(self) -> bool:
        """Write what can be written; whether all could. The lock is held."""
        while self._unsent:
            _, data, slot = self._unsent[0]
            try:
                if slot is None or not (descriptors := slot.told()[1]):
                    self._end.send(data)
                else:
                    socket.send_fds(self._end, [data], descriptors)
                if slot is not None:
                    slot.was_told()
            except BlockingIOError:
                return False
            except OSError as error:
                self._fail(error.strerror or str(error))
                return True
            self._unsent.popleft()
        self._left.notify_all()
        return True

    def _fail(self, reason: str) -> None:
        """Nothing leaves any more. The lock is held."""
        self._failed = self._failed or reason
        for _, _, slot in self._unsent:
            if slot is not None:
                slot.was_told()
        self._unsent.clear()
        self._waiting.clear()
        self._left.notify_all()

    def flush(self, deadline: float) -> None:
        """Wait until all that was sent has left. Raises LinkError at `deadline` or when the peer is gone."""
        with self._left:
            left = max(0.0, deadline - time.monotonic())
            done = self._left.wait_for(
                lambda: self._failed or not (self._waiting or self._filling or self._unsent), left
            )
            if self._failed:
                raise LinkError(f"sending to worker {self.peer} failed: {self._failed}")
            if not done:
                raise LinkError(f"{self.in_flight} messages to worker {self.peer} did not leave in time")

    # ---- the end ----

    def close(self) -> None:
        """Say goodbye, so that the peer's receiving thread ends."""
        with suppress(LinkError):
            self.flush(time.monotonic() + _JOIN_S)
            with self._lock:
                self._post(_BYE)
            self.flush(time.monotonic() + _JOIN_S)

    def abandon(self) -> None:
        """End the link without a word: both ends see the socket close.

        It tells of nothing any more, however late its thread ends: there may be a new link to the same peer by then.
        """
        self._abandoned = True
        self.cut()
        self.join(_JOIN_S)

    def cut(self) -> None:
        """End the connection, as if a cable were cut."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._bell.ring()

    def join(self, timeout_s: float) -> None:
        """Wait for the receiving thread, which ends at the peer's goodbye or loss."""
        self._thread.join(timeout_s)

    # ---- the thread ----

    def _run(self) -> None:
        try:
            reason = self._serve()
        except Exception as error:  # whatever it was: nothing more comes, and who waits must know
            reason = str(error) or type(error).__name__
        with self._lock:
            self._fail(reason)
        self._end.close()
        if not self._abandoned:
            self._mailbox.lose(self.peer, reason)

    def _serve(self) -> str:
        """Take messages until there are no more; returns why."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        while True:
            with self._lock:
                unsent = bool(self._unsent)
            poll.register(self._end, select.POLLIN | (select.POLLOUT if unsent else 0))
            poll.poll()
            self._bell.quiet()
            self._give_back()
            with self._lock:
                if self._copy_failed is not None:
                    return self._copy_failed
                self._push()
            while (found := self._next()) is not None:
                data, descriptors = found
                if not data:
                    return "the connection was closed"
                if self._take(data, descriptors):
                    return "it has left"

    def _next(self) -> tuple[bytes, list[int]] | None:
        """The next message and what came with it; empty at the end, None where there is none yet."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._end, _WORDS.size + HEADER_BYTES, 1)
        except BlockingIOError:
            return None
        except ConnectionError:
            return b"", []
        return data, descriptors

    def _take(self, data: bytes, descriptors: list[int]) -> bool:
        """Act on a message; whether it is a goodbye. Raises LinkError for what is none, OSError for a slot that is
        none."""
        if len(data) < _WORDS.size or (descriptors and data[0] != _SLOT):
            for descriptor in descriptors:
                os.close(descriptor)
            raise LinkError(f"a message is none: {len(data)} bytes with {len(descriptors)} descriptors")
        what, number, count = _WORDS.unpack_from(data)
        if what == _FULL and 0 <= number < len(self._mine):
            self._deliver(number, Header.unpack(data[_WORDS.size :], self._size))
        elif what == _SLOT:
            self._theirs.append(self._memory.theirs(data[_WORDS.size :], descriptors, self._size))
            self._now_free(len(self._theirs) - 1, True)
        elif what == _FREE and 0 <= number < len(self._theirs):
            self._now_free(number, bool(count))
        elif what == _WANT:
            self._give_back()
            with self._lock:  # more wait than will find a slot among those that are on their way
                if number > self._given + self._returning - count:
                    self._grant()
        elif what != _BYE:
            raise LinkError(f"a message is none: it says {what} of slot {number}")
        return what == _BYE

    def _now_free(self, number: int, ready: bool) -> None:
        """Use a slot for what waits longest, or keep it."""
        with self._lock:
            self._got += 1
            if not self._waiting:
                (self._free.appendleft if ready else self._free.append)(number)
                return
            header, payload = self._waiting.popleft()
            self._filling += 1
        self._fill(number, header, payload)

    def _grant(self) -> None:
        """Have the peer have one more slot. The lock is held."""
        slot = self._memory.own(self._size)
        self._mine.append(slot)
        self._given += 1
        self._post(_SLOT, len(self._mine) - 1, header=slot.told()[0], slot=slot)

    def _give_back(self) -> None:
        """Tell the peer of the slots that are free again, as soon as the device has done with them."""
        while self._bell.returned:
            number = self._bell.returned.popleft()
            with self._lock:
                self._returning += 1
            self._copies.used(partial(self._returned, number))

    def _returned(self, number: int, error: BaseException | None) -> None:
        with self._lock:
            self._returning -= 1
            if error is not None:
                self._copy_failed = f"a payload is still in use: {error}"
                self._bell.ring()
                return
            if ready := len(self._ready) < KEPT:
                self._ready.add(number)
            else:
                self._mine[number].empty()
            self._given += 1
            self._post(_FREE, number, int(ready))

    def _deliver(self, number: int, header: Header) -> None:
        """File what lies in a slot."""
        self._ready.discard(number)
        if header.num_bytes:
            let_go = partial(self._bell.give_back, number)
            payload = self._mine[number].payload(header.num_bytes, let_go).view(header.dtype).view(header.shape)
        else:
            payload = torch.empty(header.shape, dtype=header.dtype)
            self._bell.give_back(number)
        self._mailbox.put(header.view, header.step, header.op, self.peer, header.deliver_at, payload)
