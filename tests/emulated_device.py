"""A device for tests of links on the CPU: its memory is memfd, found by a handle as CUDA IPC's is, and every copy to it
and every use of it ends late, on another thread."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
import time
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.copy_engine import CopyEngine
from pipeline.runtime.device_slots import DeviceSlots, Held
from pipeline.runtime.slots import Queued

CPU = torch.device("cpu")


class EmulatedDriver:
    """See Driver. A handle has the process and the descriptor; addresses are those of this process."""

    handle_bytes = 64

    def __init__(self) -> None:
        self.maps: dict[int, tuple[mmap.mmap, int]] = {}
        """Address -> memory, and its descriptor (-1: a peer's)."""

    def _map(self, descriptor: int, size: int, own: bool) -> int:
        memory = mmap.mmap(descriptor, size)
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
        self.maps[address] = memory, descriptor if own else -1
        return address

    def allocate(self, size: int) -> int:
        descriptor = os.memfd_create("emulated-device")
        os.ftruncate(descriptor, size)
        return self._map(descriptor, size, own=True)

    def free(self, address: int) -> None:
        os.close(self.maps.pop(address)[1])

    def export(self, address: int) -> bytes:
        return struct.pack("<qq", os.getpid(), self.maps[address][1]).ljust(64, b"\0")

    def open(self, handle: bytes, size: int) -> int:
        process, number = struct.unpack_from("<qq", handle)
        descriptor = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
        try:
            if (found := os.fstat(descriptor).st_size) < size:
                raise OSError(f"a slot of {found} bytes; expected {size}")
            return self._map(descriptor, size, own=False)
        finally:
            os.close(descriptor)

    def close(self, address: int) -> None:
        del self.maps[address]

    def tensor(self, held: Held) -> Tensor:
        class Bytes(ctypes.Array[Any]):
            _type_, _length_ = ctypes.c_ubyte, held.size

        found = Bytes.from_address(held.address)
        found.held = held  # type: ignore[attr-defined]
        return torch.frombuffer(found, dtype=torch.uint8)


class LateEngine(CopyEngine):
    """Copies that take a while, each another one."""

    def __init__(self, name: str, seed: int, most_s: float = 0.002) -> None:
        self._random, self._most_s = random.Random(seed), most_s
        super().__init__(CPU, name)

    def _copy(self, target: Tensor, source: Tensor, urgency: int, after: Any) -> None:
        time.sleep(self._random.random() * self._most_s)
        super()._copy(target, source, urgency, after)


class EmulatedCopies(Queued):
    """What copies to an emulated device."""

    def __init__(self, seed: int) -> None:
        self._filling, self._using = LateEngine("fill", seed), LateEngine("used", seed + 1)


def emulated(seed: int) -> dict[str, Any]:
    """What a SharedLink is told of a device."""
    return {"memory": DeviceSlots(EmulatedDriver()), "copies": EmulatedCopies(seed)}
