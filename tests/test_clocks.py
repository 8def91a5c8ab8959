"""Setting clocks, through a stand-in for NVML: what is locked, what is refused, and that all is given back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from launch import clocks
from launch.clocks import Actuator, NvmlActuator, Recorded, applied
from schedulers.frequency import ClockError


class FakeNvml:
    """Devices of 1000 MHz by default, with clocks of 300 to 1500 MHz in steps of 15. `fails` maps a function's name, or
    (name, handle), to the error that it raises."""

    NVML_CLOCK_GRAPHICS = 0
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION, NVML_ERROR_LIBRARY_NOT_FOUND = 3, 4, 12

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__({3: "Not Supported", 4: "Insufficient Permissions", 6: "Not Found",
                              12: "NVML Shared Library Not Found"}[value])  # fmt: skip
            self.value = value

    def __init__(self, **fails: int) -> None:
        self.fails: dict[Any, int] = dict(fails)
        self.locked: dict[str, tuple[int, int]] = {}
        self.calls: list[str] = []
        self.started = 0

    def _call(self, name: str, handle: Any = None) -> None:
        self.calls.append(name)
        for key in (name, (name, handle)):
            if key in self.fails:
                raise self.NVMLError(self.fails[key])

    def nvmlInit(self) -> None:
        self._call("init")
        self.started += 1

    def nvmlShutdown(self) -> None:
        self.started -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self._call("find", index)
        return f"gpu{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._call("find", uuid)
        return uuid

    def nvmlDeviceGetDefaultApplicationsClock(self, handle: str, kind: int) -> int:
        self._call("default", handle)
        return 1000

    def nvmlDeviceGetSupportedMemoryClocks(self, handle: str) -> list[int]:
        self._call("memory", handle)
        return [2600, 1600]

    def nvmlDeviceGetSupportedGraphicsClocks(self, handle: str, memory: int) -> list[int]:
        assert memory == 2600
        return list(range(1500, 299, -15))

    def nvmlDeviceSetGpuLockedClocks(self, handle: str, low: int, high: int) -> None:
        self._call("lock", handle)
        self.locked[handle] = (low, high)

    def nvmlDeviceResetGpuLockedClocks(self, handle: str) -> None:
        self._call("reset", handle)
        del self.locked[handle]


def test_clocks_are_locked_meanwhile_at_a_supported_one_that_is_not_above() -> None:
    nvml = FakeNvml()
    with applied({1: 1.25, 0: 0.8}, NvmlActuator({0: 0, 1: "GPU-7"}, nvml=nvml)):
        assert nvml.locked == {"gpu0": (795, 795), "GPU-7": (1245, 1245)}
    assert nvml.locked == {}
    assert nvml.started == 0


def test_the_nominal_clock_may_be_given() -> None:
    nvml = FakeNvml(default=3)
    with applied({0: 1.0}, NvmlActuator({0: 0}, nominal_mhz=900.0, nvml=nvml)):
        assert nvml.locked == {"gpu0": (900, 900)}
    with pytest.raises(
        ClockError, match=r"its default clock \(or give nominal_mhz\): NVML says 'Not Supported'; a dev"
    ):
        NvmlActuator({0: 0}, nvml=nvml).set(0, 1.0)


@pytest.mark.parametrize("error", [RuntimeError("the step failed"), KeyboardInterrupt(), SystemExit(75)])
def test_clocks_are_reset_on_an_error(error: BaseException) -> None:
    nvml = FakeNvml()
    with pytest.raises(type(error)):
        with applied({0: 0.8, 1: 1.2}, NvmlActuator({0: 0, 1: 1}, nvml=nvml)):
            raise error
    assert (nvml.locked, nvml.started) == ({}, 0)


def test_where_one_cannot_be_set_the_others_are_reset() -> None:
    nvml = FakeNvml()
    nvml.fails["lock", "gpu1"] = 4
    said = r"locking device 1 of worker 1 at 1200 MHz: NVML says 'Insufficient Permissions'; run as root"
    with pytest.raises(ClockError, match=said):
        with applied({0: 0.8, 1: 1.2}, NvmlActuator({0: 0, 1: 1}, nvml=nvml)):
            pytest.fail("nothing may run at clocks that were not set")
    assert (nvml.locked, nvml.started) == ({}, 0)
    assert nvml.calls.count("reset") == 1, "only what was set is reset"


def test_a_reset_that_fails_is_told_and_the_others_are_reset() -> None:
    nvml = FakeNvml()
    nvml.fails["reset", "gpu0"] = 4
    actuator = NvmlActuator({0: 0, 1: 1}, nvml=nvml)
    with pytest.raises(ClockError, match=r"resetting device 0 of worker 0: .*; do it by hand: nvidia-smi --reset-gpu-"):
        with applied({0: 0.8, 1: 1.2}, actuator):
            pass
    assert nvml.locked == {"gpu0": (795, 795)}
    assert nvml.started == 0
    with pytest.raises(RuntimeError, match="the step") as caught:
        with applied({0: 0.8, 1: 1.2}, actuator):
            raise RuntimeError("the step failed")
    assert any("resetting device 0" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ({"init": 12}, r"starting NVML: NVML says 'NVML Shared Library Not Found'; install NVIDIA's driver"),
        ({"find": 6}, r"finding device 0 of worker 0: NVML says 'Not Found'$"),
        ({"memory": 3}, r"device 0 of worker 0: its supported clocks: NVML says 'Not Supported'; a device of Volta"),
        ({"lock": 3}, r"locking device 0 of worker 0 at 990 MHz: NVML says 'Not Supported'"),
    ],
)
def test_what_is_missing_is_named(fails: dict[str, int], said: str) -> None:
    nvml = FakeNvml(**fails)
    with pytest.raises(ClockError, match=said):
        with applied({0: 1.0}, NvmlActuator({0: 0}, nvml=nvml)):
            pass
    assert (nvml.locked, nvml.started) == ({}, 0)


def test_clocks_and_workers_that_are_none_are_refused() -> None:
    nvml = FakeNvml()
    with pytest.raises(ClockError, match=r"clock 2 of 1000 MHz is 2000 MHz; allowed: 300 to 1500 MHz"):
        NvmlActuator({0: 0}, nvml=nvml).set(0, 2.0)
    with pytest.raises(ClockError, match=r"clock 0\.1 of 1000 MHz is 100 MHz; allowed: 300 to 1500 MHz"):
        NvmlActuator({0: 0}, nvml=nvml).set(0, 0.1)
    with pytest.raises(ClockError, match=r"worker 3 has no device; allowed: 0"):
        NvmlActuator({0: 0}, nvml=nvml).set(3, 1.0)
    with pytest.raises(ClockError, match=r"device 0 is that of workers \[0, 1\]; allowed: one worker per device"):
        NvmlActuator({0: 0, 1: 0}, nvml=nvml)


def test_an_actuator_can_be_used_again() -> None:
    nvml = FakeNvml()
    actuator = NvmlActuator({0: 0}, nvml=nvml)
    for clock, mhz in ((0.6, 600), (0.9, 900)):
        with applied({0: clock}, actuator):
            assert nvml.locked == {"gpu0": (mhz, mhz)}
    actuator.reset()
    assert (nvml.locked, nvml.started) == ({}, 0)


def test_recorded_says_what_would_be_set() -> None:
    recorded = Recorded()
    actuator: Actuator = recorded
    with pytest.raises(ValueError, match="ended"):
        with applied({1: 1.2, 0: 0.8}, actuator):
            raise ValueError("ended")
    assert recorded.calls == [(0, 0.8), (1, 1.2), None]


def test_without_the_binding_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ClockError, match=r"pynvml, which is not installed: pip install 'unbroken\[nvml\]'"):
        NvmlActuator({0: 0})


def test_the_binding_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with applied({0: 1.0}, NvmlActuator({0: 0})):
        assert nvml.locked == {"gpu0": (990, 990)}
    assert clocks.NvmlActuator is NvmlActuator


def test_nothing_imports_the_binding_unasked() -> None:
    """In a process of its own: the command and the module are there, pynvml is not."""
    code = "import sys, launch.clocks; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
