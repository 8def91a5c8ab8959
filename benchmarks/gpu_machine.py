"""What the machine of benchmarks/gpu.py is, and how much of its memory is used; CUDA is never touched by this.

All contenders are measured alike: the device's memory in use, contexts included, and the host's, shared memory and
pinned pages included, both less what was in use before.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

SAMPLE_S = 0.05


def _nvidia_smi(fields: str) -> list[str]:
    """Of the first device; [] where there is none."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return [each.strip() for each in done.stdout.strip().split(",")] if done.returncode == 0 else []


class Device:
    """The first NVIDIA device, through NVML where its Python package is installed and nvidia-smi otherwise. Make it in
    the process that asks."""

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:  # not installed, no driver, no device: each has an error of its own
            self._nvml = None

    def about(self) -> dict[str, Any]:
        """Name, driver and bytes; all None where there is no device."""
        if self._nvml is not None:
            name, driver = self._nvml.nvmlDeviceGetName(self._handle), self._nvml.nvmlSystemGetDriverVersion()
            total = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).total)
            told = [each.decode() if isinstance(each, bytes) else each for each in (name, driver)]
            return {"device": told[0], "driver": told[1], "device_bytes": total}
        name, driver, total = _nvidia_smi("name,driver_version,memory.total") or (None, None, None)
        return {"device": name, "driver": driver, "device_bytes": None if total is None else int(total) << 20}

    def used(self) -> int | None:
        """Bytes in use, by whomever."""
        if self._nvml is not None:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        found = _nvidia_smi("memory.used")
        return int(found[0]) << 20 if found else None


class Peaks(threading.Thread):
    """The most memory in use beyond what was before, sampled until `close`. Start it after whatever forks."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._device, self._over = Device(), threading.Event()
        self._before = self._device.used(), psutil.virtual_memory().available
        self._most: list[int | None] = [None if self._before[0] is None else 0, 0]

    def run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        used, (before, available) = self._device.used(), self._before
        if used is not None and before is not None:
            self._most[0] = max(self._most[0] or 0, used - before)
        self._most[1] = max(self._most[1] or 0, available - psutil.virtual_memory().available)

    def close(self) -> dict[str, int | None]:
        """Stop; what was found, in bytes."""
        self._look()
        self._over.set()
        self.join()
        return {"device_peak_bytes": self._most[0], "host_peak_bytes": self._most[1]}


def about() -> dict[str, Any]:
    """Of the machine and what is installed, for the record of a run. `cuda_touched` says whether this process has
    loaded CUDA's driver: then what it forks may fail with an initialization error."""
    root = Path(__file__).resolve().parent.parent
    commit = os.environ.get("COMMIT", "")  # for a copy of the repository without its history
    with contextlib.suppress(OSError):
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
        commit = asked.stdout.strip() or commit
    return {
        **Device().about(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "cuda": torch.version.cuda,
        "cuda_touched": "libcuda.so" in Path("/proc/self/maps").read_text(),
        "commit": commit or None, "cpus": len(os.sched_getaffinity(0)),
        "host_bytes": psutil.virtual_memory().total,
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
    }  # fmt: skip
