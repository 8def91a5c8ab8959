"""What would happen if a worker were lost, said before the first step: a person who minds can choose otherwise."""

from __future__ import annotations

import time
from collections import defaultdict

from jobs.config import TrainConfig
from recovery.policy import CHECKPOINT, REROUTE, Recovery

_PATIENCE_S = 1.0


def forecast(config: TrainConfig, recovery: Recovery) -> list[str]:
    """One line for each group of workers that are alike in this."""
    if recovery.meanwhile == REROUTE:  # to plan for every worker would take as long as the plan itself
        return ["if a worker is lost: its microbatches take other routes, or all go back to a checkpoint"]
    until = time.monotonic() + _PATIENCE_S
    again = f"up to {config.checkpoint_every} steps again" if config.checkpoint_every else "all steps again"
    alike: defaultdict[str, list[int]] = defaultdict(list)
    for worker in recovery.home.workers:
        if time.monotonic() > until:
            return ["if a worker is lost: the others take its layers, as `unbroken plan --losses 1` tells for each"]
        alike[recovery.forecast(worker)].append(worker)
    return [
        f"if {_or(workers)} is lost: {what}{f', {again}' if what == CHECKPOINT else ''}"
        for what, workers in sorted(alike.items(), key=lambda item: item[1])
    ]


def _or(workers: list[int]) -> str:
    if len(workers) == 1:
        return f"worker {workers[0]}"
    if len(workers) > 4 and workers == list(range(workers[0], workers[-1] + 1)):
        return f"one of workers {workers[0]} to {workers[-1]}"
    return f"worker {', '.join(map(str, workers[:-1]))} or {workers[-1]}"
