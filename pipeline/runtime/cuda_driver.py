"""The few calls of CUDA's driver that torch does not offer: memory that another process may map.

They are those of CUDA's driver API, section "Memory Management" (cuMemAlloc, cuMemFree, cuIpcGetMemHandle,
cuIpcOpenMemHandle, cuIpcCloseMemHandle). `torch.UntypedStorage._share_cuda_` would do the same through files in
/dev/shm that count users, which a killed process leaves behind.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.device_slots import Held

_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_BLOCK = 2 << 20
"""What the driver cuts its memory into: a handle of less would be for a block that others are in too."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * _HANDLE_BYTES)]


@cache
def _library() -> Any:
    """Raises OSError where there is no driver."""
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    if result := int(getattr(_library(), name)(*arguments)):
        text = ctypes.c_char_p()
        _library().cuGetErrorString(result, ctypes.byref(text))
        raise OSError(f"{name} failed with error {result}: {(text.value or b'unknown').decode()}")


class CudaDriver:
    """Memory of one CUDA device, for any thread of this process."""

    handle_bytes = _HANDLE_BYTES

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.synchronize(self._device)  # so that there is a context
        number, self._context = ctypes.c_int(), ctypes.c_void_p()
        _call("cuDeviceGet", ctypes.byref(number), self._device.index)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number)

    def _enter(self) -> None:
        """Have the device's context on this thread."""
        _call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        self._enter()
        address = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(-(-size // _BLOCK) * _BLOCK))
        return address.value

    def free(self, address: int) -> None:
        self._enter()
        _call("cuMemFree_v2", ctypes.c_uint64(address))

    def export(self, address: int) -> bytes:
        self._enter()
        handle = _Handle()
        _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.reserved)

    def open(self, handle: bytes, size: int) -> int:
        self._enter()
        address, given = ctypes.c_uint64(), _Handle.from_buffer_copy(handle)
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, ctypes.c_uint(_PEER_ACCESS))
        base, found = ctypes.c_uint64(), ctypes.c_size_t()
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(found), address)
        if found.value < size:
            self.close(address.value)
            raise OSError(f"a slot of {found.value} bytes; expected {size}")
        return address.value

    def close(self, address: int) -> None:
        self._enter()
        _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def tensor(self, held: Held) -> Tensor:
        ordinal = ctypes.c_int()
        _call("cuPointerGetAttribute", ctypes.byref(ordinal), _ORDINAL, ctypes.c_uint64(held.address))
        return torch.as_tensor(held, device=torch.device("cuda", ordinal.value))
