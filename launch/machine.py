"""What this machine can hold: as many processes and threads as its cores can still tell apart, and shared memory."""

from __future__ import annotations

import os

from jobs.config import TrainConfig, require
from pipeline.runtime.groups import machine

_WORKERS_PER_CORE, _WORKERS = 16, 32
_THREADS_PER_CORE = 4


def check_machine(config: TrainConfig, workers_here: int, cores: int | None = None) -> None:
    """Raise ConfigError for more workers or threads than `cores` (unset: those of this process) can run in turn."""
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    most = max(_WORKERS, _WORKERS_PER_CORE * cores)
    here = f"a machine of {cores} core(s)"
    found = "" if workers_here == config.workers else f"; {workers_here} of them are for this one"
    require(workers_here <= most, "workers", config.workers, f"at most {most} on {here}{found}")
    most -= workers_here
    require(config.spares <= most, "spares", config.spares, f"at most {most} beside {workers_here} workers, on {here}")
    most = _THREADS_PER_CORE * cores
    require(config.threads <= most, "threads", config.threads, f"0 to {most} on {here}")


def check_links(config: TrainConfig) -> None:
    """Raise ConfigError where workers are to share memory and this system has none to share: nothing has begun yet."""
    allowed = "auto or gloo, as this system has no memfd or no Unix sockets"
    require(config.links != "shm" or bool(machine()), "links", config.links, allowed)
