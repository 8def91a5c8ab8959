"""Memory that two processes of one machine share, a message at a time: slots that the receiver owns and a sender fills.

A slot is anonymous memory of the kernel (memfd), which ends with the processes that have it: nothing is left behind by
one that is killed. What was received is a tensor in the slot itself; when the last who uses it lets go, it is free.
Slots on a device are in `device_slots.py`.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.runtime.copy_engine import URGENT, CopyEngine, Then

_SEALS = 0x2 | 0x4  # F_SEAL_SHRINK | F_SEAL_GROW: what is mapped stays there
_ADD_SEALS, _GET_SEALS = 1033, 1034


class Bell:
    """Wakes a thread that polls, from anywhere and without a lock, even from a finalizer; and what it is to look at."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.returned: deque[int] = deque()

    def fileno(self) -> int:
        """Readable when it has been rung."""
        return self._descriptor

    def ring(self) -> None:
        """Wake whoever polls."""
        os.eventfd_write(self._descriptor, 1)

    def give_back(self, number: int) -> None:
        """A slot is free again."""
        self.returned.append(number)
        self.ring()

    def quiet(self) -> None:
        """Let it be rung anew."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)

    def __del__(self) -> None:  # not before the last payload is gone, which may ring it yet
        os.close(self._descriptor)


class OwnSlot(Protocol):
    """A slot of the receiver."""

    def told(self) -> tuple[bytes, list[int]]:
        """By what the sender finds it: words, and descriptors, which go with the message."""
        ...

    def was_told(self) -> None:
        """The message is on its way."""
        ...

    def empty(self) -> None:
        """Give its memory back to the system, if that can be done; it is taken anew when it is written."""
        ...

    def payload(self, size: int, let_go: Callable[[], None]) -> Tensor:
        """The first `size` bytes (at least one) as a tensor of bytes, without a copy; `let_go` is called, on whatever
        thread, when nobody has it any more."""
        ...


class Memory(Protocol):
    """Where the slots of a link lie. Both of its ends have the same kind."""

    def own(self, size: int) -> OwnSlot:
        """A new slot of so many bytes. Raises OSError or RuntimeError where there is no room."""
        ...

    def theirs(self, said: bytes, descriptors: Sequence[int], size: int) -> Tensor:
        """A peer's slot as a tensor of `size` bytes to write into; the descriptors are closed. Raises OSError for what
        is none."""
        ...


class HostSlot:
    """A slot in host memory, of `size` bytes. Pages are taken when they are written first."""

    def __init__(self, size: int, pinned: bool = False) -> None:
        self.descriptor, self.size = os.memfd_create("unbroken-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), size
        os.ftruncate(self.descriptor, size)
        fcntl.fcntl(self.descriptor, _ADD_SEALS, _SEALS)
        self._memory = mmap.mmap(self.descriptor, size)
        self._pinned = pin(self._memory, size) if pinned else None

    def told(self) -> tuple[bytes, list[int]]:
        return b"", [self.descriptor]

    def was_told(self) -> None:
        os.close(self.descriptor)  # the peer has its own by now; the memory stays

    def empty(self) -> None:
        if self._pinned is None:  # else its pages are bound to the device
            self._memory.madvise(mmap.MADV_REMOVE)

    def payload(self, size: int, let_go: Callable[[], None]) -> Tensor:
        return torch.frombuffer(hold(self._pinned or self._memory, size, let_go), dtype=torch.uint8)


class HostSlots:
    """Slots in host memory; `pinned` where a CUDA device copies from and to it."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned

    def own(self, size: int) -> HostSlot:
        return HostSlot(size, self._pinned)

    def theirs(self, said: bytes, descriptors: Sequence[int], size: int) -> Tensor:
        if len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            raise OSError(f"a slot of host memory with {len(descriptors)} descriptors; expected one")
        memory = map_slot(descriptors[0], size)
        return torch.frombuffer(pin(memory, size) if self._pinned else memory, dtype=torch.uint8)


def hold(memory: Any, size: int, let_go: Callable[[], None]) -> Any:
    """The first `size` bytes of a buffer; `let_go` is called, on whatever thread, when nobody has them any more, and
    before the buffer itself may go."""
    held = (ctypes.c_ubyte * size).from_buffer(memory)
    weakref.finalize(held, let_go).atexit = False
    return held


def pin(memory: Any, size: int) -> Any:
    """A buffer, registered with CUDA for as long as it is there. Raises OSError."""
    runtime: Any = torch.cuda.cudart()
    address = ctypes.addressof((ctypes.c_ubyte * size).from_buffer(memory))
    if result := int(runtime.cudaHostRegister(address, size, 0)):
        raise OSError(f"cudaHostRegister of {size} bytes failed with error {result}")
    return hold(memory, size, lambda: runtime.cudaHostUnregister(address))


def map_slot(descriptor: int, size: int) -> mmap.mmap:
    """A peer's slot of `size` bytes to write into; the descriptor is closed. Raises OSError for one that is not of that
    size, or might shrink."""
    try:
        if os.fstat(descriptor).st_size != size or fcntl.fcntl(descriptor, _GET_SEALS) & _SEALS != _SEALS:
            raise OSError(f"a slot of {os.fstat(descriptor).st_size} bytes; expected {size}, sealed")
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


class AtOnce:
    """Copies by the CPU: each is done when it is asked for."""

    def copy(self, target: Tensor, source: Tensor, then: Then) -> None:
        """Copy, and tell `then`."""
        target.copy_(source)
        then(None)

    def used(self, then: Then) -> None:
        """All that reads is done."""
        then(None)

    def close(self) -> None:
        """There is nothing to end."""


class Queued:
    """Copies beside the work of a device. Slots are filled by one engine and waited for by another: a slot comes back
    when the work that reads it is done, which may be long after a copy that is due."""

    def __init__(self, device: torch.device, name: str) -> None:
        self._filling, self._using = CopyEngine(device, f"fill-{name}"), CopyEngine(device, f"used-{name}")

    def copy(self, target: Tensor, source: Tensor, then: Then) -> None:
        """Copy what is computed by all that the calling thread has queued so far; tell `then` when it is there."""
        self._filling.move([(target, source)], URGENT, self._filling.mark(), then)

    def used(self, then: Then) -> None:
        """Tell `then` when all that has been queued so far is done."""
        self._using.move([], URGENT, self._using.mark(), then)

    def close(self) -> None:
        """End the threads."""
        self._filling.close()
        self._using.close()
