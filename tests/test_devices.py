"""What is known of devices without touching them: how many, how large, and what of a model they are given at once."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from jobs.config import ConfigError
from launch import devices
from launch.devices import Devices, device_bytes, span_mib


def told(text: str) -> Any:
    return lambda *_, **__: subprocess.CompletedProcess([], 0, text, "")


def test_the_smallest_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.subprocess, "run", told("143771\n81559\n"))
    assert device_bytes() == 81559 << 20


@pytest.mark.parametrize("text", ["", "[N/A]\n"])
def test_a_device_that_does_not_tell_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(devices.subprocess, "run", told(text))
    with pytest.raises(ConfigError, match=r"span_mib is 0, but what memory the CUDA devices have is not known"):
        device_bytes()

    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(devices.subprocess, "run", missing)
    with pytest.raises(ConfigError, match="allowed: the MiB that the weights of a span may take"):
        device_bytes()


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_weights_and_gradients_of_two_spans_take_half_of_a_device(dtype: str, width: int) -> None:
    memory = 24 << 30
    elements = (span_mib(memory, dtype) << 20) / 4
    assert 0.99 < 2 * elements * (width + 4) / (memory / 2) <= 1
    assert span_mib(1 << 20, dtype) == 1


def test_workers_take_devices_in_turn() -> None:
    assert [Devices(2, False).of(n) for n in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert Devices(0, False).of(5) == "cpu"
