"""Eyes on a worker in the middle of a step: a probe at named points of it, and a pulse that says that it comes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

READING = "reference"
"""The point at which what an unlearning request reads of the model before is being computed."""


class Probe(Protocol):
    """Called at named points of a step (forward, backward, reduce, commit, optimizer, ...): to inject faults."""

    slowdown: float
    """How many times as long every compute op is to take."""

    def __call__(self, point: str, step: int, /) -> None: ...


class Unprobed:
    """Nothing happens."""

    slowdown = 1.0

    def __call__(self, point: str, step: int, /) -> None:
        return None


@dataclass
class Reading:
    """The probe of a step while something is read of a model, which is no step: one point, amid the forward work."""

    probe: Probe
    slowdown: float

    def __call__(self, point: str, step: int, /) -> None:
        if point == "forward":
            self.probe(READING, step)


@dataclass
class Pulse:
    """Counts what comes on in long work (a layer written, read or received), for who watches that it does come on."""

    count: int = 0

    def __call__(self) -> None:
        self.count += 1
