"""Copies between a worker's device and host memory, beside the work: activations first, weights in chunks behind them.

One thread per direction takes the most urgent chunk that is due, so hidden states wait for one chunk of weights at
most. On CUDA each copy runs on a stream of its own, after the event that it is told to wait for, and only its own event
is waited for: nothing synchronises the device. On the CPU it is the same thread and the same order with plain copies.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CHUNK = 64 << 20
"""Bytes of one chunk."""
URGENT, LATER = 0, 1
"""Hidden states and their gradients; weights and gradients of weights."""


Then = Callable[[BaseException | None], None]
"""Told, on the engine's thread, that a copy has ended, and how."""


class Ticket:
    """A copy that is under way."""

    def __init__(self, then: Then = lambda _: None) -> None:
        self._done, self._then = threading.Event(), then
        self.error: BaseException | None = None

    def wait(self, timeout_s: float) -> None:
        """Return when all of it is there. Raises what the copy raised, and TimeoutError after `timeout_s`."""
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"a copy between host and device has not ended after {timeout_s:g} s")
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        self._done.set()
        self._then(self.error)


def chunks(target: Tensor, source: Tensor, size: int = CHUNK) -> list[tuple[Tensor, Tensor]]:
    """(target, source) in pieces of at most `size` bytes; both must be contiguous, or the copy is one piece."""
    if not (target.is_contiguous() and source.is_contiguous()) or target.numel() * target.element_size() <= size:
        return [(target, source)]
    length = max(1, size // target.element_size())
    return list(zip(target.view(-1).split(length), source.reshape(-1).split(length), strict=True))


class CopyEngine:
    """The copies in one direction. `copied` has (bytes, urgency) of the last chunks, in the order of their turn."""

    def __init__(self, device: torch.device, name: str, chunk: int = CHUNK) -> None:
        self._device, self._chunk = device, chunk
        self._cuda = device.type == "cuda"
        self._streams: dict[int, Any] = (
            {urgency: torch.cuda.Stream(device) for urgency in (URGENT, LATER)} if self._cuda else {}
        )
        self._queue: list[tuple[int, int, tuple[Tensor, Tensor] | None, Any, Ticket | None, bool]] = []
        self._count = itertools.count()
        self._ready = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.copied: deque[tuple[int, int]] = deque(maxlen=4096)
        self._thread.start()

    def mark(self) -> Any:
        """What a copy must wait for: all that the calling thread has queued for the device so far."""
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def empty(self, size: int) -> Tensor:
        """[bytes] on the device, into which the most urgent copies may write at once: nothing that the calling thread
        has queued reads what lay there before."""
        if not self._cuda:
            return torch.empty(size, dtype=torch.uint8)
        with torch.cuda.stream(self._streams[URGENT]):
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
        memory.record_stream(torch.cuda.current_stream(self._device))
        return memory

    def move(
        self, pairs: Sequence[tuple[Tensor, Tensor]], urgency: int, after: Any = None, then: Then = lambda _: None
    ) -> Ticket:
        """Copy each (target, source) once the CUDA event `after` has happened; the ticket is for all of them. Without
        any pairs it is for the event alone."""
        ticket = Ticket(then)
        pieces: list[tuple[Tensor, Tensor] | None] = []
        pieces += [piece for target, source in pairs for piece in chunks(target, source, self._chunk)]
        with self._ready:
            for i, piece in enumerate(pieces or [None]):
                last = i + 1 >= len(pieces)
                heapq.heappush(self._queue, (urgency, next(self._count), piece, after, ticket, last))
            self._ready.notify()
        return ticket

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish what is queued, and end the thread; one that does not end is left behind, and said."""
        with self._ready:
            heapq.heappush(self._queue, (LATER + 1, next(self._count), None, None, None, True))
            self._ready.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("copies %s have not come to their end within %g s", self._thread.name, timeout_s)

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._queue:
                    self._ready.wait()
                urgency, _, piece, after, ticket, last = heapq.heappop(self._queue)
            if ticket is None:
                return
            try:
                if piece is not None:
                    self._copy(*piece, urgency, after)
                elif after is not None:
                    after.synchronize()
            except BaseException as error:  # told where it is waited for
                ticket.error = error
            piece = None  # what was copied is not kept until the next copy
            if last:
                ticket.finish()

    def _copy(self, target: Tensor, source: Tensor, urgency: int, after: Any) -> None:
        self.copied.append((target.numel() * target.element_size(), urgency))
        if not self._cuda:
            target.copy_(source)
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._streams[urgency]):
            if after is not None:
                self._streams[urgency].wait_event(after)
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        event.synchronize()
