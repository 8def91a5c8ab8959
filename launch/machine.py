"""What this machine can hold: as many processes and threads as its cores can still tell apart."""

from __future__ import annotations

import os

from jobs.config import TrainConfig, require

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
