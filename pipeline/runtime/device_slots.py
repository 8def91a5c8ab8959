"""Slots in a device's own memory, which another process of the machine maps: the payload never sees the host.

The receiver allocates a slot and exports it by a handle of CUDA IPC; the sender maps it and copies into it, from the
same device or from one that can reach it. The handle travels in the message that tells of the slot. Slots are
allocations of their own, beside those of torch: a handle is for a whole allocation, and what a peer still maps must not
be given to anybody else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.wire import checked


class Driver(Protocol):
    """Memory of one device, by address. All raise OSError, saying what was asked and what the device said."""

    @property
    def handle_bytes(self) -> int: ...
    def allocate(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def export(self, address: int) -> bytes: ...
    def open(self, handle: bytes, size: int) -> int: ...
    def close(self, address: int) -> None: ...
    def tensor(self, held: Held) -> Tensor:
        """[size] of bytes, which keep `held` for as long as they are there."""
        ...


class Held:
    """`size` bytes at an address of a device; `let_go` is called when nobody has them any more."""

    def __init__(self, address: int, size: int, let_go: Callable[[], None], owner: Any = None) -> None:
        self.address, self.size, self._owner = address, size, owner
        weakref.finalize(self, let_go).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "version": 3}


class DeviceSlot:
    """A slot of the receiver."""

    def __init__(self, driver: Driver, size: int) -> None:
        self._driver = driver
        address = driver.allocate(size)
        self._whole = Held(address, size, partial(driver.free, address))
        self._handle = driver.export(address)

    def told(self) -> tuple[bytes, list[int]]:
        return self._handle, []

    def was_told(self) -> None:
        """There is nothing to close."""

    def empty(self) -> None:
        """What a peer has mapped stays where it is."""

    def payload(self, size: int, let_go: Callable[[], None]) -> Tensor:
        return self._driver.tensor(Held(self._whole.address, size, let_go, self._whole))


class DeviceSlots:
    """Slots in the memory of a device."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def own(self, size: int) -> DeviceSlot:
        return DeviceSlot(self._driver, size)

    def theirs(self, said: bytes, descriptors: Sequence[int], size: int) -> Tensor:
        if descriptors or len(said) != self._driver.handle_bytes:
            raise OSError(
                f"a slot of a device with a handle of {len(said)} bytes and {len(descriptors)} descriptors; expected "
                f"{self._driver.handle_bytes} and none"
            )
        address = self._driver.open(said, size)
        return self._driver.tensor(Held(address, size, partial(self._driver.close, address)))


@dataclass(frozen=True)
class Reach:
    """The device of a worker, by a name that is the same in every process of the machine, and those that it can copy
    to; all empty for the CPU."""

    device: str = ""
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, device: torch.device) -> Reach:
        if device.type != "cuda":
            return cls()
        here = torch.cuda.current_device() if device.index is None else device.index
        names = [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]
        reached = [n for n in range(len(names)) if n != here and torch.cuda.can_device_access_peer(here, n)]
        return cls(names[here], tuple(names[n] for n in reached))

    def meets(self, other: Reach) -> bool:
        """Whether each can copy to the other. It is the same for both."""
        both = other.device in self.others and self.device in other.others
        return bool(self.device) and (self.device == other.device or both)

    def as_json(self) -> dict[str, Any]:
        return {"device": self.device, "others": list(self.others)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Reach:
        """Raises WireError."""
        found = checked(values, "a worker's device", device=str, others=list)
        return cls(found["device"], tuple(map(str, found["others"])))
