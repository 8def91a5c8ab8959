"""`unbroken doctor`: what is installed, what the machine has, and whether a run could start here."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import psutil
import torch.distributed as dist

from launch.devices import count_cuda
from launch.slots import Slot, open_store
from pipeline.model.families import FAMILIES
from pipeline.model.weights import PRESETS
from pipeline.runtime.groups import address_towards
from pipeline.settings import ConfigError, Within, check_bounds
from schedulers import ENGINES

VERSIONED = ("unbroken", "torch", "transformers", "safetensors", "tokenizers", "datasets", "numpy", "tyro", "rich")
EXTRAS = ("gguf", "accelerate", "tensorboard", "deepspeed", "ray", "torchft-nightly")


@dataclass(frozen=True)
class DoctorConfig:
    """Check versions, devices, cores, the store and a port."""

    store_port: Annotated[int, Within(0, 65535)] = 0
    """The port that a run would use for its store; 0 takes a free one."""
    json: bool = False
    """Print one JSON object."""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _store(port: int) -> dict[str, Any]:
    """Host a store, write and read through a client, and time it."""
    try:
        handle = open_store(Slot(port=port), timeout_s=10.0)
        try:
            began = time.perf_counter()
            for number in range(100):
                handle.store.set("key", str(number))
                handle.store.get("key")
            return {"ok": True, "port": handle.port, "round_trip_ms": (time.perf_counter() - began) * 1000 / 200}
        finally:
            handle.close()
    except (RuntimeError, ConfigError) as error:
        return {"ok": False, "port": port, "error": str(error).splitlines()[0]}


def _gloo() -> dict[str, Any]:
    try:
        address = address_towards("127.0.0.1", 0)
        dist.ProcessGroupGloo.create_device(hostname=address)
        return {"ok": True, "address": address}
    except (RuntimeError, OSError) as error:
        return {"ok": False, "error": str(error).splitlines()[0]}


def doctor(config: DoctorConfig) -> tuple[dict[str, Any], str]:
    """The findings, and the same as text. `ok` tells whether a run could start."""
    check_bounds(config)
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.getcwd())
    findings: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in VERSIONED},
        "extras": {name: _version(name) for name in EXTRAS},
        "cores": len(os.sched_getaffinity(0)),
        "memory_free_gib": round(memory.available / 2**30, 1),
        "disk_free_gib": round(disk.free / 2**30, 1),
        "shared_memory": os.path.isdir("/dev/shm"),
        "temporary_folder": os.access(tempfile.gettempdir(), os.W_OK),
        "cuda_devices": count_cuda(),
        "store": _store(config.store_port),
        "gloo": _gloo(),
        "schedulers": sorted(ENGINES),
        "models": {"families": sorted(FAMILIES), "presets": sorted(PRESETS)},
    }
    findings["ok"] = bool(findings["store"]["ok"] and findings["gloo"]["ok"] and findings["packages"]["torch"])
    return findings, _tell(findings)


def _tell(findings: dict[str, Any]) -> str:
    store, gloo = findings["store"], findings["gloo"]
    lines = [
        f"python     {findings['python']}",
        "packages   " + "  ".join(f"{name} {found or 'MISSING'}" for name, found in findings["packages"].items()),
        "extras     " + "  ".join(f"{name} {found or '-'}" for name, found in findings["extras"].items()),
        f"machine    {findings['cores']} cores, {findings['memory_free_gib']} GiB memory free, "
        f"{findings['disk_free_gib']} GiB disk free, {findings['cuda_devices']} CUDA device(s)",
        "store      "
        + (f"ok on port {store['port']}, {store['round_trip_ms']:.2f} ms" if store["ok"] else store["error"]),
        "gloo       " + (f"ok on {gloo['address']}" if gloo["ok"] else gloo["error"]),
        "schedulers " + ", ".join(findings["schedulers"]),
        "models     "
        + ", ".join(findings["models"]["families"])
        + "; presets "
        + ", ".join(findings["models"]["presets"]),
        "all well" if findings["ok"] else "NOT READY: see above",
    ]
    return "\n".join(lines)
