"""Memory that two processes of one machine share, a message at a time: slots that the receiver owns and a sender fills.

A slot is anonymous memory of the kernel (memfd), which ends with the processes that have it: nothing is left behind by
one that is killed. What was received is a tensor in the slot itself; when the last who uses it lets go, it is free.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

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


class OwnSlot:
    """A slot of the receiver, of `size` bytes. Pages are taken when they are written first."""

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create("unbroken-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, size)
        fcntl.fcntl(self.descriptor, _ADD_SEALS, _SEALS)
        self._memory = mmap.mmap(self.descriptor, size)
        self.size = size

    def close_descriptor(self) -> None:
        """The peer has its own by now; the memory stays."""
        os.close(self.descriptor)

    def empty(self) -> None:
        """Give its pages back to the system; they are taken anew when they are written."""
        self._memory.madvise(mmap.MADV_REMOVE)

    def payload(self, size: int, let_go: Callable[[], None]) -> Tensor:
        """The first `size` bytes (at least one) as a tensor of bytes, without a copy; `let_go` is called, on whatever
        thread, when nobody has it any more."""
        held = (ctypes.c_ubyte * size).from_buffer(self._memory)
        weakref.finalize(held, let_go).atexit = False
        return torch.frombuffer(held, dtype=torch.uint8)


def map_slot(descriptor: int, size: int) -> Tensor:
    """A peer's slot as a tensor of `size` bytes to write into; the descriptor is closed. Raises OSError for one that is
    not of that size, or might shrink."""
    try:
        if os.fstat(descriptor).st_size != size or fcntl.fcntl(descriptor, _GET_SEALS) & _SEALS != _SEALS:
            raise OSError(f"a slot of {os.fstat(descriptor).st_size} bytes; expected {size}, sealed")
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    finally:
        os.close(descriptor)
