"""Setting the clocks that `schedulers.frequency` plans: on NVIDIA devices, or on paper.

Nothing in a training run calls this. It is off unless somebody who may - NVML wants root for it - writes

    with applied(plan.clock, NvmlActuator({0: 0, 1: 1})):
        ...

The clocks are set back at the end, on an error and on an interrupt too, to the device's own choice: a lock that was
there before is lost, since NVML does not tell it. After SIGKILL, and a SIGTERM that nobody handles, they stay until
`nvidia-smi --reset-gpu-clocks` or a reboot.
The binding is the extra `nvml` (nvidia-ml-py); it is imported when a NvmlActuator is made, and never before.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from schedulers.frequency import ClockError

_LOG = logging.getLogger(__name__)
_ADVICE = {
    "NVML_ERROR_NO_PERMISSION": "run as root, or let an administrator lock the clocks",
    "NVML_ERROR_LIBRARY_NOT_FOUND": "install NVIDIA's driver",
    "NVML_ERROR_NOT_SUPPORTED": "a device of Volta or newer is needed, one whose clocks may be locked",
}


class Actuator(Protocol):
    """What clocks are set by."""

    def set(self, worker: int, clock: float) -> None:
        """Hold the clock of a worker's device at a multiple of its nominal one. Raises ClockError."""
        ...

    def reset(self) -> None:
        """Give back every clock that was set. Raises ClockError, after having tried all."""
        ...


@contextmanager
def applied(clocks: Mapping[int, float], actuator: Actuator) -> Iterator[None]:
    """Have each worker at its clock meanwhile. Raises ClockError where one cannot be set; those that were are reset."""
    try:
        for worker, clock in sorted(clocks.items()):
            actuator.set(worker, clock)
        yield
    except BaseException as error:
        try:
            actuator.reset()
        except ClockError as left:
            error.add_note(str(left))  # what went wrong first is what must be seen
        raise
    else:
        actuator.reset()


class Recorded:
    """Sets nothing: `calls` are the (worker, clock) that would be set, and None for each reset."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float] | None] = []

    def set(self, worker: int, clock: float) -> None:
        self.calls.append((worker, clock))

    def reset(self) -> None:
        self.calls.append(None)


class NvmlActuator:
    """Locks the graphics clocks of NVIDIA devices (Volta or newer) through NVML.

    `devices` says which device a worker has: its number in NVML, which counts all devices of the machine by bus and
    knows nothing of CUDA_VISIBLE_DEVICES, or its UUID. `nominal_mhz` is the clock that the costs were measured at; left
    out, the device's default application clock. A clock becomes the highest supported one that is not above it, so that
    a power cap is kept; the device may still run slower, for its own limits of heat and power. `nvml` stands in for the
    module in tests.

    Raises ClockError where the binding, the driver, a device, a clock or the permission is missing.
    """

    def __init__(self, devices: Mapping[int, int | str], nominal_mhz: float | None = None, *, nvml: Any = None) -> None:
        shared = {device: [w for w in devices if devices[w] == device] for device in devices.values()}
        for device, workers in shared.items():
            if len(workers) > 1:
                raise ClockError(f"device {device!r} is that of workers {workers}; allowed: one worker per device")
        self._nvml = _binding() if nvml is None else nvml
        self._devices, self._nominal = dict(devices), nominal_mhz
        self._held: dict[int, Any] = {}
        self._started = False
        self._start()

    def set(self, worker: int, clock: float) -> None:
        if worker not in self._devices:
            known = ", ".join(map(str, self._devices)) or "none"
            raise ClockError(f"worker {worker} has no device; allowed: {known}")
        self._start()
        handle = self._handle(worker)
        mhz = self._supported(worker, handle, clock)
        self._held[worker] = handle
        try:
            self._nvml.nvmlDeviceSetGpuLockedClocks(handle, mhz, mhz)
        except self._nvml.NVMLError as error:
            del self._held[worker]
            raise self._refusal(f"locking {self._named(worker)} at {mhz} MHz", error) from error
        _LOG.info("%s: locked at %d MHz, %.3f of nominal", self._named(worker), mhz, clock)

    def reset(self) -> None:
        left: list[str] = []
        for worker, handle in self._held.items():
            try:
                self._nvml.nvmlDeviceResetGpuLockedClocks(handle)
            except self._nvml.NVMLError as error:
                left.append(str(self._refusal(f"resetting {self._named(worker)}", error)))
        self._held = {}
        if self._started:
            self._nvml.nvmlShutdown()
            self._started = False
        if left:
            raise ClockError("; ".join([*left, "do it by hand: nvidia-smi --reset-gpu-clocks"]))

    def _start(self) -> None:
        if not self._started:
            try:
                self._nvml.nvmlInit()
            except self._nvml.NVMLError as error:
                raise self._refusal("starting NVML", error) from error
            self._started = True

    def _handle(self, worker: int) -> Any:
        device = self._devices[worker]
        find = self._nvml.nvmlDeviceGetHandleByIndex if isinstance(device, int) else None
        try:
            return find(device) if find else self._nvml.nvmlDeviceGetHandleByUUID(device)
        except self._nvml.NVMLError as error:
            raise self._refusal(f"finding {self._named(worker)}", error) from error

    def _supported(self, worker: int, handle: Any, clock: float) -> int:
        """The MHz for a clock."""
        nvml, nominal = self._nvml, self._nominal
        if nominal is None:
            try:
                nominal = nvml.nvmlDeviceGetDefaultApplicationsClock(handle, nvml.NVML_CLOCK_GRAPHICS)
            except nvml.NVMLError as error:
                raise self._refusal(f"{self._named(worker)}: its default clock (or give nominal_mhz)", error) from error
        try:
            memory = max(nvml.nvmlDeviceGetSupportedMemoryClocks(handle))
            supported = sorted(nvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory))
        except nvml.NVMLError as error:
            raise self._refusal(f"{self._named(worker)}: its supported clocks", error) from error
        asked = clock * nominal
        if not supported[0] <= asked + 0.5 <= supported[-1] + 1:
            raise ClockError(
                f"{self._named(worker)}: clock {clock:g} of {nominal:g} MHz is {asked:.0f} MHz; "
                f"allowed: {supported[0]} to {supported[-1]} MHz"
            )
        return max(mhz for mhz in supported if mhz <= asked + 0.5)

    def _named(self, worker: int) -> str:
        return f"device {self._devices[worker]!r} of worker {worker}"

    def _refusal(self, what: str, error: Exception) -> ClockError:
        code = getattr(error, "value", None)
        advice = next((f"; {said}" for name, said in _ADVICE.items() if code == getattr(self._nvml, name)), "")
        return ClockError(f"{what}: NVML says {str(error)!r}{advice}")


def _binding() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        raise ClockError(
            "clocks are set through pynvml, which is not installed: pip install 'unbroken[nvml]'"
        ) from None
