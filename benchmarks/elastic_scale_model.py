"""What a large run does when workers fail: three strategies, simulated over the same failures.

Failures are a Poisson process (exponential times between them); each takes a host with all its workers. Then either a
hot spare stands ready, or a replacement comes after a time drawn from an exponential distribution. Time that is neither
stalled, nor lost, nor spent on checkpoints is useful; fewer workers make it count for less. Goodput is the useful time
as a share of all. Holders of a layer are taken never to be lost all at once (there are 64 or more).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Draw = Callable[[np.random.Generator], float]
"""One draw of a time, in seconds."""


class Failure(NamedTuple):
    """At `at` seconds; its replacement is there `wait_s` later (0: a hot spare)."""

    at: float
    wait_s: float


@dataclass(frozen=True)
class Stalls:
    """Seconds for which the whole run stands, from the moment of the failure or of the arrival."""

    replace: Draw
    """From a failure to the next step with a spare, or, less `detect_s`, from the arrival of a replacement."""
    shrink: Draw
    """From a failure to the next step without the host."""
    grow: Draw
    """What an arrival stalls."""
    detect_s: float = 0.0


def draw_failures(
    rng: np.random.Generator, rate: float, horizon_s: float, wait_s: float, spare_share: float
) -> list[Failure]:  # fmt: skip
    """`rate` failures a second in `horizon_s` seconds; `wait_s` is the mean wait of those who find no spare."""
    times = np.sort(rng.uniform(0, horizon_s, rng.poisson(rate * horizon_s)))
    waits = np.where(rng.uniform(size=len(times)) < spare_share, 0.0, rng.exponential(wait_s, len(times)))
    return [Failure(float(at), float(wait)) for at, wait in zip(times, waits, strict=True)]


def daly_interval(mtbf_s: float, write_s: float) -> float:
    """Seconds of work between two checkpoints that lose least: Daly, "A higher order estimate of the optimum
    checkpoint interval for restart dumps", 2006, equation 37; Young's sqrt(2 * write * MTBF) is its first term."""
    if write_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = write_s / (2 * mtbf_s)
    return math.sqrt(2 * write_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - write_s


def daly_goodput(mtbf_s: float, interval_s: float, write_s: float, restart_s: float) -> float:
    """Useful share under checkpoints, exact for exponential failures, in restarts too: Daly 2006, equation 13."""
    spent = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + write_s) / mtbf_s)
    return interval_s / spent


def checkpoint_restart(
    failures: Sequence[Failure], horizon_s: float, interval_s: float, write_s: float, restart_s: float,
    detect_s: float = 0.0,
) -> float:  # fmt: skip
    """Goodput of a run that writes a checkpoint after every `interval_s` of work and, at a failure, waits for the
    replacement, starts all again and goes on from the last checkpoint."""
    useful, up, ready = 0.0, 0.0, 0.0  # since when it runs; when the last replacement was there
    for at, wait_s in [*failures, Failure(horizon_s, 0.0)]:
        if at >= up:
            ran = at - up
            whole, rest = divmod(ran, interval_s + write_s)
            useful += whole * interval_s + (min(rest, interval_s) if at == horizon_s else 0.0)
        ready = max(ready, at + detect_s + wait_s)
        up = ready + restart_s
    return useful / horizon_s


def replacing_only(rng: np.random.Generator, failures: Sequence[Failure], horizon_s: float, stalls: Stalls) -> float:
    """Goodput of a run that loses no step but stands until every place is taken again."""
    stalled = []
    for at, wait_s in failures:
        stall = stalls.replace(rng)
        stalled.append((at, at + (max(stalls.detect_s, wait_s) + stall - stalls.detect_s if wait_s else stall)))
    return 1 - _covered(stalled, horizon_s) / horizon_s


def elastic(
    rng: np.random.Generator, failures: Sequence[Failure], horizon_s: float, stalls: Stalls, slow: Sequence[float]
) -> float:  # fmt: skip
    """Goodput of a run that goes on with fewer: `slow[k]` times as long a step without k hosts; more than the list has
    stop it. A spare takes a place at once; who comes later is let in by a stall."""
    stalled: list[tuple[float, float]] = []
    changes: list[tuple[float, int]] = []
    for at, wait_s in failures:
        if not wait_s:
            stalled.append((at, at + stalls.replace(rng)))
            continue
        shrunk = at + stalls.shrink(rng)
        arrives = max(at + wait_s, shrunk)  # who comes during the stall is let in after it
        stalled += [(at, shrunk), (arrives, arrived := arrives + stalls.grow(rng))]
        changes += [(at, 1), (arrived, -1)]
    useful, missing, last = 0.0, 0, 0.0
    points = sorted([*changes, (horizon_s, 0)])
    free = _Free(stalled, horizon_s)
    for at, change in points:
        until = min(at, horizon_s)
        if missing < len(slow):
            useful += (free(until) - free(last)) / slow[missing]
        missing, last = missing + change, until
    return useful / horizon_s


class _Free:
    """Seconds up to a time in which no stall was under way."""

    def __init__(self, stalled: Sequence[tuple[float, float]], horizon_s: float) -> None:
        merged = _merged(stalled, horizon_s)
        self.starts = np.array([a for a, _ in merged])
        self.ends = np.array([b for _, b in merged])
        self.before = np.concatenate([[0.0], np.cumsum(self.ends - self.starts)])

    def __call__(self, at: float) -> float:
        begun = int(np.searchsorted(self.starts, at, "right"))
        over = max(0.0, float(self.ends[begun - 1]) - at) if begun else 0.0
        return at - float(self.before[begun]) + over


def _merged(intervals: Sequence[tuple[float, float]], horizon_s: float) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for a, b in sorted((a, min(b, horizon_s)) for a, b in intervals if a < horizon_s):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def _covered(intervals: Sequence[tuple[float, float]], horizon_s: float) -> float:
    return sum(b - a for a, b in _merged(intervals, horizon_s))
