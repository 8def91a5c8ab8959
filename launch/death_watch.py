"""Sees a process die when it begins to, and not when all that it had has been taken down.

The kernel tells of the end of a killed process once its memory is gone: for one that has imported torch that takes 10
to 30 milliseconds of a core, for which it waits like everybody else, and longer where it had a device. A robust mutex
that it holds is handed on before any of that, when none of its code runs any more. Where there are none (they are
glibc's) the end is told as ever.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable

_SLOT, _SLOTS = 128, 1024
_HELD = 64  # where in a slot it stands that the mutex is held: the mutex itself is smaller
_SHARED = _ROBUST = 1  # PTHREAD_PROCESS_SHARED, PTHREAD_MUTEX_ROBUST
_BEGIN_S, _LOOK_S = 10.0, 0.002


class DeathWatch:
    """Mutexes in memory that is shared with all processes that are forked later, one for each that is watched."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SLOT * _SLOTS)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._free = list(range(_SLOTS))
        self._libc = ctypes.CDLL(None)
        self.works = hasattr(self._libc, "pthread_mutexattr_setrobust")

    # ---- in the process that watches ----

    def slot(self) -> int | None:
        """A slot for a process that is about to be forked, until it is watched; None where nothing can be seen, or too
        many are."""
        if not self.works or not self._free:
            return None
        attributes = ctypes.create_string_buffer(64)
        self._libc.pthread_mutexattr_init(attributes)
        self._libc.pthread_mutexattr_setpshared(attributes, _SHARED)
        self._libc.pthread_mutexattr_setrobust(attributes, _ROBUST)
        self._memory[(slot := self._free.pop()) * _SLOT + _HELD] = 0
        self._libc.pthread_mutex_init(self._mutex(slot), attributes)
        return slot

    def give_back(self, slot: int) -> None:
        """No process was forked for it."""
        self._free.append(slot)

    def watch(self, slot: int, pid: int, died: Callable[[int], None]) -> None:
        """Have `died(code)` called, in a thread of its own, when process `pid` dies without having let go of its slot;
        `code` is its exit code, or minus the signal that ends it. Where that cannot be seen, nothing is called."""
        threading.Thread(target=self._watch, args=(slot, pid, died), name=f"watch-{pid}", daemon=True).start()

    def _watch(self, slot: int, pid: int, died: Callable[[int], None]) -> None:
        deadline = time.monotonic() + _BEGIN_S
        while not self._memory[slot * _SLOT + _HELD]:
            if time.monotonic() > deadline or exit_code(pid) is not None:
                return  # the slot stays taken: it may still be locked
            time.sleep(_LOOK_S)
        gone = self._libc.pthread_mutex_lock(self._mutex(slot)) == errno.EOWNERDEAD
        if gone and (code := exit_code(pid)):  # 0 is also what those are told who may not know it
            died(code)
        self._free.append(slot)

    # ---- in the process that is watched ----

    def hold(self, slot: int) -> None:
        """By the thread with which the process ends."""
        self._libc.pthread_mutex_lock(self._mutex(slot))
        self._memory[slot * _SLOT + _HELD] = 1

    def let_go(self, slot: int) -> None:
        """It is about to end by itself."""
        self._libc.pthread_mutex_unlock(self._mutex(slot))

    def _mutex(self, slot: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._at + slot * _SLOT)


def exit_code(pid: int) -> int | None:
    """That of a process that is ending or has not been waited for yet, or minus the signal; None while it lives, and
    where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    status = int(fields[-1])
    return os.waitstatus_to_exitcode(status) if status or fields[0] in "ZX" else None
