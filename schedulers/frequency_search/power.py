"""What a clock costs and gives: the watts of a worker, and its seconds, as functions of the clock.

The model is the usual one of dynamic voltage and frequency scaling (DVFS). A CMOS circuit that switches draws C V^2 f,
and the voltage V must rise about as the frequency f does, so dynamic power grows with f^3; leakage and the rest of the
board is static (Mudge, Power: A First-Class Architectural Design Constraint, IEEE Computer 34(4), 2001). Only the part
of an op that waits for the cores shrinks with the clock, not the one that waits for memory: the beta model of Hsu and
Feng (A Power-Aware Run-Time System for High-Performance Computing, SC 2005). Clocks are multiples of the nominal one,
at which costs were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from pipeline.schedule.costs import Costs, Network
from pipeline.schedule.ops import Schedule

Vector = NDArray[np.float64]


class ClockError(ValueError):
    """Clocks that cannot be planned or set: names what was asked, what was found and what is allowed."""


@dataclass(frozen=True)
class Power:
    """One worker. It draws `static + dynamic * f ** exponent` watts at clock f while it computes, `static` while it
    waits; an op of t seconds at the nominal clock takes `t * (bound / f + 1 - bound)`. Raises ClockError."""

    static: float
    """Watts that are drawn whatever it does."""
    dynamic: float
    """Watts that computing adds at the nominal clock."""
    least: float = 0.5
    """The lowest clock, as a multiple of the nominal one."""
    most: float = 1.25
    """The highest clock."""
    bound: float = 1.0
    """The share of an op's time that scales with the clock: 1 where only cores count, 0 where only memory does."""
    exponent: float = 3.0
    """3 where the voltage follows the clock, 1 where it stays."""
    steps: tuple[float, ...] = ()
    """The clocks that it can have, ascending, if not any from `least` to `most`, which then mean nothing."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("static", 0.0, 1e9), ("dynamic", 0.0, 1e9), ("least", 0.01, 100.0), ("most", 0.01, 100.0),
            ("bound", 0.0, 1.0), ("exponent", 1.0, 10.0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ClockError(f"{name} is {value!r}; allowed: {low:g} to {high:g}")
        if self.steps:
            if list(self.steps) != sorted(set(self.steps)) or not (self.steps[0] >= 0.01 and self.steps[-1] <= 100):
                raise ClockError(f"steps are {self.steps}; allowed: ascending, from 0.01 to 100")
        elif self.least > self.most:
            raise ClockError(f"least is {self.least:g}, above most, {self.most:g}; allowed: up to {self.most:g}")

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest clock."""
        return (self.steps[0], self.steps[-1]) if self.steps else (self.least, self.most)

    def watts(self, clock: float) -> float:
        """While it computes."""
        return self.static + self.dynamic * clock**self.exponent

    def stretch(self, clock: float) -> float:
        """Seconds of an op as a multiple of those at the nominal clock."""
        return self.bound / clock + 1 - self.bound

    def allowed(self, clock: float) -> bool:
        """Whether it can have this clock."""
        low, high = self.range
        return clock in self.steps if self.steps else low <= clock <= high

    def below(self, clock: float) -> float:
        """The highest clock that it can have and that is not above this one; the lowest, if all are."""
        low, high = self.range
        return max((s for s in self.steps if s <= clock), default=low) if self.steps else min(high, max(low, clock))


@dataclass(frozen=True)
class ClockProblem:
    """A step, and what each of its workers may draw; `cap` watts for all of them computing at once.

    Raises ClockError for a worker without a Power, a Power without a worker, workers of which only some have steps, and
    a cap that the lowest clocks exceed.
    """

    schedule: Schedule
    costs: Costs
    powers: Mapping[int, Power]
    cap: float
    network: Network | None = None
    workers: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        workers = tuple(sorted(self.schedule.lanes))
        object.__setattr__(self, "workers", workers)
        if missing := [w for w in workers if w not in self.powers]:
            raise ClockError(f"powers have no worker {missing[0]}; allowed: one for each of {_listed(workers)}")
        if unknown := [w for w in self.powers if w not in self.schedule.lanes]:
            raise ClockError(f"powers have worker {unknown[0]}, which has no lane; allowed: {_listed(workers)}")
        stepped = [w for w in workers if self.powers[w].steps]
        if 0 < len(stepped) < len(workers):
            raise ClockError(f"only workers {_listed(stepped)} have steps; allowed: steps for all workers, or for none")
        least = sum(self.powers[w].watts(self.powers[w].range[0]) for w in workers)
        if not least <= self.cap * (1 + 1e-12):
            raise ClockError(
                f"the cap is {self.cap:g} W; {len(workers)} workers at their lowest clocks may draw {least:g} W; "
                "allowed: that or more"
            )

    @property
    def discrete(self) -> bool:
        """Whether the workers have steps."""
        return bool(self.workers) and bool(self.powers[self.workers[0]].steps)

    def of(self, name: str) -> Vector:
        """A field of every worker's Power, in the order of `workers`."""
        assert name in {f.name for f in fields(Power)}
        return np.array([getattr(self.powers[w], name) for w in self.workers], dtype=float)

    def peak_watts(self, clocks: Mapping[int, float]) -> float:
        """Watts if all workers computed at once."""
        return math.fsum(self.powers[w].watts(clocks[w]) for w in self.workers)


def _listed(workers: tuple[int, ...] | list[int]) -> str:
    return f"{workers[0]} to {workers[-1]}" if len(workers) > 4 else ", ".join(map(str, workers))
