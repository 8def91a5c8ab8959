"""What a run is made of, for the record of each of its starts: its folder then explains itself to later versions.

Defaults change from one version to the next, and machines from one start to the next; a report that is drawn years
later needs those that the run had.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from jobs.config import TrainConfig
from jobs.plan import Plan
from launch.devices import count_cuda
from pipeline.schedule.graph import compiled
from pipeline.schedule.memory import lane_peaks
from pipeline.settings import declared, groups, names_of
from recovery.coordinator import as_layers

_PACKAGES = ("unbroken", "torch", "transformers", "numpy")
_MOMENTS = 2
_FP32 = 4


def describe(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """The fields of an event: `model` with its sizes, `layers` (place -> spans), `layer_bytes` (weights and moments of
    each), `peak_activations` (place -> microbatches, proved), `groups` and `defaults` of the settings, `environment`.
    """
    model = plan.model
    counts = [model.parameter_count(layer) for layer in range(model.num_layers)]
    trained = [model.trained_count(layer) for layer in range(model.num_layers)]
    known, unset = groups(type(config)), type(config)().resolved()  # as the run's own are kept
    # under roundpipe activations come and go with times, and a host store is what is proved
    peaks = {} if plan.rounds is not None else lane_peaks(compiled(plan.layout.train))
    return {
        "model": model.config.model_type if config.model is None else config.model,
        "parameters": sum(counts), "trained": sum(trained), "num_layers": model.num_layers,
        "layers": as_layers(plan.layout),
        "layer_bytes": [_FP32 * (a + _MOMENTS * b) for a, b in zip(counts, trained, strict=True)],
        "peak_activations": {str(place): int(peak) for place, peak in peaks.items()},
        "groups": {group.__name__.removesuffix("Settings"): list(declared(group)) for group in known},
        "defaults": _plain({name: getattr(unset, name) for name in names_of(type(config))}),
        "environment": environment(0 if config.device == "cpu" else count_cuda()),
    }  # fmt: skip


def environment(cuda: int) -> dict[str, Any]:
    """Versions and the machine; no names of machines or of people, for a report may be shown to others."""
    return {
        "python": platform.python_version(),
        **{name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
        "devices": f"{cuda} CUDA" if cuda else "CPU",
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """That of the sources, where they are a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
